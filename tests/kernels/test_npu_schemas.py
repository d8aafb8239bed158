"""The Ascend implementations against the schemas, metas and gradients of the real torch_npu, in one child process.

The child imports the wheel with a stand-in for CANN and runs every ``npu.py`` on fake tensors of device npu. That shows
argument names, types, shapes, dtypes and gradients; no number is computed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
# V4-Pro and one that is smaller in every way but those that the operators fix.
PRO = {
    "H": 128,
    "K": 512,
    "R": 32,
    "index_heads": 64,
    "index_width": 128,
    "topk": 1024,
    "D": 7168,
    "F": 3072,
    "E": 384,
}


def child() -> None:
    """What the child does; prints one JSON object."""
    import torch
    import torch_npu  # noqa: F401

    from kernels import _npu, _npu_check

    said: list[str] = []
    rows = _npu_check.check(say=said.append)
    found = {
        "rows": rows,
        "said": said,
        "planted": _planted(),
        "pro": _pro(),
        "explained": _explained(),
        "fused_adamw": torch._C._dispatch_has_kernel_for_dispatch_key("aten::_fused_adamw_", "PrivateUse1"),
        "adamw": _adamw(),
        "takes": [_npu.takes("npu::npu_moe_gating_top_k", name) for name in ("tid2eid", "tid3eid")],
    }
    print(json.dumps(found))


def _explained() -> dict:
    import torch

    from kernels import registry

    names = [name for name in registry.operators() if "npu" in registry.implementations(name)]
    return {name: registry.explain(name, "npu", torch.bfloat16) for name in names}


def _planted() -> dict[str, list[str]]:
    """What the check says of errors made on purpose."""
    import torch

    from kernels import _npu, _npu_check
    from kernels._cases import draw_case
    from kernels.grouped_swiglu.npu import grouped_swiglu
    from kernels.rms_norm.npu import rms_norm
    from kernels.rope.npu import rope

    right = _npu.call

    def checked(operator: str, run, call=right) -> list[str]:
        _npu.call = call
        try:
            with _npu.unlimited():
                return _npu_check.problems(operator, run, draw_case(operator, 0), torch.bfloat16)
        finally:
            _npu.call = right

    def renamed(operator, *args, **kwargs):
        return right(operator, *args, **{{"alpha": "slope"}.get(k, k): v for k, v in kwargs.items()})

    def word(operator, *args, **kwargs):
        return (
            right(operator, *args[:-1], 1.0) if operator == "npu::npu_rotary_mul" else right(operator, *args)
        )

    return {
        "nothing": checked("rope", rope),
        "an argument of another name": checked("grouped_swiglu", grouped_swiglu, renamed),
        "an argument of another type": checked("rope", rope, word),
        "an operator that is not there": checked(
            "rms_norm", lambda x, weight, eps: _npu.call("npu::npu_rms_normal", x, weight, eps)
        ),
        "a wrong dtype": checked("rope", lambda x, cos, sin: rope(x, cos, sin).float()),
        "a wrong shape": checked("rope", lambda x, cos, sin: rope(x, cos, sin)[..., :1]),
        "a missing gradient": checked("rms_norm", lambda x, weight, eps: rms_norm(x, weight.detach(), eps)),
    }


def _pro() -> dict:
    """Which fused operators run, and what falls back, at the sizes of V4-Pro: packed rows of 1024 tokens."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from kernels import _npu_check, registry
    from kernels._cases import Rows, whole

    T, H, K, R, S = 1024, PRO["H"], PRO["K"], PRO["R"], 256
    rows = whole(1, T)
    rows = Rows(rows.position_ids % 640, (rows.position_ids >= 640).long())
    real = rows.geometry()
    found = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        geometry = _npu_check.on_npu(real)

        def new(*shape, dtype=torch.bfloat16, grad=True):
            x = torch.empty(shape, dtype=dtype, device="npu")
            return x.requires_grad_() if grad and dtype.is_floating_point else x

        def run(name, operator, *args, **kwargs):
            torch.use_deterministic_algorithms(False)
            with _npu_check.watched() as (fused, reasons):
                outputs = registry.get(operator, "npu", torch.bfloat16)(*args, **kwargs)
                _npu_check._backward([x for x in _npu_check.tensors(outputs)])
            found[name] = {"fused": sorted(fused), "fell_back": sorted(reasons)}

        angles = [new(1, T, R, dtype=torch.float32, grad=False) for _ in range(2)]
        attend = (new(1, T, H, K), new(1, T, K), new(H, dtype=torch.float32), *angles, geometry)
        common = {"window": 128, "eps": 1e-6, "want_mass": True}
        run("window", "shared_kv_attention", *attend, **common)
        run("hca", "shared_kv_attention", *attend, entries_BCK=new(1, T // 128, K), rate=128, **common)
        selected = torch.zeros(1, T, S, dtype=torch.long, device="npu")
        csa = {"entries_BCK": new(1, S, K), "rate": 4, "selected_BTS": selected}
        run("csa", "shared_kv_attention", *attend, **csa, **common)
        hi, wi = PRO["index_heads"], PRO["index_width"]
        index = new(1, T, hi, wi), new(1, S, wi), new(1, T, hi)
        run("indexer_select", "indexer_select", *index, geometry, rate=4, topk=PRO["topk"])
        mass = new(1, T, S, dtype=torch.float32, grad=False)
        run("indexer_kl", "indexer_kl", *index, mass, geometry, rate=4, selected_BTS=selected)
        run("rms_norm", "rms_norm", new(1, T, PRO["D"]), new(PRO["D"]), 1e-6)
        experts = torch.zeros(T, 6, dtype=torch.long, device="npu")
        weights = new(T, 6, dtype=torch.float32)
        gate_up, down = new(PRO["E"] // 16, 2 * PRO["F"], PRO["D"]), new(PRO["E"] // 16, PRO["D"], PRO["F"])
        run("experts", "grouped_swiglu", new(T, PRO["D"]), experts, weights, gate_up, down, 10.0)
        router = new(T, PRO["D"]), new(PRO["E"], PRO["D"])
        options = {
            "k": 6,
            "scaling": 2.5,
            "want_scores": True,
            "bias_E": new(PRO["E"], dtype=torch.float32, grad=False),
        }
        run("router", "routing", *router, scoring="sqrtsoftplus", **options)
        run("sigmoid router", "routing", *router, scoring="sigmoid", **options)
        head = new(129280, PRO["D"])
        targets = torch.zeros(T, dtype=torch.long, device="npu")
        run("logprob", "linear_logprob", new(T, PRO["D"]), head, targets)
    return found


def _adamw() -> list[str]:
    """The optimizer's fused kernel on a fake parameter of device npu."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        parameter = torch.nn.Parameter(torch.empty(8, device="npu"))
        parameter.grad = torch.empty_like(parameter)
        optimizer = torch.optim.AdamW([parameter], fused=True)
        optimizer.step()
        return sorted({x.device.type for x in optimizer.state[parameter].values()})


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    import system_packages

    from lab_utils.ascend import stand_in, wheel

    if wheel.location() is None:
        pytest.skip("no torch_npu wheel beside this environment: make setup")
    system_packages.installed(("gcc",), ("gcc", "libc6-dev"))
    folder = tmp_path_factory.mktemp("cann")
    stand_in.build(folder)
    environment = stand_in.environment(folder)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, __file__], cwd=folder, env=environment, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_implementation_passes_its_operators_schemas_and_metas(found):
    assert found["said"] == []
    assert all(row["ok"] for row in found["rows"])
    ran = {row["operator"] for row in found["rows"] if row["cases"]}
    assert ran == set(found["explained"]) - {"hyper_connection_pre", "hyper_connection_post"}


def test_the_fused_operators_are_called_and_not_the_fall_back(found):
    import importlib

    for row in found["rows"]:
        if row["cases"]:
            expected = set(importlib.import_module(f"kernels.{row['operator']}.npu").OPERATORS)
            assert set(row["fused"]) == expected, row
    reasons = {reason for row in found["rows"] if row["cases"] for reason in row["fell_back"]}
    assert reasons == {"npu_moe_gating_top_k has softmax and sigmoid, but not sqrtsoftplus"}


def test_the_registry_takes_them_on_npu_and_says_what_is_not_installed(found):
    for operator, told in found["explained"].items():
        if operator.startswith("hyper_connection"):
            assert told["implementation"] == "torch" and "is not installed" in told["reason"]
        else:
            assert told["implementation"] == "npu"


@pytest.mark.parametrize(
    "what, text",
    [
        ("an argument of another name", "slope"),
        ("an argument of another type", "str"),
        ("an operator that is not there", "npu_rms_normal"),
        ("a wrong dtype", "float32"),
        ("a wrong shape", "output 0"),
        ("a missing gradient", "weight has no gradient"),
    ],
)
def test_a_planted_error_is_found(found, what, text):
    assert found["planted"]["nothing"] == []
    assert any(text in why for why in found["planted"][what])


def test_at_the_sizes_of_pro_only_the_router_falls_back(found):
    fell = {name: row["fell_back"] for name, row in found["pro"].items() if row["fell_back"]}
    assert list(fell) == ["router"]
    assert "npu::npu_sparse_flash_attention_grad" in found["pro"]["csa"]["fused"]
    assert "npu::npu_fusion_attention_grad" in found["pro"]["hca"]["fused"]
    assert "npu::npu_sparse_flash_attention" not in found["pro"]["hca"]["fused"]
    assert found["pro"]["indexer_kl"]["fused"] == ["npu::npu_lightning_indexer_grad"]


def test_whether_a_release_takes_an_argument_is_read_off_its_schema(found):
    assert found["takes"] == [True, False]


def test_the_optimizers_fused_kernel_exists_on_npu(found):
    assert found["fused_adamw"] and found["adamw"] == ["npu"]


if __name__ == "__main__":
    child()
