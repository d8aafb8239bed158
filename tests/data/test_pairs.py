"""Pairs: loss on the answer alone, both documents in one row, every pair once an epoch whatever the ranks."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lab_utils.data.documents import Documents, Encoding
from lab_utils.data.encoding import encode_messages
from lab_utils.data.manifest import load_manifest
from lab_utils.data.pairs import (
    CHOSEN,
    MISMATCHED,
    REJECTED,
    PairLoader,
    Pairs,
    answer_document,
    build_pair_loader,
    load_pairs,
)
from lab_utils.data.rows import PackedRows
from lab_utils.data.tokenizer import load_tokenizer
from lab_utils.errors import DataError, LayoutError
from lab_utils.recipe import DataSection, DataSource, Recipe, ScheduleSection

T = 24


def store(lengths: list[int], size: int, start: int = 0) -> Pairs:
    """Pairs whose tokens are ``100 × (number of the document + start) + position``, every other one with loss."""
    tokens = [100 * (start + d) + t for d, n in enumerate(lengths) for t in range(n)]
    supervised = np.array([t % 2 == 1 for t in tokens], np.bool_)
    offsets = np.cumsum([0, *lengths])
    name = f"set{start}"
    return Pairs(Documents(np.array(tokens, np.int32), supervised, offsets, name, name), size)


def loader(sources, rows_per_step=4, rank=0, world=1, seed=0, **more) -> PairLoader:
    more = {"row_tokens": T, "pad_id": 7, **more}
    return PairLoader(sources, rows_per_step=rows_per_step, seed=seed, rank=rank, world_size=world, **more)


def pairs_of(rows: PackedRows, size: int) -> list[int]:
    """Numbers of the pairs in rows, after checking that each is whole, in order and in one row."""
    found = []
    for b in range(rows.rows):
        ids, owners = rows.input_ids[b].tolist(), rows.document_ids[b].tolist()
        roles = rows.side["role"][b].tolist()
        numbers = []
        for owner in range(max(owners) + 1):
            at = [t for t in range(T) if owners[t] == owner]
            numbers.append(ids[at[0]] // 100)
            assert [ids[t] for t in at] == [100 * numbers[-1] + p for p in range(len(at))]
            assert rows.position_ids[b, at].tolist() == list(range(len(at)))
            assert {roles[t] for t in at} == {owner % size}
        assert {roles[t] for t in range(T) if owners[t] < 0} <= {-1}
        assert len(numbers) % size == 0
        for first in range(0, len(numbers), size):
            assert numbers[first : first + size] == list(range(numbers[first], numbers[first] + size))
            assert numbers[first] % size == 0
        found += [number // size for number in numbers[::size]]
    return found


SIZES = st.sampled_from([2, 3])


@st.composite
def lengths_of(draw, size: int) -> list[int]:
    pairs = draw(st.lists(st.tuples(*[st.integers(1, T // size)] * size), min_size=1, max_size=15))
    return [length for pair in pairs for length in pair]


@settings(max_examples=60, deadline=None)
@given(st.data(), SIZES, st.integers(0, 3), st.integers(1, 8), st.sampled_from([1, 2, 4]))
def test_pairs_stay_together_and_an_epoch_has_each_once_on_any_number_of_ranks(
    data, size, seed, steps, world
):
    source = store(data.draw(lengths_of(size)), size)
    whole = loader([source], seed=seed)
    ranks = [loader([source], seed=seed, rank=r, world=world) for r in range(world)]
    seen: list[int] = []
    for _ in range(steps):
        rows = whole.next_step()
        seen += pairs_of(rows, size)
        for rank in ranks:
            share = rank.next_step()
            for name, tensor in share.tensors().items():
                assert torch.equal(tensor, rows.tensors()[name][rank.rank :: world]), name
    done = whole.state_dict()["epoch"]
    counts = Counter(seen)
    assert all(done <= counts[pair] <= done + 1 for pair in range(len(source)))
    assert whole.documents[-1].input_ids[0] == 100 * (size * len(source) - 1)
    assert len(whole.documents) == size * len(source)


@settings(max_examples=30, deadline=None)
@given(st.data(), SIZES, st.integers(0, 5))
def test_resuming_goes_on_with_the_same_rows(data, size, done):
    source = store(data.draw(lengths_of(size)), size)
    whole = loader([source])
    for _ in range(done):
        whole.next_step()
    resumed = loader([source])
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert resumed.epoch == whole.epoch
    for _ in range(2):
        one, other = whole.next_step().tensors(), resumed.next_step().tensors()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_counts_are_of_pairs_and_state_of_other_pairs_is_refused():
    one = loader([store([6, 6, 5, 6], 2)], rows_per_step=1)  # both pairs fit a row
    assert one.rows_per_epoch == 1 and one.padding_fraction == pytest.approx(1 / 24)
    with pytest.raises(DataError, match="belongs to other data"):
        loader([store([6, 6, 5, 6], 2, start=2)]).load_state_dict(one.state_dict())
    with pytest.raises(LayoutError):
        loader([store([3, 3], 2)], rows_per_step=3, world=2)


@settings(max_examples=30, deadline=None)
@given(st.data(), SIZES, st.sampled_from([1, 2, 3]), st.integers(1, 3))
def test_evaluation_passes_once_with_equally_many_rows_on_every_rank(data, size, world, micro):
    source = store(data.draw(lengths_of(size)), size)
    ranks = [loader([source], rows_per_step=world, rank=r, world=world, shuffle=False) for r in range(world)]
    batches = [rank.batches(micro) for rank in ranks]
    assert len({tuple(b.rows for b in mine) for mine in batches}) == 1
    assert sorted(p for mine in batches for rows in mine for p in pairs_of(rows, size)) == list(
        range(len(source))
    )


# -- the reference's log-probabilities -----------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.data(), SIZES, st.sampled_from([1, 2, 3]), st.integers(1, 3), st.integers(T, 2 * T))
def test_a_reference_pass_over_all_ranks_fills_what_the_rows_then_carry(data, size, world, micro, row_tokens):
    first = data.draw(lengths_of(size))
    sources = [store(first, size), store(data.draw(lengths_of(size)), size, start=len(first))]
    one = loader(sources, weights=[1.0, 0.5])
    assert "reference_logps" not in one.next_step().side
    found, heights = np.zeros(one.store_tokens, np.float32), set()
    visits = np.zeros(one.store_tokens, np.int64)
    for rank in range(world):
        batches = list(one.reference_batches(rank, world, row_tokens, micro))
        heights.add(tuple(rows.rows for rows, _ in batches))
        for rows, places in batches:
            assert rows.input_ids.shape == places.shape and rows.input_ids.shape[1] == row_tokens
            assert ((places >= 0) == (rows.document_ids.numpy() >= 0)).all()
            at = places >= 0
            visits[places[at]] += 1
            # Stands for a model: a number that tells token and weight.
            found[places[at]] = (rows.input_ids + 0.5 * rows.loss_weights).numpy()[at]
    assert (visits == 1).all() and len(heights) == 1
    one.reference = found
    for _ in range(3):
        rows = one.next_step()
        expected = (rows.input_ids + 0.5 * rows.loss_weights).where(rows.document_ids >= 0, 0)
        assert torch.equal(rows.side["reference_logps"], expected.float())


def test_a_reference_of_other_data_is_refused_and_paths_tell_data_and_weights_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("ASCENT_CACHE", str(tmp_path))
    one, other = loader([store([3, 4], 2)]), loader([store([3, 4], 2, start=2)])
    with pytest.raises(DataError, match=r"shape \(6,\), but the pairs have 7 tokens"):
        one.reference = np.zeros(6, np.float32)
    paths = {loader.reference_path(identity) for loader in (one, other) for identity in ("a", "b")}
    assert len(paths) == 4 and all(tmp_path in path.parents for path in paths)
    assert one.reference_path("a") == loader([store([3, 4], 2)], seed=5).reference_path("a")


# -- from a manifest -----------------------------------------------------------------------------------------------


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"type": "function", "id": "1", "function": {"name": "weather", "arguments": "{}"}}
ROWS = [
    {
        "prompt": [user("1 + 1?")],
        "chosen": [assistant("2")],
        "rejected": [assistant("It is three, I think.")],
    },
    {
        "prompt": [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Hello"), user("Who?")],
        "chosen": [assistant("A model.")],
        "rejected": [assistant("Nobody")],
    },
    {
        "prompt": [user("Weather?")],
        "tools": [TOOL],
        "chosen": [
            assistant("", tool_calls=[CALL]),
            {"role": "tool", "content": "sun", "tool_call_id": "1"},
            assistant("Sunny."),
        ],
        "rejected": [assistant("No idea.")],
    },
]


def encoding(mode: str = "chat", drop: bool = True) -> Encoding:
    return Encoding(load_tokenizer(), mode, drop)


def text_of(document, only: bool | None = None) -> str:
    ids = [i for i, w in zip(document.input_ids, document.loss_weights) if only is None or (w > 0) == only]
    return load_tokenizer().decode(ids)


END = "<｜end▁of▁sentence｜>"


def test_documents_are_whole_conversations_with_loss_on_their_answer(make_set):
    pairs = load_pairs(load_manifest(make_set(ROWS, format="preference")), "train", encoding())
    assert len(pairs) == 3 and [list(pairs.members(i)) for i in range(3)] == [[0, 1], [2, 3], [4, 5]]
    for i, row in enumerate(ROWS):
        for role, side in ((CHOSEN, "chosen"), (REJECTED, "rejected")):
            document = pairs.documents[2 * i + role]
            messages = [*row["prompt"], *row[side]]
            whole = encode_messages(messages, tools=row.get("tools"), add_generation_prompt=False)
            assert text_of(document) == "".join(segment.text for segment in whole)
            assert set(document.loss_weights) == {0.0, 1.0} and document.loss_weights[0] == 0
    learnt = [text_of(document, only=True) for document in pairs.documents]
    assert learnt[:4] == [f"2{END}", f"It is three, I think.{END}", f"A model.{END}", f"Nobody{END}"]
    assert "weather" in learnt[4] and "sun<" not in learnt[4] and learnt[4].endswith(f"Sunny.{END}")


def test_mismatched_documents_ask_this_question_and_answer_the_next(make_set):
    pairs = load_pairs(
        load_manifest(make_set(ROWS, format="preference")), "train", encoding(), mismatched=True
    )
    assert pairs.size == 3 and len(pairs) == 3
    plain = load_pairs(load_manifest(make_set(ROWS, format="preference")), "train", encoding())
    assert pairs.key != plain.key
    for i, row in enumerate(ROWS):
        following = ROWS[(i + 1) % 3]["chosen"]
        expected = answer_document(row["prompt"], following, row.get("tools"), encoding())
        found = pairs.documents[3 * i + MISMATCHED]
        assert found.input_ids == expected.input_ids and found.loss_weights == expected.loss_weights
        assert [d.input_ids for d in pairs.documents[3 * i : 3 * i + 2]] == [
            d.input_ids for d in plain.documents[2 * i : 2 * i + 2]
        ]
    assert text_of(pairs.documents[2], only=True) == f"A model.{END}"
    assert "1 + 1?" in text_of(pairs.documents[2])


@pytest.mark.parametrize("drop", [True, False])
def test_reasoning_of_the_answer_is_learnt_and_that_of_the_prompt_is_not(drop):
    prompt = [user("a"), assistant("b", reasoning_content="old"), user("c")]
    document = answer_document(
        prompt, [assistant("d", reasoning_content="new")], None, encoding("thinking", drop)
    )
    assert text_of(document, only=True) == f"new</think>d{END}"
    assert ("old" in text_of(document)) is not drop


def test_an_answer_that_cannot_be_told_from_the_prompt_is_refused():
    prompt = [user("a"), assistant("b"), {"role": "developer", "content": "c"}]
    answer = [assistant("", tool_calls=[CALL]), {"role": "tool", "content": "sun"}, assistant("d")]
    with pytest.raises(DataError, match=r"line 3: expected 3 turns of the assistant .* found 2"):
        answer_document(prompt, answer, None, encoding("thinking"), "line 3")
    kept = answer_document(prompt, answer, None, encoding("thinking", False), "line 3")
    assert "weather" in text_of(kept, only=True) and "b" not in text_of(kept, only=True).split("<")[0]


def test_kto_needs_a_second_pair(make_set):
    manifest = load_manifest(make_set(ROWS[:1], format="preference"))
    with pytest.raises(DataError, match="trial:train has one pair"):
        load_pairs(manifest, "train", encoding(), mismatched=True)
    assert len(load_pairs(manifest, "train", encoding())) == 1


# -- from a recipe -------------------------------------------------------------------------------------------------


def recipe(manifest, row_tokens=512, **objective) -> Recipe:
    source = DataSource(manifest=str(manifest))
    data = DataSection(train=(source,), validation=(source,), row_tokens=row_tokens)
    return Recipe(
        data=data,
        schedule=ScheduleSection(batch_tokens=row_tokens * 2),
        objective={"kind": "preference", **objective},
    )


@pytest.mark.parametrize("loss, size", [("dpo", 2), ("kto", 3)])
def test_loader_of_a_recipe(make_set, loss, size):
    built = build_pair_loader(
        recipe(make_set(ROWS, format="preference"), loss=loss), load_tokenizer(), rank=0, world_size=1
    )
    roles = built.next_step().side["role"]
    assert roles.dtype == torch.int8 and set(roles.unique().tolist()) == {-1, *range(size)}
    assert len(built.documents) == 3 * size
    logps = np.arange(built.store_tokens, dtype=np.float32)
    held_out = build_pair_loader(
        recipe(make_set(ROWS, format="preference"), loss=loss),
        load_tokenizer(),
        rank=0,
        world_size=1,
        train=False,
        reference=logps,
    )
    (rows,) = held_out.batches(4)
    carried = rows.side["reference_logps"][rows.document_ids >= 0]
    assert torch.equal(carried, torch.from_numpy(logps))  # in their order: everything fits the first row


def test_weights_of_sources_count_passes_over_their_pairs(make_set):
    manifest = str(make_set(ROWS, format="preference"))
    sources = [DataSource(manifest=manifest, weight=2.0)]
    built = build_pair_loader(recipe(manifest), load_tokenizer(), sources=sources, rank=0, world_size=1)
    used = built.rows_per_epoch * 512 * (1 - built.padding_fraction)
    assert used == pytest.approx(2 * built.store_tokens)


def test_a_pair_longer_than_the_row_stops_the_run_with_the_number_to_set(make_set):
    manifest = make_set(ROWS, format="preference")

    def build(row_tokens: int) -> PairLoader:
        return build_pair_loader(recipe(manifest, row_tokens), load_tokenizer(), rank=0, world_size=1)

    with pytest.raises(
        DataError, match=r"trial:train row 3 has \d+ tokens in its 2 documents, which"
    ) as error:
        build(128)
    needed = int(str(error.value).split("at least ")[1].split(",")[0])
    assert max(len(d.input_ids) for d in build(512).documents) < needed
    assert build(needed).rows_per_epoch >= 1
    with pytest.raises(DataError):
        build(needed - 1)


def test_other_formats_are_refused(make_set):
    manifest = make_set([{"messages": [user("a"), assistant("b")]}])
    with pytest.raises(DataError, match="trial has format messages, but learning from pairs"):
        build_pair_loader(recipe(manifest), load_tokenizer(), rank=0, world_size=1)


def test_the_shipped_pairs_can_be_learnt_from():
    wide = recipe("ascent-tasks-preference", row_tokens=1024)
    source = DataSource(manifest="ascent-tasks-preference", split="validation")
    built = build_pair_loader(wide, load_tokenizer(), sources=[source], rank=0, world_size=1, train=False)
    assert len(built.documents) == 480 and built.padding_fraction < 0.1
