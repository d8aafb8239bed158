"""Models by their source, as a recipe names it, and the way back to disk.

    base:NAME      weights shipped with the project, lab_utils/models/shipped/NAME
    preset:NAME    random weights of a preset, the same for a seed
    hf:ORG/NAME    a checkpoint of the hub, from its local cache where HF_HUB_OFFLINE=1
    a path         a folder with config.json and safetensors

``model_type`` deepseek_v4 becomes our own implementation, anything else goes through the generic adapter.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab_utils.errors import CheckpointError, RecipeError
from lab_utils.models.presets import preset

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lab_utils.models.base import TrainableModel

SHIPPED = Path(__file__).parent / "shipped"
SHARD_BYTES = 4 << 30
REWARD_MODEL = (
    "DeepseekV4ForSequenceClassification"  # named as transformers names such models; it has none for V4
)


def load_model(
    source: str,
    *,
    dtype: torch.dtype | str = "float32",
    device: torch.device | str = "cpu",
    seed: int = 0,
    checkpointing: str = "none",
    indexer_loss: float = 0.01,
    indexer_phase: str = "sparse",
    mtp_loss: float = 0.0,
    balance_loss: float = 0.0,
    balance_rate: float = 0.0,
    scored: bool = False,
    defer: bool = False,
) -> TrainableModel:
    """A trainable model in ``dtype`` on ``device``.

    Args:
        source: see the module's head.
        dtype: torch dtype or its name; the correction bias of the routers stays fp32.
        seed: of random weights; does not touch the global generators.
        checkpointing: what is made again in the backward pass: "none", "mhc", "attention" (V4 only) or "full".
        indexer_loss, indexer_phase, mtp_loss, balance_loss, balance_rate: training signals of V4, see ``DeepseekV4``.
            A checkpoint without the tensors of multi-token prediction gets them fresh by seed, and a warning.
        scored: a reward model, with a head of one number (V4 only); fresh by seed where the checkpoint has none.
        defer: leave a V4 without memory, to be cut first: its ``materialise()`` then reads what is left of it.

    Raises:
        RecipeError: unknown preset, shipped model or form of source; a training signal that the model doesn't have.
        CheckpointError: files that are missing, or tensors that don't fit the configuration.
    """
    import torch

    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    signals = {"mtp_loss": mtp_loss, "balance_loss": balance_loss, "balance_rate": balance_rate}
    options: dict[str, Any] = {**signals, "indexer_loss": indexer_loss, "indexer_phase": indexer_phase}
    options["checkpointing"] = checkpointing
    folder = None if source.startswith("preset:") else checkpoint_folder(source)
    if folder and read_config(folder)["model_type"] != "deepseek_v4":
        from lab_utils.models.hf import load_adapter

        wanted = [f"model.{name}" for name, value in signals.items() if value]
        wanted += ["model.indexer_phase"] if indexer_phase != "sparse" else []
        wanted += ["head of a reward model (objective.kind=reward)"] if scored else []
        wanted += ["model.checkpointing"] if checkpointing not in ("none", "full") else []
        if wanted:
            raise RecipeError(f"{source} is no DeepSeek-V4 and has no {' or '.join(wanted)}: leave it out.")
        return load_adapter(folder, dtype=dtype, device=device, checkpointing=checkpointing)
    from transformers import DeepseekV4Config

    from lab_utils.models.deepseek_v4.materialise import deferred, without_memory

    config = DeepseekV4Config.from_pretrained(folder) if folder else preset(source.removeprefix("preset:"))
    scored = scored or REWARD_MODEL in (config.architectures or [])
    if scored:
        config.architectures, config.num_labels = [REWARD_MODEL], 1
    model = without_memory(config, scored=scored, **options)
    deferred(model, folder, dtype=dtype, device=device, seed=seed)
    if not defer:
        model.materialise()
    return model


def load_tokenizer_path(source: str) -> Path | None:
    """Folder of the tokenizer beside the weights of a source; None where there is none (presets)."""
    if source.startswith("preset:"):
        return None
    folder = checkpoint_folder(source)
    return folder if (folder / "tokenizer.json").exists() else None


def load_config(source: str) -> Any:
    """transformers configuration of a source, without its weights."""
    if source.startswith("preset:"):
        return preset(source.removeprefix("preset:"))
    from transformers import AutoConfig

    folder = checkpoint_folder(source)
    read_config(folder)
    return AutoConfig.from_pretrained(folder)


def checkpoint_folder(source: str) -> Path:
    """Local folder of a source with files: shipped, hub snapshot or path."""
    if source.startswith("base:"):
        name = source.removeprefix("base:")
        known = sorted(p.name for p in SHIPPED.iterdir() if p.is_dir()) if SHIPPED.exists() else []
        if name not in known:
            raise RecipeError(
                f"model.source: no model '{name}' ships with the project (shipped: {', '.join(known) or 'none'}); "
                "choose one of them, or preset:NAME."
            )
        return SHIPPED / name
    if source.startswith("hf:"):
        from lab_utils.models.hf import snapshot_folder

        return snapshot_folder(source.removeprefix("hf:"))
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise RecipeError(
            f"model.source: '{source}' is no folder; give base:NAME, preset:NAME, hf:ORG/NAME, or a folder with "
            "config.json and safetensors."
        )
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a checkpoint folder."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: config.json is missing; give a folder in transformers' layout."
        ) from None
    except ValueError:
        raise CheckpointError(
            f"{folder / 'config.json'}: not valid JSON; copy the checkpoint again."
        ) from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise CheckpointError(
            f"{folder / 'config.json'}: no 'model_type'; give a folder in transformers' layout."
        )
    return config


def read_state_dict(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors, one file or sharded."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    state: dict[str, Tensor] = {}
    for name in names:
        try:
            state.update(load_file(folder / name))
        except FileNotFoundError:
            raise CheckpointError(f"{folder}: {name} is missing; copy the checkpoint again.") from None
        except SafetensorError as error:
            raise CheckpointError(
                f"{folder / name}: truncated or damaged ({error}); copy it again."
            ) from None
    return state


def save_pretrained(
    model: Any, config: Any, out_dir: Path | str, dtype: torch.dtype | str | None = None
) -> Path:
    """Write config.json and safetensors in transformers' layout; the folder appears whole or not at all.

    Args:
        model: a module or a state dict with transformers' names.
        dtype: cast matrices and vectors to it (the routers' correction bias stays fp32); None keeps each tensor's.

    Raises:
        CheckpointError: ``out_dir`` exists and is not an empty folder.
    """
    import torch

    state = model if isinstance(model, dict) else model.state_dict()
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    out = Path(out_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: already there and not empty; choose another folder or remove it.")
    out.parent.mkdir(parents=True, exist_ok=True)
    tensors, stored = {}, set()
    for name, tensor in state.items():
        if tensor.numel() and tensor.data_ptr() in stored:
            continue  # a tied weight: the file holds it once, under its first name
        stored.add(tensor.data_ptr())
        cast = (
            dtype is not None and tensor.is_floating_point() and not name.endswith("e_score_correction_bias")
        )
        tensors[name] = tensor.detach().to("cpu", dtype if cast else None).contiguous()
    parts = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        _write_shards(tensors, parts)
        write_config(config, next(t.dtype for n, t in tensors.items() if n.endswith("weight")), parts)
        parts.chmod(0o755)
        if out.exists():
            out.rmdir()
        os.replace(parts, out)
    except BaseException:
        shutil.rmtree(parts, ignore_errors=True)
        raise
    return out


def write_config(config: Any, dtype: torch.dtype, folder: Path) -> None:
    """``config.json`` beside weights of this dtype, as ``from_pretrained`` expects it."""
    tree = config.to_dict() | {"architectures": config.architectures or ["DeepseekV4ForCausalLM"]}
    tree["dtype"] = str(dtype).removeprefix("torch.")
    tree.pop("_name_or_path", None)  # where the weights once lay is nobody's business
    text = json.dumps(tree, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def describe(source: str, document_length: int = 4096) -> dict[str, Any]:
    """Sizes of a source: ``parameters`` (without MTP), ``parameters_mtp``, ``active_parameters``, ``by_component``,
    ``flops_per_token`` (training, one document of ``document_length`` tokens)."""
    config = load_config(source)
    if config.model_type != "deepseek_v4":
        from lab_utils.models.hf import describe_other

        return {"source": source} | describe_other(config, document_length)
    from lab_utils.models.deepseek_v4 import counting

    parts = counting.parameters_by_component(config)
    return {
        "source": source,
        "parameters": sum(parts.values()),
        "parameters_mtp": counting.parameters_mtp(config),
        "active_parameters": counting.active_parameters(config),
        "by_component": parts,
        "flops_per_token": counting.training_flops(config, [document_length]),
        "document_length": document_length,
    }


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """One safetensors file, readable to whom the umask allows (safetensors itself makes it the owner's alone)."""
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def _write_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        save_tensors(shards[0], folder / "model.safetensors")
        return
    placed = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_tensors(shard, folder / file)
        placed.update(dict.fromkeys(shard, file))
    tree = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
