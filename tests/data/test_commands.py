"""``lab data …`` from outside: output, exit codes, one sentence on standard error."""

from __future__ import annotations

import json
import sys

import pytest
from data_sets import chat, write_jsonl

from lab_utils import cli
from lab_utils.data.documents import Encoding
from lab_utils.data.manifest import load_manifest
from lab_utils.data.pairs import load_pairs
from lab_utils.data.tokenizer import load_tokenizer
from lab_utils.errors import DataError


@pytest.fixture
def lab(monkeypatch, capsys, tmp_path):
    """``lab("list", "--json")`` as the console script runs it: exit code, standard output, standard error."""
    monkeypatch.setenv("ASCENT_MANIFESTS", str(tmp_path))

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lab", "data", *words])
        monkeypatch.setattr(cli, "app", cli.typer.Typer(pretty_exceptions_enable=False))
        monkeypatch.setattr(cli, "VERBS", {"data": cli.VERBS["data"]})
        with pytest.raises(SystemExit) as end:
            cli.main()
            raise SystemExit(0)
        out = capsys.readouterr()
        return int(end.value.code or 0), out.out, out.err

    return run


TOOL = {"type": "function", "function": {"name": "add", "description": "Add", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
ROWS = [
    chat("1+1?", "2"),
    {
        "messages": [
            {"role": "user", "content": "Add."},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
        ],
        "tools": [TOOL],
    },
]


def test_list_names_every_set(lab):
    code, out, _ = lab("list", "--json")
    sets = {row["name"]: row for row in json.loads(out)}
    assert code == 0 and sets["gsm8k"]["ready"] is False and sets["ascent-tasks-sft"]["splits"]["test"] > 0
    assert "gsm8k" in lab("list")[1]


def test_verify_says_ok_and_lists_problems(lab, make_set):
    path = make_set(ROWS)
    code, out, _ = lab("verify", "trial", "--json")
    assert code == 0 and json.loads(out)["ok"] is True and json.loads(out)["problems"] == []
    write_jsonl(path.parent / "train.jsonl", [*ROWS, "{"])
    code, out, err = lab("verify", "trial", "--json")
    (problem,) = json.loads(out)["problems"]
    assert code == 3 and json.loads(out)["ok"] is False and problem["manifest"] == "trial"
    assert (
        err.startswith("error: ")
        and err.count("\n") == 1
        and "Traceback" not in err
        and problem["message"] in err
    )


def test_verify_of_an_unpinned_set_fails_with_advice(lab):
    code, out, err = lab("verify", "gsm8k", "--json")
    assert code == 3 and not json.loads(out)["ok"] and "lab data pin gsm8k" in err


def test_preview_marks_what_bears_loss(lab, make_set):
    make_set(ROWS)
    code, out, _ = lab("preview", "trial", "--json")
    first, second = json.loads(out)
    assert code == 0 and first["place"] == "train.jsonl line 1" and first["tokens"] > 5
    assert "".join(s["text"] for s in first["messages"] if s["supervised"]) == "2<｜end▁of▁sentence｜>"
    assert any("tool_calls" in s["text"] and s["supervised"] for s in second["messages"])
    assert "1+1?" in lab("preview", "trial", "-n", "1")[1]
    assert lab("preview", "trial", "--from", "9")[0] == 3


def test_stats_count_tokens(lab, make_set):
    make_set(ROWS)
    code, out, _ = lab("stats", "trial", "--row-tokens", "1024", "--json")
    found = json.loads(out)["splits"]["train"]
    assert code == 0 and found["documents"] == 2 and found["rows"] == 1 and found["longer_than_row"] == 0
    assert 0 < found["supervised_tokens"] < found["tokens"] and found["length"]["max"] <= found["tokens"]
    assert found["padding_fraction"] == pytest.approx(1 - found["tokens"] / 1024)
    short = json.loads(lab("stats", "trial", "--row-tokens", "16", "--json")[1])["splits"]["train"]
    assert short["longer_than_row"] == 1
    assert "documents" in lab("stats", "trial")[1]


EARLIER = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "earlier"},
    {"role": "user", "content": "r"},
]
PAIRS = [
    {"prompt": EARLIER, "chosen": "a", "rejected": "b, at some length"},
    {"prompt": "q", "chosen": "c", "rejected": "d"},
]


def test_stats_of_preferences_are_of_pairs(lab, make_set):
    """Loss falls on the answers alone, and a row length that the longest pair fits is one that training takes."""
    path = make_set(PAIRS, format="preference")
    stats = lambda *more: json.loads(lab("stats", "trial", "--json", *more)[1])["splits"]["train"]  # noqa: E731
    found = stats()
    assert found["pairs"] == 2 and found["documents"] == 4 and found["rows"] == 1
    answers = found["tokens_of"]["chosen"] + found["tokens_of"]["rejected"]
    assert found["supervised_tokens"] == answers  # each answer with its end token, and nothing of the prompts
    assert found["tokens"] == answers + 2 * found["tokens_of"]["prompt"]
    assert found["tokens_of"]["chosen"] == 4 < found["tokens_of"]["rejected"]
    three = stats("--kto")
    assert three["documents"] == 6 and three["tokens_of"] == found["tokens_of"]
    assert three["tokens"] == found["tokens"] + found["tokens_of"]["prompt"] + found["tokens_of"]["chosen"]
    for kto, longest in ((False, found["length"]["max"]), (True, three["length"]["max"])):
        pairs = load_pairs(load_manifest(path), "train", Encoding(load_tokenizer()), mismatched=kto)
        assert pairs.fitted(longest) is pairs
        with pytest.raises(DataError, match=f"at least {longest}"):
            pairs.fitted(longest - 1)
    short = stats("--row-tokens", str(found["length"]["max"] - 1))
    assert short["longer_than_row"] == 1 and short["rows"] == 1
    _, shown, _ = lab("stats", "trial")
    assert "rejected" in shown and f"data.row_tokens of {found['length']['max']} or more" in shown
    make_set(ROWS)
    code, _, err = lab("stats", "trial", "--kto")
    assert code == 3 and "needs preference" in err


def test_preview_of_a_pair_marks_the_answer_alone(lab, make_set):
    make_set(PAIRS, format="preference")
    first = json.loads(lab("preview", "trial", "-n", "1", "--json")[1])[0]
    for side, answer in (("chosen", "a"), ("rejected", "b, at some length")):
        marked = "".join(s["text"] for s in first[side] if s["supervised"])
        assert marked == f"{answer}<｜end▁of▁sentence｜>"
        assert any("earlier" in s["text"] for s in first[side])
    longest = json.loads(lab("stats", "trial", "--json")[1])["splits"]["train"]["length"]["max"]
    assert first["tokens"] == longest


def test_add_then_use(lab, tmp_path):
    file = write_jsonl(tmp_path / "mine.jsonl", [{"question": f"{i}?", "answer": str(i)} for i in range(30)])
    code, out, _ = lab("add", str(file), "--validation", "0.2", "--json")
    made = json.loads(out)
    assert code == 0 and made["format"] == "messages" and sum(made["splits"].values()) == 30
    assert lab("verify", "mine")[0] == 0
    code, _, err = lab("add", str(file))
    assert code == 3 and "--replace" in err


def test_pin_without_a_hub_split_is_one_sentence(lab, make_set):
    make_set(ROWS)
    code, _, err = lab("pin", "trial")
    assert code == 3 and "nothing to pin" in err and "Traceback" not in err


def test_croissant_describes_files_and_fields(lab, make_set):
    path = make_set(ROWS)
    tree = json.loads(lab("croissant", "trial")[1])
    (file,) = tree["distribution"]
    assert tree["conformsTo"].endswith("croissant/1.0") and file["sha256"] in path.read_text()
    assert file["contentUrl"] == "train.jsonl" and file["encodingFormat"] == "application/jsonlines"
    (records,) = tree["recordSet"]
    (field,) = records["field"]
    assert (
        field["name"] == "messages"
        and field["repeated"]
        and [f["name"] for f in field["subField"]]
        == [
            "role",
            "content",
        ]
    )
    ids = [x["@id"] for x in (file, records, field, *field["subField"])]
    assert len(set(ids)) == len(ids)


def test_croissant_of_every_shipped_set_refers_to_its_files(lab):
    for row in json.loads(lab("list", "--json")[1]):
        tree = json.loads(lab("croissant", row["name"])[1])
        known = {file["@id"] for file in tree["distribution"]}
        fields = [
            f
            for records in tree["recordSet"]
            for field in records["field"]
            for f in [field, *field.get("subField", [])]
        ]
        used = {f["source"]["fileObject"]["@id"] for f in fields if "source" in f}
        assert used == known, row["name"]
