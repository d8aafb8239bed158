"""Parameters and training FLOPs of a configuration in closed form; needs no device and no torch.

Parameters by component as in the technical report's architecture; FLOPs: 6 per multiply-accumulate of a trained term
(2 forward, 4 backward), 2 for an indexer that is only run forward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lab_utils.errors import LayoutError

if TYPE_CHECKING:
    from transformers import DeepseekV4Config

CSA, HCA = "compressed_sparse_attention", "heavily_compressed_attention"
WINDOW_ONLY = "sliding_attention"


def parameters_by_component(config: DeepseekV4Config) -> dict[str, int]:
    """Parameters of the model without MTP, by component."""
    c, N, d, _H, K = (
        config,
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.head_dim,
    )
    csa, hca, n = c.layer_types.count(CSA), c.layer_types.count(HCA), c.hc_mult
    m_csa, m_hca = c.compress_rates[CSA], c.compress_rates[HCA]
    Hi, Ki = c.index_n_heads, c.index_head_dim
    return {
        "routed experts": N * c.n_routed_experts * _expert(c),
        "attention": N * _attention(c),
        "compressors": csa * _pool(d, 2 * K, K, m_csa) + hca * _pool(d, K, K, m_hca),
        "indexers": csa * (_pool(d, 2 * Ki, Ki, m_csa) + c.q_lora_rank * Hi * Ki + d * Hi),
        "shared experts": N * c.n_shared_experts * _expert(c),
        "routers": N * c.n_routed_experts * d,
        "hyper-connections": 2 * N * _hyper_connection(n, d) + _hyper_head(n, d),
        "norms": (2 * N + 1) * d,
        "embedding": c.vocab_size * d,
        "head": c.vocab_size * d,
    }


def parameters_mtp(config: DeepseekV4Config) -> int:
    """Parameters of the multi-token-prediction blocks: window-only block, two projections, three norms, hc head."""
    c, d, n = config, config.hidden_size, config.hc_mult
    block = _attention(c) + (c.n_routed_experts + c.n_shared_experts) * _expert(c) + c.n_routed_experts * d
    block += 2 * _hyper_connection(n, d) + 2 * d
    return c.num_nextn_predict_layers * (block + 2 * d * d + 3 * d + _hyper_head(n, d))


def active_parameters(config: DeepseekV4Config) -> int:
    """Parameters that one token uses, without the embedding (a look-up)."""
    parts = parameters_by_component(config)
    total = sum(parts.values()) - parts["embedding"] - parts["routed experts"]
    return total + config.num_hidden_layers * config.num_experts_per_tok * _expert(config)


def training_flops(
    config: DeepseekV4Config,
    lengths: list[int],
    *,
    indexer_trained: bool = False,
    mtp: bool = False,
    indexer_warmup: bool = False,
) -> float:
    """Training FLOPs per token, the length-weighted mean over documents of these lengths.

    Args:
        indexer_trained: the indexer has its loss; else it only runs forward.
        mtp: the blocks of multi-token prediction are trained.
        indexer_warmup: nothing but the indexer is trained, and every visible entry is attended.
    """
    flops = [_document_flops(config, length, indexer_trained, mtp, indexer_warmup) for length in lengths]
    total = sum(length * each for length, each in zip(lengths, flops, strict=True))
    return total / max(sum(lengths), 1)


def layer_costs(
    config: DeepseekV4Config, length: int = 4096, *, mtp: bool = False
) -> tuple[list[float], float]:
    """Forward FLOPs per token of each layer, and of what follows the last one (collapse and head, with ``mtp`` the
    blocks of multi-token prediction), for documents of this length: what a stage of a pipeline costs."""
    layers = [_layer(config, kind, length, config.index_topk) for kind in config.layer_types]
    after = _head(config) + (_mtp(config, length) if mtp else 0)
    return [2 * (main + indexer) for main, indexer in layers], 2 * after


def reach(config: Any) -> int:
    """Tokens before a run of a row that its keys need: the window, or those of the entries that close in it first."""
    return max(config.sliding_window, 2 * config.compress_rates[CSA], config.compress_rates[HCA])


def check_parts(config: Any, row_tokens: int, cp: int) -> None:
    """Rows are long enough to be cut over so many ranks.

    Raises:
        LayoutError: a run would be shorter than what it needs of the one before.
    """
    needed = reach(config)
    if cp > 1 and row_tokens // cp < needed:
        raise LayoutError(
            f"parallel.cp={cp} cuts rows of {row_tokens} tokens into runs of {row_tokens // cp}, and attention needs "
            f"the {needed} tokens before a run: set parallel.cp to at most {max(1, row_tokens // needed)}, or raise "
            f"data.row_tokens."
        )


def split_layers(config: Any, stages: int, *, mtp: bool = False) -> list[int]:
    """How many layers each of the stages holds, in order: the heaviest stage as light as can be.

    Weighed by forward FLOPs (``counting.layer_costs``): window-only, CSA and HCA layers differ, and the last stage
    carries the head besides, with ``mtp`` the block of multi-token prediction too. The embedding is a look-up.

    Raises:
        LayoutError: fewer layers than stages.
    """
    costs, head = layer_costs(config, mtp=mtp)
    n = len(costs)
    if n < stages:
        raise LayoutError(
            f"parallel.pp × parallel.virtual_stages = {stages} stages, but the model has {n} layers: use at most {n}."
        )
    upto = [0.0]
    for cost in costs:
        upto.append(upto[-1] + cost)
    # best[s][i]: the heaviest stage when the first i layers are cut into s stages, and where the last one begins
    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for s in range(1, stages + 1):
        row = {}
        for i in range(s, n - (stages - s) + 1):
            extra = head if s == stages else 0.0
            options = [
                (max(best[s - 1][j][0], upto[i] - upto[j] + extra), j)
                for j in range(s - 1, i)
                if j in best[s - 1]
            ]
            row[i] = min(options, key=lambda option: (option[0], -option[1]))
        best.append(row)
    counts, i = [], n
    for s in range(stages, 0, -1):
        j = best[s][i][1]
        counts.append(i - j)
        i = j
    return counts[::-1]


def _document_flops(c: DeepseekV4Config, L: int, indexer_trained: bool, mtp: bool, warmup: bool) -> float:
    layers = [_layer(c, kind, L, L if warmup else c.index_topk) for kind in c.layer_types]
    main, indexer = sum(main for main, _ in layers) + _head(c), sum(indexer for _, indexer in layers)
    if mtp:
        main += _mtp(c, L)
    return (2 if warmup else 6) * main + (6 if indexer_trained else 2) * indexer


def _layer(c: DeepseekV4Config, kind: str, L: int, topk: int) -> tuple[float, float]:
    """Multiply-accumulates per token of a layer without its indexer, and of the indexer."""
    d, H, K, q, n = c.hidden_size, c.num_attention_heads, c.head_dim, c.q_lora_rank, c.hc_mult
    main = d * q + q * H * K + d * K + H * K * c.o_lora_rank + c.o_groups * c.o_lora_rank * d
    main += (c.num_experts_per_tok + c.n_shared_experts) * _expert(c) + d * c.n_routed_experts
    main += 2 * n * (n + 2) * n * d + 2 * n * n * d
    main += 2 * H * K * _window_keys(L, c.sliding_window)
    if kind == WINDOW_ONLY:
        return main, 0.0
    m = c.compress_rates[kind]
    if kind == HCA:
        return main + 2 * d * K + 2 * H * K * _entry_keys(L, m, L // m), 0.0
    Hi, Ki = c.index_n_heads, c.index_head_dim
    indexer = 4 * d * Ki + q * Hi * Ki + d * Hi + Hi * Ki * _entry_keys(L, m, L // m)
    return main + 4 * d * K + 2 * H * K * _entry_keys(L, m, topk), indexer


def _mtp(c: DeepseekV4Config, L: int) -> float:
    """Multiply-accumulates per token of multi-token prediction, its use of the shared head included."""
    block = _layer(c, WINDOW_ONLY, L, 0)[0] + (1 + c.hc_mult) * c.hidden_size**2 + _head(c)
    return c.num_nextn_predict_layers * block


def _head(c: DeepseekV4Config) -> int:
    return c.hc_mult**2 * c.hidden_size + c.hidden_size * c.vocab_size


def _window_keys(L: int, w: int) -> float:
    """Mean number of window keys of a query."""
    P = min(L, w)
    return (P * (P + 1) / 2 + (L - P) * w) / L


def _entry_keys(L: int, m: int, K: int) -> float:
    """Mean over t = 1..L of min(t div m, K)."""
    K = min(K, L // m)
    P = min(L, m * K)
    a, b = divmod(P, m)
    return (m * a * (a - 1) / 2 + a * (b + 1) + (L - P) * K) / L


def _expert(c: DeepseekV4Config) -> int:
    return 3 * c.hidden_size * c.moe_intermediate_size


def _attention(c: DeepseekV4Config) -> int:
    d, H, K, q = c.hidden_size, c.num_attention_heads, c.head_dim, c.q_lora_rank
    output = H * K * c.o_lora_rank + c.o_groups * c.o_lora_rank * d
    return d * q + q + q * H * K + d * K + K + output + H


def _pool(d: int, inner: int, width: int, rate: int) -> int:
    return 2 * d * inner + rate * inner + width


def _hyper_connection(n: int, d: int) -> int:
    return n * (n + 2) * n * d + n * (n + 2) + 3


def _hyper_head(n: int, d: int) -> int:
    return n * n * d + n + 1
