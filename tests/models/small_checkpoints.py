"""Small DeepSeek-V4 checkpoints with an MTP block, on the disk in every format."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from lab_utils.models.deepseek_v4.formats.files import DTYPES, FileWriter, Slot
from lab_utils.models.load import save_pretrained

S, C, H = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
FULL = ("_hc.", "hc_head", "sinks", "position_bias", "e_score_correction_bias")


def config(**changes) -> DeepseekV4Config:
    """All three kinds of layer, both kinds of routing, sizes that cut blocks at every edge."""
    sizes = {
        "vocab_size": 97,
        "hidden_size": 136,
        "num_hidden_layers": 4,
        "layer_types": [S, C, H, S],
        "mlp_layer_types": ["hash_moe"] + ["moe"] * 3,
        "num_attention_heads": 4,
        "head_dim": 72,
        "partial_rotary_factor": 0.5,
        "q_lora_rank": 40,
        "o_groups": 2,
        "o_lora_rank": 36,
        "n_routed_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 132,
        "compress_rates": {C: 4, H: 8},
        "sliding_window": 8,
        "index_n_heads": 6,
        "index_head_dim": 16,
        "index_topk": 3,
        "max_position_embeddings": 256,
    }
    return DeepseekV4Config(architectures=["DeepseekV4ForCausalLM"], **(sizes | changes))


def whole_blocks(**changes) -> DeepseekV4Config:
    """Every quantised matrix in whole blocks of 128, the only sizes that transformers dequantises."""
    sizes = {"hidden_size": 128, "head_dim": 128, "q_lora_rank": 128, "o_lora_rank": 64, "index_n_heads": 8}
    return config(**(sizes | {"moe_intermediate_size": 128} | changes))


def tensors(of: DeepseekV4Config, seed: int, dtype: torch.dtype = torch.bfloat16, mtp: bool = True) -> dict:
    """A state dict in transformers' layout: random, fp32 where DeepSeek keeps fp32, with an MTP block."""
    g = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        state = DeepseekV4ForCausalLM(of).state_dict()
    if mtp:
        last = f"model.layers.{of.num_hidden_layers - 1}."
        state |= {n.replace(last, "mtp.0."): t for n, t in state.items() if n.startswith(last)}
        state |= {f"mtp.0.{n}_proj.weight": torch.empty(of.hidden_size, of.hidden_size) for n in "eh"}
        state |= {f"mtp.0.{n}.weight": torch.empty(of.hidden_size) for n in ("enorm", "hnorm", "norm")}
        state |= {
            n.replace("model.", "mtp.0."): t for n, t in state.items() if n.startswith("model.hc_head.")
        }
    found = {}
    for name, tensor in state.items():
        if name.endswith("tid2eid"):
            found[name] = torch.randint(of.n_routed_experts, tensor.shape, generator=g)
        else:
            values = torch.randn(tensor.shape, generator=g) * 0.05
            full = any(part in name for part in FULL)
            found[name] = values.to(torch.float32 if full else dtype)
    return found


def write(folder: Path, of: DeepseekV4Config, seed: int = 0, **options) -> dict[str, Tensor]:
    """Writes ``tensors`` to a folder in transformers' layout, and returns them."""
    state = tensors(of, seed, **options)
    save_pretrained(dict(state), of, folder)
    (folder / "tokenizer.json").write_text("{}")
    return state


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder as they are stored, read by the safetensors library."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    """Same names, dtypes, shapes and bits."""

    def bits(x: Tensor) -> Tensor:
        return x.contiguous().view(-1).view(torch.uint8)

    return one.keys() == two.keys() and all(
        a.dtype == two[n].dtype and a.shape == two[n].shape and torch.equal(bits(a), bits(two[n]))
        for n, a in one.items()
    )


def rewrite(folder: Path, change) -> None:
    """Replaces the weights of a folder by ``change(tensors)``, in one file, without an index."""
    found = change(stored(folder))
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        file.unlink()
    codes = {dtype: name for name, dtype in DTYPES.items()}
    slots = [Slot(name, codes[t.dtype], tuple(t.shape)) for name, t in found.items()]
    slots.sort(key=lambda slot: -DTYPES[slot.dtype].itemsize)
    writer = FileWriter(folder / "model.safetensors", slots)
    for slot in slots:
        writer.write(slot.name, 0, found[slot.name])
    writer.finish()


def edit_config(folder: Path, **changes) -> None:
    """Changes keys of config.json; None removes one."""
    tree = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in tree.items() if v is not None}))
