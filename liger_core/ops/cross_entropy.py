"""Cross entropy of logits that are given. The equation and the kernel are `row_loss`'s.

    loss = sum over rows m of loss(z[m], y[m]) / total

A sum's gradient is taken in forward, where a row that was read for its loss is still in L2: one
read and one write of the logits in all. Backward multiplies it by the upstream gradient, which
where that is 1 reads one number and returns. fp16 has not the range for a gradient that waits for
its loss scale, and the losses of rows have no upstream gradient yet: there, and under
torch.compile, whose product would be a pass of its own, the gradient is taken in backward.

A second backward reads the logits again, and gives the same gradient as the first.
"""

from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from liger_core.dispatch import Impl, accumulate_dtype, no_autocast, overwritable, use_triton
from liger_core.ops.labels import IGNORE_INDEX, LabelScan, as_labels
from liger_core.ops.reduction import (
    CrossEntropyStats,
    Reduction,
    check_reduction,
    class_weights,
    share_of_rows,
    with_stats,
)
from liger_core.ops.row_loss import NOTHING, RowLoss, Rows, Want, join, row_grad, row_loss
from liger_core.ops.scaled import scaled

TORCH_CHUNK = 64 << 20  # bytes of temporaries that the torch path works in


class _Plan(NamedTuple):
    """All that is not a tensor."""

    o: RowLoss
    want: Want
    summed: bool  # else a loss a row
    early: bool  # the gradient is taken in forward
    inplace: bool  # it takes the place of the logits
    kernels: bool


def _rows(
    plan: _Plan, c: Tensor | None, z: Tensor, y: Tensor, g: Tensor | None, dz: Tensor | None,
    lse: Tensor | None,
) -> Rows:  # fmt: skip
    if lse is None or dz is None:
        return row_loss(z, y, plan.o, c=c, want=plan.want, g=g, dz=dz, kernels=plan.kernels)
    rows = Rows(lse, lse)
    row_grad(z, y, plan.o, rows, c=c, g=g, dz=dz, kernels=plan.kernels)
    return rows


def _walk(
    plan: _Plan, c: Tensor | None, z: Tensor, y: Tensor, g: Tensor | None, dz: Tensor | None,
    lse: Tensor | None = None,
) -> Rows:  # fmt: skip
    """Values of the rows and, into dz, the gradient of loss * g; that alone by an earlier lse."""
    M, V = y.shape[0], z.shape[-1]
    z = z if z.dim() == 2 else z.reshape(M, V)
    z = z if z.stride(-1) == 1 else z.contiguous()
    tensors = (z, y, g, None if dz is None else dz.view(M, V), lse)
    if plan.kernels:
        return _rows(plan, c, *tensors)
    step = max(TORCH_CHUNK // max(V * 4, 1), 1)
    parts = [repeat(None) if t is None else t.split(step) for t in tensors]
    with no_autocast(z.device.type):  # which would take z @ c in half precision, on a GPU
        return join([_rows(plan, c, *part) for part in zip(*parts, strict=False)])  # pyright: ignore


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, y: Tensor, c: Tensor | None, share: Tensor | None, plan: _Plan
    ) -> Tensor | tuple[Tensor | None, ...]:
        dz = z.detach() if plan.inplace else z.new_empty(z.shape) if plan.early else None
        g = share.expand(y.shape) if plan.early and share is not None else None
        out = _walk(plan, c, z, y, g, dz if plan.early else None)
        if plan.early and plan.inplace:
            increment_version(z)  # autograd then tells who has saved z
        ctx.plan, ctx.dz = plan, dz  # outside of autograd's sight: the first backward uses it up
        ctx.save_for_backward(z, y, c, share, out.lse)
        loss = out.loss.sum() if plan.summed else out.loss
        loss = loss if share is None else loss * share
        if not plan.want.top:
            return loss
        ctx.mark_non_differentiable(*(t for t in (out.lse, out.top) if t is not None))
        return loss, out.lse, out.top

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        plan, dz, ctx.dz = ctx.plan, ctx.dz, None
        if plan.inplace and dz is None:
            raise RuntimeError(
                "inplace=True has put the gradient where the logits were, so that there is one "
                "backward only; leave inplace out"
            )
        z, y, c, share, lse = ctx.saved_tensors
        if dz is None or not plan.early:
            dz = z.new_empty(z.shape) if dz is None else dz
            g = share if plan.early else dloss if share is None else dloss * share
            g = None if g is None else g.expand(y.shape)
            _walk(plan, c, z, y, g, dz, None if plan.early else lse)  # as in forward, bit by bit
        if plan.early:
            scaled(dz.view(y.shape[0], z.shape[-1]), dloss, dz, True, plan.kernels)
        if plan.inplace:
            increment_version(dz)
        return dz, None, None, None, None


def _check_inplace(z: Tensor) -> None:
    if not overwritable(z):
        raise ValueError(
            f"inplace=True writes the gradient over the logits: they must be contiguous, a plain "
            f"tensor, and neither a leaf that requires grad nor a view of one; leave it out for a "
            f"{type(z).__name__} of shape {tuple(z.shape)}, strides {z.stride()}"
        )


def _cross_entropy(
    z: Tensor, y: Tensor, o: RowLoss, want: Want, reduction: Reduction, total: Tensor | None,
    c: Tensor | None, inplace: bool, impl: Impl,
) -> tuple[Tensor, Rows | None, Tensor, Tensor | None]:  # fmt: skip
    """The reduced loss, (M,) values of the rows if any is wanted, labels, what a row weighs."""
    if z.shape[:-1] != y.shape:
        raise ValueError(
            f"labels must have shape {tuple(z.shape[:-1])}, that of the logits without the last, "
            f"got {tuple(y.shape)}"
        )
    check_reduction(reduction, total, z.device)
    o.check()
    kernels, labels = use_triton(impl, z, y) and z.numel() > 0, as_labels(y)
    V, dtype, compiling = z.shape[-1], accumulate_dtype(z.dtype), torch.compiler.is_compiling()
    if not (z.is_cuda or compiling):
        LabelScan(y, V, o.ignore_index).count()
    c = None if c is None else class_weights(c, V, z.device, dtype)
    share = None if total is None else total.to(dtype).reciprocal()
    if reduction == "mean" and share is None:
        share = share_of_rows(labels, V, o.ignore_index, c, dtype, kernels)
    eager = torch.is_grad_enabled() and z.requires_grad and not compiling
    if eager and inplace:
        _check_inplace(z)
    summed = reduction != "none"
    early = eager and summed and z.dtype != torch.float16
    plan = _Plan(o, want, summed, early, eager and inplace, kernels)
    out: Any = _CrossEntropy.apply(z, labels, c, share, plan)
    loss, lse, top = out if want.top else (out, None, None)
    loss = loss if summed or y.dim() == 1 else loss.view(y.shape)
    return loss, None if lse is None else Rows(lse, lse, top=top), labels, share


def cross_entropy(
    z: Tensor,
    y: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    reduction: Reduction = "mean",
    total: Tensor | None = None,
    class_weight: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    inplace: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Cross entropy of logits that are given; equals `F.cross_entropy` where both can.

    Args:
        z: (..., V) logits, any float dtype.
        y: (...) integer labels in [0, V), or `ignore_index`: loss 0 and gradient 0.
        reduction: "mean" (the sum over that of class_weight[y[m]] of scored labels; 0, not NaN,
            where there are none), "sum", or "none" for y's shape.
        total: what the sum of losses is divided by, a 0-d tensor; None for the reduction's own.
            Dividing the result instead costs one more pass over the gradient.
        class_weight: (V,) weights of the classes, as `F.cross_entropy` has them; not of the z-loss.
        softcap: z becomes softcap * tanh(z / softcap) (Gemma 2); None for no cap.
        scale: multiplies z before the cap. temperature: divides it after.
        label_smoothing: e in `row_loss`'s equation (Szegedy et al. 2016, section 7).
        z_loss: weight of lse^2 (PaLM, Chowdhery et al. 2022, section 5).
        inplace: write the gradient over the logits, which saves a tensor of their size: z holds it
            from now on, or from backward for fp16 and "none". A second backward raises, and so
            does autograd for whoever saved z before, but not under saved-tensor hooks
            (non-reentrant checkpoints). No effect where z gets no gradient, nor under
            torch.compile.
        impl: "auto", "triton" or "torch"; see `liger_core.dispatch.use_triton`.

    Returns:
        fp32 (fp64 for fp64). Saved for backward: z, y and one fp32 a row; and, from now on for a
        sum or mean of bf16 or fp32, else from backward, the gradient, of z's size and dtype.

    Raises:
        ValueError: shapes or devices that do not fit; labels that are not integers; on a CPU, a
            label out of range. On a GPU, which is not waited for, such a row's loss is NaN. With
            `inplace`, logits that are not contiguous, or a leaf.
    """
    o = RowLoss(ignore_index, softcap, scale, label_smoothing, z_loss, temperature)
    return _cross_entropy(z, y, o, NOTHING, reduction, total, class_weight, inplace, impl)[0]


def cross_entropy_stats(
    z: Tensor,
    y: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    reduction: Reduction = "mean",
    total: Tensor | None = None,
    class_weight: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    inplace: bool = False,
    impl: Impl = "auto",
) -> CrossEntropyStats:
    """`cross_entropy` with what the same pass over the logits tells besides.

    Arguments and errors are those of `cross_entropy`.
    """
    o = RowLoss(ignore_index, softcap, scale, label_smoothing, z_loss, temperature)
    loss, rows, labels, share = _cross_entropy(
        z, y, o, Want(top=True), reduction, total, class_weight, inplace, impl
    )
    assert rows is not None
    return with_stats(
        loss, rows, labels, o, share, reduction != "none", lambda t, _: t.view(y.shape)
    )
