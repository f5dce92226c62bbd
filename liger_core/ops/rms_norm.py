"""RMSNorm over the last dimension: y = w' * x * rstd, rstd = 1 / sqrt(mean(x^2) + eps).

w' = w + offset. With xhat = x * rstd and g = dy * w', the backward is

    dx = rstd * (g - xhat * mean(g * xhat))        dw = sum over rows of dy * xhat
"""

from typing import Any, Literal

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

Casting = Literal["llama", "gemma"]


def rms_norm_ref(
    x: Tensor, w: Tensor, eps: float = 1e-6, *, offset: float = 0.0, casting: Casting = "llama"
) -> Tensor:
    """The definition, with the roundings of the model families that it is named for."""
    acc = accumulate_dtype(x.dtype)
    xf = x.to(acc)
    xhat = xf * torch.rsqrt(xf.square().mean(-1, keepdim=True) + eps)
    if casting == "llama":
        return (w + offset) * xhat.to(x.dtype)
    return (xhat * (w.to(acc) + offset)).to(x.dtype)


@triton.jit
def _rms_norm_fwd_kernel(
    x_ptr, w_ptr, y_ptr, rstd_ptr,
    stride_xm, stride_ym, N, eps, offset,
    LLAMA: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Grid (M,): one row a program.  x, y: (M, N);  w: (N,);  rstd: (M,) fp32.
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2^31 on long batches
    cols = tl.arange(0, BLOCK_N)
    mask = cols < N
    x = tl.load(x_ptr + row * stride_xm + cols, mask=mask, other=0.0)
    w = tl.load(w_ptr + cols, mask=mask, other=0.0).to(tl.float32) + fp32(offset)
    xf = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(xf * xf) / N + fp32(eps))
    tl.store(rstd_ptr + row, rstd)
    xhat = xf * rstd
    if LLAMA:
        xhat = xhat.to(x.dtype).to(tl.float32)
    tl.store(y_ptr + row * stride_ym + cols, (xhat * w).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rms_norm_bwd_kernel(
    dy_ptr, x_ptr, w_ptr, rstd_ptr, dx_ptr, dw_partial_ptr,
    stride_dym, stride_xm, stride_dxm, M, N, offset,
    NEED_DW: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Grid (P,): program p walks rows p, p + P, ... and owns row p of dw_partial, (P, N) fp32.
    pid = tl.program_id(0).to(tl.int64)  # makes `row` int64 too
    cols = tl.arange(0, BLOCK_N)
    mask = cols < N
    w = tl.load(w_ptr + cols, mask=mask, other=0.0).to(tl.float32) + fp32(offset)
    dw = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for row in range(pid, M, tl.num_programs(0)):
        dy = tl.load(dy_ptr + row * stride_dym + cols, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * stride_xm + cols, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        xhat, g = x * rstd, dy * w
        dx = rstd * (g - xhat * (tl.sum(g * xhat) / N))
        tl.store(dx_ptr + row * stride_dxm + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if NEED_DW:
            dw += dy * xhat
    if NEED_DW:
        tl.store(dw_partial_ptr + pid * N + cols, dw, mask=mask)


def _fwd_triton(
    x: Tensor, w: Tensor, eps: float, offset: float, casting: Casting
) -> tuple[Tensor, Tensor]:
    N = x.shape[-1]
    M, llama = x.numel() // N, casting == "llama"
    rows, stride = as_rows(x)
    dtype = torch.promote_types(w.dtype, x.dtype) if llama else x.dtype
    y, rstd = x.new_empty(x.shape, dtype=dtype), x.new_empty(M, dtype=torch.float32)
    BLOCK_N = block(N)
    launch(
        _rms_norm_fwd_kernel, (M, 1, 1), row_warps(BLOCK_N),
        (rows, w, y, rstd, stride, N, N, eps, offset), llama, BLOCK_N,
    )  # fmt: skip
    return y, rstd


def _bwd_triton(
    dy: Tensor, x: Tensor, w: Tensor, rstd: Tensor, offset: float, need_dw: bool
) -> tuple[Tensor, Tensor | None]:
    N = x.shape[-1]
    M = x.numel() // N
    (rows, stride), (dy, stride_dy), P = as_rows(x), as_rows(dy), min(M, sm_count(x))
    dx = x.new_empty(x.shape)
    partial = x.new_empty(P, N, dtype=torch.float32) if need_dw else dx
    BLOCK_N = block(N)
    launch(
        _rms_norm_bwd_kernel, (P, 1, 1), row_warps(BLOCK_N),
        (dy, rows, w, rstd, dx, partial, stride_dy, stride, N, M, N, offset), need_dw, BLOCK_N,
    )  # fmt: skip
    return dx, partial.sum(0).to(w.dtype) if need_dw else None


def _fwd_torch(
    x: Tensor, w: Tensor, eps: float, offset: float, casting: Casting
) -> tuple[Tensor, Tensor]:
    xf = x.to(accumulate_dtype(x.dtype))
    rstd = torch.rsqrt(xf.square().mean(-1, keepdim=True) + eps)
    xhat = xf * rstd
    if casting == "llama":
        return (w + offset) * xhat.to(x.dtype), rstd
    return rounded(xhat * (w.to(xf.dtype) + offset), x.dtype), rstd


def _bwd_torch(
    dy: Tensor, x: Tensor, w: Tensor, rstd: Tensor, offset: float, need_dw: bool
) -> tuple[Tensor, Tensor | None]:
    acc = rstd.dtype
    dy, xhat = dy.to(acc), x.to(acc) * rstd
    dw = (dy * xhat).sum_to_size(w.shape).to(w.dtype) if need_dw else None
    g = dy * (w.to(acc) + offset)
    c = (g * xhat).mean(-1, keepdim=True)
    return (rstd * torch.addcmul(g, xhat, c, value=-1)).to(x.dtype), dw


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, eps: float, offset: float, casting: Casting, kernels: bool
    ) -> Tensor:
        w = w.contiguous()
        y, rstd = (_fwd_triton if kernels else _fwd_torch)(x, w, eps, offset, casting)
        ctx.save_for_backward(x, w, rstd)
        ctx.offset, ctx.kernels = offset, kernels
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, rstd = ctx.saved_tensors
        bwd = _bwd_triton if ctx.kernels else _bwd_torch
        dx, dw = bwd(dy, x, w, rstd, ctx.offset, ctx.needs_input_grad[1])
        return dx, dw, None, None, None, None


def rms_norm(
    x: Tensor,
    w: Tensor,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    casting: Casting = "llama",
    impl: Impl = "auto",
) -> Tensor:
    """Root-mean-square layer norm over the last dimension (Zhang and Sennrich 2019, eq. 4).

    Args:
        x: (..., N), any float dtype.
        w: (N,), any float dtype.
        eps: added to the mean square, not to its root.
        offset: added to `w`; 1.0 for Gemma, whose weights are stored minus one.
        casting: "llama" rounds x * rstd to x.dtype before it meets `w`, and the result has the
            promoted dtype of the two; "gemma" multiplies in fp32 and rounds once, to x.dtype.
        impl: "auto", "triton" or "torch"; see `liger_core.dispatch.use_triton`.

    Returns:
        (..., N). Statistics are fp32 (fp64 for fp64). Saved for backward: x, w and one fp32 a row.

    Raises:
        ValueError: `w` is not (N,), tensors on different devices, or an unknown casting.
    """
    if w.shape != x.shape[-1:]:
        raise ValueError(
            f"w must have shape {tuple(x.shape[-1:])}, the last of x, got {tuple(w.shape)}"
        )
    if casting not in ("llama", "gemma"):
        raise ValueError(f"casting must be 'llama' or 'gemma', got {casting!r}")
    kernels = use_triton(impl, x, w, row=x.shape[-1]) and x.numel() > 0
    return _RMSNorm.apply(x, w, eps, offset, casting, kernels)  # pyright: ignore
