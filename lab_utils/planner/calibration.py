"""Predictions beside what is known, in one table: ``lab plan --calibration``, ``docs/calibration.md``.

No figure of a cluster was chosen to meet a number in this table. Efficiencies come from measurements of single
operators and from assumptions named in ``clusters/*.yaml``; a row says what else its comparison takes for granted, and
by how much it misses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from lab_utils.planner.assumptions import Assumptions
from lab_utils.planner.cluster import Case, find
from lab_utils.planner.own import QUANTITIES, machines, predicted
from lab_utils.planner.peers import PANGU, V3, Run, tokens_per_s
from lab_utils.planner.placed import place
from lab_utils.planner.rates import Rates
from lab_utils.planner.search import search
from lab_utils.planner.timing import of_placed
from lab_utils.recipe import Recipe

OWN = "`lab bench plan`"  # whose runs are our own
CASES: tuple[Case, ...] = ("low", "expected", "high")
# Of runs whose kernels and overlap are their own: what the engine doesn't do, but they did or may have done.
PEER = Assumptions(
    hidden_exchange=1.0,
    hidden_messages=True,
    imbalance=1.0,
    swapped=True,
)


@dataclass(frozen=True)
class Row:
    """One comparison; ``low`` and ``high`` are the ends of the cluster's efficiencies."""

    what: str
    quantity: str
    published: float
    low: float
    predicted: float
    high: float
    assumed: str
    source: str

    @property
    def miss(self) -> float:
        """Predicted over published, less one."""
        return self.predicted / self.published - 1

    @property
    def brackets(self) -> bool:
        return min(self.low, self.high) <= self.published <= max(self.low, self.high)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "miss": self.miss, "brackets": self.brackets}


@cache
def rows() -> tuple[Row, ...]:
    """All comparisons, none left out."""
    return (*_published_pro(), *_pangu(), *_bridge(), *_v3(), *_measured())


def _recipe(preset: str, **changes: Any) -> Recipe:
    tree = {
        "model": {"source": f"preset:{preset}", "dtype": "bfloat16", "indexer_loss": 0.01},
        "data": {"train": [{"manifest": "any"}], "row_tokens": 4096},
    }
    return Recipe.parse(tree).with_changes(changes)


def _ends(of: Callable[[Case], float]) -> tuple[float, float, float]:
    low, expected, high = (of(case) for case in CASES)
    return low, expected, high


# -- published runs ---------------------------------------------------------------------------------------------------

# Batches of 4K rows. 34.9 % in 27 s are 22.0M, 23.4M or 24.9M tokens on 1,024 packages of 708 TFLOPS (MindSpeed-LLM,
# verl), 752 (arXiv 2506.12708) or 800 (Huawei, 2025); an interleaved schedule takes multiples of 2,048 rows.
PRO_ROWS = (4096, 5632, 6144)


def _published_pro() -> list[Row]:
    """The V4-Pro run on about a thousand 910C; its layout, batch and denominator are not published."""
    cluster, source = find("ascend-910c"), "press, June 2026 (SLAI, HIT Shenzhen, SRIBD, Huawei); 1,500 steps"
    found = []
    for count in PRO_ROWS:
        recipe = _recipe("pro", **{"optim.kind": "muon", "schedule.batch_tokens": count * 4096})
        best = {
            case: search(recipe, cluster, 2048, PEER.but(case=case), offload=False).best for case in CASES
        }
        steps = [best[case].time.seconds if best[case] else float("nan") for case in CASES]
        used = [100 * best[case].time.mfu if best[case] else float("nan") for case in CASES]
        at = best["expected"].name if best["expected"] else "none"
        text = (
            f"1,024 packages, a batch of {count * 4096 / 1e6:.1f}M tokens in 4K rows, no multi-token prediction; our "
            "fastest layout that fits with messages hidden, even experts, "
            f"optimizer swapped ({at})"
        )
        what = f"V4-Pro, all weights, 1,024 × 910C, {count * 4096 / 1e6:.1f}M tokens"
        found.append(Row(what, "s a step", 27.0, *steps, text, source))
        found.append(Row(what, "MFU, % of 752", 34.9, *used, "the same", source))
    return found


def _pangu() -> list[Row]:
    cluster, report = find("ascend-910b"), "arXiv 2505.04519"
    found = []
    runs = (
        ("6,144 × 910B", 30.0, Run(PANGU, 6144, 8, 16, 32, 2, 4608 * 4096, 4096, 0.3), report),
        (
            "10,240 × 910B",
            41.0,
            Run(PANGU, 10240, 8, 16, 32, 2, 7680 * 8192, 8192, 0.3),
            "press, May 2025: TP8 PP16 EP32, 8K rows",
        ),
    )
    for where, published, run, source in runs:
        flops = 6.0 * run.model.macs(run.row_tokens)

        def mfu(case: Case, run: Run = run, flops: float = flops) -> float:
            speed = tokens_per_s(run, cluster, PEER.but(case=case, hidden_exchange=0.9, imbalance=1.1))
            return 100 * flops * speed / (run.ranks * cluster.device.tflops.value * 1e12)

        text = (
            f"TP{run.tp} PP{run.pp} EP{run.ep}, {run.virtual_stages} virtual stages, "
            f"{run.batch_tokens / 1e6:.0f}M tokens a step (assumed), 0.9 of the all-to-all hidden, 0.3 of the forward "
            "pass again; MFU by 6·MAC with causal attention, of 376 TFLOPS"
        )
        if run.ranks < 8000:
            text += "; layout of the first run assumed; its 1.46M tokens/s and 30 % don't agree at any count of FLOPs"
        found.append(Row(f"Pangu Ultra MoE 718B, {where}", "MFU, %", published, *_ends(mfu), text, source))
    return found


def _bridge() -> list[Row]:
    """Megatron-Bridge on GB300; MXFP8."""
    cluster, found = find("gb300"), []
    runs = (
        (
            "V4-Pro, 256 × GB300",
            3050.0,
            _recipe(
                "pro",
                **{
                    "parallel.pp": 4,
                    "parallel.virtual_stages": 4,
                    "parallel.ep": 64,
                    "schedule.micro_rows": 1,
                },
            ),
            4096,
            256,
            "PP4 VPP4 EP64, 4096 × 4K, mHC made again",
            "NVIDIA-NeMo/Megatron-Bridge#4808: 21.5 s an iteration; tokens/s derived",
        ),
        (
            "V4-Flash, 128 × GB300",
            8224.0,
            _recipe("flash", **{"parallel.ep": 64, "schedule.micro_rows": 1}),
            2048,
            128,
            "PP1 EP64, 2048 × 4K",
            "Megatron-Bridge's performance summary, 2026",
        ),
    )
    for what, published, recipe, batch, ranks, text, source in runs:
        laid = recipe.with_changes(
            {"schedule.batch_tokens": batch * 4096, "model.checkpointing": "mhc", "model.mtp_loss": 0.1}
        )
        placed = place(laid, ranks)

        def speed(case: Case, laid: Recipe = laid, placed: Any = placed, ranks: int = ranks) -> float:
            rates = Rates(cluster, PEER.but(case=case, fp8=True))
            return of_placed(laid, placed, rates).tokens_per_s / ranks

        text += ", MXFP8 products, forced balance, all-to-all hidden, multi-token prediction trained"
        found.append(Row(what, "tokens/s a GPU", published, *_ends(speed), text, source))
    return found


def _v3() -> list[Row]:
    cluster = find("h800")
    run = Run(V3, 2048, 1, 16, 64, 1, 15360 * 4096, 4096, 0.15, dual=True, computing=112 / 132)

    def speed(case: Case) -> float:
        return tokens_per_s(run, cluster, PEER.but(case=case, fp8=True)) / run.ranks

    text = (
        "PP16 EP64 DualPipe (half the bubble), 63M tokens a step, fp8 products, all-to-all hidden by 20 of 132 SMs, "
        "0.15 made again"
    )
    source = "arXiv 2412.19437: 180K H800 hours for a trillion tokens"
    return [
        Row("DeepSeek-V3, 2,048 × H800", "tokens/s a GPU", 1e12 / 180e3 / 3600, *_ends(speed), text, source)
    ]


# -- our own measurements ---------------------------------------------------------------------------------------------


def _measured() -> list[Row]:
    """Every run of every machine of ``planner/own``, in all that was measured of it."""
    found = []
    for machine in machines():
        for run in machine["runs"]:
            size = f"{run['rows']} × {run['row_tokens']:,} tokens"
            name = f"{run['source'].removeprefix('preset:')}, {size}, {run['layout']}"
            source = f"{OWN}, {machine['machine']}"
            for key, value in predicted(machine["cluster"], run).items():
                found.append(Row(name, QUANTITIES[key], run[key], value, value, value, TAKEN[key], source))
    return found


TAKEN = {
    "seconds": "rates of the machine's cores; sustained share and calls from data-parallel steps of reference and tiny "
    "that took turns with the run's",
    "tensors_mib": "nothing measured",
    "peak_mib": "tensors; the heap's share and the rest of the process from steps of reference and tiny",
}
