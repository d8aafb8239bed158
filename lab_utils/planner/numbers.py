"""What the planner needs of a DeepSeek-V4's configuration, read without transformers: that import takes ten seconds.

The fields carry the names of transformers' ``DeepseekV4Config``, so that ``models.deepseek_v4.counting`` and
``optim.groups`` take either. Legend of names in this package: D model, H heads, K head dimension, F expert width, E
experts, k experts of a token, m compression rate, n streams, T tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

from lab_utils.errors import RecipeError
from lab_utils.models.deepseek_v4.counting import CSA, HCA, WINDOW_ONLY

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Numbers:
    """A configuration's numbers; the values here are transformers' own where a config.json leaves them out."""

    layer_types: tuple[str, ...]
    mlp_layer_types: tuple[str, ...]
    vocab_size: int = 129280
    hidden_size: int = 4096
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 43
    num_attention_heads: int = 64
    head_dim: int = 512
    q_lora_rank: int = 1024
    num_experts_per_tok: int = 6
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    max_position_embeddings: int = 1048576
    compress_csa: int = 4
    compress_hca: int = 128
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    sliding_window: int = 128
    o_groups: int = 8
    o_lora_rank: int = 1024
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 512
    num_nextn_predict_layers: int = 1
    model_type: str = "deepseek_v4"

    @property
    def compress_rates(self) -> dict[str, int]:
        return {CSA: self.compress_csa, HCA: self.compress_hca}

    def kind(self, layer: int) -> tuple[str, bool]:
        """Attention of a layer, and whether a table routes it; past the last one stands multi-token prediction."""
        if layer >= self.num_hidden_layers:
            return WINDOW_ONLY, False
        return self.layer_types[layer], self.mlp_layer_types[layer] == "hash_moe"


@cache
def numbers(source: str) -> Numbers:
    """Of ``model.source``, as ``models.load`` understands it.

    Raises:
        RecipeError: unknown source, or a model that is no DeepSeek-V4.
        CheckpointError: a folder without a readable config.json.
    """
    if source.startswith("preset:"):
        from lab_utils.models.presets import _PRESETS, presets
        from lab_utils.registry import nearest

        name = source.removeprefix("preset:")
        if name not in _PRESETS:
            raise RecipeError(f"model.source: there is no preset '{name}': {nearest(name, presets())}.")
        return of_fields(_PRESETS[name])
    from lab_utils.models.load import checkpoint_folder, read_config

    tree = read_config(checkpoint_folder(source))
    if tree["model_type"] != "deepseek_v4":
        raise RecipeError(
            f"model.source: {source} is a {tree['model_type']}, and the planner knows DeepSeek-V4: "
            "give a source of that kind (preset:pro, a checkpoint folder)."
        )
    return of_fields(tree)


def of_fields(tree: dict[str, Any]) -> Numbers:
    """From a preset or a config.json, DeepSeek's own spelling (``compress_ratios``, ``num_hash_layers``) included."""
    count = tree.get("num_hidden_layers", Numbers.num_hidden_layers)
    types = tree.get("layer_types")
    if types is None and "compress_ratios" in tree:
        types = [{0: WINDOW_ONLY, 4: CSA, 128: HCA}[ratio] for ratio in tree["compress_ratios"]]
    if types is None:
        types = [HCA] * min(count, 2) + [CSA if i % 2 else HCA for i in range(max(count - 2, 0))]
    mlp = tree.get("mlp_layer_types")
    if mlp is None:
        hashed = min(count, tree.get("num_hash_layers", 3))
        mlp = ["hash_moe"] * hashed + ["moe"] * (count - hashed)
    rates = tree.get("compress_rates") or {}
    known = {field.name for field in fields(Numbers)}
    plain = {name: value for name, value in tree.items() if name in known and value is not None}
    return Numbers(
        **plain
        | {
            "layer_types": tuple(types[:count]),
            "mlp_layer_types": tuple(mlp[:count]),
            "compress_csa": rates.get(CSA, Numbers.compress_csa),
            "compress_hca": rates.get(HCA, Numbers.compress_hca),
        }
    )


def with_layers(n: Numbers, count: int) -> Numbers:
    """The same model with its first layers alone."""
    kept = {"layer_types": n.layer_types[:count], "mlp_layer_types": n.mlp_layer_types[:count]}
    return replace(n, num_hidden_layers=count, **kept)


# -- shapes of parameters, in the order in which the model has them ---------------------------------------------------


@cache
def layer_shapes(n: Numbers, kind: str, hashed: bool, ep: int = 1) -> tuple[tuple[str, Shape], ...]:
    """Name below its layer and shape of every parameter that a rank of an ep group holds of one layer."""
    D, H, K, F = n.hidden_size, n.num_attention_heads, n.head_dim, n.moe_intermediate_size
    E, S = n.n_routed_experts, n.hc_mult
    found: list[tuple[str, Shape]] = [
        ("self_attn.sinks", (H,)),
        ("self_attn.q_a_proj.weight", (n.q_lora_rank, D)),
        ("self_attn.q_a_norm.weight", (n.q_lora_rank,)),
        ("self_attn.q_b_proj.weight", (H * K, n.q_lora_rank)),
        ("self_attn.kv_proj.weight", (K, D)),
        ("self_attn.kv_norm.weight", (K,)),
        ("self_attn.o_a_proj.weight", (n.o_groups * n.o_lora_rank, H * K // n.o_groups)),
        ("self_attn.o_b_proj.weight", (D, n.o_groups * n.o_lora_rank)),
    ]
    if kind != WINDOW_ONLY:
        found += _pool("self_attn.compressor", D, K, n.compress_rates[kind], kind == CSA)
    if kind == CSA:
        at, Ki = "self_attn.compressor.indexer", n.index_head_dim
        found += _pool(at, D, Ki, n.compress_csa, True)
        found.append((f"{at}.q_b_proj.weight", (n.index_n_heads * Ki, n.q_lora_rank)))
        found.append((f"{at}.scorer.weights_proj.weight", (n.index_n_heads, D)))
    found += [
        ("mlp.gate.weight", (E, D)),
        ("mlp.experts.gate_up_proj", (E // ep, 2 * F, D)),
        ("mlp.experts.down_proj", (E // ep, D, F)),
        ("mlp.shared_experts.gate_proj.weight", (F, D)),
        ("mlp.shared_experts.up_proj.weight", (F, D)),
        ("mlp.shared_experts.down_proj.weight", (D, F)),
        ("input_layernorm.weight", (D,)),
        ("post_attention_layernorm.weight", (D,)),
    ]
    for block in ("attn_hc", "ffn_hc"):
        found += [(f"{block}.fn", (S * (S + 2), S * D)), (f"{block}.base", (S * (S + 2),))]
        found.append((f"{block}.scale", (3,)))
    return tuple(found)


def _pool(at: str, D: int, width: int, rate: int, overlap: bool) -> list[tuple[str, Shape]]:
    inner = width * (2 if overlap else 1)
    return [
        (f"{at}.position_bias", (rate, inner)),
        (f"{at}.kv_proj.weight", (inner, D)),
        (f"{at}.gate_proj.weight", (inner, D)),
        (f"{at}.kv_norm.weight", (width,)),
    ]


def embedding_shapes(n: Numbers) -> list[tuple[str, Shape]]:
    return [("model.embed_tokens.weight", (n.vocab_size, n.hidden_size))]


def final_shapes(n: Numbers, scored: bool = False) -> list[tuple[str, Shape]]:
    """What stands behind the last layer: norm, the streams' collapse, head (of a reward model: one number)."""
    head = (
        ("score.weight", (1, n.hidden_size)) if scored else ("lm_head.weight", (n.vocab_size, n.hidden_size))
    )
    return [("model.norm.weight", (n.hidden_size,)), *_hyper_head(n, "model.hc_head"), head]


def mtp_shapes(n: Numbers, ep: int = 1) -> list[tuple[str, Shape]]:
    """The blocks of multi-token prediction."""
    D, found = n.hidden_size, []
    for depth in range(n.num_nextn_predict_layers):
        own = [(f"mtp.{depth}.{name}", shape) for name, shape in layer_shapes(n, WINDOW_ONLY, False, ep)]
        own += [(f"mtp.{depth}.{name}.weight", (D,)) for name in ("enorm", "hnorm", "norm")]
        own += [(f"mtp.{depth}.{name}.weight", (D, D)) for name in ("e_proj", "h_proj")]
        found += own + _hyper_head(n, f"mtp.{depth}.hc_head")
    return found


def _hyper_head(n: Numbers, at: str) -> list[tuple[str, Shape]]:
    S = n.hc_mult
    return [(f"{at}.hc_fn", (S, S * n.hidden_size)), (f"{at}.hc_base", (S,)), (f"{at}.hc_scale", (1,))]


def size(shape: Shape) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
