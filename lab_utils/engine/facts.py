"""What only the ranks of a job know, left for the run card: machines, chips, peak rate, content of the data.

``facts.json`` in the run directory; an attempt is added each time the run is started or resumed. Telling is no part of
training: whatever fails here is a warning.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from typing import Any

from lab_utils.accelerators import _cann
from lab_utils.engine.reduce import gather_objects

FILE = "facts.json"
# Variables that decide how ranks are connected and how a device works.
TOLD = (
    "HCCL_",
    "NCCL_",
    "GLOO_",
    "ASCEND_RT_",
    "TASK_QUEUE_ENABLE",
    "PYTORCH_NPU_ALLOC_CONF",
    "CPU_AFFINITY_CONF",
)


def record(engine: Any) -> None:
    """Add this attempt to ``facts.json``; collective, rank 0 writes.

    Args:
        engine: an ``Engine`` that is open.
    """
    nodes = gather_objects(socket.gethostname())
    if engine.rank:
        return
    try:
        _write(engine, nodes)
    except Exception as error:  # a full disk, parts without a census: the run goes on
        print(
            f"warning: {FILE} could not be written ({type(error).__name__}: {error}).",
            file=sys.stderr,
            flush=True,
        )


def _write(engine: Any, nodes: list[str]) -> None:
    import json

    from lab_utils.runs.directory import read_json, write_atomic

    path = engine.run_dir.path / FILE
    known = read_json(path)
    attempts = known.get("attempts") if isinstance(known.get("attempts"), list) else []
    told = {**known, "attempts": [*attempts, _attempt(engine, nodes)], "data": _data(engine.parts)}
    write_atomic(path, json.dumps(told, indent=1, ensure_ascii=False, default=str))


def _attempt(engine: Any, nodes: list[str]) -> dict[str, Any]:
    recipe, accelerator, parallel = engine.recipe, engine.accelerator, engine.recipe.parallel
    capacity = accelerator.memory().capacity
    return {
        "opened": round(time.time(), 3),
        "from_step": engine.progress.step,
        "ranks": engine.world,
        "nodes": list(dict.fromkeys(nodes)),
        "kind": accelerator.name,
        "device": accelerator.device_name(),
        "device_gib": round(capacity / 2**30, 2) if capacity else None,
        "peak_flops": engine.peak.flops,
        "peak_source": engine.peak.source,
        "host_cores": os.cpu_count(),
        "cann": _cann.cann_version(),
        "driver": _cann.driver_version(),
        "environment": {key: value for key, value in sorted(os.environ.items()) if key.startswith(TOLD)},
        "layout": {
            "dp": engine.dp,
            "cp": parallel.cp,
            "ep": engine.layout.ep_size,
            "pp": engine.layout.pp_size,
            "virtual_stages": parallel.virtual_stages,
            "zero": parallel.zero,
            "offload": parallel.offload,
            "micro_rows": engine.micro_rows,
            "accumulation": engine.accumulation,
        },
        "recipe_hash": recipe.hash,
    }


def _data(parts: Any) -> dict[str, Any]:
    return {
        "train": parts.train.census(),
        "validation": parts.validation.census() if parts.validation is not None else [],
        "questions": len(parts.questions),
    }
