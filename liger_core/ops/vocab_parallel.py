"""A head whose rows are split over processes: the values of whole rows from those of their parts.

lse = logsumexp of the parts' lse        z[y] = sum of the parts' z[y], 0 where they have no y
entropy = lse - sum over parts of exp(lse_part - lse) (lse_part - entropy_part)
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from liger_core.ops.row_loss import RowLoss, Rows


class VocabShard(NamedTuple):
    """This process's rows of a head: classes start ... start + w.shape[0] of `total`.

    Labels are classes of the whole vocabulary. Losses and statistics come out whole and the same on
    every process of `group`; gradients of w and b are those of the process's own rows, and the
    gradient of x is this process's part of a sum, as the input of a column-parallel layer has it.
    """

    start: int
    total: int
    group: ProcessGroup


def combine(part: Rows, y: Tensor, o: RowLoss, shard: VocabShard) -> Rows:
    """Whole rows of y (n,) from this process's part of them: one all-gather."""
    names = [name for name, value in zip(Rows._fields, part, strict=True) if value is not None]
    columns = torch.stack([getattr(part, name).to(part.lse.dtype) for name in names])
    every = columns.new_empty(shard.group.size(), *columns.shape)  # (processes, names, n)
    dist.all_gather(list(every.unbind()), columns, group=shard.group)
    parts = dict(zip(names, every.unbind(1), strict=True))
    lse, e = parts["lse"].logsumexp(0), o.label_smoothing
    z_y = parts["loss"].sum(0)
    mean = parts["mean_logit"].sum(0) if "mean_logit" in parts else None
    loss = (1 - e) * (lse - z_y) + o.z_loss * lse.square()
    loss = loss + e * (lse - mean) if e and mean is not None else loss
    entropy = square = top = top_z = None
    if "entropy" in parts:
        expected = (parts["lse"] - lse).exp() * (parts["lse"] - parts["entropy"])
        entropy = lse - expected.sum(0)
    if "log_sum_sq_probs" in parts:
        square = (parts["log_sum_sq_probs"] + 2 * (parts["lse"] - lse)).logsumexp(0)
    if "top" in parts:
        top_z = parts["top_logit"].amax(0)
        classes = parts["top"].masked_fill(parts["top_logit"] != top_z, torch.inf)
        top = classes.amin(0).to(torch.int64)  # the first of several
    return Rows(loss, lse, mean, entropy, square, top, top_z).without(y == o.ignore_index)
