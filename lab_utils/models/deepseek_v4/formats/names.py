"""DeepSeek's names of a checkpoint's tensors and transformers' names of the same, one table for both directions.

The table is transformers' ``conversion_mapping`` of ``deepseek_v4`` written out; the block of an MTP module is named
like a layer's, and its own tensors are added. In transformers' layout the experts of a layer are two stacked tensors:
``gate_up_proj [E, 2f, d]``, of an expert w1's rows and then w3's, and ``down_proj [E, d, f]``, w2.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lab_utils.errors import CheckpointError

# What the released files store a tensor as:
LINEAR = "linear"  # FP8
EXPERT = "expert"  # MXFP4, or FP8 in base models
NARROW = "narrow"  # BF16
FULL = "full"  # FP32
TABLE = "table"  # int64

_HYPER = {
    f"hc_{part}_{leaf}": (f"{part}_hc.{leaf}", FULL)
    for part in ("attn", "ffn")
    for leaf in ("fn", "base", "scale")
}
_HEAD = {f"hc_head_{leaf}": (f"hc_head.hc_{leaf}", FULL) for leaf in ("fn", "base", "scale")}


def _compressor(official: str, ours: str) -> dict[str, tuple[str, str]]:
    return {
        f"{official}.wkv.weight": (f"{ours}.kv_proj.weight", NARROW),
        f"{official}.wgate.weight": (f"{ours}.gate_proj.weight", NARROW),
        f"{official}.norm.weight": (f"{ours}.kv_norm.weight", NARROW),
        f"{official}.ape": (f"{ours}.position_bias", FULL),
    }


_BLOCK = {
    "attn_norm.weight": ("input_layernorm.weight", NARROW),
    "ffn_norm.weight": ("post_attention_layernorm.weight", NARROW),
    **_HYPER,
    "attn.wq_a.weight": ("self_attn.q_a_proj.weight", LINEAR),
    "attn.q_norm.weight": ("self_attn.q_a_norm.weight", NARROW),
    "attn.wq_b.weight": ("self_attn.q_b_proj.weight", LINEAR),
    "attn.wkv.weight": ("self_attn.kv_proj.weight", LINEAR),
    "attn.kv_norm.weight": ("self_attn.kv_norm.weight", NARROW),
    "attn.wo_a.weight": ("self_attn.o_a_proj.weight", LINEAR),
    "attn.wo_b.weight": ("self_attn.o_b_proj.weight", LINEAR),
    "attn.attn_sink": ("self_attn.sinks", FULL),
    **_compressor("attn.compressor", "self_attn.compressor"),
    **_compressor("attn.indexer.compressor", "self_attn.compressor.indexer"),
    "attn.indexer.wq_b.weight": ("self_attn.compressor.indexer.q_b_proj.weight", LINEAR),
    "attn.indexer.weights_proj.weight": ("self_attn.compressor.indexer.scorer.weights_proj.weight", NARROW),
    "ffn.gate.weight": ("mlp.gate.weight", NARROW),
    "ffn.gate.bias": ("mlp.gate.e_score_correction_bias", FULL),
    "ffn.gate.tid2eid": ("mlp.gate.tid2eid", TABLE),
    "ffn.shared_experts.w1.weight": ("mlp.shared_experts.gate_proj.weight", LINEAR),
    "ffn.shared_experts.w2.weight": ("mlp.shared_experts.down_proj.weight", LINEAR),
    "ffn.shared_experts.w3.weight": ("mlp.shared_experts.up_proj.weight", LINEAR),
}
_MTP = {
    **_BLOCK,
    **_HEAD,
    "e_proj.weight": ("e_proj.weight", LINEAR),
    "h_proj.weight": ("h_proj.weight", LINEAR),
    "enorm.weight": ("enorm.weight", NARROW),
    "hnorm.weight": ("hnorm.weight", NARROW),
    "norm.weight": ("norm.weight", NARROW),
}
_TOP = {
    "embed.weight": ("model.embed_tokens.weight", NARROW),
    "head.weight": ("lm_head.weight", NARROW),
    "norm.weight": ("model.norm.weight", NARROW),
    **{official: (f"model.{ours}", kind) for official, (ours, kind) in _HEAD.items()},
}
_OFFICIAL = {
    table: {ours: (official, kind) for official, (ours, kind) in entries.items()}
    for table, entries in (("layer", _BLOCK), ("mtp", _MTP), ("top", _TOP))
}
# An MTP module works with the main model's embedding and head; some files hold a copy under its name.
_COPIES = {"embed", "head", "emb.tok_emb", "embed_tokens", "lm_head"}
_STACKS = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
_SLOT = {"w1": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "w2": ("down_proj", 0)}
_EXPERT = re.compile(r"ffn\.experts\.(\d+)\.(w[123])\.weight")


@dataclass(frozen=True)
class Place:
    """Where an official tensor stands in transformers' layout."""

    ours: str  # name
    kind: str  # how official files store it
    expert: int | None = None  # of a stacked tensor
    slot: int = 0  # which matrix of that expert: 0 for w1 and w2, 1 for w3


def place(official: str) -> Place:
    """Place of an official tensor.

    Raises:
        CheckpointError: DeepSeek-V4 has no tensor of this name.
    """
    prefix, rest, table = _split(official)
    ours_prefix = f"model.{prefix}" if prefix.startswith("layers.") else prefix
    expert = _EXPERT.fullmatch(rest) if prefix else None
    if expert:
        stack, slot = _SLOT[expert[2]]
        return Place(f"{ours_prefix}mlp.experts.{stack}", EXPERT, int(expert[1]), slot)
    found = {"layer": _BLOCK, "mtp": _MTP, "top": _TOP}[table].get(rest)
    if found is None:
        raise CheckpointError(
            f"tensor {official} is no tensor of DeepSeek-V4: a file of another model, or damaged."
        )
    return Place(ours_prefix + found[0], found[1])


def official_name(ours: str) -> str:
    """Official name of a tensor of transformers' layout that is not stacked.

    Raises:
        CheckpointError: transformers' DeepSeek-V4, and our MTP block beside it, have no tensor of this name.
    """
    prefix, rest, table = _split_ours(ours)
    found = _OFFICIAL[table].get(rest)
    if found is None:
        raise CheckpointError(
            f"tensor {ours} is no tensor of DeepSeek-V4: a file of another model, or damaged."
        )
    return prefix + found[0]


def stack_names(ours: str, experts: int) -> list[list[str]] | None:
    """Official matrices of a stacked tensor in the order of its bytes, an expert at a time; None for other tensors."""
    prefix, rest, _ = _split_ours(ours)
    slots = _STACKS.get(rest.removeprefix("mlp.experts.")) if rest.startswith("mlp.experts.") else None
    if not prefix or slots is None:
        return None
    return [[f"{prefix}ffn.experts.{e}.{slot}.weight" for slot in slots] for e in range(experts)]


def is_copy(name: str) -> bool:
    """Whether this is an MTP module's copy of the embedding or the head, under either naming."""
    _, rest, table = _split(name)
    return table == "mtp" and rest.removesuffix(".weight") in _COPIES


def order(official: str) -> tuple:
    """Sort key: embedding, layers by number, final norm and head, MTP; experts by number within a layer."""
    numbers = [int(n) for n in re.findall(r"(?<=\.)\d+(?=\.)", official)]
    group = next((i for i, p in enumerate(("embed.", "layers.")) if official.startswith(p)), 2)
    return (3 if official.startswith("mtp.") else group, numbers[:1], len(numbers), numbers, official)


def _split(official: str) -> tuple[str, str, str]:
    """Prefix of the block ("layers.3.", "mtp.0.", or ""), the rest, and the table that knows it."""
    match = re.fullmatch(r"(layers|mtp)\.(\d+)\.(.+)", official)
    if match is None:
        return "", official, "top"
    return f"{match[1]}.{match[2]}.", match[3], "layer" if match[1] == "layers" else "mtp"


def _split_ours(ours: str) -> tuple[str, str, str]:
    """The same of a name in transformers' layout; the prefix is the official one."""
    if ours.startswith("model.layers."):
        return _split(ours.removeprefix("model."))
    return _split(ours) if ours.startswith("mtp.") else ("", ours, "top")
