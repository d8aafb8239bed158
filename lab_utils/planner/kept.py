"""What the backward pass needs of each token: bytes that a block keeps, by what is made again, and working sets.

Read from the code, tensor by tensor: ``models/deepseek_v4/{block,attention,moe,mtp,hyper_connections}.py`` and what the
operators' own functions save (``kernels/*/torch.py``). Everything is bytes a token of one micro-batch; w is the size of
a number in the working precision. Legend: n streams, D model, H heads, K head dimension, F expert width, k experts of
a token, m compression rate.
"""

from __future__ import annotations

from functools import cache

from lab_utils.models.deepseek_v4.counting import CSA, WINDOW_ONLY
from lab_utils.planner.numbers import Numbers
from lab_utils.recipe.sections import ModelSection

Kept = dict[str, float]
CHUNK, CPU_CHUNK = 1 << 28, 1 << 19  # logits that kernels/linear_logprob makes at once
# Bytes that a chunk of attention works on at once on a CPU: scores and their gradient, keys and theirs
# (``CHUNK_ELEMENTS`` of kernels/geometry.py, fp32).
SCORES = 4 * 4.0 * 2**20


def width(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


@cache
def block(
    n: Numbers, kind: str, hashed: bool, model: ModelSection, row_tokens: int, ep: int, cp: int = 1
) -> Kept:
    """Kept by one block: ``streams`` (hyper-connections), ``block`` (inputs and outputs of its two halves),
    ``attention``, ``indexer``, ``experts``."""
    w, D, S = width(model.dtype), n.hidden_size, n.hc_mult
    again = "none" if model.indexer_phase == "warmup" else model.checkpointing
    if again == "full":
        return {"streams": S * D * w, "block": 0.0, "attention": 0.0, "indexer": 0.0, "experts": 0.0}
    mixing = 0.0 if again == "mhc" else 2.0 * _mixing(n)
    found = {
        "streams": (1 if again == "mhc" else 2) * S * D * w + mixing,
        "block": (4 if again == "mhc" else 6) * D * w + 8.0,
        "attention": 0.0,
        "indexer": 0.0,
        "experts": _experts(n, w, ep),
    }
    if again != "attention":
        found |= {
            "attention": _attention(n, kind, row_tokens, cp, w),
            "indexer": _indexer(n, kind, model, row_tokens, cp, w),
        }
    return found


def _mixing(n: Numbers) -> float:
    """fp32 of one hyper-connection: projections, inverse RMS, coefficients, what each step of Sinkhorn divided by."""
    S = n.hc_mult
    return 4.0 * (S * (S + 2) + 1 + 2 * S * S + S + (2 * n.hc_sinkhorn_iters - 1) * S)


def _attention(n: Numbers, kind: str, T: int, cp: int, w: int) -> float:
    HK, K, q = n.num_attention_heads * n.head_dim, n.head_dim, n.q_lora_rank
    # Queries before their norm, output, the low ranks on both sides of their norm, key-value on both sides of its own.
    kept = (2 * HK + 2 * q + 2 * K + n.o_groups * n.o_lora_rank) * w + 8.0
    if kind == WINDOW_ONLY:
        return kept
    m = n.compress_rates[kind]
    kept += _pool(K, m, kind == CSA, w) + _of_row(K, m, cp, w)
    if kind == CSA and T // m > n.index_topk:
        kept += 8.0 * n.index_topk  # the entries selected, int64
    return kept


def _pool(K: int, m: int, overlap: bool, w: int) -> float:
    """Values and gates of a compressor, its entries in fp32, before and after their norm."""
    return 2 * K * (2 if overlap else 1) * w + K / m * (4 + 2 * w)


def _of_row(K: int, m: int, cp: int, w: int) -> float:
    """Entries of the whole row, where a rank pools only its own."""
    return cp * K / m * w if cp > 1 else 0.0


def _indexer(n: Numbers, kind: str, model: ModelSection, T: int, cp: int, w: int) -> float:
    """Its gradients are made in the forward pass: of queries, keys and head weights."""
    if kind != CSA or not model.indexer_loss or n.compress_csa > T:
        return 0.0
    Hi, Ki, m = n.index_n_heads, n.index_head_dim, n.compress_csa
    return _pool(Ki, m, True, w) + Hi * Ki * w + cp * Ki / m * w + 4.0 * Hi


def _experts(n: Numbers, w: int, ep: int) -> float:
    D, F, k = n.hidden_size, n.moe_intermediate_size, n.num_experts_per_tok
    routed = k * ((D if ep > 1 else 0) + 2 * F) * w + 56.0 * k  # rows that arrived, before the SwiGLU; orders
    shared = 6.0 * n.n_shared_experts * F * w
    return (
        routed + shared + 12.0 * n.n_routed_experts
    )  # the router's logits, their softplus and its root, fp32


def buffers(n: Numbers, hashed: bool) -> float:
    """Bytes of a router's buffers: its table of tokens, or its balance bias and counts of load."""
    return 8.0 * n.vocab_size * n.num_experts_per_tok if hashed else 12.0 * n.n_routed_experts


def positions(n: Numbers) -> float:
    """Kept once a micro-batch: its rows, the window's mask, angles, where entries lie."""
    W = n.sliding_window // 2 if n.sliding_window >= 64 else n.sliding_window
    return 4.0 * (n.sliding_window + W) + 4 * 4.0 * (n.head_dim // 8) + 400.0


def ends(n: Numbers, model: ModelSection, mtp: bool, row_tokens: int, ep: int, cp: int = 1) -> Kept:
    """Kept behind the last layer: the streams' last collapse, norm and head; the block of multi-token prediction."""
    w, D, S = width(model.dtype), n.hidden_size, n.hc_mult
    found = {"head": (S + 3) * D * w + 64.0}
    if mtp:
        own = block(n, WINDOW_ONLY, False, model, row_tokens, ep, cp)
        # Embeddings before and after their norm, streams before theirs and after it, the collapse, the hidden states.
        entry = (1 + S) * D * w if model.checkpointing == "full" else (2 + S) * D * w
        depths = n.num_nextn_predict_layers
        found["mtp"] = depths * (sum(own.values()) + entry + (S + 3) * D * w)
    return found


# -- working sets -----------------------------------------------------------------------------------------------------


def exchange(n: Numbers, dtype: str, ep: int) -> float:
    """Bytes a token of the all-to-all at its fullest: rows that came and wait, rows sent, rows received."""
    return 3.0 * n.num_experts_per_tok * n.hidden_size * width(dtype) if ep > 1 else 0.0


def backward(
    n: Numbers,
    kind: str,
    model: ModelSection,
    row_tokens: int,
    tokens: int,
    ep: int,
    cp: int = 1,
    on_cpu: bool = False,
) -> float:
    """Bytes of the largest working set of a block's backward pass over so many tokens, the all-to-all apart.

    What is made again stands beside it: all of the block under ``full``, attention under ``attention``.
    """
    w, D, S, k = width(model.dtype), n.hidden_size, n.hc_mult, n.num_experts_per_tok
    F, HK = n.moe_intermediate_size, n.num_attention_heads * n.head_dim
    none = model.model_copy(update={"checkpointing": "none"})
    whole = block(n, kind, False, none, row_tokens, ep, cp)
    again = "none" if model.indexer_phase == "warmup" else model.checkpointing
    made = sum(whole.values()) - S * D * w if again == "full" else 0.0
    attention_made = whole["attention"] + whole["indexer"] if again == "attention" else 0.0
    streams = 2 * S * D * w  # their gradient, and the part of it that arrives from the block's way in
    # Gradients in fp32 of the mixing, beside its inputs in fp32.
    mixing = streams + 12.0 * S * D + 8.0 * D + (4 * S * D if again == "mhc" else 0)
    # Rows gathered again, gradients of rows and of the SwiGLU's inputs, what its own backward makes; then the weights'.
    experts = streams + k * max(D + 8 * F, 2 * D + 4 * F) * w
    expert_weights = n.n_routed_experts // ep * 3 * D * F * w
    attention = streams + attention_made + 3.0 * HK * w
    if (
        cp > 1 and kind != WINDOW_ONLY
    ):  # gradients of the row's entries, and what is summed of them over its ranks
        attention += cp * n.head_dim / n.compress_rates[kind] * (4 + 2 * w)
    attention_weights = HK * (n.q_lora_rank + n.o_lora_rank) * w
    of_attention = max(tokens * attention, SCORES) if on_cpu else tokens * attention
    sets = (tokens * experts + expert_weights, tokens * mixing, of_attention + attention_weights)
    return tokens * made + max(sets)


def head(n: Numbers, tokens: int, w: int, mtp: bool, on_cpu: bool = False) -> float:
    """Of ``kernels/linear_logprob`` backward: the head's gradient and a product of it in fp32, a chunk of logits and
    once more in w bytes; on a CPU a head that isn't fp32 once more in fp32; the gradient by multi-token prediction.
    """
    rows = min(tokens, max(16, (CPU_CHUNK if on_cpu else CHUNK) // n.vocab_size))
    heads = 4 * (3 if on_cpu and w < 4 else 2) + (w if mtp else 0)
    return float(n.vocab_size * (heads * n.hidden_size + (4 + w) * rows))
