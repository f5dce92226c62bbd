"""The layers, losses and patches for Hugging Face transformers.

What needs the transformers package is imported when first used; the rest needs torch alone.
"""

import importlib
from typing import TYPE_CHECKING, Any

from liger_kernel.transformers.cross_entropy import LigerCrossEntropyLoss
from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss
from liger_kernel.transformers.geglu import LigerGEGLUMLP, LigerTiledGEGLUMLP
from liger_kernel.transformers.layer_norm import LigerLayerNorm
from liger_kernel.transformers.patch import Patch, apply, patch_of
from liger_kernel.transformers.recipes import FAMILIES
from liger_kernel.transformers.rms_norm import LigerFusedAddRMSNorm, LigerRMSNorm
from liger_kernel.transformers.rope import liger_rotary_pos_emb
from liger_kernel.transformers.swiglu import (
    LigerPhi3SwiGLUMLP,
    LigerSwiGLUMLP,
    LigerTiledSwiGLUMLP,
)

if TYPE_CHECKING:
    from liger_kernel.transformers.auto_model import AutoLigerKernelForCausalLM
    from liger_kernel.transformers.callback import LigerCallback
    from liger_kernel.transformers.monkey_patch import (
        _apply_liger_kernel,
        _apply_liger_kernel_to_instance,
    )
    from liger_kernel.transformers.training_args import (
        LigerArguments,
        Seq2SeqTrainingArguments,
        TrainingArguments,
    )

_LAZY = {
    "AutoLigerKernelForCausalLM": "auto_model",
    "LigerArguments": "training_args",
    "LigerCallback": "callback",
    "Seq2SeqTrainingArguments": "training_args",
    "TrainingArguments": "training_args",
    "_apply_liger_kernel": "monkey_patch",
    "_apply_liger_kernel_to_instance": "monkey_patch",
} | {f"apply_liger_kernel_to_{family}": "monkey_patch" for family in FAMILIES}

__all__ = [
    "AutoLigerKernelForCausalLM",
    "LigerArguments",
    "LigerCallback",
    "LigerCrossEntropyLoss",
    "LigerFusedAddRMSNorm",
    "LigerFusedLinearCrossEntropyLoss",
    "LigerGEGLUMLP",
    "LigerLayerNorm",
    "LigerPhi3SwiGLUMLP",
    "LigerRMSNorm",
    "LigerSwiGLUMLP",
    "LigerTiledGEGLUMLP",
    "LigerTiledSwiGLUMLP",
    "Patch",
    "Seq2SeqTrainingArguments",
    "TrainingArguments",
    "_apply_liger_kernel",
    "_apply_liger_kernel_to_instance",
    "apply",
    "liger_rotary_pos_emb",
    "patch_of",
]


def __dir__() -> list[str]:
    return [*globals(), *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_LAZY[name]}")
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError(f"{name} needs transformers: pip install transformers") from error
    return getattr(module, name)
