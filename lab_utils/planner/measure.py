"""``lab doctor --measure``: this machine as a cluster, ``ASCENT_CACHE/clusters/local.yaml``, in two minutes.

A device is a core, and all cores work at once, as those of a layout do: what a lone one reaches of the memory's
bandwidth, no rank ever has. Measured in child processes of one thread: fp32 products by size, attention, memory,
messages between two ranks; then steps of two small models, data-parallel over the cores (``planner/fitted.py``). GPUs
and NPUs are described by a file of their own (``docs/planner.md``).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from lab_utils.console import say
from lab_utils.errors import RunError

SIZES = (64, 128, 256, 512, 1024)
SECONDS = 1.5  # of each measurement
DEVICE = "measured on this machine, a thread on each core at once"
COPIES = 4  # cores that are measured at once, at most
PER_CORE = ("products", "attention", "streams", "disk")
TENSORS = (0.25, 1.0, 4.0, 16.0, 64.0)  # MiB of each tensor whose product with another is measured


def run(as_json: bool = False) -> Path:
    """Measure, write the file, and say where it is.

    Raises:
        RunError: a measurement failed.
    """
    path = write(measure())
    if as_json:
        print(json.dumps(yaml.safe_load(path.read_text(encoding="utf-8")), indent=2))
    else:
        say(f"This machine as a cluster: {path} (lab plan RECIPE --cluster local).")
    return path


def measure() -> dict[str, Any]:
    """Figures by name, SI units."""
    from lab_utils.planner.fitted import steps

    say("measuring products, attention and memory on all cores …")
    with ThreadPoolExecutor(COPIES) as pool:
        every = list(pool.map(_child, ["one"] * min(COPIES, os.cpu_count() or 1)))
    found = {**every[0], **{name: _mean([each[name] for each in every]) for name in PER_CORE}}
    say("measuring messages between two ranks …")
    found |= _child("two")
    say("measuring steps of small models on all cores …")
    return {**found, "steps": steps(len(every))}


def write(found: dict[str, Any]) -> Path:
    """The cluster's file from figures."""
    from lab_utils.accelerators.cpu import cache_dir
    from lab_utils.planner.cluster import Cluster
    from lab_utils.planner.fitted import fitted

    path = cache_dir() / "clusters" / "local.yaml"
    tree = fitted(tree_of(found), found.get("steps", []))
    Cluster.model_validate(tree)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def tree_of(found: dict[str, Any]) -> dict[str, Any]:
    """A cluster's YAML from what was measured."""

    def figure(value: float, source: str = DEVICE) -> dict[str, Any]:
        return {"value": float(f"{value:.4g}"), "source": source}

    peak = max(found["products"].values())
    streams = {float(size): rate for size, rate in found["streams"].items()}
    bandwidth = streams[max(streams)]
    caches = {size: float(f"{rate / bandwidth:.4g}") for size, rate in streams.items()}
    curve = {float(size): float(f"{rate / peak:.4g}") for size, rate in found["products"].items()}
    cores = found["cores"]
    return {
        "name": "local",
        "about": f"this machine, {cores} cores, measured {found['date']}",
        "kind": "cpu",
        "devices_per_chip": 1,
        "chips_per_node": cores,
        "device": {
            "memory_gib": figure(found["memory"] / cores / 2**30, "the machine's memory over its cores"),
            "tflops": figure(
                peak / 1e12, f"{DEVICE}: the fastest fp32 product, in which all products run on a CPU"
            ),
            "tflops_fp32": figure(peak / 1e12),
            "bandwidth_tb_s": figure(
                bandwidth / 1e12, f"{DEVICE}: products of two tensors of {max(TENSORS):.0f} MiB into a third"
            ),
        },
        "planes": [
            {
                "name": "memory",
                "gb_s": figure(
                    found["message"] / 1e9, "measured: gloo, all-gather between two ranks, caches cold"
                ),
                "latency_us": figure(found["latency"] * 1e6, "measured: gloo, an all-reduce of one number"),
                "all_to_all_gb_s": {
                    "points": {2.0: float(f"{found['exchange'] / 1e9:.4g}")},
                    "source": "measured: gloo, an uneven all-to-all between two ranks, caches cold",
                },
            }
        ],
        "host": {
            "memory_gib": figure(found["memory"] / cores / 2**30, "the machine's memory over its cores"),
            "gb_s": figure(bandwidth / 1e9, "the device's memory is the host's"),
            "tflops": figure(peak / 1e12),
            "storage_gb_s": figure(found["disk"] / 1e9, "measured: 64 MiB written and synced"),
        },
        "efficiency": {
            "products": {"points": curve, "source": f"{DEVICE}: square fp32 products"},
            "sustained": figure(1.0, "the curve is of this machine"),
            "attention": figure(
                min(1.0, found["attention"] / peak), f"{DEVICE}: shared_kv_attention, both ways"
            ),
            "memory": figure(1.0, "the bandwidth is measured"),
            "caches": {
                "points": caches,
                "source": f"{DEVICE}: products of two tensors into a third, six in turn",
            },
            "network": figure(1.0, "the bandwidth is measured"),
        },
        "watts_per_chip": figure(15.0, "assumed: a core and its share of a server"),
        "runtime_gib": figure(found["resident"] / 2**30, "measured: a process that has imported torch"),
        "communicator_mib": figure(2.0, "assumed: gloo's buffers"),
        "allocator_share": figure(0.1, "assumed: glibc keeps what it freed"),
        "host_wait_us": figure(0.0, "a CPU is its own host"),
        "data_tokens_s": figure(2e6, "assumed: packed rows are cut ahead"),
    }


def _mean(values: list[Any]) -> Any:
    if isinstance(values[0], dict):
        return {key: sum(each[key] for each in values) / len(values) for key in values[0]}
    return sum(values) / len(values)


def _child(what: str) -> dict[str, Any]:
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "lab_utils.planner.measure", what]
    if what == "two":
        ranks = ["--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", "0", "--standalone"]
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *ranks,
            "-m",
            "lab_utils.planner.measure",
            what,
        ]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["killed"])[-1]
        raise RunError(f"lab doctor --measure: the measurement of {what} failed: {last[:200]}.")
    return json.loads(lines[-1])


def _rate(work: float, call: Any) -> float:
    """Work a second of the fastest call within some seconds."""
    best, end = float("inf"), time.perf_counter() + SECONDS
    call()
    while (start := time.perf_counter()) < end or best == float("inf"):
        call()
        best = min(best, time.perf_counter() - start)
    return work / best


def _one() -> dict[str, Any]:
    """Of one core."""
    import psutil
    import torch  # noqa: F401  (what every rank holds)

    from lab_utils.accelerators.cpu import measure_matmul

    resident = psutil.Process().memory_info().rss
    streams = {int(size * 2**20): _streams(int(size * 2**18)) for size in TENSORS}
    with tempfile.NamedTemporaryFile() as file:

        def write_out() -> None:
            file.seek(0)
            file.write(bytes(64 << 20))
            file.flush()
            os.fsync(file.fileno())

        disk = _rate(float(64 << 20), write_out)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cores": psutil.cpu_count(logical=True) or 1,
        "memory": psutil.virtual_memory().total,
        "products": {size: measure_matmul("float32", size, SECONDS) for size in SIZES},
        "attention": _attention(),
        "streams": streams,
        "disk": disk,
        "resident": resident,
    }


def _streams(elements: int) -> float:
    """Bytes a second of fp32 products of two tensors into a third: six in turn, like operators that follow another."""
    import torch

    ring = [torch.full((elements,), 1.0 + i * 1e-6) for i in range(6)]

    def once_around() -> None:
        for i in range(6):
            torch.mul(ring[i], ring[(i + 1) % 6], out=ring[(i + 2) % 6])

    return _rate(6 * 3.0 * ring[0].nbytes, once_around)


def _attention() -> float:
    """FLOP/s of the attention operator, forward and backward, counted as ``work.layer`` counts the plain kernels."""
    import torch

    from kernels import registry
    from kernels.geometry import Geometry

    T, H, K, window = 1024, 8, 64, 64
    positions = torch.arange(T)[None]
    geometry = Geometry(positions, torch.zeros_like(positions))
    q = torch.randn(1, T, H, K, requires_grad=True)
    kv = torch.randn(1, T, K, requires_grad=True)
    sinks = torch.zeros(H, requires_grad=True)
    cos, sin = torch.ones(1, T, 8), torch.zeros(1, T, 8)
    attend = registry.get("shared_kv_attention", "cpu", torch.float32)

    def call() -> None:
        out, _ = attend(q, kv, sinks, cos, sin, geometry, window=window, eps=1e-6)
        out.backward(torch.ones_like(out))

    keys = 1 + window + window // 2
    return _rate(7 * 2.0 * T * H * K * keys, call)


def _two() -> dict[str, Any]:
    """Of messages between two ranks."""
    import torch
    import torch.distributed as dist

    from lab_utils.collectives import all_gather

    dist.init_process_group("gloo")
    own, all_of_it = torch.zeros(4 << 20), torch.empty(8 << 20)
    message = _cold(lambda: all_gather(all_of_it, own), float(own.nbytes))
    half = [len(own) // 2, len(own) // 2]
    parts = torch.empty_like(own)
    exchange = _cold(lambda: dist.all_to_all_single(parts, own, half, half), own.nbytes / 2)
    one = torch.zeros(1)
    latency = 1.0 / _steady(lambda: dist.all_reduce(one), 1.0)
    rank = dist.get_rank()
    dist.barrier()
    dist.destroy_process_group()
    return {"message": message, "exchange": exchange, "latency": latency} if rank == 0 else {}


def _cold(call: Any, work: float, times: int = 20) -> float:
    """Work a second of the middle of so many calls; before each of them other tensors go through the caches, as those
    of a layer do."""
    import torch
    import torch.distributed as dist

    other, spent = torch.zeros(16 << 20), []
    for _ in range(times):
        other.add_(1.0)
        dist.barrier()
        start = time.perf_counter()
        call()
        spent.append(time.perf_counter() - start)
    return work / sorted(spent)[times // 2]


def _steady(call: Any, work: float, times: int = 20) -> float:
    """Work a second of so many calls, the same number on every rank."""
    call()
    start = time.perf_counter()
    for _ in range(times):
        call()
    return work * times / (time.perf_counter() - start)


if __name__ == "__main__":
    figures = _one() if sys.argv[1] == "one" else _two()
    if figures:
        print(json.dumps(figures), flush=True)
