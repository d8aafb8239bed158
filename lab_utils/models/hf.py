"""The generic adapter: any causal LM of transformers on packed rows (data parallel and ZeRO).

Documents stay apart through ``position_ids`` that restart and transformers' own packed-sequence masks: with no
attention mask given, it derives the documents from the restarts. Legend: B rows, T tokens, D model, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lab_utils.errors import CheckpointError
from lab_utils.models.base import ModelOutput


class CausalAdapter(nn.Module):
    """A ``TrainableModel`` around ``AutoModelForCausalLM``; ``state_dict`` has the names of the wrapped model."""

    def __init__(self, wrapped: nn.Module, *, checkpointing: str = "none"):
        super().__init__()
        self.config, self.wrapped = wrapped.config, wrapped
        if checkpointing == "full":
            wrapped.gradient_checkpointing_enable({"use_reentrant": False})
        self._register_state_dict_hook(_without_prefix)
        self.register_load_state_dict_pre_hook(_with_prefix)

    @property
    def head_weight(self) -> Tensor:
        return self.wrapped.get_output_embeddings().weight

    def flops_per_token(self, document_lengths: list[int]) -> float:
        return _flops(self.config, _matrix_parameters(self.wrapped), document_lengths)

    def forward(self, input_ids: Tensor, position_ids: Tensor, document_ids: Tensor) -> ModelOutput:
        """Packed rows ``[B, T]`` to final hidden states."""
        output = self.wrapped.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        return ModelOutput(output.last_hidden_state)


def load_adapter(
    folder: Path, *, dtype: torch.dtype, device: torch.device | str, checkpointing: str
) -> CausalAdapter:
    """A local checkpoint folder as an adapter.

    Raises:
        CheckpointError: transformers can't make a causal LM of it; its own message is quoted.
    """
    from transformers import AutoModelForCausalLM

    try:
        wrapped = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = (
            str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        )
        raise CheckpointError(
            f"{folder}: transformers can't load it as a causal LM ({reason}); check the folder."
        ) from None
    if wrapped.get_output_embeddings() is None:
        raise CheckpointError(f"{folder}: the model has no LM head; give a causal LM.")
    return CausalAdapter(wrapped.to(device), checkpointing=checkpointing)


def snapshot_folder(repository: str) -> Path:
    """Local folder of a hub repository; with HF_HUB_OFFLINE=1 only the local cache is asked."""
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "tokenizer*", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except Exception as error:
        reason = type(error).__name__
        raise CheckpointError(
            f"hf:{repository}: not in the local hub cache and not reachable ({reason}); download it on a connected "
            "machine into HF_HOME, or give a folder."
        ) from None


def describe_other(config: Any, document_length: int) -> dict[str, Any]:
    """``describe`` for a configuration that is not DeepSeek-V4: counted on the meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = "layers" if ".layers." in name else name.removesuffix(".weight").split(".")[-1]
        parts[part] = parts.get(part, 0) + parameter.numel()
    return {
        "parameters": sum(parts.values()),
        "parameters_mtp": 0,
        "active_parameters": _matrix_parameters(model),
        "by_component": parts,
        "flops_per_token": _flops(config, _matrix_parameters(model), [document_length]),
        "document_length": document_length,
    }


def _matrix_parameters(model: nn.Module) -> int:
    """Parameters that a token is multiplied with: all but the embedding (unless it is the head too)."""
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding or bool(model.config.tie_word_embeddings)
    total = sum(p.numel() for p in model.parameters())
    return total if tied else total - embedding.numel()


def _flops(config: Any, parameters: int, lengths: list[int]) -> float:
    """6 per parameter, and 12·D per visible key and layer (causal: half the length on average)."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    keys = sum(length * (length + 1) / 2 for length in lengths) / max(sum(lengths), 1)
    return 6 * parameters + 12 * text.num_hidden_layers * width * keys


def _without_prefix(module, state, prefix, _metadata):
    for name in [n for n in state if n.startswith(f"{prefix}wrapped.")]:
        state[prefix + name.removeprefix(f"{prefix}wrapped.")] = state.pop(name)
    return state


def _with_prefix(module, state, prefix, *_):
    for name in [n for n in state if n.startswith(prefix)]:
        state[f"{prefix}wrapped.{name.removeprefix(prefix)}"] = state.pop(name)
