"""Normalisation of rows, one pair of kernels for every norm here.

    s = x + r                               where there is a residual r, rounded to x's dtype
    xhat = (s - mean) * rstd                rstd = 1 / sqrt(mean((s - mean)^2) + eps)
    y = xhat * (w + offset) + b

RMSNorm is the same with 0 for the mean and no b. With g = dy * (w + offset), and ds the gradient
that reaches s by other ways, the backward, one gradient for both x and r, is

    dx = dr = ds + rstd * (g - mean(g) - xhat * mean(g * xhat))      without mean(g) for RMSNorm
    dw = sum over rows of dy * xhat        db = sum over rows of dy

A program holds whole rows of up to MAX_BLOCK columns in registers; wider ones are read again. The
backward's programs walk over rows, so that dw and db are summed in registers, and leave a partial
sum each, which a second kernel adds up: deterministic, without atomics.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from liger_core.dispatch import (
    Impl,
    accumulate_dtype,
    as_rows,
    block,
    can_repack,
    fp32,
    launch,
    repacked,
    rounded,
    shared_memory,
    sm_count,
    tl,
    triton,
    use_triton,
)
from liger_core.ops.sharded import by_rows, is_dtensor


class Norm(NamedTuple):
    """Which norm: LayerNorm if `center`; where xhat and y are rounded, and to what."""

    center: bool
    eps: float
    offset: float = 0.0
    round_xhat: bool = False  # to x's dtype, before it meets w
    promote: bool = False  # y in the promoted dtype of x and w, else in x's

    def dtype(self, x: Tensor, w: Tensor | None) -> torch.dtype:
        return torch.promote_types(w.dtype, x.dtype) if self.promote and w is not None else x.dtype


Grads = tuple[Tensor, Tensor | None, Tensor | None]  # of x, w and b
MAX_BLOCK = 16384  # columns that a program holds; wider rows are read again for every pass


@triton.jit
def _load(ptr, rows, stride, cols, M, N):
    """A tile of a matrix in its own dtype, 0 outside."""
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    return tl.load(ptr + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0)


@triton.jit
def _store(ptr, rows, stride, cols, M, N, value):
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    value = value.to(ptr.dtype.element_ty)
    tl.store(ptr + rows[:, None] * stride + cols[None, :], value, mask=mask)


@triton.jit
def _weight(w_ptr, cols, N, offset, HAS_W: tl.constexpr):
    """(1, BLOCK_N) factors in fp32."""
    w = tl.full((cols.shape[0],), 1.0, tl.float32)
    if HAS_W:
        w = tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(tl.float32) + offset
    return w[None, :]


@triton.jit
def _norm_fwd_kernel(
    x_ptr, r_ptr, w_ptr, b_ptr, y_ptr, s_ptr, mean_ptr, rstd_ptr,
    stride_xm, stride_rm, M, N, inv_n, eps, offset,
    CENTER: tl.constexpr, ROUND_XHAT: tl.constexpr,
    HAS_R: tl.constexpr, HAS_W: tl.constexpr, HAS_B: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Grid (M / BLOCK_M,).  x, r, s, y: (M, N), s and y contiguous;  w, b: (N,);  mean, rstd: (M,)
    # fp32.  inv_n = 1 / N comes from the host: division on the GPU is not exactly rounded.
    # Every loop over columns is one pass, and no loop at all unless the row is WIDE.
    inv_n, eps, offset = fp32(inv_n), fp32(eps), fp32(offset)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    lanes = tl.arange(0, BLOCK_N)
    END = N if WIDE else BLOCK_N
    x = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    mean = tl.zeros((BLOCK_M,), tl.float32)
    square = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, END, BLOCK_N):
        cols = start + lanes
        x_in = _load(x_ptr, rows, stride_xm, cols, M, N)
        if HAS_R:
            r = _load(r_ptr, rows, stride_rm, cols, M, N)
            x_in = (x_in.to(tl.float32) + r.to(tl.float32)).to(x_in.dtype)
            _store(s_ptr, rows, N, cols, M, N, x_in)
        x = x_in.to(tl.float32)
        mean += tl.sum(x, 1) if CENTER else 0.0
        square += tl.sum(x * x, 1)
    if HAS_R:
        x_ptr, stride_xm = s_ptr, N
    if CENTER:
        mean *= inv_n
        square = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, END, BLOCK_N):
            cols = start + lanes
            if WIDE:
                x = _load(x_ptr, rows, stride_xm, cols, M, N).to(tl.float32)
            x = tl.where((cols < N)[None, :], x - mean[:, None], 0.0)
            square += tl.sum(x * x, 1)
        tl.store(mean_ptr + rows, mean, mask=rows < M)
    rstd = tl.rsqrt(square * inv_n + eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < M)
    for start in range(0, END, BLOCK_N):
        cols = start + lanes
        if WIDE:
            x = _load(x_ptr, rows, stride_xm, cols, M, N).to(tl.float32) - mean[:, None]
        y = x * rstd[:, None]
        if ROUND_XHAT:
            y = y.to(x_ptr.dtype.element_ty).to(tl.float32)
        y *= _weight(w_ptr, cols, N, offset, HAS_W)
        if HAS_B:
            y += tl.load(b_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        _store(y_ptr, rows, N, cols, M, N, y)


@triton.jit
def _normed(dy, x, cols, N, mean, rstd, CENTER: tl.constexpr):
    """Tiles of dy and xhat in fp32."""
    x = x.to(tl.float32)
    if CENTER:
        x = tl.where((cols < N)[None, :], x - mean[:, None], 0.0)
    return dy.to(tl.float32), x * rstd[:, None]


@triton.jit
def _add(ptr, cols, N, value):
    """To a row that no other program touches."""
    old = tl.load(ptr + cols, mask=cols < N, other=0.0)
    tl.store(ptr + cols, old + value, mask=cols < N)


@triton.jit
def _norm_bwd_kernel(
    dy_ptr, ds_ptr, x_ptr, w_ptr, mean_ptr, rstd_ptr, dx_ptr, partial_ptr,
    stride_dym, stride_dsm, stride_xm, M, N, inv_n, offset,
    CENTER: tl.constexpr, HAS_DS: tl.constexpr, HAS_W: tl.constexpr,
    NEED_DW: tl.constexpr, NEED_DB: tl.constexpr, WIDE: tl.constexpr, RELOAD: tl.constexpr,
    PACK: tl.constexpr, STAGES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Grid (P,): program p walks the tiles p, p + P, ... of BLOCK_M rows, STAGES - 1 of them on
    # their way, and owns row p of the partial sums: dw's if NEED_DW, then db's, each (P, N) fp32,
    # 0 at first if WIDE.  RELOAD: the weight is loaded for each tile, to leave registers for dw.
    inv_n, offset = fp32(inv_n), fp32(offset)
    pid = tl.program_id(0).to(tl.int64)  # makes the rows int64 too
    dw_ptr = partial_ptr + pid * N
    db_ptr = dw_ptr + (tl.num_programs(0).to(tl.int64) * N if NEED_DW else 0)
    lanes = tl.arange(0, BLOCK_N)
    END = N if WIDE else BLOCK_N
    w = _weight(w_ptr, lanes, N, offset, HAS_W)
    dw = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    db = dw
    dy_in, x_in = dw.to(dy_ptr.dtype.element_ty), dw.to(x_ptr.dtype.element_ty)
    tiles, P = tl.cdiv(M, BLOCK_M), tl.num_programs(0)
    for tile in tl.range(pid, tiles, P, num_stages=STAGES):  # pyright: ignore
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)
        mean = rstd
        if CENTER:
            mean = tl.load(mean_ptr + rows, mask=rows < M, other=0.0)
        c_g, c_x = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, END, BLOCK_N):
            cols = start + lanes
            dy_in = _load(dy_ptr, rows, stride_dym, cols, M, N)
            x_in = _load(x_ptr, rows, stride_xm, cols, M, N)
            dy, xhat = _normed(dy_in, x_in, cols, N, mean, rstd, CENTER)
            if RELOAD:
                w = _weight(w_ptr, cols, N, offset, HAS_W)
            c_x += tl.sum(dy * w * xhat, 1)
            c_g += tl.sum(dy * w, 1) if CENTER else 0.0
        for start in range(0, END, BLOCK_N):
            cols = start + lanes
            if WIDE:
                dy_in = _load(dy_ptr, rows, stride_dym, cols, M, N)
                x_in = _load(x_ptr, rows, stride_xm, cols, M, N)
            dy_in, x_in = repacked(dy_in, PACK), repacked(x_in, PACK)
            dy, xhat = _normed(dy_in, x_in, cols, N, mean, rstd, CENTER)
            if RELOAD:
                w = _weight(w_ptr, cols, N, offset, HAS_W)
            dx = dy * w - xhat * (c_x * inv_n)[:, None]
            if CENTER:
                dx -= (c_g * inv_n)[:, None]
            dx *= rstd[:, None]
            if HAS_DS:
                dx += _load(ds_ptr, rows, stride_dsm, cols, M, N).to(tl.float32)
            _store(dx_ptr, rows, N, cols, M, N, dx)
            if WIDE:
                if NEED_DW:
                    _add(dw_ptr, cols, N, tl.sum(dy * xhat, 0))
                if NEED_DB:
                    _add(db_ptr, cols, N, tl.sum(dy, 0))
            else:
                if NEED_DW:
                    dw += dy * xhat
                if NEED_DB:
                    db += dy
    if NEED_DW and not WIDE:
        tl.store(dw_ptr + lanes, tl.sum(dw, 0), mask=lanes < N)
    if NEED_DB and not WIDE:
        tl.store(db_ptr + lanes, tl.sum(db, 0), mask=lanes < N)


@triton.jit
def _norm_sum_kernel(
    partial_ptr, dw_ptr, db_ptr, P, N, DW: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Grid (N / BLOCK_N, 1 or 2).  partial: (1 or 2, P, N) fp32, dw's first if DW;  dw, db: (N,).
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    matrix = tl.program_id(1)
    partial_ptr += matrix.to(tl.int64) * P * N
    total = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(0, P, BLOCK_P):
        rows = (start + tl.arange(0, BLOCK_P)).to(tl.int64)
        total += _load(partial_ptr, rows, N, cols, P, N)
    if DW and matrix == 0:
        tl.store(dw_ptr + cols, tl.sum(total, 0).to(dw_ptr.dtype.element_ty), mask=cols < N)
    else:
        tl.store(db_ptr + cols, tl.sum(total, 0).to(db_ptr.dtype.element_ty), mask=cols < N)


def _tile(N: int) -> tuple[bool, int]:
    """Whether a row is wider than what one program holds, and the columns of a tile."""
    return N > MAX_BLOCK, min(block(N), MAX_BLOCK)


def _bwd_shape(x: Tensor, N: int, itemsize: int) -> tuple[int, int, int, int]:
    """Rows of a tile, programs a multiprocessor, warps, and stages of the loop: measured on an
    H100, which wants some 6000 elements of each input on their way to a multiprocessor. They have
    to fit its shared memory for each stage that waits, `itemsize` bytes of all inputs together,
    beside what the reductions take.
    """
    if N > 8192:
        return 1, 1, 16, 1
    small = 1 << max(1536 // N, 1).bit_length() - 1
    BLOCK_M, programs, num_warps = next(
        shape
        for most, *shape in (
            (1024, small, 4, 4), (1536, 2, 2, 4), (3072, 1, 2, 4), (4096, 2, 1, 8), (8192, 1, 1, 8),
        )
        if most >= N
    )  # fmt: skip
    waiting = 2 * programs * BLOCK_M * block(N) * itemsize + 4096
    return BLOCK_M, programs, num_warps, 3 if waiting <= shared_memory(x) else 1


def _fwd_triton(
    x: Tensor, r: Tensor | None, w: Tensor | None, b: Tensor | None, o: Norm
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N = x.shape[-1]
    M, (wide, BLOCK_N) = x.numel() // N, _tile(N)
    (rows, stride), (res, stride_r) = as_rows(x), (x, 0) if r is None else as_rows(r)
    y = x.new_empty(x.shape, dtype=o.dtype(x, w))
    s = x if r is None else x.new_empty(x.shape)
    rstd = x.new_empty(M, dtype=torch.float32)
    mean = torch.empty_like(rstd) if o.center else rstd
    BLOCK_M = max(2048 // BLOCK_N, 1)
    args = (
        rows, res, rows if w is None else w, rows if b is None else b, y, s, mean, rstd,
        stride, stride_r, M, N, 1 / N, o.eps, o.offset,
    )  # fmt: skip
    launch(
        _norm_fwd_kernel, (-(-M // BLOCK_M), 1, 1), 4 if BLOCK_N <= 2048 else 8, args,
        o.center, o.round_xhat, r is not None, w is not None, b is not None, wide,
        BLOCK_M, BLOCK_N,
    )  # fmt: skip
    return y, s, mean, rstd


def _bwd_triton(
    dy: Tensor, ds: Tensor | None, x: Tensor, w: Tensor | None, mean: Tensor, rstd: Tensor,
    o: Norm, dw_dtype: torch.dtype | None, db_dtype: torch.dtype | None,
) -> Grads:  # fmt: skip
    N = x.shape[-1]
    M, (wide, BLOCK_N) = x.numel() // N, _tile(N)
    (rows, stride), (dy, stride_dy) = as_rows(x), as_rows(dy)
    ds, stride_ds = (None, 0) if ds is None else as_rows(ds)
    itemsize = sum(t.element_size() for t in (dy, rows, ds) if t is not None)
    BLOCK_M, programs, num_warps, stages = _bwd_shape(x, N, itemsize)
    P = min(-(-M // BLOCK_M), sm_count(x) * programs)
    dx, sums = x.new_empty(x.shape), (dw_dtype is not None) + (db_dtype is not None)
    partial = (x.new_zeros if wide else x.new_empty)((sums, P, N), dtype=torch.float32)
    launch(
        _norm_bwd_kernel, (P, 1, 1), num_warps,
        (dy, dy if ds is None else ds, rows, rows if w is None else w, mean, rstd, dx, partial,
         stride_dy, stride_ds, stride, M, N, 1 / N, o.offset),
        o.center, ds is not None, w is not None, dw_dtype is not None, db_dtype is not None,
        wide, BLOCK_N == MAX_BLOCK, BLOCK_N == MAX_BLOCK and can_repack(), stages, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    if not sums:
        return dx, None, None
    dw = None if dw_dtype is None else x.new_empty(N, dtype=dw_dtype)
    db = None if db_dtype is None else x.new_empty(N, dtype=db_dtype)
    out = partial, partial if dw is None else dw, partial if db is None else db, P, N
    launch(_norm_sum_kernel, (-(-N // 32), sums, 1), 4, out, dw is not None, 128, 32)
    return dx, dw, db


def _fwd_torch(
    x: Tensor, r: Tensor | None, w: Tensor | None, b: Tensor | None, o: Norm
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    s = x if r is None else x + r
    y = rounded(s, accumulate_dtype(x.dtype))
    mean = y.mean(-1, keepdim=True) if o.center else y.new_empty(0)
    y = y - mean if o.center else y
    rstd = torch.rsqrt(y.square().mean(-1, keepdim=True) + o.eps)
    y = y * rstd
    y = y.to(x.dtype).to(rstd.dtype) if o.round_xhat else y
    y = y if w is None else y * (w.to(rstd.dtype) + o.offset)
    y = y if b is None else y + b.to(rstd.dtype)
    return rounded(y, o.dtype(x, w)), s, mean, rstd


def _bwd_torch(
    dy: Tensor, ds: Tensor | None, x: Tensor, w: Tensor | None, mean: Tensor, rstd: Tensor,
    o: Norm, dw_dtype: torch.dtype | None, db_dtype: torch.dtype | None,
) -> Grads:  # fmt: skip
    acc, width = rstd.dtype, x.shape[-1:]
    dy, xhat = dy.to(acc), x.to(acc)
    xhat = (xhat - mean if o.center else xhat) * rstd
    dw = None if dw_dtype is None else (dy * xhat).sum_to_size(width).to(dw_dtype)
    db = None if db_dtype is None else dy.sum_to_size(width).to(db_dtype)
    g = dy if w is None else dy * (w.to(acc) + o.offset)
    c = (g * xhat).mean(-1, keepdim=True)
    dx = g - g.mean(-1, keepdim=True) if o.center else g
    dx = rstd * torch.addcmul(dx, xhat, c, value=-1)
    return (dx if ds is None else dx + ds.to(acc)).to(x.dtype), dw, db


class _RowNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, r: Tensor | None, w: Tensor | None, b: Tensor | None, o: Norm,
        kernels: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        w, b = (None if t is None else t.contiguous() for t in (w, b))
        y, s, mean, rstd = (_fwd_triton if kernels else _fwd_torch)(x, r, w, b, o)
        ctx.save_for_backward(s, w, mean, rstd)
        ctx.o, ctx.kernels, ctx.b_dtype = o, kernels, None if b is None else b.dtype
        return y if r is None else (y, s)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, ds: Tensor | None = None) -> tuple[Tensor | None, ...]:
        x, w, mean, rstd = ctx.saved_tensors
        need_x, need_r, need_w, need_b = ctx.needs_input_grad[:4]
        dx, dw, db = (_bwd_triton if ctx.kernels else _bwd_torch)(
            dy, ds, x, w, mean, rstd, ctx.o,
            w.dtype if need_w else None, ctx.b_dtype if need_b else None,
        )  # fmt: skip
        return dx if need_x else None, dx if need_r else None, dw, db, None, None


def row_norm(
    x: Tensor, r: Tensor | None, w: Tensor | None, b: Tensor | None, o: Norm, impl: Impl
) -> Any:
    """y, and s where there is a residual, which agrees with x. Checks w, b, devices and `impl`.

    DTensors may be split by any dimension but the last, as sequence parallelism does it.
    """
    if x.dim() == 0:
        raise ValueError("x must be (..., N), got a tensor without dimensions")
    for name, t in (("w", w), ("b", b)):
        if t is not None and t.shape != x.shape[-1:]:
            raise ValueError(
                f"{name} must have shape {tuple(x.shape[-1:])}, the last of x, got {tuple(t.shape)}"
            )
    if is_dtensor(x, r, w, b):
        op = lambda x, r, w, b: row_norm(x, r, w, b, o, impl)  # noqa: E731
        return by_rows(op, (x, r), (w, b), split=lambda dim: dim < x.dim() - 1)
    kernels = use_triton(impl, x, r, w, b) and x.numel() > 0
    return _RowNorm.apply(x, r, w, b, o, kernels)
