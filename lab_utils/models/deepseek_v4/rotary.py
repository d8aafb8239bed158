"""Angles of RoPE, computed in fp32 from the configuration whenever they are needed.

No buffer holds the frequencies: a cast of the module to bfloat16 would ruin them. Legend: R rotated pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DeepseekV4Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


class Rotary:
    """``rotary(kind, positions) -> (cos, sin)`` with kind "main" (window-only layers) or "compress" (TR §2.3.3)."""

    def __init__(self, config: DeepseekV4Config):
        self.config = config
        self._frequencies: dict[tuple[str, torch.device], tuple[Tensor, float]] = {}

    def __call__(self, kind: str, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin ``[…, R]`` fp32 at integer positions of any shape."""
        frequency_R, scaling = self._of(kind, positions.device)
        angle = positions[..., None].float() * frequency_R
        return angle.cos() * scaling, angle.sin() * scaling

    def _of(self, kind: str, device: torch.device) -> tuple[Tensor, float]:
        if (kind, device) not in self._frequencies:
            parameters = self.config.rope_parameters[kind]
            if parameters["rope_type"] == "default":
                R = int(self.config.head_dim * parameters.get("partial_rotary_factor", 1.0)) // 2
                exponent_R = torch.arange(R, dtype=torch.float32) / R
                found = 1.0 / parameters["rope_theta"] ** exponent_R, 1.0
            else:
                found = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](self.config, None, layer_type=kind)
            self._frequencies[kind, device] = found[0].to(device), found[1]
        return self._frequencies[kind, device]
