"""Log-probabilities and cross entropy under a linear head, never holding the (M, V) logits.

    z = scale * (x @ w.T + b), softcapped        logp[m] = z[m, y[m]] - logsumexp(z[m])
    dz = p - onehot(y)        dx = dz @ w        dw = dz.T @ x        db = sum over rows of dz

Rows whose label is ignored are dropped before any product. The others go through in chunks: a
chunk's logits are computed, `row_loss` turns them into their own gradient in place, and dx and dw
follow, while the buffer serves the next chunk. Two autograd wrappers share that walk:

    linear_cross_entropy   takes the gradients in forward, for the weight 1 of a row (so that fp16
                           holds them); backward only scales them: 3 products, 2 for a frozen head
    linear_logprob         keeps lse, and walks again in backward: 4 products

A second backward of the former walks again too, so it gives the same gradients as the first.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from liger_core.dispatch import (
    HAS_TRITON,
    Impl,
    accumulate_dtype,
    launch,
    tl,
    triton,
    use_triton,
)
from liger_core.ops.cross_entropy import (
    PLAIN,
    Reduction,
    RowLoss,
    cross_entropy_ref,
    join,
    row_loss,
)
from liger_core.ops.labels import IGNORE_INDEX, LabelScan, as_labels

MIN_BUDGET, MAX_BUDGET = 32 << 20, 1 << 30  # bytes of logits, where the caller names none


def linear_logprob_ref(
    x: Tensor, w: Tensor, y: Tensor, b: Tensor | None = None, o: RowLoss = PLAIN
) -> Tensor:
    """(M,) log-probabilities by the definition, from the full logits; 0 where y is ignored."""
    return -cross_entropy_ref(torch.nn.functional.linear(x, w, b), y, o)


class _Plan(NamedTuple):
    """All that is not a tensor."""

    o: RowLoss
    dtype: torch.dtype  # of the products
    dw_dtype: torch.dtype  # in which dw is summed over chunks
    chunks: int
    need: tuple[bool, bool, bool]  # gradients of x, w, b
    kernels: bool


class _Grads(NamedTuple):
    x: Tensor | None
    w: Tensor | None
    b: Tensor | None


def _add_product(out: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """out + a @ b in `dtype`; out may be None for 0, and is written to."""
    if dtype == a.dtype:
        return a @ b if out is None else out.addmm_(a, b)
    if a.is_cuda:  # bf16 or fp16 operands, fp32 sum, in one pass
        if out is None:
            return torch.mm(a, b, out_dtype=dtype)
        return torch.addmm(out, a, b, out_dtype=dtype, out=out)
    return (a @ b).to(dtype) if out is None else out.add_(a @ b)


def _walk(
    plan: _Plan,
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    y: Tensor,
    rows: Tensor | None,
    *,
    lse: Tensor | None = None,
    g: Tensor | None = None,
) -> tuple[Tensor, Tensor, _Grads]:
    """Losses and lse of the scored rows (all of them if `rows` is None), and unit-scaled gradients.

    g weighs the rows; None is 1 for each. dx is (M, H) in plan.dtype, 0 in rows not scored.
    """
    if torch.is_autocast_enabled(x.device.type) and not torch.compiler.is_compiling():
        with torch.autocast(x.device.type, enabled=False):  # plan.dtype says it all
            return _walk(plan, x, w, b, y, rows, lse=lse, g=g)
    y = y if rows is None else y[rows]
    n, V = y.shape[0], w.shape[0]
    need_dx, need_dw, need_db = plan.need
    w, b = w.to(plan.dtype), None if b is None else b.to(plan.dtype)
    make_dx = x.new_empty if rows is None else x.new_zeros
    dx = make_dx(x.shape, dtype=plan.dtype) if need_dx else None
    dw, db = None, None
    parts: list[tuple[Tensor, Tensor]] = []
    chunk = _chunk_rows(n, plan.chunks)
    buffer = x.new_empty(chunk, V, dtype=plan.dtype)
    for i in range(plan.chunks):
        part = slice(min(i * chunk, n), min((i + 1) * chunk, n))
        x_c = (x[part] if rows is None else x[rows[part]]).to(plan.dtype)
        z = buffer[: part.stop - part.start]
        torch.mm(x_c, w.T, out=z) if b is None else torch.addmm(b, x_c, w.T, out=z)
        parts.append(
            row_loss(
                z, y[part], plan.o, kernels=plan.kernels,
                lse=None if lse is None else lse[part], g=None if g is None else g[part],
                dz=z if any(plan.need) else None,
            )
        )  # fmt: skip
        if dx is not None:
            if rows is None:
                torch.mm(z, w, out=dx[part])
            else:
                dx.index_copy_(0, rows[part], z @ w)
        if need_dw:
            dw = _add_product(dw, z.T, x_c, plan.dw_dtype)
        if need_db:
            db_c = z.sum(0, dtype=plan.dw_dtype)
            db = db_c if db is None else db.add_(db_c)
    return *join(parts), _Grads(dx, dw, db)


@triton.jit
def _scale_kernel(t_ptr, s_ptr, n, BLOCK: tl.constexpr):
    # Grid (n / BLOCK,): t *= s for a contiguous t of n elements and s one fp32 number.
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    t = tl.load(t_ptr + i, mask=i < n)
    tl.store(t_ptr + i, (t.to(tl.float32) * tl.load(s_ptr)).to(t.dtype), mask=i < n)


def _scaled(t: Tensor | None, s: Tensor, like: Tensor | None, own: bool) -> Tensor | None:
    """t * s in the dtype of `like`, with s at its full precision; in t itself where it can be.

    torch rounds a 0-d fp32 factor to bf16 before it multiplies a bf16 tensor.
    """
    if t is None or like is None:
        return None
    if own and t.dtype == s.dtype:
        return t.mul_(s).to(like.dtype)
    if not own or t.dtype != like.dtype:
        return (t.to(s.dtype) * s).to(like.dtype)
    if HAS_TRITON and t.is_cuda and t.is_contiguous():
        launch(_scale_kernel, (-(-t.numel() // 4096), 1, 1), 8, (t, s, t.numel()), 4096)
        return t
    for part in t.split(max((1 << 22) // max(t[0].numel(), 1), 1)):
        part.copy_(part.to(s.dtype) * s)
    return t


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, total: Tensor,
        rows: Tensor | None, plan: _Plan,
    ) -> Tensor:  # fmt: skip
        loss, _, unit = _walk(plan, x, w, b, y, rows)
        ctx.plan, ctx.unit = plan, None
        if torch.compiler.is_compiling():
            ctx.save_for_backward(x, w, b, y, total, rows, *unit)
        else:  # outside of autograd's sight, so that the first backward may scale them in place
            ctx.unit = unit
            ctx.save_for_backward(x, w, b, y, total, rows)
        return loss.sum() / total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        x, w, b, y, total, rows, *unit = ctx.saved_tensors
        own = len(unit) == 0
        if own:
            unit, ctx.unit = ctx.unit or _walk(ctx.plan, x, w, b, y, rows)[2], None
        s = dloss / total
        grads = (_scaled(t, s, like, own) for t, like in zip(unit, (x, w, b), strict=True))
        return *grads, None, None, None, None


class _LinearRowLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, rows: Tensor | None,
        plan: _Plan,
    ) -> Tensor:  # fmt: skip
        loss, lse, _ = _walk(plan._replace(need=(False, False, False)), x, w, b, y, rows)
        ctx.save_for_backward(x, w, b, y, rows, lse)
        ctx.plan = plan
        return loss if rows is None else loss.new_zeros(y.shape).index_copy_(0, rows, loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w, b, y, rows, lse = ctx.saved_tensors
        g = g if rows is None else g[rows]
        # Unit-scaled for fp16's sake, and scaled after the products; a bad row stays its own.
        s = g.abs().nan_to_num(0.0, 0.0).amax() if g.numel() else g.new_ones(())
        s = s.masked_fill(s == 0, 1.0)
        unit = _walk(ctx.plan, x, w, b, y, rows, lse=lse, g=g / s)[2]
        own = not torch.compiler.is_compiling()
        grads = (_scaled(t, s, like, own) for t, like in zip(unit, (x, w, b), strict=True))
        return *grads, None, None, None


def _chunk_count(n: int, V: int, itemsize: int, budget: int | None) -> int:
    """Into how many chunks n rows go, for each one's logits to fit the budget.

    Under torch.compile n is a symbol and the count is guarded on, so that one graph serves many n.
    """
    if budget is None and torch.compiler.is_compiling():
        return max(4, -(-n // max(MAX_BUDGET // (V * itemsize), 1)))
    if budget is None:
        budget = min(max(n * V * itemsize // 4, MIN_BUDGET), MAX_BUDGET)
    most = max(budget // (V * itemsize), 1)
    most = most // 128 * 128 if most > 128 else most
    return max(-(-n // most), 1)


def _chunk_rows(n: int, chunks: int) -> int:
    """Rows a chunk, evenly spread; a multiple of 128 where that costs no chunk."""
    rows = -(-n // chunks)
    if torch.compiler.is_compiling():
        return rows
    round_rows = -(-rows // 128) * 128
    return round_rows if rows > 128 and (chunks - 1) * round_rows < n else rows


def _plan(
    x: Tensor, w: Tensor, b: Tensor | None, n: int, o: RowLoss,
    memory_budget: int | None, accum_dtype: torch.dtype | None, impl: Impl,
) -> _Plan:  # fmt: skip
    device, dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    elif w.dtype != x.dtype or (b is not None and b.dtype != x.dtype):
        raise ValueError(
            f"x, w and b must have one dtype outside of autocast, got x {x.dtype}, w {w.dtype}"
            f"{'' if b is None else f', b {b.dtype}'}; convert them or use torch.autocast"
        )
    chunks = _chunk_count(n, w.shape[0], dtype.itemsize, memory_budget)
    # dw may be rounded four times in bf16 and stay as exact as torch; fp16 would overflow
    narrow = w.dtype == torch.bfloat16 and chunks <= 4
    dw_dtype = accum_dtype or (w.dtype if narrow else accumulate_dtype(w.dtype))
    wanted = torch.is_grad_enabled()
    need = tuple(wanted and t is not None and t.requires_grad for t in (x, w, b))
    kernels = use_triton(impl, x, w, b) and n > 0
    return _Plan(o, dtype, dw_dtype, chunks, need, kernels)  # pyright: ignore


def _checked(
    x: Tensor, w: Tensor, y: Tensor, b: Tensor | None, labels: LabelScan | None, o: RowLoss,
    compact: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """x as (M, H), y as (M,), and the rows that are scored, or None for all."""
    if w.dim() != 2 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"w must be (V, {x.shape[-1]}), as x is (..., H), got {tuple(w.shape)}")
    if y.shape != x.shape[:-1]:
        raise ValueError(
            f"labels must have shape {tuple(x.shape[:-1])}, that of x without the last, "
            f"got {tuple(y.shape)}"
        )
    if b is not None and b.shape != w.shape[:1]:
        raise ValueError(f"b must be ({w.shape[0]},), got {tuple(b.shape)}")
    if y.device != x.device:
        raise ValueError(f"labels must be on x's device, {x.device}, got {y.device}")
    o.check()
    rows = None
    if compact and not torch.compiler.is_compiling():
        rows = (labels or LabelScan(y, w.shape[0], o.ignore_index)).rows()
    return x.reshape(-1, x.shape[-1]), as_labels(y), rows


def linear_cross_entropy(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    b: Tensor | None = None,
    *,
    total: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = IGNORE_INDEX,
    softcap: float | None = None,
    scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    labels: LabelScan | None = None,
    compact: bool = True,
    memory_budget: int | None = None,
    accum_dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """`cross_entropy(x @ w.T + b, y)` with its gradients taken in forward, chunk by chunk.

    Args:
        x: (..., H) hidden states.
        w: (V, H) weight of the head, in x's dtype, or any under autocast.
        y: (...) integer labels in [0, V), or `ignore_index`.
        b: (V,) bias, or None.
        total: what the sum of losses is divided by, a 0-d tensor; None for the reduction's own.
        reduction: "mean" (over scored labels; 0 where there are none), "sum", or "none" for the
            loss of each label, whose gradient is then taken in backward: 4 products, not 3.
        ignore_index, softcap, scale, label_smoothing, z_loss: as in `cross_entropy`.
        labels: a `LabelScan` of y made earlier, which saves waiting for the device here.
        compact: drop ignored rows first. False never waits for the device (CUDA graphs), and a bad
            label then gives NaN; under torch.compile it is always so.
        memory_budget: bytes of logits held at once; None for a quarter of them, within 32 MiB and
            1 GiB.
        accum_dtype: in which dw is summed; None for w's where that is as exact as torch, else fp32.
        impl: "auto", "triton" or "torch"; see `liger_core.dispatch.use_triton`.

    Returns:
        fp32 (fp64 for fp64): a scalar, or y's shape for "none". Between forward and backward, the
        gradients of x and w are held; beyond them the peak is the memory budget.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a label out of range.
    """
    o = RowLoss(ignore_index, softcap, scale, label_smoothing, z_loss)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    x2, y1, rows = _checked(x, w, y, b, labels, o, compact)
    n = y1.shape[0] if rows is None else rows.shape[0]
    plan = _plan(x2, w, b, n, o, memory_budget, accum_dtype, impl)
    if reduction == "none":
        if total is not None:
            raise ValueError("total divides the sum; reduction='none' has none, leave it out")
        return _LinearRowLoss.apply(x2, w, b, y1, rows, plan).view(y.shape)  # pyright: ignore
    if total is None and reduction == "mean":
        total = (y1 != ignore_index).sum().clamp_min(1) if rows is None else None
    if total is None:
        count = max(n, 1) if reduction == "mean" else 1
        total = torch.full((), count, dtype=accumulate_dtype(plan.dtype), device=x.device)
    total = total.to(accumulate_dtype(plan.dtype))
    return _LinearCrossEntropy.apply(x2, w, b, y1, total, rows, plan)  # pyright: ignore


def linear_logprob(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    b: Tensor | None = None,
    *,
    ignore_index: int = IGNORE_INDEX,
    softcap: float | None = None,
    scale: float = 1.0,
    labels: LabelScan | None = None,
    compact: bool = True,
    memory_budget: int | None = None,
    accum_dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Log-probability of each label, for losses that come later through autograd.

    Arguments, errors and peak memory are those of `linear_cross_entropy`.

    Returns:
        y's shape, fp32 (fp64 for fp64); 0 where y is ignored. Saved for backward: x, w, y and one
        number a row; backward computes the logits again.
    """
    o = RowLoss(ignore_index, softcap, scale)
    x2, y1, rows = _checked(x, w, y, b, labels, o, compact)
    n = y1.shape[0] if rows is None else rows.shape[0]
    plan = _plan(x2, w, b, n, o, memory_budget, accum_dtype, impl)
    return -_LinearRowLoss.apply(x2, w, b, y1, rows, plan).view(y.shape)  # pyright: ignore
