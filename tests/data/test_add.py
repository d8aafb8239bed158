"""A user's own file: recognised, checked to the last row, never changed."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_sets import chat, write_jsonl

from lab_utils.data.add import add
from lab_utils.data.manifest import load_manifest
from lab_utils.errors import DataError

ASKS = [{"role": "user", "content": "q"}]
CHAT = {"messages": [*ASKS, {"role": "assistant", "content": "a"}]}


@pytest.mark.parametrize(
    "row, format, first",
    [
        (CHAT, "messages", CHAT["messages"]),
        ({"messages": ASKS}, "prompt", ASKS),
        ({"prompt": "q", "completion": "a"}, "messages", CHAT["messages"]),
        ({"question": "q", "answer": "a"}, "messages", CHAT["messages"]),
        ({"instruction": "q", "input": "", "output": "a"}, "messages", CHAT["messages"]),
        (
            {"system": "s", "instruction": "q", "output": "a"},
            "messages",
            [{"role": "system", "content": "s"}, *CHAT["messages"]],
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            "messages",
            CHAT["messages"],
        ),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference", None),
        ({"chosen": CHAT["messages"], "rejected": chat("q", "b")["messages"]}, "preference", None),
        ({"prompt": "q"}, "prompt", ASKS),
        ({"prompt": ASKS}, "prompt", ASKS),
        ({"text": "words"}, "text", None),
    ],
)
def test_layouts_are_recognised(tmp_path, row, format, first):
    file = write_jsonl(tmp_path / "My Data.jsonl", [row, row])
    before = file.read_bytes(), file.stat().st_mtime_ns
    made = add(file, folder=tmp_path)
    manifest = load_manifest(tmp_path / "my-data.yaml")
    assert (manifest.name, manifest.format, manifest.columns) == ("my-data", format, made.columns)
    assert manifest.verify() == []
    rows = list(manifest.rows("train"))
    assert len(rows) == 2 and (first is None or rows[0]["messages"] == first)
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before


def test_parquet_and_gzip_are_taken_too(tmp_path):
    pq.write_table(pa.Table.from_pylist([{"question": "q", "answer": "a"}] * 3), tmp_path / "a.parquet")
    write_jsonl(tmp_path / "b.jsonl.gz", [CHAT] * 4)
    assert add(tmp_path / "a.parquet", folder=tmp_path).row_count("train") == 3
    assert add(tmp_path / "b.jsonl.gz", folder=tmp_path).row_count("train") == 4
    assert len(list(load_manifest(tmp_path / "a.yaml").rows("train"))) == 3


def test_a_manifest_elsewhere_finds_the_file(tmp_path):
    file = write_jsonl(tmp_path / "data.jsonl", [CHAT])
    add(file, folder=tmp_path / "manifests", name="x")
    assert list(load_manifest(tmp_path / "manifests/x.yaml").rows("train")) == [CHAT]


def test_bad_rows_are_listed_by_line_and_nothing_is_written(tmp_path):
    rows: list = [CHAT] * 60
    rows[4] = "{broken"
    for i in range(10, 40):
        rows[i] = {"messages": [{"role": "user", "content": i}]}
    file = write_jsonl(tmp_path / "data.jsonl", rows)
    with pytest.raises(DataError, match="31 of 60 rows are bad, so nothing was written") as error:
        add(file, folder=tmp_path)
    lines = str(error.value).splitlines()
    assert lines[1].startswith("  line 5: not valid JSON") and lines[2].startswith(
        "  line 11: messages, message 1"
    )
    assert len(lines) == 22 and lines[-1].strip() == "… and 11 more"
    assert not (tmp_path / "data.yaml").exists()


@pytest.mark.parametrize(
    "rows, more, says",
    [
        ([], {}, "the file has no rows"),
        ([{"a": 1, "b": 2}], {}, "columns a, b are no known layout of messages, preference, prompt or text"),
        ([{"text": "x"}], {"format": "messages"}, "columns text are no known layout of messages"),
        ([CHAT], {"format": "mesages"}, "did you mean 'messages'"),
        ([CHAT], {"validation": 1.5}, "expected a share from 0"),
    ],
)
def test_what_cannot_be_added_says_why(tmp_path, rows, more, says):
    file = write_jsonl(tmp_path / "data.jsonl", rows)
    with pytest.raises(DataError) as error:
        add(file, folder=tmp_path, **more)
    assert says in str(error.value) and not (tmp_path / "data.yaml").exists()


def test_other_files_are_refused(tmp_path):
    (tmp_path / "data.csv").write_text("a,b\n")
    with pytest.raises(DataError, match="unknown kind of file"):
        add(tmp_path / "data.csv", folder=tmp_path)
    with pytest.raises(DataError, match="there is no such file"):
        add(tmp_path / "data.jsonl", folder=tmp_path)


def test_a_name_is_not_taken_twice_by_accident(tmp_path):
    file = write_jsonl(tmp_path / "data.jsonl", [CHAT])
    add(file, folder=tmp_path)
    write_jsonl(file, [CHAT, CHAT])
    with pytest.raises(DataError, match="--replace"):
        add(file, folder=tmp_path)
    assert add(file, folder=tmp_path, replace=True).row_count("train") == 2


def test_a_held_out_share_is_a_partition_that_keeps_equal_rows_together(tmp_path):
    rows = [chat(f"question {i % 150}", "a") for i in range(300)]
    file = write_jsonl(tmp_path / "data.jsonl", rows)
    add(file, folder=tmp_path, validation=0.2, seed=3)
    manifest = load_manifest(tmp_path / "data.yaml")
    assert manifest.verify() == []
    parts = {s: [json.dumps(r, sort_keys=True) for r in manifest.rows(s)] for s in ("train", "validation")}
    assert sorted(parts["train"] + parts["validation"]) == sorted(json.dumps(r, sort_keys=True) for r in rows)
    assert not set(parts["train"]) & set(parts["validation"])
    assert 30 <= len(parts["validation"]) <= 90 and manifest.row_count("validation") == len(
        parts["validation"]
    )
