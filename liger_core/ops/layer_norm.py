"""LayerNorm over the last dimension: y = w * (x - mean) * rstd + b, rstd = 1 / sqrt(var(x) + eps).

The variance is the biased one. With xhat = (x - mean) * rstd and g = dy * w, the backward is

    dx = rstd * (g - mean(g) - xhat * mean(g * xhat))
    dw = sum over rows of dy * xhat        db = sum over rows of dy
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from liger_core.dispatch import (
    Impl,
    accumulate_dtype,
    as_rows,
    block,
    fp32,
    launch,
    rounded,
    row_warps,
    sm_count,
    tl,
    triton,
    use_triton,
)


def layer_norm_ref(x: Tensor, w: Tensor, b: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """The definition: fp32 statistics and products (fp64 for fp64), rounded once."""
    acc = accumulate_dtype(x.dtype)
    xc = x.to(acc) - x.to(acc).mean(-1, keepdim=True)
    y = xc * torch.rsqrt(xc.square().mean(-1, keepdim=True) + eps) * w.to(acc)
    return (y if b is None else y + b.to(acc)).to(x.dtype)


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, mean_ptr, rstd_ptr,
    stride_xm, stride_ym, N, inv_n, eps,
    HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Grid (M,): one row a program.  x, y: (M, N);  w, b: (N,);  mean, rstd: (M,) fp32.
    # inv_n = 1 / N comes from the host: division on the GPU is not exactly rounded.
    inv_n, eps = fp32(inv_n), fp32(eps)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    mask = cols < N
    x = tl.load(x_ptr + row * stride_xm + cols, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x) * inv_n
    xc = tl.where(mask, x - mean, 0.0)  # masked lanes hold -mean otherwise
    rstd = tl.rsqrt(tl.sum(xc * xc) * inv_n + eps)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    y = xc * rstd * tl.load(w_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(b_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * stride_ym + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _layer_norm_bwd_kernel(
    dy_ptr, x_ptr, w_ptr, mean_ptr, rstd_ptr, dx_ptr, dw_partial_ptr, db_partial_ptr,
    stride_dym, stride_xm, stride_dxm, M, N, inv_n,
    NEED_DW: tl.constexpr, NEED_DB: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Grid (P,): program p walks rows p, p + P, ... and owns row p of the (P, N) fp32 partials.
    inv_n = fp32(inv_n)
    pid = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    mask = cols < N
    w = tl.load(w_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK_N,), dtype=tl.float32)
    db = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for row in range(pid, M, tl.num_programs(0)):
        dy = tl.load(dy_ptr + row * stride_dym + cols, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * stride_xm + cols, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        xhat = tl.where(mask, (x - tl.load(mean_ptr + row)) * rstd, 0.0)
        g = dy * w
        dx = rstd * (g - tl.sum(g) * inv_n - xhat * (tl.sum(g * xhat) * inv_n))
        tl.store(dx_ptr + row * stride_dxm + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if NEED_DW:
            dw += dy * xhat
        if NEED_DB:
            db += dy
    if NEED_DW:
        tl.store(dw_partial_ptr + pid * N + cols, dw, mask=mask)
    if NEED_DB:
        tl.store(db_partial_ptr + pid * N + cols, db, mask=mask)


def _fwd_triton(
    x: Tensor, w: Tensor, b: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    N = x.shape[-1]
    M = x.numel() // N
    rows, stride = as_rows(x)
    y = x.new_empty(x.shape)
    mean, rstd = x.new_empty(2, M, dtype=torch.float32).unbind()
    BLOCK_N = block(N)
    launch(
        _layer_norm_fwd_kernel, (M, 1, 1), row_warps(BLOCK_N),
        (rows, w, w if b is None else b, y, mean, rstd, stride, N, N, 1 / N, eps),
        b is not None, BLOCK_N,
    )  # fmt: skip
    return y, mean, rstd


def _bwd_triton(
    dy: Tensor, x: Tensor, w: Tensor, mean: Tensor, rstd: Tensor, need_dw: bool, need_db: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    N = x.shape[-1]
    M = x.numel() // N
    (rows, stride), (dy, stride_dy), P = as_rows(x), as_rows(dy), min(M, sm_count(x))
    dx = x.new_empty(x.shape)
    dw, db = x.new_empty(2, P, N, dtype=torch.float32).unbind()
    BLOCK_N = block(N)
    launch(
        _layer_norm_bwd_kernel, (P, 1, 1), row_warps(BLOCK_N),
        (dy, rows, w, mean, rstd, dx, dw, db, stride_dy, stride, N, M, N, 1 / N),
        need_dw, need_db, BLOCK_N,
    )  # fmt: skip
    return dx, dw.sum(0) if need_dw else None, db.sum(0) if need_db else None


def _fwd_torch(x: Tensor, w: Tensor, b: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulate_dtype(x.dtype)
    xf = x.to(acc)
    mean = xf.mean(-1, keepdim=True)
    xhat = xf - mean
    rstd = torch.rsqrt(xhat.square().mean(-1, keepdim=True) + eps)
    y = xhat * rstd * w.to(acc)
    return rounded(y if b is None else y + b.to(acc), x.dtype), mean, rstd


def _bwd_torch(
    dy: Tensor, x: Tensor, w: Tensor, mean: Tensor, rstd: Tensor, need_dw: bool, need_db: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    acc = rstd.dtype
    dy, xhat = dy.to(acc), (x.to(acc) - mean) * rstd
    g = dy * w.to(acc)
    c = (g * xhat).mean(-1, keepdim=True)
    dx = rstd * (g - g.mean(-1, keepdim=True) - xhat * c)
    dw = (dy * xhat).sum_to_size(w.shape) if need_dw else None
    return dx.to(x.dtype), dw, dy.sum_to_size(w.shape) if need_db else None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, eps: float, kernels: bool
    ) -> Tensor:
        w, b = w.contiguous(), None if b is None else b.contiguous()
        y, mean, rstd = (_fwd_triton if kernels else _fwd_torch)(x, w, b, eps)
        ctx.save_for_backward(x, w, mean, rstd)
        ctx.b_dtype, ctx.kernels = None if b is None else b.dtype, kernels
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, mean, rstd = ctx.saved_tensors
        bwd = _bwd_triton if ctx.kernels else _bwd_torch
        dx, dw, db = bwd(dy, x, w, mean, rstd, *ctx.needs_input_grad[1:3])
        dw = None if dw is None else dw.to(w.dtype)
        db = None if db is None else db.to(ctx.b_dtype)
        return dx, dw, db, None, None


def layer_norm(
    x: Tensor, w: Tensor, b: Tensor | None = None, eps: float = 1e-5, *, impl: Impl = "auto"
) -> Tensor:
    """Layer norm over the last dimension (Ba et al. 2016, eq. 4), as `F.layer_norm`.

    Args:
        x: (..., N), any float dtype.
        w: (N,), any float dtype.
        b: (N,), or None for no bias.
        eps: added to the variance.
        impl: "auto", "triton" or "torch"; see `liger_core.dispatch.use_triton`.

    Returns:
        (..., N) in x.dtype, rounded once. Saved for backward: x, w and two fp32 numbers a row.

    Raises:
        ValueError: `w` or `b` is not (N,), or tensors on different devices.
    """
    for name, t in (("w", w), ("b", b)):
        if t is not None and t.shape != x.shape[-1:]:
            raise ValueError(
                f"{name} must have shape {tuple(x.shape[-1:])}, the last of x, got {tuple(t.shape)}"
            )
    kernels = use_triton(impl, x, w, b, row=x.shape[-1]) and x.numel() > 0
    return _LayerNorm.apply(x, w, b, eps, kernels)  # pyright: ignore
