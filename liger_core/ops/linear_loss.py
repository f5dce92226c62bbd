"""A loss of whole sequences' log-probabilities under a linear head, its gradients taken in forward.

    loss = sum over groups of loss_fn(logp of the group's sequences)

A chunk holds whole groups. Its logits give log-probabilities, those their loss and its gradient by
a tiny autograd, and the logits become their own gradient in place: 3 products. A group that is
larger than the budget goes through in parts, all of them forward, then all of them back: the last
part's logits are still there, the others are computed again.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, Unpack

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from liger_core.dispatch import accumulate_dtype, sum_dtype
from liger_core.ops.linear_head import (
    CHUNKS,
    MAX_BUDGET,
    MIN_BUDGET,
    Call,
    Grads,
    Head,
    HeadOptions,
    Options,
    Plan,
    Walk,
    prepare,
    spans,
    split,
    without_autocast,
)
from liger_core.ops.linear_logprob import (
    Output,
    TokenStats,
    row_losses,
    token_stats,
    unit_gradients,
    wanted,
)
from liger_core.ops.row_loss import Rows, Want, join
from liger_core.ops.scaled import scale_all

Together = Literal["sequence", "pair", "batch"]
LossFn = Callable[[TokenStats, Callable[[Tensor], Tensor]], Tensor]


def check_sequences(y: Tensor, pairs: bool) -> None:
    """ValueError unless y is (S, T), of an even S for pairs."""
    if y.dim() != 2 or (pairs and y.shape[0] % 2):
        raise ValueError(
            f"y must be (S, T){', with S even for pairs' if pairs else ''}, got {tuple(y.shape)}"
        )


class _Bin(NamedTuple):
    """Whole groups that go through together."""

    rows: slice  # of the scored rows, in the order of the bins
    parts: list[slice]  # of the same, of a size that fits the budget; one, if the bin does
    sequences: tuple[slice, ...]  # of y

    def take(self, t: Tensor) -> Tensor:
        return torch.cat([t[s] for s in self.sequences])


def _pack(sizes: list[int], most: int) -> list[tuple[int, int]]:
    """Consecutive groups, as many together as `most` rows hold; a larger one by itself."""
    packed, start, held = list[tuple[int, int]](), 0, 0
    for i, size in enumerate(sizes):
        if i > start and held + size > most:
            packed.append((start, i))
            start, held = i, 0
        held += size
    return [*packed, (start, len(sizes))]


def _capacity(sizes: list[int], row_bytes: int, budget: int | None) -> int:
    """Rows that a bin may hold: as few as four bins take and the largest group needs, within the
    limits of the default budget; or what the caller's holds."""
    if budget is not None:
        return max(budget // row_bytes, 1)
    low = max(-(-sum(sizes) // CHUNKS), max(sizes), MIN_BUDGET // row_bytes, 1)
    high = max(MAX_BUDGET // row_bytes, 1)
    if low >= high or len(_pack(sizes, high)) > CHUNKS:
        return high
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_pack(sizes, middle)) <= CHUNKS else (middle + 1, high)
    return low


def _bins(
    call: Call, y: Tensor, together: Together, budget: int | None
) -> tuple[Tensor | None, list[_Bin]]:
    """The scored rows in the order of the bins, None for all in their own, and the bins."""
    S, T = y.shape
    halves = 2 if together == "pair" else 1
    counts = call.counts or [T] * S
    if len(counts) != S:
        raise ValueError(f"labels must be a LabelScan of y {tuple(y.shape)}, not of another shape")
    groups = S // halves
    sizes = [sum(counts[h * groups + i] for h in range(halves)) for i in range(groups)]
    most = _capacity(sizes, call.plan.row_bytes, budget)
    whole = together == "batch" or call.plan.unit
    bins, order, start = list[_Bin](), list[tuple[int, int]](), 0
    offsets = [0, *itertools.accumulate(counts)]
    for first, last in [(0, groups)] if whole else _pack(sizes, most):
        sequences = tuple(slice(h * groups + first, h * groups + last) for h in range(halves))
        order += [(offsets[s.start], offsets[s.stop]) for s in sequences]
        stop = start + sum(sizes[first:last])
        parts = spans(start, stop, split(stop - start, most))
        bins.append(_Bin(slice(start, stop), parts, sequences))
        start = stop
    if len(bins) == 1 or halves == 1:
        return call.rows, bins
    rows = torch.arange(S * T, device=y.device) if call.rows is None else call.rows
    return torch.cat([rows[a:b] for a, b in order]), bins


@without_autocast
def _walk_bins(
    plan: Plan, head: Head, y: Tensor, rows: Tensor | None, bins: list[_Bin], want: Want,
    loss_fn: LossFn, shape: torch.Size,
) -> tuple[Tensor, Tensor, TokenStats, Grads]:  # fmt: skip
    """The loss, what gradients are still to be multiplied by, the values of all labels, gradients.

    y: labels of the scored rows; shape: (S, T) of all labels.
    """
    walk, values, loss = Walk(plan, head, rows), dict[str, Tensor](), None
    buffer = walk.buffer(max((one.parts[0] for one in bins), key=lambda s: s.stop - s.start))
    later = torch.ones((), dtype=accumulate_dtype(plan.dtype), device=y.device)
    for one in bins:
        at = one.rows if rows is None else rows[one.rows]
        out = [
            walk.loss(walk.logits(part, buffer), y[part], None, want, None, False)
            for part in one.parts
        ]
        rows_of_bin = join(out)
        hits = rows_of_bin.hits(y[one.rows], plan.o.ignore_index)
        _store(values, rows_of_bin, hits, at, shape)
        some, g, dh = _known(values, one, loss_fn)
        loss = some if loss is None else loss + some
        g, dh = _at(g, one, at, shape), None if dh is None else _at(dh, one, at, shape)
        if plan.unit:
            later, g, dh = unit_gradients(g, dh)
        for part, part_rows in zip(reversed(one.parts), reversed(out), strict=True):
            here = slice(part.start - one.rows.start, part.stop - one.rows.start)
            last = part is one.parts[-1]
            z = buffer[: part.stop - part.start] if last else walk.logits(part, buffer)
            walk.grad(z, y[part], part_rows, g[here], None if dh is None else dh[here])
            walk.add(z)
    assert loss is not None
    return loss, later, TokenStats(**values), walk.grads()


def _store(
    values: dict[str, Tensor], rows: Rows, hits: Tensor | None, at: slice | Tensor,
    shape: torch.Size,
) -> None:  # fmt: skip
    """Put the values of some rows where they belong among those of all labels."""
    named = {"logp": -rows.loss, "entropy": rows.entropy, "mean_logit": rows.mean_logit,
             "log_sum_sq_probs": rows.log_sum_sq_probs, "is_top1": hits}  # fmt: skip
    for name, value in named.items():
        if value is not None:
            everywhere = values.setdefault(name, value.new_zeros(shape))
            everywhere.view(-1)[at] = value


def _known(
    values: dict[str, Tensor], one: _Bin, loss_fn: LossFn
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss of a bin, and its gradients with respect to its rows' losses and entropies."""
    mine = {name: one.take(t) for name, t in values.items()}
    leaves = [mine[name].requires_grad_() for name in ("logp", "entropy") if name in mine]
    with torch.enable_grad():
        loss = loss_fn(TokenStats(**mine), one.take)
        if not loss.requires_grad:  # a constant
            return loss, torch.zeros_like(leaves[0]), None
        grads: list[Tensor | None] = [*torch.autograd.grad(loss, leaves, allow_unused=True)]
    g, dh = grads[0], grads[1] if len(grads) > 1 else None
    return loss.detach(), torch.zeros_like(leaves[0]) if g is None else -g, dh


def _at(t: Tensor, one: _Bin, at: slice | Tensor, shape: torch.Size) -> Tensor:
    """Values of a bin's sequences, at its scored rows."""
    everywhere = t.new_empty(shape)
    for s, piece in zip(one.sequences, t.chunk(len(one.sequences)), strict=True):
        everywhere[s] = piece
    return everywhere.view(-1)[at]


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, u: Tensor | None, v: Tensor | None,
        y: Tensor, rows: Tensor | None, plan: Plan, walk: Callable[..., Any],
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        ctx.set_materialize_grads(False)
        loss, later, stats, ctx.unit = walk(plan, Head(x, w, b, u, v), y, rows)
        ctx.save_for_backward(x, w, b, u, v, y, rows, later)
        ctx.plan, ctx.walk = plan, walk
        ctx.mark_non_differentiable(*(t for t in stats if t is not None))
        return loss, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if dloss is None:  # not 0 times gradients that may be NaN
            return (None,) * 9
        *tensors, y, rows, later = ctx.saved_tensors
        head = Head(*tensors)
        grads, ctx.unit = ctx.unit or ctx.walk(ctx.plan, head, y, rows)[3], None
        s = dloss * later
        grads = scale_all(grads, s, head, True, ctx.plan.kernels)
        return *grads, *[None] * 4


def linear_loss(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    loss_fn: LossFn,
    b: Tensor | None = None,
    *,
    together: Together = "sequence",
    outputs: Sequence[Output] = (),
    **options: Unpack[HeadOptions],
) -> tuple[Tensor, TokenStats]:
    """A loss of the log-probabilities of whole sequences, with its gradients taken in forward.

    Args:
        x: (S, T, H) hidden states of S sequences. w, b: as in `linear_token_stats`.
        y: (S, T) integer labels in [0, V), or `ignore_index`.
        loss_fn: gets `TokenStats` of some sequences, (s, T) each, and `take`, which cuts any tensor
            (S, ...) to the same sequences; returns their share of the loss, a scalar: the loss is
            the sum over calls. Gradients reach `logp` and `entropy` and nothing else that it uses.
            It lives as long as the loss's graph, with all that it refers to.
        together: what one call of `loss_fn` must see whole: a "sequence", a "pair" (sequence i and
            S / 2 + i; the first half of what it gets are the chosen ones), or the "batch".
        outputs: as in `linear_token_stats`. options: see `HeadOptions`; the default
            `memory_budget` holds the largest group, within 1 GiB.

    Returns:
        The loss, a scalar, and `TokenStats` of all labels, without gradients. 3 products, one more
        of each row of a group that is larger than the budget but for its last part; 2 for a frozen
        head. In fp16, which has to know its gradients' size, and under torch.compile, where the
        loss comes after all log-probabilities, the whole batch is one group.

    Raises:
        ValueError: as `linear_token_stats`; an odd number of sequences for pairs.
    """
    if together not in ("sequence", "pair", "batch"):
        raise ValueError(f"together must be 'sequence', 'pair' or 'batch', got {together!r}")
    check_sequences(y, together == "pair")
    opt, want = Options(**options), wanted(outputs)
    call = prepare(x, w, y, b, opt.row_loss(), opt)
    plan = call.plan
    if torch.compiler.is_compiling() or plan.frozen or not any(plan.need) or call.n == 0:
        stats = token_stats(call, y, row_losses(call, want))
        loss = loss_fn(stats, lambda t: t)
        return loss, TokenStats(*(None if t is None else t.detach() for t in stats))  # pyright: ignore
    rows, bins = _bins(call, y, together, opt.memory_budget)
    parts = sum(len(one.parts) for one in bins)
    plan = plan._replace(dw_dtype=opt.accum_dtype or sum_dtype(w.dtype, parts))
    labels = call.y if rows is None else call.y[rows]
    walk = partial(_walk_bins, bins=bins, want=want, loss_fn=loss_fn, shape=y.shape)
    loss, *stats = _LinearLoss.apply(*call.head, labels, rows, plan, walk)  # pyright: ignore
    return loss, TokenStats(*stats)
