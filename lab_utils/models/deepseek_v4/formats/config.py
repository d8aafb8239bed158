"""config.json of a checkpoint in transformers' form and in DeepSeek's, made of one another.

transformers 5 reads both: DeepSeek's keys (``compress_ratios``, ``num_hash_layers``, ``qk_rope_head_dim``,
``rope_scaling``) become its own when a configuration is made. The way back is here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

S, C, H = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
_RELEASED_RATES = {C: 4, H: 128}
_STORAGE = ("quantization_config", "expert_dtype", "dtype", "torch_dtype", "_name_or_path")


def transformers_config(folder: Path, tree: dict[str, Any], dtype: str) -> dict[str, Any]:
    """For dense weights of ``dtype`` in transformers' layout; a tree that is in transformers' form already is kept."""
    if "layer_types" not in tree or "compress_ratios" in tree:
        from transformers import DeepseekV4Config

        tree = DeepseekV4Config.from_pretrained(folder).to_dict()
        for rope in tree["rope_parameters"].values():
            rope.pop("type", None)  # the old name of rope_type, which stands beside it
    return _without_storage(tree) | {"dtype": dtype}


def official_config(
    folder: Path, tree: dict[str, Any], dtype: str, experts: str | None, mtp_modules: int
) -> dict[str, Any]:
    """For weights under DeepSeek's names, with the keys that its own code, vLLM and transformers read.

    Args:
        experts: "fp8" or "fp4" for quantised checkpoints, None for dense ones of ``dtype``.
        mtp_modules: how many MTP modules the checkpoint holds.
    """
    if "compress_ratios" not in tree:
        tree = _official_keys(folder)
    tree = _without_storage(tree) | {"dtype": dtype, "num_nextn_predict_layers": mtp_modules}
    layers = tree["num_hidden_layers"]
    tree["compress_ratios"] = [*tree["compress_ratios"][:layers], *[0] * mtp_modules]
    if experts is None:
        return tree
    storage = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    }
    return tree | {"expert_dtype": experts, "quantization_config": storage}


def _official_keys(folder: Path) -> dict[str, Any]:
    from transformers import DeepseekV4Config

    config = DeepseekV4Config.from_pretrained(folder)
    tree, rates = config.to_dict(), config.compress_rates
    tree["compress_ratios"] = [0 if kind == S else rates[kind] for kind in config.layer_types]
    tree["qk_rope_head_dim"] = config.qk_rope_head_dim
    hashed = config.mlp_layer_types.count("hash_moe")
    if config.mlp_layer_types == ["hash_moe"] * hashed + ["moe"] * (len(config.mlp_layer_types) - hashed):
        tree["num_hash_layers"] = hashed
        del tree["mlp_layer_types"]
    if rates == _RELEASED_RATES:
        # transformers derives both; at other rates it only knows its own form, so both are written.
        del tree["layer_types"], tree["compress_rates"]
    main, compress = config.rope_parameters["main"], dict(config.rope_parameters["compress"])
    del tree["rope_parameters"], tree["partial_rotary_factor"]
    tree["rope_theta"], tree["compress_rope_theta"] = main["rope_theta"], compress.pop("rope_theta")
    compress.pop("partial_rotary_factor", None)
    if compress.get("attention_factor") == 1.0:
        del compress["attention_factor"]  # what a reader of DeepSeek's form assumes
    kind = compress.pop("rope_type")
    if kind != "default":
        tree["rope_scaling"] = {"type": kind, **compress}
    return tree


def _without_storage(tree: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in tree.items() if key not in _STORAGE}
    return kept | {"architectures": tree.get("architectures") or ["DeepseekV4ForCausalLM"]}
