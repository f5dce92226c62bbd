"""Cross entropy of logits that the caller keeps. The equation and the kernel are `row_loss`'s."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from liger_core.dispatch import Impl, use_triton
from liger_core.ops.labels import IGNORE_INDEX, LabelScan, as_labels
from liger_core.ops.row_loss import RowLoss, Rows, join, row_grad, row_loss

Reduction = Literal["mean", "sum", "none"]
TORCH_CHUNK = 64 << 20  # bytes of temporaries that the torch path works in


def _in_chunks(z: Tensor, kernels: bool) -> int:
    """Rows at a time: all for a kernel, as many as TORCH_CHUNK holds for torch."""
    return max(z.shape[0] if kernels else TORCH_CHUNK // max(z.shape[1] * 4, 1), 1)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor, o: RowLoss, kernels: bool) -> Tensor:
        step = _in_chunks(z, kernels)
        rows = join(
            [
                row_loss(z_c, y_c, o, kernels=kernels)
                for z_c, y_c in zip(z.split(step), y.split(step), strict=True)
            ]
        )
        ctx.save_for_backward(z, y, rows.lse)
        ctx.o, ctx.kernels = o, kernels
        return rows.loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        z, y, lse = ctx.saved_tensors
        dz, step = z.new_empty(z.shape), _in_chunks(z, ctx.kernels)
        for z_c, y_c, lse_c, g_c, dz_c in zip(
            *(t.split(step) for t in (z, y, lse, g, dz)), strict=True
        ):
            row_grad(z_c, y_c, ctx.o, Rows(lse_c, lse_c), g=g_c, dz=dz_c, kernels=ctx.kernels)
        return dz, None, None, None


def reduce_rows(
    loss: Tensor, y: Tensor, ignore_index: int, reduction: Reduction, total: Tensor | None = None
) -> Tensor:
    """(M,) losses to their sum, their mean over scored rows (0 where there are none), or as is."""
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / ((y != ignore_index).sum().clamp_min(1) if total is None else total)


def cross_entropy(
    z: Tensor,
    y: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    reduction: Reduction = "mean",
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    impl: Impl = "auto",
) -> Tensor:
    """Cross entropy of logits that the caller keeps; equals `F.cross_entropy` where both can.

    Args:
        z: (..., V) logits, any float dtype. Not written to.
        y: (...) integer labels in [0, V), or `ignore_index`: loss 0 and gradient 0.
        reduction: "mean" over the scored labels (0, not NaN, where there are none), "sum", or
            "none" for y's shape.
        softcap: z becomes softcap * tanh(z / softcap) (Gemma 2); None for no cap.
        scale: multiplies z before the cap. temperature: divides it after.
        label_smoothing: e in `row_loss`'s equation (Szegedy et al. 2016, section 7).
        z_loss: weight of lse^2 (PaLM, Chowdhery et al. 2022, section 5).
        impl: "auto", "triton" or "torch"; see `liger_core.dispatch.use_triton`.

    Returns:
        fp32 (fp64 for fp64). Saved for backward: z, y and one fp32 a row. The gradient is one
        buffer of z's size and dtype, made in backward.

    Raises:
        ValueError: shapes or devices that do not fit; labels that are not integers; on a CPU, a
            label out of range. On a GPU, which is not waited for, such a row's loss is NaN.
    """
    if z.shape[:-1] != y.shape:
        raise ValueError(
            f"labels must have shape {tuple(z.shape[:-1])}, that of the logits without the last, "
            f"got {tuple(y.shape)}"
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    o = RowLoss(ignore_index, softcap, scale, label_smoothing, z_loss, temperature)
    o.check()
    kernels, labels = use_triton(impl, z, y) and z.numel() > 0, as_labels(y)
    if not (z.is_cuda or torch.compiler.is_compiling()):
        LabelScan(y, z.shape[-1], ignore_index).count()
    rows = z.reshape(y.numel(), z.shape[-1])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    loss = _CrossEntropy.apply(rows, labels, o, kernels)
    loss = reduce_rows(loss, y, ignore_index, reduction)  # pyright: ignore
    return loss.view(y.shape) if reduction == "none" else loss
