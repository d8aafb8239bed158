"""The tokenizer: round trips, markup apart from content, ids from its own table, transformers' loader."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from lab_utils.data.tasks._words import closed_vocabulary
from lab_utils.data.tokenizer import (
    ASSISTANT,
    BOS,
    DSML,
    END_THINK,
    EOS,
    PAD,
    REQUIRED,
    SHIPPED,
    SPECIAL_TOKENS,
    USER,
    load_tokenizer,
)
from lab_utils.data.tokenizer_training import train
from lab_utils.errors import DataError

TOKENIZER = load_tokenizer()
# Arbitrary text with special-token strings thrown in; lone surrogates have no UTF-8.
TEXT = st.lists(
    st.one_of(st.text(st.characters(exclude_categories=["Cs"])), st.sampled_from(SPECIAL_TOKENS))
).map("".join)


def shuffled(tmp_path, drop: str | None = None):
    """A tokenizer.json like a real checkpoint's: the same strings, other ids, some not flagged special."""
    definition = json.loads((SHIPPED / "tokenizer.json").read_text(encoding="utf-8"))
    order = list(range(len(definition["model"]["vocab"])))
    random.Random(3).shuffle(order)
    definition["model"]["vocab"] = {token: order[i] for token, i in definition["model"]["vocab"].items()}
    for token in definition["added_tokens"]:
        token["id"] = definition["model"]["vocab"][token["content"]]
        token["special"] = token["content"] not in (END_THINK, DSML)
    definition["added_tokens"] = sorted(
        (t for t in definition["added_tokens"] if t["content"] != drop), key=lambda t: t["id"]
    )
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(definition, ensure_ascii=False), encoding="utf-8")
    return file


@given(text=TEXT)
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert TOKENIZER.decode(TOKENIZER.encode(text, special=True)) == text


@given(text=TEXT)
@settings(max_examples=200, deadline=None)
def test_content_never_becomes_markup(text):
    assert not TOKENIZER.special_ids & set(TOKENIZER.encode(text))


@given(pieces=st.lists(st.tuples(TEXT, st.booleans()), max_size=6))
@settings(max_examples=100, deadline=None)
def test_pieces_keep_their_text_and_their_owner(pieces):
    ids, owner = TOKENIZER.encode_segments(pieces)
    assert TOKENIZER.decode(ids) == "".join(text for text, _ in pieces)
    assert len(ids) == len(owner) and owner == sorted(owner)
    markup = {i for i, (_, is_markup) in enumerate(pieces) if is_markup}
    assert all(o in markup for i, o in zip(ids, owner, strict=True) if i in TOKENIZER.special_ids)


def test_pieces_without_injected_markup_equal_the_whole_string():
    pieces = [(BOS, True), ("Be brief.", False), (USER, True), ("2+3?", False), (ASSISTANT + END_THINK, True)]
    pieces += [("\n\n<｜DSML｜x>", True), ("Oslo", False), ("</", True), ("5", False), (EOS, True)]
    whole = "".join(text for text, _ in pieces)
    ids, owner = TOKENIZER.encode_segments(pieces)
    assert (
        ids
        == TOKENIZER.encode(whole, special=True)
        == TOKENIZER.backend.encode(whole, add_special_tokens=False).ids
    )
    assert owner[0] == 0 and owner[-1] == len(pieces) - 1


def test_special_ids_come_first_and_in_order():
    assert (TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.pad_id) == (0, 1, 2)
    assert [TOKENIZER.special_id(t) for t in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    assert TOKENIZER.vocab_size == 2048
    for token in SPECIAL_TOKENS:
        assert TOKENIZER.encode(token, special=True) == [TOKENIZER.special_id(token)]


def test_digits_stand_alone_and_words_are_whole():
    assert len(TOKENIZER.encode("1234567890")) == 10
    for word in closed_vocabulary():
        assert len(TOKENIZER.encode(word)) == len(TOKENIZER.encode(" " + word)) == 1, word


def test_skipping_special_tokens_when_decoding():
    ids = TOKENIZER.encode(f"{USER}hi{EOS}", special=True)
    assert TOKENIZER.decode(ids, skip_special=True) == "hi"
    assert TOKENIZER.decode(ids) == f"{USER}hi{EOS}"


def test_transformers_loads_a_saved_folder(tmp_path):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(TOKENIZER.save(tmp_path / "saved"))
    text = f"{BOS}Be brief.{USER}47 + 38? größer{ASSISTANT}{END_THINK}85{EOS}"
    assert theirs(text, add_special_tokens=True)["input_ids"] == TOKENIZER.encode(text, special=True)
    assert theirs.decode(TOKENIZER.encode(text, special=True)) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
    assert load_tokenizer(tmp_path / "saved").encode(text) == TOKENIZER.encode(text)
    assert (tmp_path / "saved" / "tokenizer.json").read_bytes() == (SHIPPED / "tokenizer.json").read_bytes()


def test_a_foreign_tokenizer_with_other_ids_drops_in(tmp_path):
    foreign = load_tokenizer(shuffled(tmp_path))
    assert foreign.bos_id != 0 and foreign.vocab_size == TOKENIZER.vocab_size
    text = f"{BOS}{USER}Sort 9, 4, 7.{ASSISTANT}{END_THINK}"
    ids = foreign.encode(text, special=True)
    assert ids != TOKENIZER.encode(text, special=True) and foreign.decode(ids) == text
    assert ids[0] == foreign.bos_id and foreign.special_id(END_THINK) == ids[-1]
    for token in REQUIRED:  # flagged special or not, content is content
        assert not foreign.special_ids & set(foreign.encode(f"a {token} b"))
    assert load_tokenizer(foreign.save(tmp_path / "again")).encode(text, special=True) == ids


@pytest.mark.parametrize("token", REQUIRED)
def test_a_missing_special_token_is_named(tmp_path, token):
    with pytest.raises(DataError) as error:
        load_tokenizer(shuffled(tmp_path, drop=token))
    assert token in str(error.value) and str(error.value).count("\n") == 0


def test_a_tokenizer_without_a_pad_token_pads_with_eos(tmp_path):
    tokenizer = load_tokenizer(shuffled(tmp_path, drop=PAD))
    assert tokenizer.pad_id == tokenizer.eos_id
    with pytest.raises(DataError, match="pad"):
        tokenizer.special_id(PAD)


def test_files_that_are_no_tokenizer_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such tokenizer"):
        load_tokenizer(tmp_path)
    for text in ("{", "[]", '{"model": 1}'):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(DataError, match=r"tokenizer\.json"):
            load_tokenizer(tmp_path)


def test_training_twice_gives_the_same_tokenizer():
    texts = [f"the cat has {n} apples and the dog has {n + 1}" for n in range(300)]
    first, second = train(texts, 400), train(texts, 400)
    assert first.backend.to_str() == second.backend.to_str()
    assert isinstance(first.backend, Tokenizer) and first.eos_id == 1 and len(first.encode("42")) == 2


def test_the_record_of_the_shipped_tokenizer_fits_its_file():
    import hashlib

    record = json.loads((SHIPPED / "training.json").read_text(encoding="utf-8"))
    assert record["tokenizer_sha256"] == hashlib.sha256((SHIPPED / "tokenizer.json").read_bytes()).hexdigest()
    assert record["vocab_size"] == TOKENIZER.vocab_size
