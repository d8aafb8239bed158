"""The loader: one order of rows whatever the ranks, resume to the row, nothing dropped or repeated."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from data_sets import chat, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from lab_utils.data.documents import Documents
from lab_utils.data.loader import PackedLoader, build_loader
from lab_utils.data.rows import PackedRows
from lab_utils.data.tokenizer import load_tokenizer
from lab_utils.errors import DataError, LayoutError
from lab_utils.recipe import DataSection, DataSource, Recipe, ScheduleSection

T = 16


def store(lengths: list[int], start: int = 0, key: str = "k") -> Documents:
    """Documents whose tokens are ``100 × (number + start) + position``, every other one with loss."""
    tokens = [100 * (start + d) + t for d, n in enumerate(lengths) for t in range(n)]
    supervised = np.array([t % 2 == 1 for t in tokens], np.bool_)
    offsets = np.cumsum([0, *lengths])
    return Documents(np.array(tokens, np.int32), supervised, offsets, f"set{start}", f"{key}{start}")


def loader(sources, rows_per_step=4, rank=0, world=1, seed=0, **more) -> PackedLoader:
    more = {"row_tokens": T, "pad_id": 7, **more}
    return PackedLoader(sources, rows_per_step=rows_per_step, seed=seed, rank=rank, world_size=world, **more)


def documents_of(rows: PackedRows) -> list[int]:
    """Numbers of the documents in rows, after checking that each is whole and placed as promised."""
    found = []
    for b in range(rows.rows):
        ids, positions = rows.input_ids[b].tolist(), rows.position_ids[b].tolist()
        owners, weights = rows.document_ids[b].tolist(), rows.loss_weights[b].tolist()
        real = [o for o in owners if o >= 0]
        assert owners == real + [-1] * (T - len(real)) and real == sorted(real)
        for owner in dict.fromkeys(real):
            at = [t for t in range(T) if owners[t] == owner]
            number = ids[at[0]] // 100
            assert [ids[t] for t in at] == [100 * number + p for p in range(len(at))]
            assert [positions[t] for t in at] == list(range(len(at)))
            assert [weights[t] for t in at] == [float(p % 2) for p in range(len(at))]
            found.append(number)
        pad = range(len(real), T)
        assert [(ids[t], positions[t], weights[t]) for t in pad] == [(7, i, 0.0) for i in range(len(pad))]
    return found


LENGTHS = st.lists(st.integers(1, T), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(0, 3), st.integers(1, 12))
def test_an_epoch_has_every_document_once_and_no_step_is_short(lengths, seed, steps):
    source = store(lengths)
    one = loader([source], seed=seed)
    seen: list[int] = []
    for _ in range(steps):
        rows = one.next_step()
        assert rows.rows == 4
        seen += documents_of(rows)
    n = len(lengths)
    whole = one.state_dict()["epoch"]
    counts = Counter(seen)
    assert all(whole <= counts[d] <= whole + 1 for d in range(n))  # finished epochs, and some of the next


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(0, 3), st.integers(0, 6), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))
def test_resuming_mid_epoch_at_another_number_of_ranks_goes_on_with_the_same_rows(
    lengths, seed, done, before, after
):
    source = store(lengths)
    whole = loader([source], seed=seed)
    reference = [whole.next_step() for _ in range(done + 3)]
    ranks = [loader([source], seed=seed, rank=r, world=before) for r in range(before)]
    for step in range(done):
        for rank in ranks:
            assert torch.equal(rank.next_step().input_ids, reference[step].input_ids[rank.rank :: before])
    state = json.loads(json.dumps(ranks[-1].state_dict()))
    for r in range(after):
        resumed = loader([source], seed=seed, rank=r, world=after)
        resumed.load_state_dict(state)
        for step in range(done, done + 3):
            rows = resumed.next_step()
            for name in ("input_ids", "position_ids", "document_ids", "loss_weights"):
                assert torch.equal(getattr(rows, name), getattr(reference[step], name)[r::after])


def test_rewinding_gives_the_same_step_again():
    one = loader([store([5] * 30)])
    for _ in range(2):
        one.next_step()
    state = one.state_dict()
    first = one.next_step()
    for _ in range(8):
        one.next_step()  # into later epochs
    one.load_state_dict(state)
    assert torch.equal(one.next_step().input_ids, first.input_ids)


def test_epochs_and_seeds_have_orders_of_their_own():
    def epochs(seed: int) -> list[list[int]]:
        one = loader([store([T] * 12)], seed=seed)
        return [[d for _ in range(3) for d in documents_of(one.next_step())] for _ in range(2)]

    first, second = epochs(0)
    assert sorted(first) == sorted(second) == list(range(12)) and first != second
    assert epochs(0) == [first, second] and epochs(1)[0] != first


@pytest.mark.parametrize("weight, epochs", [(2.0, 1), (0.5, 2), (1.5, 2), (0.25, 4)])
def test_weights_say_how_often_an_epoch_passes_over_a_source(weight, epochs):
    full, weighted = store([T] * 8), store([T] * 8, start=50)
    one = loader([full, weighted], rows_per_step=1, weights=[1.0, weight])
    seen: list[set[int]] = []
    counts: Counter[int] = Counter()
    for _ in range(epochs):
        assert one.epoch == len(seen)
        numbers = [d for _ in range(one.rows_per_epoch) for d in documents_of(one.next_step())]
        counts.update(numbers)
        seen.append({d for d in numbers if d >= 50})
        assert sum(d >= 50 for d in numbers) == 8 * weight
    assert {counts[d] for d in range(8)} == {epochs}
    assert {counts[50 + d] for d in range(8)} == {epochs * weight}
    if weight < 1:  # a different part each epoch
        assert all(not a & b for a, b in pairwise(seen))


def test_state_of_other_data_is_refused():
    state = loader([store([3, 4])]).state_dict()
    for other in (
        loader([store([3, 4])], seed=1),
        loader([store([3, 4], key="changed")]),
        loader([store([3, 4])], row_tokens=32),
        loader([store([3, 4])], weights=[2.0]),
    ):
        with pytest.raises(DataError, match="belongs to other data"):
            other.load_state_dict(state)


def test_rows_that_ranks_cannot_share_are_refused():
    with pytest.raises(LayoutError, match=r"set schedule.batch_tokens to a multiple of 48"):
        loader([store([3])], rows_per_step=4, world=3)


def test_an_epoch_without_documents_is_refused():
    with pytest.raises(DataError, match="holds no document"):
        loader([store([3, 4])], weights=[0.25])


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.sampled_from([1, 2, 3]), st.integers(1, 3))
def test_evaluation_passes_once_with_equally_many_rows_on_every_rank(lengths, world, micro):
    ranks = [
        loader([store(lengths)], rows_per_step=world, rank=r, world=world, shuffle=False)
        for r in range(world)
    ]
    batches = [rank.batches(micro) for rank in ranks]
    assert len({tuple(b.rows for b in mine) for mine in batches}) == 1
    seen = [d for mine in batches for rows in mine for d in documents_of(rows)]
    assert sorted(seen) == list(range(len(lengths)))
    assert torch.equal(batches[0][0].input_ids, ranks[0].batches(micro)[0].input_ids)


def test_counts_are_what_they_say():
    one = loader([store([8, 7, 8]), store([8], start=9)], rows_per_step=1)  # any two fit a row
    assert len(one.documents) == 4 and [d.input_ids[0] // 100 for d in one.documents] == [0, 1, 2, 9]
    assert one.documents[-1].source == "set9 document 1" and one.documents[1].loss_weights[:2] == [0.0, 1.0]
    assert one.rows_per_epoch == 2 and one.padding_fraction == pytest.approx(1 / 32)
    one.next_step()
    assert one.epoch == 0.5
    rows = loader([store([8, 7, 9])], rows_per_step=2).next_step()
    assert rows.tokens == 24 and sorted(rows.document_lengths()) == [7, 8, 9]
    assert rows.slice(0, 1).rows == 1 and rows.to("cpu").tokens == 24


# -- from a recipe -------------------------------------------------------------------------------------------


def recipe(manifest, row_tokens=64, **more) -> Recipe:
    source = DataSource(manifest=str(manifest))
    data = DataSection(train=(source,), validation=(source,), row_tokens=row_tokens)
    return Recipe(data=data, schedule=ScheduleSection(batch_tokens=row_tokens * 4), **more)


def test_loader_of_a_recipe_trains_on_the_answers(make_set):
    tokenizer = load_tokenizer()
    manifest = make_set([chat(f"What is {i} plus 1?", str(i + 1)) for i in range(40)])
    built = build_loader(recipe(manifest), tokenizer, rank=1, world_size=2)
    rows = built.next_step()
    assert rows.rows == 2 and rows.input_ids.shape == (2, 64)
    answers = tokenizer.decode(rows.input_ids[rows.loss_weights > 0].tolist()).split("<｜end▁of▁sentence｜>")
    assert (
        answers.pop() == ""
        and all(a.isdigit() for a in answers)
        and len(answers) == len(rows.document_lengths())
    )
    assert int(rows.input_ids[rows.document_ids < 0].unique()) == tokenizer.eos_id
    held_out = build_loader(recipe(manifest), tokenizer, rank=0, world_size=1, train=False)
    assert sum(len(b.document_lengths()) for b in held_out.batches(3)) == 40


def test_a_document_longer_than_the_row_stops_the_run_with_the_number_to_set(make_set):
    manifest = make_set([chat("Hi", "Hello"), chat("Count", "1 2 3 4 5 6 7 8 9 " * 20)])
    with pytest.raises(
        DataError, match=r"trial:train row 2 has \d+ tokens, but data.row_tokens is 64: set"
    ) as error:
        build_loader(recipe(manifest), load_tokenizer(), rank=0, world_size=1)
    needed = int(str(error.value).split("at least ")[1].split(",")[0])
    assert build_loader(recipe(manifest, needed), load_tokenizer(), rank=0, world_size=1).documents[1]


def test_long_running_text_is_cut_into_rows(make_set):
    text = " ".join(f"The number {i} follows {i - 1}." for i in range(60))
    manifest = make_set([{"text": text}, {"text": "Short."}], format="text")
    tokenizer = load_tokenizer()
    built = build_loader(recipe(manifest), tokenizer, rank=0, world_size=1)
    lengths = [len(d.input_ids) for d in built.documents]
    whole = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
    assert lengths[:-2] == [64] * (len(lengths) - 2) and sum(lengths[:-1]) == len(whole)
    assert [i for d in built.documents[:-1] for i in d.input_ids] == whole
    assert all(d.loss_weights == [0.0, *[1.0] * (len(d.input_ids) - 1)] for d in built.documents)


@pytest.mark.parametrize(
    "format, row",
    [
        ("prompt", {"messages": [{"role": "user", "content": "?"}]}),
        ("preference", {"prompt": "?", "chosen": "a", "rejected": "b"}),
    ],
)
def test_formats_without_answers_to_learn_are_refused(make_set, format, row):
    manifest = make_set([row], format=format)
    with pytest.raises(DataError, match=f"trial has format {format}, but training"):
        build_loader(recipe(manifest), load_tokenizer(), rank=0, world_size=1)


def test_changed_data_is_noticed_although_its_tokens_are_cached(make_set):
    manifest = make_set([chat("Hi", "Hello")] * 8)
    build_loader(recipe(manifest), load_tokenizer(), rank=0, world_size=1)
    write_jsonl(manifest.parent / "train.jsonl", [chat("Hi", "Hallo")] * 8)
    with pytest.raises(DataError, match="expected sha256"):
        build_loader(recipe(manifest), load_tokenizer(), rank=0, world_size=1)


def test_the_official_texts_of_a_checkpoint_are_what_is_trained_on(make_set, tmp_path):
    (tmp_path / "encoding_dsv4.py").write_text(
        "TOOLS_TEMPLATE = 'Zebra\\n{tool_schemas}\\nQuagga'\n"
        "REASONING_EFFORT_MAX = 'x'\nresponse_format_template = '{schema}'\n"
    )
    tool = {"type": "function", "function": {"name": "f"}}
    manifest, tokenizer = make_set([{**chat("a", "b"), "tools": [tool]}] * 4), load_tokenizer()
    official = recipe(manifest, model={"encoding": str(tmp_path)})
    rows = build_loader(official, tokenizer, rank=0, world_size=1).next_step()
    assert "Zebra" in tokenizer.decode(rows.input_ids[0].tolist())
    shipped = build_loader(recipe(manifest, row_tokens=256), tokenizer, rank=0, world_size=1).next_step()
    assert "Zebra" not in tokenizer.decode(shipped.input_ids[0].tolist())
