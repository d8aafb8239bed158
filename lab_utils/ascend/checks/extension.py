"""The real extension loads against the stand-in and is a device of torch's."""

from __future__ import annotations

from collections.abc import Iterator

from lab_utils.ascend.stand_in import DEVICES

ORDER = 20
PROVES = {
    "extension": "every symbol that torch_npu needs of CANN has a known name; npu is a device of torch and of ours, "
    "hccl a backend of its groups"
}


def run() -> Iterator[tuple[str, bool, str]]:
    import torch
    import torch_npu

    from lab_utils.accelerators.npu import Npu

    device = Npu().setup(local_rank=3)
    kind, peak = Npu().device_name(), Npu().peak("bfloat16")
    operators = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("npu::")]
    count, hccl = torch.npu.device_count(), torch.distributed.is_hccl_available()
    capacity = Npu().memory().capacity or 0
    ok = (
        count == DEVICES
        and hccl
        and torch.npu.current_device() == device.index == 3
        and peak.flops is not None
        and capacity == 64 * 2**30
        and torch.utils.backend_registration._privateuse1_backend_name == "npu"
    )
    found = f"torch_npu {torch_npu.__version__}: {count} × {kind} of {capacity / 2**30:.0f} GiB, hccl {hccl}"
    yield "extension", ok, f"{found}, {len(operators)} npu operators"
