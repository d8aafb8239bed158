"""What one device computes, moves and sends for a micro-batch, layer by layer: counts, no seconds.

Of a DeepSeek-V4 as the engine runs it: ``models/deepseek_v4`` and the operators in ``kernels``. Legend: N tokens of the
micro-batch, D model, H heads, K head dimension, F expert width, k experts of a token, m compression rate, n streams.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from math import ceil

from lab_utils.models.deepseek_v4.counting import CSA, HCA, WINDOW_ONLY, _entry_keys, _window_keys, reach
from lab_utils.planner.kept import CHUNK
from lab_utils.planner.numbers import Numbers

HYPER = "hyper_connections"


@dataclass(frozen=True)
class Product:
    """``groups`` products ``[rows, inner] · [inner, outer]``, forward.

    Attributes:
        part: attention, indexer, experts, shared, router or head.
        precision: working (the recipe's), or fp32 where the operator computes so.
        backward: products of the same size in the backward pass: 2 trained, 0 forward only; 3 where logits are made
            again.
    """

    part: str
    rows: float
    inner: int
    outer: int
    groups: int = 1
    precision: str = "working"
    backward: float = 2.0

    @property
    def flops(self) -> float:
        return 2.0 * self.groups * self.rows * self.inner * self.outer


@dataclass(frozen=True)
class Work:
    """Of one layer and micro-batch on one device, forward; backward as stated.

    Attributes:
        attention, attention_backward: FLOPs of scores and values, done as one operator.
        scores: FLOPs of the indexer, with its loss also of its gradients, all in the forward pass.
        moved, moved_backward: bytes through memory by part; ``tensors``: of one of the tensors that are moved.
        sent: bytes of one all-to-all; ``exchanges`` of them in a forward pass, as many in a backward one.
        shared_beside: the shared expert runs while the first all-to-all travels.
        before: bytes of the tokens before a run, where a row is cut over ranks; ``entries``, ``entries_backward``: of
            the whole row's entries, and of their gradients in fp32.
    """

    products: tuple[Product, ...]
    attention: float = 0.0
    attention_backward: float = 0.0
    scores: float = 0.0
    moved: dict[str, float] = field(default_factory=dict)
    moved_backward: dict[str, float] = field(default_factory=dict)
    tensors: dict[str, float] = field(default_factory=dict)
    sent: float = 0.0
    exchanges: int = 2
    shared_beside: bool = True
    before: float = 0.0
    entries: float = 0.0
    entries_backward: float = 0.0


@cache
def layer(
    n: Numbers,
    kind: str,
    T: int,
    N: int,
    ep: int,
    w: int,
    *,
    indexer_loss: bool,
    warmup: bool,
    fused: bool,
    cp: int = 1,
) -> Work:
    """A block on documents as long as the row.

    Args:
        cp: ranks that share a row. Counted is the one with its end, whose queries see most: the others wait for it.
        fused: attention, hyper-connections and SwiGLU as one operator each; else the plain ones of ``kernels``.
    """
    D, H, K, q, F, k = (
        n.hidden_size,
        n.num_attention_heads,
        n.head_dim,
        n.q_lora_rank,
        n.moe_intermediate_size,
        n.num_experts_per_tok,
    )
    g, r, E = n.o_groups, n.o_lora_rank, n.n_routed_experts
    trained = 0.0 if warmup else 2.0
    index = 2.0 if indexer_loss else 0.0
    products = [
        Product("attention", N, D, q, backward=trained),
        Product("attention", N, q, H * K, backward=trained),
        Product("attention", N, D, K, backward=trained),
        Product("attention", N, H * K // g, r, groups=g, backward=trained),
        Product("attention", N, g * r, D, backward=trained),
        Product("router", N, D, E, precision="fp32", backward=trained),
        Product("experts", k * N * ep / E, D, 2 * F, groups=E // ep, backward=trained),
        Product("experts", k * N * ep / E, F, D, groups=E // ep, backward=trained),
    ]
    products += [Product("shared", N, D, F, groups=3 * n.n_shared_experts, backward=trained)]
    keys, scores, indexed = _window_keys(T, n.sliding_window), 0.0, False
    if kind != WINDOW_ONLY:
        m, inner = n.compress_rates[kind], K * (2 if kind == CSA else 1)
        products += [Product("attention", N, D, inner, groups=2, backward=trained)]
        topk = T // m if kind == HCA or warmup else n.index_topk
        keys += _last_keys(T, m, topk, cp)
    if kind == CSA:
        indexed = indexer_loss or (n.index_topk < T // n.compress_csa and not warmup)
    if indexed:
        Hi, Ki, m = n.index_n_heads, n.index_head_dim, n.compress_csa
        products += [
            Product("indexer", N, D, 2 * Ki, groups=2, backward=index),
            Product("indexer", N, q, Hi * Ki, backward=index),
            Product("indexer", N, D, Hi, backward=index),
        ]
        once = 2.0 * N * Hi * Ki * _last_keys(T, m, T // m, cp)
        selects = n.index_topk < T // m and not warmup
        scores = once * (
            int(selects) + (3 if indexer_loss else 0)
        )  # to select; for the loss with two gradients
    if not fused:
        keys = _plain_keys(n, kind, T)
    one = 2.0 * N * H * K * keys
    moved, moved_backward = _moved(n, kind, T, N, ep, w, fused)
    if indexed and indexer_loss and not fused:
        # Of a head's scores ten passes, of their sum and the loss thirty.
        moved["other"] += N * 0.55 * (T // n.compress_csa) * (10 * n.index_n_heads + 30) * 4.0
    return Work(
        products=tuple(products),
        attention=2 * one,
        attention_backward=0.0 if warmup else 5 * one,  # scores once more, and four gradients
        scores=scores,
        moved=moved,
        moved_backward={name: 0.0 for name in moved_backward} if warmup else moved_backward,
        tensors={"other": float(N * k * D * w), HYPER: float(N * n.hc_mult * D * w)},
        sent=float(k * N * D * w) * (ep - 1) / ep,
        **_of_others(n, kind, N, w, cp, indexed),
    )


def _last_keys(T: int, m: int, most: int, cp: int) -> float:
    """Mean number of entries that a query in the last of ``cp`` runs of a row compares."""
    before = T - T // cp
    rest = before * _entry_keys(before, m, most) if before else 0.0
    return (T * _entry_keys(T, m, most) - rest) / (T - before)


def _of_others(n: Numbers, kind: str, N: int, w: int, cp: int, indexed: bool) -> dict[str, float]:
    """Bytes that a rank gets of those that share its rows."""
    if cp == 1:
        return {}
    entries = 0.0
    if kind != WINDOW_ONLY:
        width = n.head_dim + (n.index_head_dim if indexed else 0)
        entries = float(cp * N / n.compress_rates[kind] * width)
    before = float(reach(n) * n.hidden_size * w)
    return {"before": before, "entries": w * entries, "entries_backward": 4 * entries}


def _plain_keys(n: Numbers, kind: str, T: int) -> float:
    """Keys that ``kernels/shared_kv_attention/torch.py`` computes a query: masked ones are computed as well."""
    w = n.sliding_window
    keys = 1.0 + w + (w // 2 if w >= 64 else w)
    return keys if kind == WINDOW_ONLY else keys + 0.55 * (T // n.compress_rates[kind])


def _moved(
    n: Numbers, kind: str, T: int, N: int, ep: int, w: int, fused: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes read and written, forward and backward, beside those of products."""
    D, S, F, k = n.hidden_size, n.hc_mult, n.moe_intermediate_size, n.num_experts_per_tok
    HK = n.num_attention_heads * n.head_dim
    norms, heads = 4.0 * D * w, 6.0 * HK * w  # two norms; a head's norm and rotation, and the output's back
    inner = 0 if kind == WINDOW_ONLY else 4 * n.head_dim * (2 if kind == CSA else 1)
    # Sorted by expert, and back and summed; what travels is sorted again where it arrives, and put back there.
    rows = ((6 * k if ep > 1 else 2 * k) + k + 1) * D * w
    glu = 3.0 * (k + n.n_shared_experts) * F * w * (1.0 if fused else 2.5)
    # Fused: collapse reads the streams, expand reads and writes them. Plain: in fp32, one pass a line of code.
    hyper = 2.0 * (3 * S + 2) * D * w if fused else 2.0 * S * D * 46
    hyper_backward = 2.0 * (6 * S + 3) * D * w if fused else 2.0 * S * D * 100
    scores = 0.0 if fused else n.num_attention_heads * _plain_keys(n, kind, T) * 4.0
    forward = {"other": norms + heads + rows + glu + inner * w + 6 * scores, HYPER: hyper}
    backward = {"other": 1.5 * (norms + heads) + 2 * rows + 2 * glu + 2 * inner * w + 12 * scores}
    backward[HYPER] = hyper_backward
    return ({x: N * v for x, v in forward.items()}, {x: N * v for x, v in backward.items()})


@cache
def ends(
    n: Numbers,
    N: int,
    w: int,
    *,
    loss_share: float,
    times: int = 1,
    warmup: bool = False,
    chunk: int = CHUNK,
) -> Work:
    """Behind the last layer: collapse, norm, head and loss; ``times``: with multi-token prediction once more a depth.

    ``kernels/linear_logprob`` makes the logits again in the backward pass, ``chunk`` of them at once.
    """
    D, S, V = n.hidden_size, n.hc_mult, n.vocab_size
    rows = N * loss_share
    head = Product("head", rows, D, V, groups=times, backward=0.0 if warmup else 3.0)
    logits = times * rows * V * 4.0
    # The head's fp32 gradient is read and written for every chunk of tokens; that of a small head stays in cache.
    sums = times * ceil(rows / max(16, chunk // V)) * 2 * 4.0 * V * D if w < 4 else 0.0
    moved = {"other": 4 * logits + times * N * 2 * D * w, HYPER: times * N * S * D * (w + 8.0)}
    return Work(
        products=(head,),
        moved=moved,
        moved_backward={} if warmup else {"other": 6 * logits + sums, HYPER: 2.5 * moved[HYPER]},
        tensors={"other": 4.0 * min(rows * V, chunk), HYPER: float(N * S * D * w)},
        shared_beside=False,
    )


@cache
def mtp_entry(n: Numbers, N: int) -> Work:
    """The two projections in front of a block of multi-token prediction."""
    D = n.hidden_size
    return Work(products=(Product("attention", N, D, D), Product("attention", N * n.hc_mult, D, D)))
