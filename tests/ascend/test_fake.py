"""Tensors without contents: what is known of them all the same, and what the host is told of the rest."""

import pytest
import torch

from lab_utils.ascend.fake import fake


@pytest.fixture
def without_contents():
    rows = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]])  # real, as a loader's
    with fake():
        yield rows.to("cpu", torch.int64), torch.empty(4, 8)


def test_what_follows_from_rows_is_known(without_contents):
    rows, _ = without_contents
    starts = torch.where(rows == 0, torch.arange(5), 0).cummax(1).values
    assert starts.tolist() == [[0, 0, 0, 3, 3], [0, 0, 0, 0, 0]] and bool((rows >= 0).all())
    assert torch.bincount(rows[0]).tolist() == [2, 2, 1] and int((rows == 0).sum()) == 3


def test_writing_through_a_view_changes_what_is_known(without_contents):
    rows, _ = without_contents
    mask = rows == 0
    mask[:, 1:] |= rows[:, 1:] == 4
    assert mask.tolist() == [[True, False, False, True, False], [True, False, False, False, True]]


def test_what_the_device_alone_knows_is_nothing(without_contents):
    _, values = without_contents
    assert values.sum().item() == 0.0 and bool((values > 1).any()) is False
    count = torch.zeros(8, dtype=torch.int64)
    assert count.tolist() == [0] * 8
    count.scatter_add_(0, values.argmin(1), torch.ones(4, dtype=torch.int64))
    assert getattr(count, "_known", None) is None, "counts that came from unknown places are not known"


def test_a_choice_by_unknown_scores_falls_on_all_alike(without_contents):
    _, scores = without_contents
    chosen = scores.topk(2, dim=-1).indices
    assert torch.bincount(chosen.flatten(), minlength=8).tolist() == [1] * 8


def test_a_known_mask_gives_unknown_rows_their_number(without_contents):
    rows, values = without_contents
    picked = values[rows[1, :4] > 0]
    assert picked.shape == (3, 8)
    values = torch.empty(4, 8, requires_grad=True)
    values[rows[1, :4] > 0].sum().backward()
    assert values.grad.shape == (4, 8)
    with pytest.raises(Exception, match="nonzero"):
        values[values[:, 0] > 0]


def test_operators_are_told_before_they_run():
    seen = []
    with fake(lambda func, args, kwargs: seen.append(func.name())):
        torch.empty(3) + 1
    assert seen == ["aten::empty.memory_format", "aten::add.Tensor"]
