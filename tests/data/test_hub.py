"""Public sets: refused until pinned, read by the real datasets code, with the columns that they have.

The hub itself is a stand-in: a folder of small files of the same columns, in place of its API and downloads.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_sets import write_manifest

from lab_utils.data import hub
from lab_utils.data.manifest import SHIPPED, load_manifest
from lab_utils.errors import DataError

COMMIT = "a" * 40
ASKS = {"role": "user", "content": "Hi?"}
# Rows as the sets have them, by repository.
ROWS = {
    "allenai/tulu-3-sft-mixture": [
        {"id": "1", "messages": [ASKS, {"role": "assistant", "content": "Hello."}], "source": "trial"}
    ]
    * 3,
    "HuggingFaceH4/ultrafeedback_binarized": [
        {
            "prompt": "Hi?",
            "prompt_id": "1",
            "chosen": [{"content": "Hi?", "role": "user"}, {"content": "Hello.", "role": "assistant"}],
            "rejected": [{"content": "Hi?", "role": "user"}, {"content": "Go.", "role": "assistant"}],
            "messages": [{"content": "Hi?", "role": "user"}, {"content": "Hello.", "role": "assistant"}],
            "score_chosen": 9.0,
            "score_rejected": 2.0,
        }
    ]
    * 2,
    "openai/gsm8k": [{"question": "1 + 1?", "answer": "<<1+1=2>>2\n#### 2"}] * 4,
    "DigitalLearningGmbH/MATH-lighteval": [
        {"problem": "$1+1$?", "level": "Level 1", "solution": "\\boxed{2}", "type": "Algebra"}
    ],
    "Salesforce/xlam-function-calling-60k": [
        {
            "id": 0,
            "query": "Weather in Oslo?",
            "tools": json.dumps(
                [
                    {
                        "name": "weather",
                        "description": "The weather",
                        "parameters": {
                            "city": {"description": "Where", "type": "str"},
                            "days": {"description": "How long", "type": "int, optional", "default": "1"},
                        },
                    }
                ]
            ),
            "answers": json.dumps([{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}]),
        }
    ]
    * 2,
}
PUBLIC = {
    load_manifest(path).splits["train"].id: path
    for path in SHIPPED.glob("*.yaml")
    if "hub" in path.read_text()
}


def file_of(repository: str) -> str:
    return "xlam_function_calling_60k.json" if "xlam" in repository else "data/train-00000-of-00001.parquet"


@pytest.fixture
def hub_stand_in(tmp_path, monkeypatch):
    """A folder in place of the hub; ``large`` says whether it states hashes itself, as for files in LFS."""
    root = tmp_path / "hub"
    for repository, rows in ROWS.items():
        path = root / repository / file_of(repository)
        path.parent.mkdir(parents=True)
        if path.suffix == ".json":
            path.write_text(json.dumps(rows))
        else:
            pq.write_table(pa.Table.from_pylist(rows), path)
    state = SimpleNamespace(root=root, large=True, downloads=[])

    class Api:
        def dataset_info(self, repository):
            return SimpleNamespace(sha=COMMIT)

        def get_paths_info(self, repository, paths, *, repo_type, revision):
            assert (repo_type, revision) == ("dataset", COMMIT)
            data = {path: (root / repository / path).read_bytes() for path in paths}
            return [
                SimpleNamespace(
                    path=path,
                    size=len(content),
                    lfs=SimpleNamespace(sha256=hashlib.sha256(content).hexdigest()) if state.large else None,
                )
                for path, content in data.items()
            ]

    def download(repository, path, *, repo_type, revision):
        assert (repo_type, revision) == ("dataset", COMMIT)
        state.downloads.append(path)
        return str(root / repository / path)

    def builder(repository, name=None, revision=None):
        url = f"hf://datasets/{repository}@{revision}/{file_of(repository)}"
        splits = ("train", "test", "train_prefs", "test_prefs")
        return SimpleNamespace(config=SimpleNamespace(data_files={split: [url] for split in splits}))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    return state


@pytest.mark.parametrize("repository", sorted(ROWS))
def test_a_pinned_public_set_is_read_in_our_columns(hub_stand_in, repository, tmp_path):
    pinned = hub.pin(load_manifest(PUBLIC[repository]))
    manifest = load_manifest(pinned.save(tmp_path / "set.yaml"))  # through its YAML
    source = manifest.splits["train"]
    assert source.revision == COMMIT and source.pinned and manifest.verify() == []
    rows = list(manifest.rows("train"))
    assert len(rows) == len(ROWS[repository])
    if manifest.format == "preference":
        assert rows[0]["prompt"] == [ASKS] and rows[0]["chosen"] == [
            {"role": "assistant", "content": "Hello."}
        ]
    else:
        assert [m["role"] for m in rows[0]["messages"]] == ["user", "assistant"]


def test_the_columns_of_the_rows_survive(hub_stand_in):
    rows = list(hub.pin(load_manifest("gsm8k")).rows("test"))
    assert rows[0]["messages"][1]["content"].endswith("#### 2")


def test_tools_of_the_tool_set_become_schemas_and_calls(hub_stand_in):
    (row, _) = hub.pin(load_manifest("xlam-function-calling")).rows("train")
    (tool,) = row["tools"]
    assert tool["function"]["parameters"]["properties"]["days"]["type"] == "integer"
    assert tool["function"]["parameters"]["required"] == ["city"]
    (call,) = row["messages"][1]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"city": "Oslo", "days": 2}


def test_hashes_that_the_hub_does_not_state_are_computed(hub_stand_in):
    stated = hub.pin(load_manifest("gsm8k"))
    hub_stand_in.large = False
    assert hub.pin(load_manifest("gsm8k")) == stated and hub_stand_in.downloads


def test_a_file_that_is_not_what_was_pinned_stops_before_the_first_row(hub_stand_in):
    pinned = hub.pin(load_manifest("gsm8k"))
    file = hub_stand_in.root / "openai/gsm8k" / file_of("openai/gsm8k")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match="expected sha256"):
        next(iter(pinned.rows("train")))


def test_an_unpinned_set_is_refused_with_the_way_out():
    for use in (lambda m: next(iter(m.rows("train"))), lambda m: m.files("train")):
        with pytest.raises(DataError, match="run `lab data pin gsm8k` on a connected machine"):
            use(load_manifest("gsm8k"))


def test_pinning_without_a_connection_is_one_sentence(monkeypatch):
    class Api:
        def dataset_info(self, repository):
            raise huggingface_hub.errors.OfflineModeIsEnabled("Offline mode is enabled.\nSecond line.")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    with pytest.raises(
        DataError, match=r"gives no answer about openai/gsm8k .*Offline.*connected machine"
    ) as error:
        hub.pin(load_manifest("gsm8k"))
    assert "\n" not in str(error.value)


def test_a_pinned_set_that_is_not_here_says_where_to_get_it(hub_stand_in, monkeypatch):
    pinned = hub.pin(load_manifest("gsm8k"))

    def offline(*args, **more):
        raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(DataError, match=r"not in the hub's cache.*lab data verify gsm8k"):
        pinned.files("train")


def test_a_split_that_the_hub_does_not_have_is_named(hub_stand_in, tmp_path):
    splits = {"train": {"kind": "hub", "id": "openai/gsm8k", "split": "holdout"}}
    manifest = load_manifest(write_manifest(tmp_path, "messages", splits))
    with pytest.raises(DataError, match="no split 'holdout' of files, found train, test"):
        hub.pin(manifest)


def test_a_set_without_hub_splits_cannot_be_pinned():
    with pytest.raises(DataError, match="no split on the hub"):
        hub.pin(load_manifest("ascent-tasks-sft"))


def test_split_files_come_from_the_real_builder(tmp_path):
    """The layouts of a repository (here: split names in folders) are left to the datasets library."""
    for split in ("train", "test"):
        (tmp_path / "data" / split).mkdir(parents=True)
        Path(tmp_path / "data" / split / "part.jsonl").write_text('{"text": "x"}\n')
    source = SimpleNamespace(id=str(tmp_path), config=None, split="test")
    (found,) = hub.split_files(source, None)
    assert found.endswith("data/test/part.jsonl")
