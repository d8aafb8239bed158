"""Models of others by their work, for comparing predictions with published runs: latent attention and experts.

DeepSeek-V3 (arXiv 2412.19437) and Pangu Ultra MoE (arXiv 2505.04519) share that architecture. Nothing here is run by
the engine; what those systems did otherwise (tensor parallelism, schedules, overlap) is an argument.
"""

from __future__ import annotations

from dataclasses import dataclass

from lab_utils.planner.assumptions import Assumptions
from lab_utils.planner.cluster import Cluster
from lab_utils.planner.network import Group, all_to_all, ring
from lab_utils.planner.rates import Rates
from lab_utils.planner.work import Product


@dataclass(frozen=True)
class LatentModel:
    """Sizes of a model with latent attention (V3 report §4.2; Pangu Ultra MoE §2.3)."""

    name: str
    layers: int = 61
    dense_layers: int = 3
    hidden: int = 7168
    heads: int = 128
    q_rank: int = 1536
    kv_rank: int = 512
    head_dim: int = 128
    rope_dim: int = 64
    dense_width: int = 18432
    experts: int = 256
    active: int = 8
    expert_width: int = 2048
    vocabulary: int = 129280
    mtp: int = 1

    def macs(self, length: int) -> float:
        """Multiply-accumulates of a token, causal attention counted by half, multi-token prediction left out."""
        products = sum(p.flops / 2 for p in self.products(1, 1, 1, False)) * self.dense_layers
        products += sum(p.flops / 2 for p in self.products(1, 1, 1, True)) * (self.layers - self.dense_layers)
        scores = self.layers * self.heads * (2 * self.head_dim + self.rope_dim) * length / 2
        return products + scores + self.hidden * self.vocabulary

    def products(self, rows: float, ep: int, tp: int, routed: bool) -> list[Product]:
        """Forward products of one layer on a device."""
        D, H, h, r = self.hidden, self.heads // tp, self.head_dim, self.rope_dim
        found = [
            Product("attention", rows, D, self.q_rank + self.kv_rank + r),
            Product("attention", rows, self.q_rank, H * (h + r)),
            Product("attention", rows, self.kv_rank, 2 * H * h),
            Product("attention", rows, H * h, D),
        ]
        if not routed:
            return [*found, Product("shared", rows, D, self.dense_width // tp, groups=3)]
        local = max(1, self.experts // ep)
        each = rows / tp * self.active * ep / self.experts if ep > 1 else rows * self.active / self.experts
        return [
            *found,
            Product("router", rows, D, self.experts, precision="fp32"),
            Product("shared", rows, D, self.expert_width // tp, groups=3),
            Product("experts", each, D, 2 * self.expert_width, groups=local),
            Product("experts", each, self.expert_width, D, groups=local),
        ]


V3 = LatentModel("DeepSeek-V3")
PANGU = LatentModel("Pangu Ultra MoE", hidden=7680, vocabulary=153600)


@dataclass(frozen=True)
class Run:
    """A published run's layout, as far as it is known.

    Attributes:
        bubble: idle share of the pipeline, (stages - 1)/virtual stages per micro-batch, is computed; ``dual`` halves it
            (DualPipe).
        recompute: share of the forward pass that is made again.
        computing: share of the device's cores that compute while others move data.
    """

    model: LatentModel
    ranks: int
    tp: int
    pp: int
    ep: int
    virtual_stages: int
    batch_tokens: int
    row_tokens: int
    recompute: float
    dual: bool = False
    computing: float = 1.0


def tokens_per_s(run: Run, cluster: Cluster, assumed: Assumptions) -> float:
    """Of all devices: layers at the cluster's efficiencies, pipeline bubble, sums left out (they hide or are small)."""
    rates, m, N = Rates(cluster, assumed), run.model, run.row_tokens
    dp = run.ranks // run.pp // run.tp
    passes = max(run.pp, run.batch_tokens // run.row_tokens // dp)
    layers = [_layer(run, rates, N, routed=i >= m.dense_layers) for i in range(m.layers + m.mtp)]
    head = (
        4.0
        * (1 + m.mtp)
        * rates.product(Product("head", N, m.hidden, m.vocabulary // run.tp, precision="working"))
    )
    total = sum(layers) + head
    bubble = (run.pp - 1) / run.virtual_stages * (0.5 if run.dual else 1.0)
    step = (passes + bubble) * total / run.pp
    return dp * passes * N / step


def _layer(run: Run, rates: Rates, N: int, *, routed: bool) -> float:
    """Seconds of one layer, forward, backward and made again."""
    m, assumed, w = run.model, rates.assumed, 2
    uneven = assumed.imbalance if routed else 1.0
    forward = sum(
        rates.product(p) * (uneven if p.part == "experts" else 1.0)
        for p in m.products(N, run.ep, run.tp, routed)
    )
    # fp8 products leave attention and its softmax in bf16.
    scores = 2.0 * N * m.heads / run.tp * (2 * m.head_dim + m.rope_dim) * run.row_tokens / 2 / rates.attention
    k = m.active if routed else 1
    rows = (8 * k + 12) * m.hidden * w + 3.0 * (k + 1) * (m.expert_width if routed else m.dense_width) * w
    moved = N * (rows / run.tp + 6.0 * m.heads / run.tp * m.head_dim * w) / rates.bandwidth
    forward, scores = forward / run.computing, scores / run.computing
    total = 3.0 * forward + 3.5 * scores + 3.0 * moved + run.recompute * (forward + scores + moved)
    if routed:
        sent = float(m.active * N / run.tp * m.hidden * w) * (run.ep - 1) / run.ep * uneven
        group = Group(run.ep, run.ep, run.ep, run.ranks)
        once = all_to_all(rates.cluster, group, sent, assumed.case)
        total += (4 + 2 * run.recompute) * once * (1 - assumed.hidden_exchange)
    if run.tp > 1:
        # Sequence parallel: four gathers or scatters of the layer's input each way.
        one = ring(
            rates.cluster, Group(run.tp, run.tp, run.tp, run.ranks), float(N * m.hidden * w), assumed.case
        )
        total += (8 + 4 * run.recompute) * one
    return total
