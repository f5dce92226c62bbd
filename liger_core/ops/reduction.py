"""What the losses of rows come to: a sum or a mean, the weights in it, and statistics beside it."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from liger_core.dispatch import fp32, launch, tl, triton
from liger_core.ops.row_loss import RowLoss, Rows

Reduction = Literal["mean", "sum", "none"]


class CrossEntropyStats(NamedTuple):
    """A cross entropy and what the same pass over the logits tells; only `loss` has a gradient."""

    loss: Tensor  # as the function without statistics returns it
    z_loss: Tensor  # the part of it that is the z-loss, reduced like it
    token_accuracy: Tensor  # 0-d: scored labels that are their row's largest logit; 0 of none
    predicted: Tensor  # y's shape, int64: the class of the largest logit, -1 where y is ignored


def check_reduction(reduction: str, total: Tensor | None, device: torch.device) -> None:
    """ValueError if the reduction is unknown, or `total` is not what divides its sum."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if total is None:
        return
    if reduction == "none":
        raise ValueError("total divides the sum; reduction='none' has none, leave it out")
    if total.dim() or total.requires_grad or total.device != device:
        raise ValueError(
            f"total must be 0-d, on {device} and need no gradient, got {tuple(total.shape)} on "
            f"{total.device}, requires_grad={total.requires_grad}"
        )


def class_weights(c: Tensor, V: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(V,) weights of the classes as the row kernel takes them; ValueError if of another shape."""
    if c.shape != (V,):
        raise ValueError(f"class_weight must be ({V},), got {tuple(c.shape)}")
    return c.detach().to(device, dtype).contiguous()


def sum_of_weights(
    y: Tensor, ignore_index: int, dtype: torch.dtype, weights: Tensor | None, c: Tensor | None
) -> Tensor:
    """0-d: the sum of the weights of the scored labels and of their classes, 1 where that is 0."""
    each = y != ignore_index
    if weights is None and c is None:
        return each.sum(dtype=dtype).clamp_min_(1)
    each = each if weights is None else each * weights
    each = each if c is None else each * c[y.clamp(0, c.shape[0] - 1)]
    total = each.sum(dtype=dtype)
    return total.masked_fill(total == 0, 1.0)


@triton.jit
def _share_kernel(
    y_ptr, c_ptr, share_ptr, M, V, ignore_index, HAS_C: tl.constexpr, BLOCK_M: tl.constexpr
):
    # Grid (1,): 1 / sum_of_weights of labels y (M,) and their classes c (V,), which is 0-d.
    total = 0.0
    for start in range(0, M, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        y = tl.load(y_ptr + rows, mask=rows < M, other=ignore_index)
        each = tl.where(y != ignore_index, 1.0, 0.0)
        if HAS_C:
            y = tl.minimum(tl.maximum(y, 0), V - 1)
            each *= tl.load(c_ptr + y)
        total += tl.sum(each)  # pyright: ignore[reportOperatorIssue]
    total = tl.where(total == 0, 1.0, total)
    tl.store(share_ptr, tl.div_rn(fp32(1.0), total))


def share_of_rows(
    y: Tensor, V: int, ignore_index: int, c: Tensor | None, dtype: torch.dtype, kernels: bool
) -> Tensor:
    """0-d: what a row weighs in the mean, 1 / sum_of_weights; by a kernel one launch, not five."""
    if not kernels or torch.compiler.is_compiling():
        return sum_of_weights(y, ignore_index, dtype, None, c).reciprocal()
    share = torch.empty((), dtype=dtype, device=y.device)
    args = (y, share if c is None else c, share, y.shape[0], V, ignore_index)
    launch(_share_kernel, (1, 1, 1), 8, args, c is not None, 4096)
    return share


def with_stats(
    loss: Tensor, rows: Rows, y: Tensor, o: RowLoss, share: Tensor | None, summed: bool,
    spread: Callable[[Tensor, int], Tensor],
) -> CrossEntropyStats:  # fmt: skip
    """The loss and the statistics of (n,) rows, each of which has a share in it, None for 1.

    `spread` gives values of rows the shape of all labels, and what fills it elsewhere.
    """
    z_loss = o.z_loss * rows.lse.detach().square()
    z_loss = z_loss if share is None else z_loss * share
    z_loss = z_loss.sum() if summed else spread(z_loss, 0)
    hits = rows.hits(y, o.ignore_index)
    assert hits is not None and rows.top is not None
    accuracy = hits.sum() / (y != o.ignore_index).sum().clamp_min(1)
    return CrossEntropyStats(loss, z_loss, accuracy, spread(rows.top, -1))
