"""Muon against the lines of the technical report, beside AdamW, and on a whole model."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from small_models import loss_of, sentences, small_model
from torch import Tensor

from lab_utils.models.deepseek_v4.initialize import initialize
from lab_utils.models.deepseek_v4.model import DeepseekV4
from lab_utils.models.presets import preset
from lab_utils.optim import adamw, muon
from lab_utils.optim.dealing import assign
from lab_utils.optim.groups import matrices
from lab_utils.optim.muon import Muon
from lab_utils.optim.single_process import single_process
from lab_utils.optim.table import assignment_table, shapes_of, totals
from lab_utils.recipe import OptimSection

MUON = OptimSection(kind="muon", lr=1e-2, weight_decay=0.1)
SHAPES = [(6, 9), (9, 6), (6, 9), (4, 4), (1, 7), (7, 1)]


def algorithm_1(w: Tensor, m: Tensor, g: Tensor, lr: float, decay: float) -> tuple[Tensor, Tensor]:
    """One step for one matrix, line by line of the report; fp64."""
    m = 0.95 * m + g
    x = 0.95 * m + g
    x = x / x.square().sum().sqrt()
    for k in range(10):
        a, b, c = (3.4445, -4.7750, 2.0315) if k < 8 else (2, -1.5, 0.5)
        x = a * x + b * (x @ x.T) @ x + c * (x @ x.T) @ (x @ x.T) @ x
    n, columns = w.shape
    return w * (1 - lr * decay) - lr * 0.18 * math.sqrt(max(n, columns)) * x, m


def random_matrices(seed: int, shapes=SHAPES) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g) for shape in shapes]


def of(params: list[Tensor], algorithm: str, section: OptimSection = MUON, decay: float = 0.1) -> Muon:
    return muon.build([{"params": params, "weight_decay": decay, "algorithm": algorithm}], section)


@pytest.mark.parametrize("stack_bytes", [1, 600, 2**28])
def test_muon_is_algorithm_1_however_matrices_are_batched(monkeypatch, stack_bytes):
    monkeypatch.setattr(muon, "STACK_BYTES", stack_bytes)
    weights = random_matrices(0)
    expected = [(w.double(), torch.zeros_like(w).double()) for w in weights]
    optimizer = of(weights, "muon")
    for step in range(5):
        optimizer.param_groups[0]["lr"] = lr = 0.01 / (step + 1)
        for i, (w, g) in enumerate(zip(weights, random_matrices(step + 1), strict=True)):
            w.grad = g
            expected[i] = algorithm_1(*expected[i], g.double(), lr, 0.1)
        optimizer.step()
    for w, (want, momentum) in zip(weights, expected, strict=True):
        torch.testing.assert_close(w.double(), want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            optimizer.state[w]["momentum_buffer"].double(), momentum, rtol=1e-5, atol=1e-5
        )


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 64), m=st.integers(1, 64), seed=st.integers(0, 99), rms=st.sampled_from([0.18, 0.2]))
def test_an_update_has_the_rms_it_is_scaled_to(n, m, seed, rms):
    (w,), (g,) = random_matrices(0, [(n, m)]), random_matrices(seed, [(n, m)])
    if n == m:  # a square random matrix may have a singular value that ten steps don't reach
        g = g + 4 * math.sqrt(n) * torch.eye(n)
    before, w.grad = w.clone(), g
    of([w], "muon", OptimSection(kind="muon", lr=1.0, update_rms=rms), decay=0.0).step()
    assert (w - before).square().mean().sqrt() == pytest.approx(rms, rel=3e-3)


def test_adamw_groups_are_bit_by_bit_torchs_fused_adamw():
    section = OptimSection(kind="muon", lr=3e-3, betas=(0.8, 0.99), eps=1e-20)
    ours, theirs = (
        random_matrices(0, [(5, 7), (11,), (3, 2, 4)]),
        random_matrices(0, [(5, 7), (11,), (3, 2, 4)]),
    )
    mine = of(ours, "adamw", section)
    torchs = adamw.build([{"params": theirs, "weight_decay": 0.1, "algorithm": "adamw"}], section)
    for step in range(4):
        for a, b, g in zip(ours, theirs, random_matrices(step + 1, [(5, 7), (11,), (3, 2, 4)]), strict=True):
            a.grad, b.grad = g, g.clone()
        mine.step()
        torchs.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b) and mine.state[a].keys() == torchs.state[b].keys()
        assert all(torch.equal(mine.state[a][key], torchs.state[b][key]) for key in mine.state[a])


def test_a_parameter_without_gradient_is_left_alone():
    weights = random_matrices(0, [(3, 4), (3, 4)])
    before = weights[0].clone()
    weights[1].grad = torch.ones(3, 4)
    optimizer = of(weights, "muon")
    optimizer.step()
    assert torch.equal(weights[0], before) and weights[0] not in optimizer.state


def test_a_matrix_without_momentum_only_decays():
    (w,) = random_matrices(0, [(3, 4)])
    before, w.grad = w.clone(), torch.zeros(3, 4)
    of([w], "muon").step()
    torch.testing.assert_close(w, before * (1 - 1e-2 * 0.1))


@pytest.mark.parametrize(
    "wrong", [torch.ones(2, 3, 4), torch.ones(5), torch.ones(3, 4, dtype=torch.bfloat16)]
)
def test_muon_asks_for_fp32_matrices(wrong):
    wrong.grad = torch.ones_like(wrong)
    with pytest.raises(ValueError, match="cut parameters"):
        of([wrong], "muon").step()


def train(model, optimizer, steps: int, first: int = 0) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss = loss_of(model, sentences(step))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_a_small_v4_learns_and_every_matrix_follows_algorithm_1():
    section = OptimSection(kind="muon", lr=2e-2, weight_decay=0.1)
    model = small_model()
    optimizer, config = single_process(model, section), model.config
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    first = train(model, optimizer, 1)[0]
    for name, parameter in model.named_parameters():
        views = matrices(name, tuple(parameter.shape), config) if parameter.grad is not None else None
        for view in views or []:
            part = slice(view.start, view.start + view.size)
            w, g, new = (
                t.detach().double().reshape(-1)[part].view(view.rows, view.cols)
                for t in (before[name], parameter.grad, parameter)
            )
            if g.any():
                want, _ = algorithm_1(w, torch.zeros_like(w), g, section.lr, 0.1)
                torch.testing.assert_close(new, want, rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")
    losses = train(model, optimizer, 14, first=1)
    assert sum(losses[-3:]) / 3 < 0.9 * first


def test_training_is_deterministic():
    runs = []
    for _ in range(2):
        model = small_model()
        train(model, single_process(model, MUON), 2)
        runs.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_run_goes_on_from_its_state():
    model = small_model()
    optimizer = single_process(model, MUON)
    train(model, optimizer, 2)
    resumed = small_model()
    resumed.load_state_dict(copy.deepcopy(model.state_dict()))
    again = single_process(resumed, MUON)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 2, first=2)
    train(resumed, again, 2, first=2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


def state_bytes(section: OptimSection) -> int:
    """Of the shipped ``tiny`` shape after one step."""
    model = DeepseekV4(preset("tiny"))
    initialize(model, 0)
    optimizer = single_process(model, section)
    train(model, optimizer, 1)
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.ndim)


def test_muon_keeps_four_bytes_a_parameter_less():
    config = preset("tiny")
    found = totals(assignment_table(shapes_of(config), config, MUON))
    assert found["muon"] > 0.8 * (found["muon"] + found["adamw"])
    assert state_bytes(MUON) == found["state_bytes"]
    assert state_bytes(OptimSection()) == found["state_bytes"] + 4 * found["muon"]


def test_one_process_needs_an_fp32_model():
    with pytest.raises(ValueError, match="fp32 model"):
        single_process(small_model().bfloat16(), MUON)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 10_000), max_size=60), ranks=st.integers(1, 9))
def test_owners_are_balanced_to_one_matrix(sizes, ranks):
    owners = assign(sizes, ranks)
    loads = [sum(s for s, o in zip(sizes, owners, strict=True) if o == rank) for rank in range(ranks)]
    assert sum(loads) == sum(sizes) and max(loads) - min(loads) <= max(sizes, default=0)
    assert owners == assign(sizes, ranks)


@settings(max_examples=40, deadline=None)
@given(
    alike=st.integers(1, 20),
    kinds=st.lists(st.integers(1, 99), min_size=1, max_size=6),
    ranks=st.integers(1, 9),
)
def test_matrices_that_divide_are_dealt_out_evenly(alike, kinds, ranks):
    sizes = [size for size in kinds for _ in range(alike * ranks)]
    owners = assign(sizes, ranks)
    loads = {sum(s for s, o in zip(sizes, owners, strict=True) if o == rank) for rank in range(ranks)}
    assert len(loads) == 1


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_the_dense_matrices_of_flash_are_balanced_to_a_tenth(ranks):
    config = preset("flash")
    named = [(name, shape) for name, shape in shapes_of(config) if ".experts." not in name]
    sizes = [view.size for name, shape in named for view in matrices(name, shape, config) or []]
    owners = assign(sizes, ranks)
    loads = [sum(s for s, o in zip(sizes, owners, strict=True) if o == rank) for rank in range(ranks)]
    assert max(loads) < 1.1 * sum(loads) / ranks


def test_owners_go_on_from_what_ranks_already_hold():
    assert assign([5, 5, 1], 3, [0, 6, 3]) == [0, 2, 0]
    assert assign([], 4) == []


def test_a_recipe_that_sets_muons_fields_without_muon_is_told_so():
    assert OptimSection(kind="muon", momentum=0.9, update_rms=0.2).momentum == 0.9
    assert OptimSection(momentum=0.95).kind == "adamw"
    with pytest.raises(ValidationError, match=r"optim\.momentum is Muon's .* set optim\.kind=muon"):
        OptimSection(momentum=0.9)
    with pytest.raises(ValidationError, match=r"optim\.update_rms is Muon's"):
        OptimSection(kind="adamw", update_rms=0.2)
