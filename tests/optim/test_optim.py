"""Groups, schedules and AdamW."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from lab_utils.optim import adamw
from lab_utils.optim.groups import parameter_groups
from lab_utils.optim.schedules import learning_rate
from lab_utils.recipe import OptimSection, ScheduleSection


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.experts = nn.Parameter(torch.ones(2, 3, 4))
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
        self.tied = self.linear.weight


def test_weight_decay_is_for_matrices_only() -> None:
    decayed, plain = parameter_groups(Model(), OptimSection(weight_decay=0.1))
    assert decayed["algorithm"] == plain["algorithm"] == "adamw"
    assert sorted(decayed["names"]) == ["experts", "tied"] and decayed["weight_decay"] == 0.1
    assert (
        sorted(plain["names"]) == ["linear.bias", "norm.bias", "norm.weight"] and plain["weight_decay"] == 0.0
    )


def test_a_group_without_members_is_left_out() -> None:
    assert len(parameter_groups(nn.Linear(2, 2, bias=False), OptimSection())) == 1


def schedule(**values: object) -> ScheduleSection:
    return ScheduleSection(**{"steps": 100, "warmup_steps": 10, "final_lr_ratio": 0.1, **values})


@pytest.mark.parametrize("shape", ["cosine", "wsd", "constant"])
def test_warm_up_is_linear_and_the_end_is_where_it_should_be(shape: str) -> None:
    section = schedule(shape=shape)
    assert [learning_rate(s, section, 1.0) for s in range(10)] == pytest.approx(
        [(s + 1) / 10 for s in range(10)]
    )
    assert learning_rate(99, section, 2.0) == pytest.approx(2.0 if shape == "constant" else 0.2)
    rates = [learning_rate(s, section, 1.0) for s in range(9, 100)]
    assert all(a >= b for a, b in itertools.pairwise(rates))


def test_cosine_is_half_way_down_in_the_middle() -> None:
    assert learning_rate(54, schedule(), 1.0) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))


def test_wsd_decays_in_its_last_steps_alone() -> None:
    section = schedule(shape="wsd", decay_fraction=0.2)
    assert learning_rate(79, section, 1.0) == pytest.approx(1.0)
    assert learning_rate(89, section, 1.0) == pytest.approx(0.55)


def test_no_warm_up_and_warm_up_only() -> None:
    assert learning_rate(0, schedule(warmup_steps=0, shape="constant"), 1.0) == 1.0
    assert learning_rate(99, schedule(warmup_steps=200), 1.0) == pytest.approx(0.5)


def test_adamw_is_the_published_formula() -> None:
    """Loshchilov and Hutter, algorithm 2, in float64, beside the fused kernel."""
    section = OptimSection(lr=1e-2, betas=(0.9, 0.95), eps=1e-6)
    parameter = nn.Parameter(torch.tensor([[0.5, -1.0, 2.0]]))
    w, m, v = parameter.detach().double(), torch.zeros(1, 3).double(), torch.zeros(1, 3).double()
    optimizer = adamw.build([{"params": [parameter], "weight_decay": 0.1}], section)
    for step in range(1, 8):
        gradient = torch.tensor([[0.3, -0.2 * step, 1e-3]])
        parameter.grad = gradient.clone()
        optimizer.step()
        g = gradient.double()
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        w = w - 1e-2 * 0.1 * w - 1e-2 * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-6)
    torch.testing.assert_close(parameter.detach().double(), w, rtol=1e-6, atol=1e-7)
