"""ColossalAI 0.5.0 as it can be imported: without what it loads and nobody here uses, and with what torch lacks.

Whoever needs a name of it takes it from here: imported by itself first, it takes twice as long and asks for packages
that are not installed. Paths in "Defect" are below ``colossalai/`` in its source.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch
import torch.distributed as dist


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Defect: adapters and quantised optimizers are imported whether or not they are used: peft by ``checkpoint_io/
    utils.py`` and the plugins (half of a rank's start-up), galore_torch and bitsandbytes by ``nn/optimizer``.

    Empty classes take their place for the time of the import and go again, so that nobody else finds them.
    """
    from transformers.utils import is_peft_available

    is_peft_available()  # asked and remembered before there is a stand-in to be found
    absent = {
        "peft": ("PeftModel", "PeftType", "get_peft_model"),
        "peft.utils": (),
        "peft.utils.other": ("EMBEDDING_LAYER_NAMES", "check_file_exists_on_hf_hub"),
        "peft.utils.save_and_load": ("get_embedding_layer_name", "has_valid_embedding_base_layer"),
        "galore_torch": ("GaLoreAdafactor", "GaLoreAdamW"),
        "bitsandbytes": (),
        "bitsandbytes.optim": (),
        "bitsandbytes.optim.optimizer": ("Optimizer2State",),
    }
    before = {name: sys.modules.get(name) for name in absent}
    for name, classes in absent.items():
        sys.modules[name] = module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        for cls in classes:
            setattr(module, cls, type(cls, (), {}))
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


@contextmanager
def _nothing_compiled() -> Iterator[None]:
    """Defect: ``quantization/fp8.py`` and ``shardformer/layer/attn.py`` compile helpers as they are imported, which
    loads the whole of inductor; nobody here calls them."""
    real = torch.compile
    torch.compile = lambda model=None, **options: model if model is not None else lambda function: function
    try:
        yield
    finally:
        torch.compile = real


def _has_no_hccl() -> bool:
    return False


# Defect: pipeline/p2p.py calls torch.distributed.is_hccl_available, which only torch_npu defines.
if not hasattr(dist, "is_hccl_available"):
    dist.is_hccl_available = _has_no_hccl

with _stand_ins(), _nothing_compiled(), warnings.catch_warnings():
    warnings.simplefilter("ignore")  # apex, tensornvme and flash-attention are absent on purpose
    import colossalai
    from colossalai.accelerator import CpuAccelerator, set_accelerator
    from colossalai.booster import Booster
    from colossalai.booster.plugin import MoeHybridParallelPlugin
    from colossalai.booster.plugin.hybrid_parallel_plugin import (
        HybridParallelModule,
        HybridParallelZeroOptimizer,
        get_param_info,
    )
    from colossalai.pipeline import p2p
    from colossalai.shardformer import ShardFormer
    from colossalai.shardformer.policies.base_policy import Policy

__all__ = [
    "Booster",
    "CpuAccelerator",
    "HybridParallelModule",
    "HybridParallelZeroOptimizer",
    "MoeHybridParallelPlugin",
    "Policy",
    "ShardFormer",
    "colossalai",
    "get_param_info",
    "p2p",
    "set_accelerator",
]
