"""Manifests: what is verified, and what each fault says."""

from __future__ import annotations

import errno
import gzip
import json
import os
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from data_sets import chat, entry, write_jsonl, write_manifest

from lab_utils.data import documents, generated, sources
from lab_utils.data.columns import to_ours
from lab_utils.data.documents import Encoding, load_documents
from lab_utils.data.manifest import SHIPPED, Manifest, list_manifests, load_manifest
from lab_utils.data.row_check import check_row
from lab_utils.data.tokenizer import load_tokenizer
from lab_utils.errors import DataError

GOOD = [chat(f"{i}?", f"{i}!") for i in range(5)]


def problem(path: Path) -> str:
    """The one problem that verification finds; reading stops with the same sentence."""
    manifest = load_manifest(path)
    (found,) = manifest.verify()
    with pytest.raises(DataError) as error:
        list(manifest.rows("train"))
    assert str(error.value) == found.message and found.split == "train"
    return found.message


@pytest.mark.parametrize("file", ["train.jsonl", "train.jsonl.gz"])
def test_a_good_set_is_read_as_it_was_written(make_set, file):
    manifest = load_manifest(make_set(GOOD, file=file))
    assert manifest.verify() == [] and list(manifest.rows("train")) == GOOD
    assert [place for place, _ in manifest.located_rows("train")][2] == f"{file} line 3"


def test_parquet_is_read_like_jsonl(tmp_path):
    pq.write_table(
        pa.Table.from_pylist([{**row, "id": i} for i, row in enumerate(GOOD)]), tmp_path / "t.parquet"
    )
    splits = {"train": {"kind": "file", "files": [entry(tmp_path / "t.parquet", 5)]}}
    manifest = load_manifest(write_manifest(tmp_path, "messages", splits))
    assert [row["messages"] for row in manifest.rows("train")] == [row["messages"] for row in GOOD]


def test_a_wrong_checksum_names_file_expected_and_found(make_set):
    path = make_set(GOOD)
    file = path.parent / "train.jsonl"
    file.write_bytes(file.read_bytes().replace(b"4!", b"5!"))
    text = problem(path)
    assert "train.jsonl: expected sha256" in text and "found" in text and "restore the file" in text


def test_a_file_changed_after_it_was_verified_is_noticed(make_set):
    """Memory of an earlier check doesn't hide a change, even with the old size and modification time."""
    path = make_set(GOOD)
    file = path.parent / "train.jsonl"
    old = time.time() - 100
    os.utime(file, (old, old))
    time.sleep(2.1)  # only a file that has been still for a while is remembered
    manifest = load_manifest(path)
    list(manifest.rows("train"))
    stat = file.stat()
    before = sources.sha256_of
    sources.sha256_of = lambda path: pytest.fail("read again")  # type: ignore[assignment]
    try:
        list(manifest.rows("train"))  # remembered
    finally:
        sources.sha256_of = before
    file.write_bytes(file.read_bytes().replace(b"4!", b"5!"))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(DataError, match="expected sha256"):
        list(manifest.rows("train"))


def test_a_wrong_size_is_told_without_reading(make_set):
    path = make_set(GOOD)
    with (path.parent / "train.jsonl").open("a") as file:
        file.write("\n")
    assert "expected" in (text := problem(path)) and "bytes" in text and "found" in text


def test_a_missing_file_is_named(make_set):
    path = make_set(GOOD)
    (path.parent / "train.jsonl").unlink()
    assert "train.jsonl: the file is missing" in problem(path)


def test_a_wrong_number_of_rows_is_told(make_set):
    path = make_set(GOOD)
    path.write_text(path.read_text().replace("rows: 5", "rows: 6"))
    assert "expected 6 rows, found 5" in problem(path)


@pytest.mark.parametrize(
    "row, says",
    [
        ('{"messages": [', "line 3: not valid JSON"),
        ("[1]", "line 3: expected a JSON object, found list"),
        ({"messages": []}, "line 3: expected a list of messages"),
        ({"text": "x"}, "line 3: expected a list of messages in 'messages', found nothing"),
        (
            {"messages": [{"role": "robot", "content": ""}]},
            "line 3: messages, message 1: unknown role 'robot'",
        ),
        ({"messages": [{"role": "user", "content": 3}]}, "line 3: messages, message 1: expected text"),
        ({"messages": [{"role": "user", "content": "x"}]}, "line 3: no message has the role assistant"),
        (
            {"messages": [{"role": "assistant", "content": "x"}]},
            "line 3: messages, message 1: the assistant speaks",
        ),
        (chat("x", ""), "line 3: messages, message 2: the assistant says nothing"),
        ({**chat("x", "y"), "tools": {"a": 1}}, "line 3: expected 'tools' as a list"),
    ],
)
def test_a_malformed_row_is_named_by_its_line(make_set, row, says):
    assert says in problem(make_set([*GOOD[:2], row, *GOOD[2:]]))


def test_a_bad_tool_call_is_named(make_set):
    row = chat("x", "")
    row["messages"][1]["tool_calls"] = [{"function": {"name": "f", "arguments": "{"}}]
    assert "arguments of f: expected a JSON object" in problem(make_set([row]))


def test_a_line_that_is_not_utf8_is_named(tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", GOOD)
    path.write_bytes(path.read_bytes() + b'{"messages": "\xff"}\n')
    splits = {"train": {"kind": "file", "files": [entry(path, 6)]}}
    assert "line 6: not UTF-8" in problem(write_manifest(tmp_path, "messages", splits))


@pytest.mark.parametrize("cut", [0.5, 0.9])
def test_a_truncated_gzip_is_told(tmp_path, cut):
    """Truncated before the manifest was made, so that its hash fits."""
    data = "".join(json.dumps(chat(os.urandom(40).hex(), "x")) + "\n" for _ in range(200)).encode()
    file = tmp_path / "train.jsonl.gz"
    packed = gzip.compress(data)
    file.write_bytes(packed[: int(len(packed) * cut)])
    splits = {"train": {"kind": "file", "files": [entry(file, 200)]}}
    text = problem(write_manifest(tmp_path, "messages", splits))
    assert "truncated or damaged gzip after line" in text and "copy the file again" in text


def test_a_truncated_parquet_is_told(tmp_path):
    file = tmp_path / "train.parquet"
    pq.write_table(pa.Table.from_pylist(GOOD), file)
    file.write_bytes(file.read_bytes()[:-20])
    splits = {"train": {"kind": "file", "files": [entry(file, 5)]}}
    assert "not a whole Parquet file" in problem(write_manifest(tmp_path, "messages", splits))


@pytest.mark.parametrize(
    "change, says",
    [
        ({"formt": "text"}, "formt: Extra inputs"),
        ({"columns": {"anser": "x"}}, "'anser' is no column of format messages, did you mean 'user'?"),
        ({"splits": {"train": {"kind": "hub", "id": "a/b", "revision": "main"}}}, "revision"),
        ({"splits": {}}, "splits"),
    ],
)
def test_a_manifest_that_breaks_the_schema_names_the_key(make_set, change, says):
    path = make_set(GOOD)
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **change}))
    with pytest.raises(DataError, match="correct the manifest") as error:
        load_manifest(path)
    assert says.split(",")[0] in str(error.value)


def test_unknown_names_are_answered_with_the_nearest(make_set):
    with pytest.raises(DataError, match="did you mean 'gsm8k'"):
        load_manifest("gsm8")
    with pytest.raises(DataError, match="there is no such manifest"):
        load_manifest("nowhere.yaml")
    with pytest.raises(DataError, match="no split 'trian': did you mean 'train'"):
        load_manifest(make_set(GOOD)).source("trian")


def test_a_broken_yaml_names_the_line(tmp_path):
    (tmp_path / "x.yaml").write_text("name: x\nversion: [1\n")
    with pytest.raises(DataError, match="not valid YAML at line"):
        load_manifest(tmp_path / "x.yaml")


def test_a_folder_of_ones_own_comes_first(make_set, monkeypatch):
    path = make_set(GOOD, name="mine")
    monkeypatch.setenv("ASCENT_MANIFESTS", str(path.parent))
    assert load_manifest("mine").path == path.resolve() and "mine" in [m.name for m in list_manifests()]
    assert "gsm8k" in [m.name for m in list_manifests()]


# -- generated sets ------------------------------------------------------------------------------------------


def generated_set(folder: Path, **change) -> Path:
    made = {"generator": "tasks_text", "arguments": {"split": "train", "rows": 20}, "seed": 11}
    pins = generated.write_jsonl(folder / "reference.jsonl", **made)
    return write_manifest(folder, "text", {"train": {"kind": "generated", **made, **pins, **change}})


def test_a_generated_set_is_made_once_verified_and_made_again_when_damaged(tmp_path, monkeypatch):
    manifest = load_manifest(generated_set(tmp_path))
    rows = list(manifest.rows("train"))
    assert len(rows) == 20 and manifest.verify() == []
    ((file, _, _),) = manifest.files("train")
    file.write_bytes(file.read_bytes()[:-5])
    assert list(manifest.rows("train")) == rows
    monkeypatch.setattr(generated, "write_jsonl", lambda *a: pytest.fail("made again"))
    assert list(manifest.rows("train")) == rows


@pytest.mark.parametrize("change", [{"rows": 21}, {"bytes": 3}, {"sha256": "0" * 64}])
def test_a_generator_that_gives_something_else_is_told_and_leaves_nothing(tmp_path, monkeypatch, change):
    monkeypatch.setenv("ASCENT_CACHE", str(tmp_path / "cache"))
    (key,) = change
    text = problem(generated_set(tmp_path, **change))
    assert f"expected {key} {change[key]}" in text and "raise the manifest's version" in text
    assert not [f for f in (tmp_path / "cache" / "generated").iterdir() if f.suffix != ".lock"]


def test_threads_that_ask_at_once_tokenise_once(make_set, monkeypatch):
    manifest = load_manifest(make_set([chat(f"unique {i}", "x") for i in range(50)]))
    encoding, calls, found = Encoding(load_tokenizer()), [], []
    real = documents._encoded
    monkeypatch.setattr(documents, "_encoded", lambda *a: (calls.append(1), time.sleep(0.2), real(*a))[-1])
    threads = [
        threading.Thread(target=lambda: found.append(load_documents(manifest, "train", encoding)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and len({d.key for d in found}) == 1 and [len(d) for d in found] == [50] * 3


def test_a_full_disk_is_one_sentence_and_leaves_nothing_half(make_set, monkeypatch):
    manifest, encoding = load_manifest(make_set([chat("disk", "full")])), Encoding(load_tokenizer())

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(documents.np, "save", full)
        with pytest.raises(DataError, match=r"cannot be written .No space left on device.: free space"):
            load_documents(manifest, "train", encoding)
    assert not list((sources.cache_root() / "tokens").glob("*.making"))
    assert len(load_documents(manifest, "train", encoding)) == 1


def test_a_cache_that_cannot_be_a_folder_is_told(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("ASCENT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError, match="the cache cannot be written"):
        list(load_manifest(generated_set(tmp_path)).rows("train"))


def test_tokens_are_cached_by_data_tokenizer_and_encoding(make_set):
    path = make_set([chat("a", "b"), chat("c", "d")])
    manifest, tokenizer = load_manifest(path), load_tokenizer()
    keys = [
        load_documents(manifest, "train", Encoding(tokenizer, mode, drop)).key
        for mode in ("chat", "thinking")
        for drop in (True, False)
    ]
    assert len(set(keys)) == 4
    assert load_documents(load_manifest(path), "train", Encoding(load_tokenizer())).key == keys[0]


# -- what ships ----------------------------------------------------------------------------------------------


def test_every_shipped_manifest_is_valid_and_hub_sets_await_their_pin():
    manifests = {m.name: m for m in list_manifests()}
    assert all(m.path.stem == name for name, m in manifests.items())
    hub = {"tulu-3-sft-mixture", "ultrafeedback-binarized", "gsm8k", "math", "xlam-function-calling"}
    assert hub <= manifests.keys()
    for name in hub:
        for split, source in manifests[name].splits.items():
            assert source.pinned or split in manifests[name].unpinned()


def test_stored_splits_of_the_shipped_sets_are_whole():
    for manifest in list_manifests():
        for split, source in manifest.splits.items():
            if source.kind == "file":
                assert sum(1 for _ in manifest.rows(split)) == manifest.row_count(split)


def test_the_published_schema_is_the_models():
    schema = Manifest.model_json_schema()
    del schema["properties"]["path"]
    assert json.loads((SHIPPED / "schema.json").read_text()) == schema


# -- columns -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "format, columns, row, expected",
    [
        (
            "messages",
            {"user": "instruction", "input": "input", "assistant": "output"},
            {"instruction": "Add", "input": "1 2", "output": "3", "id": 4},
            {"id": 4, **chat("Add\n\n1 2", "3")},
        ),
        (
            "messages",
            {"conversations": "conversations"},
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            chat("a", "b"),
        ),
        (
            "preference",
            {},
            {"chosen": chat("a", "b")["messages"], "rejected": chat("a", "c")["messages"]},
            {
                "prompt": [{"role": "user", "content": "a"}],
                "chosen": [{"role": "assistant", "content": "b"}],
                "rejected": [{"role": "assistant", "content": "c"}],
            },
        ),
        ("prompt", {"user": "q"}, {"q": "a"}, {"messages": [{"role": "user", "content": "a"}]}),
        ("text", {"text": "body"}, {"body": "a"}, {"text": "a"}),
    ],
)
def test_columns_of_others_become_ours(format, columns, row, expected):
    ours = to_ours(row, format, columns)
    assert ours == expected and check_row(ours, format) is None


def test_a_missing_column_is_named():
    with pytest.raises(DataError, match="column 'answer' is missing, found \\['question'\\]"):
        to_ours({"question": "?"}, "messages", {"user": "question", "assistant": "answer"})
