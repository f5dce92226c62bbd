"""Cross entropy under a linear head with its gradients taken in forward: 3 products, 2 if frozen.

    loss = sum over scored rows m of weight[m] * loss(z[m], y[m]) / total        z as in linear_head

A chunk's logits become their own gradient in place, and serve for dx and dw, while the buffer goes
on to the next chunk. What divides the sum goes into that gradient at once where the dtype has the
range; fp16 has not, and keeps rows that weigh 1 at the most until backward.

A second backward walks again, and gives the same gradients as the first.
"""

from typing import Any, Unpack

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from liger_core.dispatch import accumulate_dtype
from liger_core.ops.linear_head import (
    Call,
    Grads,
    Head,
    HeadOptions,
    Options,
    Plan,
    Walk,
    largest,
    prepare,
    spans,
    without_autocast,
)
from liger_core.ops.linear_logprob import row_losses
from liger_core.ops.reduction import (
    CrossEntropyStats,
    Reduction,
    check_reduction,
    class_weights,
    sum_of_weights,
    with_stats,
)
from liger_core.ops.row_loss import NOTHING, RowLoss, Rows, Want, join
from liger_core.ops.scaled import scale_all


@without_autocast
def _walk(
    plan: Plan, head: Head, y: Tensor, rows: Tensor | None, c: Tensor | None, want: Want,
    g: Tensor | None,
) -> tuple[Rows, Grads]:  # fmt: skip
    """Losses of the scored rows, unweighted, and the gradients of their sum times g."""
    y = y if rows is None else y[rows]
    parts, walk = spans(0, y.shape[0], plan.chunks), Walk(plan, head, rows)
    out: list[Rows] = []
    buffer, grad = walk.buffer(parts[0]), any(plan.need)
    for part in parts:
        z = walk.logits(part, buffer)
        out.append(walk.loss(z, y[part], c, want, None if g is None else g[part], grad))
        if grad:
            walk.add(z)
    return join(out), walk.grads()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, u: Tensor | None, v: Tensor | None,
        y: Tensor, rows: Tensor | None, c: Tensor | None, weights: Tensor | None, total: Tensor,
        plan: Plan, want: Want,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        head, inverse = Head(x, w, b, u, v), total.reciprocal()
        n = y.shape[0] if rows is None else rows.shape[0]
        if plan.unit:
            g, later = weights, inverse
            for t in (weights, c):  # rows weigh 1 at the most, so that fp16 holds the products
                if t is not None:
                    most = largest(t)  # class weights are not the z-loss's, which weighs about 1
                    most = most.clamp_min(1.0) if t is c and plan.o.z_loss else most
                    g = 1 / most.expand(n) if g is None else g / most
                    later = later * most
        else:
            g, later = inverse.expand(n), torch.ones_like(inverse)
            g = g if weights is None else g * weights
        out, grads = _walk(plan, head, y, rows, c, want, g)
        ctx.plan, ctx.unit = plan, None
        saved = (*head, y, rows, c, g, later)
        if torch.compiler.is_compiling():
            ctx.save_for_backward(*saved, *grads)
        else:  # outside of autograd's sight, so that the first backward may scale them in place
            ctx.unit = grads
            ctx.save_for_backward(*saved)
        ctx.mark_non_differentiable(*(t for t in (out.lse, out.top) if t is not None))
        loss = (out.loss if weights is None else out.loss * weights).sum() / total
        return loss, out.lse, out.top

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, w, b, u, v, y, rows, c, g, later, *grads = ctx.saved_tensors
        head, own = Head(x, w, b, u, v), len(grads) == 0
        if own:
            grads, ctx.unit = ctx.unit or _walk(ctx.plan, head, y, rows, c, NOTHING, g)[1], None
        s = dloss * later
        return *scale_all(grads, s, head, own, ctx.plan.kernels), *[None] * 7


def _weights(
    call: Call, y: Tensor, weights: Tensor | None, c: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Weights of the scored rows and of the classes, in the dtype that losses have."""
    dtype, w = accumulate_dtype(call.plan.dtype), call.head.w
    if weights is not None:
        if weights.shape != y.shape or weights.requires_grad:
            raise ValueError(
                f"weights must have y's shape {tuple(y.shape)} and need no gradient, got "
                f"{tuple(weights.shape)}, requires_grad={weights.requires_grad}; detach them"
            )
        weights = weights.flatten().to(dtype)
        weights = weights if call.rows is None else weights[call.rows]
    if c is not None:
        if call.plan.shard is not None:
            raise ValueError("class_weight needs a head that is whole; leave shard out")
        if call.plan.o.token_scaling:
            raise ValueError("token_scaling weighs the plain loss; leave class_weight out")
        c = class_weights(c, w.shape[0], w.device, dtype)
    return weights, c


def _total(call: Call, weights: Tensor | None, c: Tensor | None, reduction: Reduction) -> Tensor:
    """What a sum is divided by: 1, or the sum of the scored rows' weights, 1 where that is 0."""
    dtype, x = accumulate_dtype(call.plan.dtype), call.head.x
    counted = bool(call.counts) or call.n == 0
    if reduction != "mean" or (weights is None and c is None and counted):
        count = max(call.n, 1) if reduction == "mean" else 1
        return torch.full((), count, dtype=dtype, device=x.device)
    return sum_of_weights(call.labels(), call.plan.o.ignore_index, dtype, weights, c)


def _cross_entropy(
    x: Tensor, w: Tensor, y: Tensor, b: Tensor | None, o: RowLoss, want: Want,
    total: Tensor | None, reduction: Reduction, weights: Tensor | None, c: Tensor | None,
    opt: Options,
) -> tuple[Call, Tensor, Rows, Tensor | None]:  # fmt: skip
    """The reduced loss; values of the scored rows, their weights times 1 / total."""
    check_reduction(reduction, total, x.device)
    call = prepare(x, w, y, b, o, opt)
    weights, c = _weights(call, y, weights, c)
    if reduction == "none":
        most = largest(c) if call.plan.unit and c is not None and not o.z_loss else None
        rows = row_losses(call, want, c=c if c is None or most is None else c / most)
        rows = rows if most is None else rows._replace(loss=rows.loss * most)
        loss = rows.loss if weights is None else rows.loss * weights
        return call, call.spread(loss, y), rows, weights
    dtype = accumulate_dtype(call.plan.dtype)
    total = _total(call, weights, c, reduction) if total is None else total.to(dtype)
    loss, lse, top = _LinearCrossEntropy.apply(
        *call.head, call.y, call.rows, c, weights, total, call.plan, want
    )  # pyright: ignore
    share = total.reciprocal() if weights is None else weights / total
    return call, loss, Rows(lse, lse, top=top), share


def linear_cross_entropy(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    b: Tensor | None = None,
    *,
    total: Tensor | None = None,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    token_scaling: bool = False,
    weights: Tensor | None = None,
    class_weight: Tensor | None = None,
    **options: Unpack[HeadOptions],
) -> Tensor:
    """`cross_entropy(x @ w.T + b, y)` with its gradients taken in forward, chunk by chunk.

    Args:
        x: (..., H) hidden states.
        w: (V, H) weight of the head, in x's dtype, or any under autocast.
        y: (...) integer labels in [0, V), or `ignore_index`.
        b: (V,) bias, or None.
        total: what the sum of losses is divided by, a 0-d tensor; None for the reduction's own.
        reduction: "mean" (the sum over that of weights[m] * class_weight[y[m]] of scored labels; 0
            where there are none), "sum", or "none" for the loss of each label, whose gradient is
            then taken in backward: 4 products, not 3.
        label_smoothing, z_loss: as in `cross_entropy`.
        token_scaling: weigh each label's loss by its probability (DFT, Wu et al. 2025).
        weights: y's shape; multiply each label's loss. They get no gradient.
        class_weight: (V,) weights of the classes, as `F.cross_entropy` has them; not of the z-loss.
        options: see `HeadOptions`.

    Returns:
        fp32 (fp64 for fp64): a scalar, or y's shape for "none". Between forward and backward, the
        gradients of x and w are held; beyond them the peak is the memory budget.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a label out of range.
    """
    opt = Options(**options)
    o = opt.row_loss(label_smoothing, z_loss, token_scaling)
    return _cross_entropy(
        x, w, y, b, o, NOTHING, total, reduction, weights, class_weight, opt
    )[1]  # fmt: skip


def linear_cross_entropy_stats(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    b: Tensor | None = None,
    *,
    total: Tensor | None = None,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    token_scaling: bool = False,
    weights: Tensor | None = None,
    class_weight: Tensor | None = None,
    **options: Unpack[HeadOptions],
) -> CrossEntropyStats:
    """`linear_cross_entropy` with what the same pass over the logits tells besides.

    Arguments and errors are those of `linear_cross_entropy`.
    """
    opt = Options(**options)
    o = opt.row_loss(label_smoothing, z_loss, token_scaling)
    call, loss, rows, share = _cross_entropy(
        x, w, y, b, o, Want(top=True), total, reduction, weights, class_weight, opt
    )
    return with_stats(
        loss, rows, call.labels(), o, share, reduction != "none",
        lambda t, fill: call.spread(t, y, fill),
    )  # fmt: skip
