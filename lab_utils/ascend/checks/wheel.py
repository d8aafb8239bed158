"""torch_npu is there, apart, and of torch's release; everybody else's ``import torch`` is whole."""

from __future__ import annotations

from collections.abc import Iterator

from lab_utils.ascend import wheel

ORDER = 10
STAND_IN = False
PROVES = {
    "wheel": "torch_npu and torch are a pair, and torch_npu breaks no `import torch` on a machine without CANN"
}


def run() -> Iterator[tuple[str, bool, str]]:
    from importlib.metadata import version
    from importlib.util import find_spec

    place = wheel.required()
    beside = find_spec("torch_npu") is not None
    import torch

    release = version("torch").split("+")[0]
    found = f"torch_npu {wheel.VERSION} in {place}, torch {torch.__version__}"
    if beside:
        yield "wheel", False, f"{found}; but torch_npu is importable beside torch: pip uninstall torch_npu"
    elif release.split(".")[:2] != wheel.VERSION.split(".")[:2]:
        yield "wheel", False, f"{found}: the two must be of one minor version"
    else:
        yield "wheel", True, found
