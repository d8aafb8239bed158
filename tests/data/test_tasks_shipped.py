"""The sets that the project ships: files as pinned, splits disjoint, every gold answer accepted."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import yaml

from lab_utils.data import generated
from lab_utils.data.manifest import load_manifest
from lab_utils.data.tasks import families, tools, verify_row
from lab_utils.data.tasks._base import normalise
from lab_utils.data.tasks._ship import CARDS

FOLDER = Path(__file__).parents[2] / "data_manifests"
CHATS = [name for name in CARDS if CARDS[name]["format"] != "text"]


def manifest(name: str) -> dict:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", list(CARDS))
def test_manifests_load_and_their_rows_pass_the_check(name, tmp_path, monkeypatch):
    monkeypatch.setenv("ASCENT_CACHE", str(tmp_path))
    loaded = load_manifest(name)
    assert loaded.format == CARDS[name]["format"] and set(loaded.splits) == set(CARDS[name]["splits"])
    for split in loaded.splits:
        if (name, split) == ("ascent-tasks-text", "train"):
            continue  # takes seconds
        ours = list(loaded.rows(split))
        assert len(ours) == loaded.row_count(split)
        if loaded.format != "text":
            assert all(row["verify"]["family"] == row["family"] for row in ours)


@cache
def rows(name: str, split: str) -> list[dict]:
    """Rows of a split: of its file, or of its generator where it isn't stored."""
    part = manifest(name)["splits"][split]
    if part["kind"] == "file":
        file = FOLDER / part["files"][0]["path"]
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return list(generated.rows(part["generator"], part["arguments"], part["seed"]))


def prompt(row: dict) -> list[dict]:
    """The messages before the answer."""
    if "prompt" in row:
        return row["prompt"]
    return row["messages"][:-1] if row["messages"][-1]["role"] == "assistant" else row["messages"]


def completion(message: dict) -> str:
    calls = [call["function"] for call in message.get("tool_calls", ())]
    return message["content"] + "".join(
        tools.render_call(f["name"], json.loads(f["arguments"])) for f in calls
    )


@pytest.mark.parametrize("name", list(CARDS))
def test_pins_fit_what_is_shipped_or_generated(name):
    for split, part in manifest(name)["splits"].items():
        pinned = part["files"][0] if part["kind"] == "file" else part
        if name == "ascent-tasks-text" and split == "train":
            continue  # takes seconds, and is verified against its pins whenever it is loaded
        data = b"".join(generated.line(row) for row in rows(name, split))
        found = {
            "sha256": hashlib.sha256(data).hexdigest(),
            "bytes": len(data),
            "rows": len(rows(name, split)),
        }
        assert found == {key: pinned[key] for key in found}, (name, split)
        if part["kind"] == "file":
            assert (FOLDER / pinned["path"]).read_bytes() == data


@pytest.mark.parametrize("name", list(CARDS))
def test_shipped_files_are_what_the_generator_gives(name):
    card = CARDS[name]
    for split, (count, seed) in card["splits"].items():
        if split != "train":
            balanced = {} if card["format"] == "text" else {"balanced": True}
            made = generated.rows(card["generator"], {"split": split, "rows": count, **balanced}, seed)
            assert list(made) == rows(name, split)


def test_no_question_is_in_two_splits_of_any_set():
    """Over every user message of every set, training splits included."""
    asked: dict[str, set[str]] = {"train": set(), "validation": set(), "test": set()}
    for name in CHATS:
        for split in asked:
            for row in rows(name, split):
                asked[split] |= {normalise(m["content"]) for m in prompt(row) if m["role"] == "user"}
    assert len(asked["train"]) > 20000
    assert not asked["train"] & asked["validation"]
    assert not asked["train"] & asked["test"]
    assert not asked["validation"] & asked["test"]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_evaluation_splits_are_balanced_and_ask_nothing_twice(split):
    part = rows("ascent-tasks-sft", split)
    by_family = Counter(row["family"] for row in part)
    assert set(by_family) == set(families()) and max(by_family.values()) - min(by_family.values()) <= 1
    questions = [[m["content"] for m in prompt(row) if m["role"] == "user"][-1] for row in part]
    assert len({normalise(q) for q in questions}) == len(part)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_gold_passes_and_rejected_fails_in_every_row(split):
    for row in rows("ascent-tasks-sft", split):
        assert verify_row(row, completion(row["messages"][-1])), row
    for row in rows("ascent-tasks-preference", split):
        asked = {**row, "messages": row["prompt"]}
        assert verify_row(asked, completion(row["chosen"][0])), row
        assert not verify_row(asked, completion(row["rejected"][0])), row


def test_prompts_end_with_the_question():
    for split in ("train", "validation", "test"):
        for row in rows("ascent-tasks-prompts", split):
            assert (
                row["messages"][-1]["role"] in ("user", "tool") and row["verify"]["family"] == row["family"]
            )


def test_some_chats_have_turns_systems_tools_and_reasoning():
    part = rows("ascent-tasks-sft", "train")
    count = len(part)
    assert sum(sum(m["role"] == "user" for m in row["messages"]) > 1 for row in part) > 0.05 * count
    assert sum(row["messages"][0]["role"] == "system" for row in part) > 0.08 * count
    assert sum("tools" in row for row in part) > 0.05 * count
    assert sum("reasoning_content" in row["messages"][-1] for row in part) > 50


def test_everything_that_is_stored_stays_small():
    stored = [path for name in CARDS for path in (FOLDER / name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in stored) < 2 * 2**20
