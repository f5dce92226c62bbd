"""Log-probabilities of labels under a linear head, never holding the (M, V) logits.

    logp[m] = z[m, y[m]] - logsumexp(z[m])    dz = dlogp (onehot(y) - p)    z: see linear_head

The loss comes later, through autograd. Backward computes the logits again: 4 products, but for the
last chunk's, which are still in the buffer, and what `saved_logits_budget` keeps. With a frozen
head, one row's gradient does not touch another's: dx for dlogp = 1 is taken in forward, and only
scaled in backward: 2 products, where only logp needs a gradient. Where the loss is known,
`linear_loss` takes 3.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Unpack

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
from liger_core.ops.row_loss import PLAIN, RowLoss, Rows, Want, join, row_loss_ref
from liger_core.ops.scaled import scale_all, scaled

Output = Literal["entropy", "log_sum_sq_probs", "mean_logit", "is_top1"]


class TokenStats(NamedTuple):
    """Values of each label, in y's shape; fp32 (fp64 for fp64), 0 where y is ignored.

    None where not asked for. `logp` and `entropy` carry gradients.
    """

    logp: Tensor
    entropy: Tensor | None = None  # -sum(p log p)
    log_sum_sq_probs: Tensor | None = None  # log sum(p^2)
    mean_logit: Tensor | None = None  # mean(z)
    is_top1: Tensor | None = None  # bool: y is the class of the largest logit, the first of several


def linear_logprob_ref(
    x: Tensor, w: Tensor, y: Tensor, b: Tensor | None = None, o: RowLoss = PLAIN
) -> Tensor:
    """(M,) log-probabilities by the definition, from the full logits; 0 where y is ignored."""
    return -row_loss_ref(torch.nn.functional.linear(x, w, b), y, o)


@without_autocast
def _forward(
    plan: Plan, head: Head, y: Tensor, rows: Tensor | None, c: Tensor | None, want: Want,
    keep: int | None,
) -> tuple[Rows, list[Tensor | None], Grads]:  # fmt: skip
    """Losses of the scored rows; the buffers of those parts whose logits `keep` bytes hold, of the
    last part for None; of a frozen head, the gradient of each row's own loss."""
    keep = keep if any(plan.need) and not plan.frozen else 0
    plan = plan if plan.frozen else plan._replace(need=(False,) * len(plan.need))
    walk, parts = Walk(plan, head, rows), spans(0, y.shape[0], plan.chunks)
    buffer: Tensor | None = None
    kept: list[Tensor | None] = []
    out: list[Rows] = []
    for i, part in enumerate(parts):
        mine = None
        if keep is None:
            mine = buffer = walk.buffer(parts[0]) if buffer is None else buffer
            mine = mine if i == len(parts) - 1 else None
        elif (size := (part.stop - part.start) * plan.row_bytes) <= keep:
            keep, mine = keep - size, walk.buffer(part)
        elif buffer is None:
            buffer = walk.buffer(parts[0])
        kept.append(mine)
        z = walk.logits(part, buffer if mine is None else mine)  # pyright: ignore
        out.append(walk.loss(z, y[part], c, want, None, plan.frozen))
        if plan.frozen:
            walk.add(z)
    return join(out), kept, walk.grads()


@without_autocast
def _backward(
    plan: Plan, head: Head, y: Tensor, rows: Tensor | None, c: Tensor | None, lse: Tensor,
    entropy: Tensor | None, g: Tensor, dh: Tensor | None, kept: Sequence[Tensor | None],
) -> Grads:  # fmt: skip
    """Gradients of the sum of losses times g and entropies times dh. Kept logits are used up: the
    last part's first, whose buffer then serves the others."""
    walk, parts = Walk(plan, head, rows), spans(0, y.shape[0], plan.chunks)
    kept = list(kept) or [None] * len(parts)
    last = kept[-1]
    buffer = last if last is not None and last.shape[0] == parts[0].stop else None
    for i in range(len(parts) - 1, -1, -1):
        part, mine = parts[i], kept[i]
        if mine is None:
            buffer = walk.buffer(parts[0]) if buffer is None else buffer
            z = walk.logits(part, buffer)
        else:
            walk.take(part)
            z = mine[: part.stop - part.start]
        some = Rows(lse[part], lse[part], entropy=None if entropy is None else entropy[part])
        walk.grad(z, y[part], some, g[part], None if dh is None else dh[part], c)
        walk.add(z)
    return walk.grads()


def unit_gradients(g: Tensor, dh: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Their largest finite magnitude and both divided by it, for fp16; a bad row stays its own."""
    s = largest(g) if dh is None else torch.maximum(largest(g), largest(dh))
    return s, g / s, None if dh is None else dh / s


class _RowLosses(torch.autograd.Function):
    """Values of the scored rows, in their order."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, u: Tensor | None, v: Tensor | None,
        y: Tensor, rows: Tensor | None, c: Tensor | None, plan: Plan, want: Want, keep: int | None,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        head = Head(x, w, b, u, v)
        out, kept, unit = _forward(plan, head, y, rows, c, want, keep)
        ctx.plan, ctx.entropy = plan, want.entropy
        saved = (*head, y, rows, c, out.lse, out.entropy)
        rest = (out.lse, out.mean_logit, out.log_sum_sq_probs, out.top)
        ctx.mark_non_differentiable(*(t for t in rest if t is not None))
        if torch.compiler.is_compiling():
            ctx.save_for_backward(*saved, *unit[:1])
            # torch 2.11's Dynamo cannot trace a backward that is given None
            values = (out.loss, out.entropy, *rest)
            return tuple(out.lse.new_empty(0) if t is None else t for t in values)
        ctx.kept, ctx.unit = kept, unit[0]  # outside of autograd's sight: backward writes to them
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        return out.loss, out.entropy, *rest

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, g: Tensor | None, dh: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        x, w, b, u, v, y, rows, c, lse, entropy, *unit = ctx.saved_tensors
        plan, head, own = ctx.plan, Head(x, w, b, u, v), len(unit) == 0
        kept: list[Tensor | None] = []
        unit = None if own else unit[0]
        if own:
            unit, kept, ctx.unit, ctx.kept = ctx.unit, ctx.kept, None, []
        g, dh = torch.zeros_like(lse) if g is None else g, dh if ctx.entropy else None
        if unit is not None and dh is None:
            s = g if rows is None else g.new_zeros(x.shape[0]).index_copy(0, rows, g)
            return scaled(unit, s, x, own, plan.kernels), *[None] * 10
        s, g, dh = unit_gradients(g, dh) if plan.unit else (None, g, dh)
        grads = _backward(plan, head, y, rows, c, lse, entropy, g, dh, kept)
        s = lse.new_ones(()) if s is None else s
        return *scale_all(grads, s, head, own, plan.kernels), *[None] * 6


def row_losses(call: Call, want: Want, c: Tensor | None = None, keep: int | None = None) -> Rows:
    """Differentiable losses and entropies, and other values, of the scored rows in their order."""
    plan, o = call.plan, call.plan.o
    plan = plan._replace(o=o._replace(token_scaling=False))
    compiling = torch.compiler.is_compiling()
    loss, entropy, lse, *rest = _RowLosses.apply(
        *call.head, call.labels(), call.rows, c, plan, want, 0 if compiling else keep
    )  # pyright: ignore
    loss = loss * loss.detach().neg().exp() if o.token_scaling else loss
    wanted = (want.mean_logit, want.entropy, want.log_sum_sq_probs, want.top)
    values = (rest[0], entropy, *rest[1:])
    return Rows(loss, lse, *(t if on else None for t, on in zip(values, wanted, strict=True)))


def token_stats(call: Call, y: Tensor, rows: Rows) -> TokenStats:
    hits = rows.hits(call.labels(), call.plan.o.ignore_index)
    values = (-rows.loss, rows.entropy, rows.log_sum_sq_probs, rows.mean_logit, hits)
    return TokenStats(*(None if t is None else call.spread(t, y) for t in values))  # pyright: ignore


def wanted(outputs: Sequence[Output]) -> Want:
    names = ("mean_logit", "entropy", "log_sum_sq_probs", "is_top1")
    if unknown := set(outputs) - set(names):
        raise ValueError(f"outputs may be {', '.join(names)}, got {', '.join(sorted(unknown))}")
    return Want(*(name in outputs for name in names))


def linear_logprob(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    b: Tensor | None = None,
    *,
    saved_logits_budget: int | None = None,
    **options: Unpack[HeadOptions],
) -> Tensor:
    """Log-probability of each label, for losses that come later through autograd.

    Arguments, errors and peak memory are those of `linear_token_stats`.

    Returns:
        y's shape, fp32 (fp64 for fp64); 0 where y is ignored.
    """
    return linear_token_stats(x, w, y, b, saved_logits_budget=saved_logits_budget, **options).logp


def linear_token_stats(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    b: Tensor | None = None,
    *,
    outputs: Sequence[Output] = (),
    saved_logits_budget: int | None = None,
    **options: Unpack[HeadOptions],
) -> TokenStats:
    """Log-probability of each label and what the same pass over the logits tells besides.

    Args:
        x: (..., H) hidden states.
        w: (V, H) weight of the head, in x's dtype, or any under autocast.
        y: (...) integer labels in [0, V), or `ignore_index`.
        b: (V,) bias, or None.
        outputs: any of "entropy", "log_sum_sq_probs", "mean_logit", "is_top1".
        saved_logits_budget: bytes of logits that may live from forward to backward, which then
            need not be computed again; None for those of the last chunk, in the buffer that
            backward needs anyway. Not under torch.compile, nor needed for a frozen head.
        options: see `HeadOptions`.

    Returns:
        `TokenStats`. Saved for backward: x, w, y, one number a row, and the logits within the
        budget; or, where x alone needs a gradient, a tensor of x's size. Under no_grad nothing.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a label out of range.
    """
    opt = Options(**options)
    call = prepare(x, w, y, b, opt.row_loss(), opt)
    return token_stats(call, y, row_losses(call, wanted(outputs), keep=saved_logits_budget))
