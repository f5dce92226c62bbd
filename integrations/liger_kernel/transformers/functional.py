"""Upstream's functional names and argument order over liger_core."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from liger_core import (
    add_rms_norm,
    cross_entropy,
    cross_entropy_stats,
    geglu,
    layer_norm,
    linear_cross_entropy,
    linear_cross_entropy_stats,
    rms_norm,
    swiglu,
)
from liger_core.ops.reduction import CrossEntropyStats, Reduction
from liger_core.ops.rms_norm import Casting
from liger_kernel.transformers.rope import liger_rotary_pos_emb as liger_rope

__all__ = [
    "CrossEntropyOutput",
    "liger_cross_entropy",
    "liger_fused_add_rms_norm",
    "liger_fused_linear_cross_entropy",
    "liger_geglu",
    "liger_layer_norm",
    "liger_rms_norm",
    "liger_rope",
    "liger_swiglu",
]


@dataclass
class CrossEntropyOutput:
    """A loss and what was asked for beside it, without gradients; see `CrossEntropyStats`."""

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None  # of each label where the reduction is "none"
    predicted_tokens: Tensor | None = None


def _output(
    out: CrossEntropyStats, target: Tensor, ignore_index: int, reduction: Reduction,
    z_loss: bool, token_accuracy: bool, predicted_tokens: bool,
) -> CrossEntropyOutput:  # fmt: skip
    hits = out.token_accuracy
    if reduction == "none":
        hits = ((out.predicted == target) & (target != ignore_index)).to(hits.dtype)
    return CrossEntropyOutput(
        out.loss,
        out.z_loss if z_loss else None,
        hits if token_accuracy else None,
        out.predicted if predicted_tokens else None,
    )


def liger_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    return_z_loss: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
) -> Tensor | CrossEntropyOutput:
    """`F.cross_entropy` in its argument order; see `liger_core.cross_entropy`.

    Args:
        input: (N, V) logits. target: (N,) labels. lse_square_scale: z-loss weight.
        weight: (V,) weights of the classes. size_average, reduce: refused.
        return_z_loss, return_token_accuracy, return_predicted_tokens: one set returns a
            `CrossEntropyOutput` with what was asked for, instead of the loss.

    Raises:
        ValueError: `size_average` or `reduce` is set.
    """
    if size_average is not None or reduce is not None:
        raise ValueError("size_average and reduce are not supported; use reduction")
    options: dict[str, Any] = {
        "ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing,
        "z_loss": lse_square_scale, "softcap": softcap, "class_weight": weight,
    }  # fmt: skip
    wanted = return_z_loss, return_token_accuracy, return_predicted_tokens
    if not any(wanted):
        return cross_entropy(input, target, **options)
    out = cross_entropy_stats(input, target, **options)
    return _output(out, target, ignore_index, reduction, *wanted)


def liger_fused_linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ce_weight: Tensor | None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    accum_dtype: torch.dtype | None = None,
    use_token_scaling: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
) -> Tensor | CrossEntropyOutput:
    """Cross entropy of `input @ weight.T + bias`; see `liger_core.linear_cross_entropy`.

    Args:
        input: (N, H) hidden states. weight: (V, H). target: (N,) labels. bias: (V,).
        ce_weight: (V,) weights of the classes. use_token_scaling: `token_scaling`.
        return_z_loss, return_token_accuracy, return_predicted_tokens: one set returns a
            `CrossEntropyOutput` with what was asked for, instead of the loss.
    """
    options: dict[str, Any] = {
        "ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing,
        "z_loss": lse_square_scale, "softcap": softcap, "accum_dtype": accum_dtype,
        "token_scaling": use_token_scaling, "class_weight": ce_weight,
    }  # fmt: skip
    wanted = return_z_loss, return_token_accuracy, return_predicted_tokens
    if not any(wanted):
        return linear_cross_entropy(input, weight, target, bias, **options)
    out = linear_cross_entropy_stats(input, weight, target, bias, **options)
    return _output(out, target, ignore_index, reduction, *wanted)


def liger_rms_norm(
    X: Tensor,
    W: Tensor,
    eps: float,
    offset: float = 0.0,
    casting_mode: Casting = "llama",
    in_place: bool = True,
) -> Tensor:
    """`liger_core.rms_norm`; `in_place` has no effect, X and its gradient are never written to."""
    return rms_norm(X, W, eps, offset=offset, casting=casting_mode)


def liger_fused_add_rms_norm(
    X: Tensor,
    R: Tensor,
    W: Tensor,
    eps: float,
    offset: float = 0.0,
    casting_mode: Casting = "llama",
    in_place: bool = True,
) -> tuple[Tensor, Tensor]:
    """`liger_core.add_rms_norm`: (norm(X + R), X + R); `in_place` has no effect."""
    return add_rms_norm(X, R, W, eps, offset=offset, casting=casting_mode)


def liger_layer_norm(X: Tensor, W: Tensor, B: Tensor | None, eps: float) -> Tensor:
    """`liger_core.layer_norm`."""
    return layer_norm(X, W, B, eps)


def liger_swiglu(a: Tensor, b: Tensor) -> Tensor:
    """silu(a) * b."""
    return swiglu(a, b)


def liger_geglu(a: Tensor, b: Tensor) -> Tensor:
    """gelu(a) * b, tanh form."""
    return geglu(a, b)
