"""First-fit packing: nothing lost, nothing split, quick."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab_utils.data.packing import first_fit, padding_fraction


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=120), st.integers(50, 90))
def test_every_document_stands_in_one_row_the_first_with_room(lengths, row_tokens):
    rows = first_fit(lengths, row_tokens)
    assert sorted(d for row in rows for d in row) == list(range(len(lengths)))
    assert all(row == sorted(row) for row in rows)
    free: list[int] = []  # the definition, without the tree
    expected: list[list[int]] = []
    for document, length in enumerate(lengths):
        row = next((r for r, room in enumerate(free) if room >= length), len(free))
        if row == len(free):
            free.append(row_tokens)
            expected.append([])
        free[row] -= length
        expected[row].append(document)
    assert rows == expected
    assert all(sum(lengths[d] for d in row) <= row_tokens for row in rows)


def test_padding_is_what_the_documents_leave():
    lengths = [60, 50, 40, 30]
    rows = first_fit(lengths, 100)
    assert rows == [[0, 2], [1, 3]] and padding_fraction(rows, lengths, 100) == pytest.approx(0.1)
    assert padding_fraction([], [], 100) == 0.0


@pytest.mark.parametrize("lengths", [[5, 0], [5, 11]])
def test_impossible_lengths_are_refused(lengths):
    with pytest.raises(ValueError, match="must be 1 … 10"):
        first_fit(lengths, 10)


def test_twenty_thousand_documents_leave_little_padding():
    rng = random.Random(0)
    lengths = [min(1024, int(rng.lognormvariate(5, 1)) + 1) for _ in range(20_000)]
    rows = first_fit(lengths, 1024)
    assert padding_fraction(rows, lengths, 1024) < 0.03
