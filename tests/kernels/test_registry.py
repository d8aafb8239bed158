"""How an implementation of an operator is chosen."""

from __future__ import annotations

import pytest
import torch

from kernels import _support, registry


def test_every_operator_has_a_reference_and_runs_on_cpu():
    assert "linear_logprob" in registry.operators()
    for operator in registry.operators():
        assert callable(registry.get(operator, "cpu", torch.float32))


def test_the_first_that_runs_is_taken_and_the_reason_given():
    told = registry.explain("rope", "cpu", torch.float32)
    assert told["implementation"] == "torch" and "cpu" in told["reason"]


def test_a_block_can_force_an_implementation():
    with registry.force(rope="reference"):
        assert registry.explain("rope")["implementation"] == "reference"
    assert registry.explain("rope")["implementation"] == "torch"


def test_the_environment_can_force_an_implementation(monkeypatch):
    monkeypatch.setenv("ASCENT_KERNELS", "rope=reference, compressor=torch")
    assert registry.explain("rope") == {"operator": "rope", "implementation": "reference", "reason": "forced"}
    assert registry.explain("rms_norm")["implementation"] == "torch"


def test_an_unknown_name_is_one_clear_sentence():
    with pytest.raises(ValueError, match="no operator 'ropes'"):
        registry.get("ropes")
    with registry.force(rope="cobol"), pytest.raises(ValueError, match="choose one of npu, torch, reference"):
        registry.get("rope")
    with pytest.raises(ValueError, match="no implementation of rope runs on cpu"):
        registry.get("rope", "cpu", torch.int64)


def test_numbers_are_counted_without_a_look_at_the_largest():
    index = torch.tensor([3, 0, 3, 5, 3])
    assert torch.equal(_support.count(index, 7), torch.tensor([1, 0, 0, 3, 0, 1, 0]))
    # A device's way works where no number can be looked at.
    assert _support.count(index.to("meta"), 7).shape == (7,)
