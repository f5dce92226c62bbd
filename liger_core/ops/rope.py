"""Rotary position embedding, half layout (Su et al. 2021, eq. 34): dimension d turns with d + D/2.

    y1 = x1 * cos1 - x2 * sin1        y2 = x2 * cos2 + x1 * sin2

x1, x2 are the halves of a head's vector; cos, sin hold D angles a position, as model families hand
them over. The backward is the transposed rotation:

    dx1 = dy1 * cos1 + dy2 * sin2     dx2 = dy2 * cos2 - dy1 * sin1
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from liger_core.dispatch import (
    Impl,
    accumulate_dtype,
    block,
    launch,
    rounded,
    tl,
    triton,
    use_triton,
)


def rope_ref(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, on (B, H, T, D) and (1 or B, T, D): fp32 (fp64 for fp64), rounded once."""
    acc = accumulate_dtype(q.dtype)
    cos, sin = cos.to(acc)[:, None], sin.to(acc)[:, None]

    def turn(x: Tensor) -> Tensor:
        x1, x2 = x.to(acc).chunk(2, -1)
        return (x.to(acc) * cos + torch.cat((-x2, x1), -1) * sin).to(x.dtype)

    return turn(q), turn(k)


@triton.jit
def _turn(
    x_ptr, y_ptr, stride_xh, stride_yh, H, HALF,
    cos1, cos2, sin1, sin2,
    BACKWARD: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # All H heads of one token, BLOCK_H at a time.
    d = tl.arange(0, BLOCK_D)[None, :]
    for start in range(0, H, BLOCK_H):
        h = (start + tl.arange(0, BLOCK_H)[:, None]).to(tl.int64)
        mask = (h < H) & (d < HALF)
        x, y = x_ptr + h * stride_xh + d, y_ptr + h * stride_yh + d
        x1 = tl.load(x, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(x + HALF, mask=mask, other=0.0).to(tl.float32)
        if BACKWARD:
            y1, y2 = x1 * cos1 + x2 * sin2, x2 * cos2 - x1 * sin1
        else:
            y1, y2 = x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2
        tl.store(y, y1.to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(y + HALF, y2.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rope_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, yq_ptr, yk_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_yqb, stride_yqh, stride_yqt, stride_ykb, stride_ykh, stride_ykt,
    stride_cb, T, HQ, HK, HALF,
    BACKWARD: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Grid (B * T,): one token a program.  q, yq: (B, HQ, T, 2 HALF);  k, yk: (B, HK, T, 2 HALF);
    # cos, sin: (1 or B, T, 2 HALF) contiguous, stride_cb 0 for the former.
    b, t = tl.program_id(0).to(tl.int64) // T, tl.program_id(0).to(tl.int64) % T
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = d < HALF
    cos = cos_ptr + b * stride_cb + t * 2 * HALF + d
    sin = sin_ptr + b * stride_cb + t * 2 * HALF + d
    cos1 = tl.load(cos, mask=mask, other=0.0).to(tl.float32)
    cos2 = tl.load(cos + HALF, mask=mask, other=0.0).to(tl.float32)
    sin1 = tl.load(sin, mask=mask, other=0.0).to(tl.float32)
    sin2 = tl.load(sin + HALF, mask=mask, other=0.0).to(tl.float32)
    _turn(
        q_ptr + b * stride_qb + t * stride_qt, yq_ptr + b * stride_yqb + t * stride_yqt,
        stride_qh, stride_yqh, HQ, HALF, cos1, cos2, sin1, sin2,
        BACKWARD, BLOCK_H, BLOCK_D,
    )  # fmt: skip
    _turn(
        k_ptr + b * stride_kb + t * stride_kt, yk_ptr + b * stride_ykb + t * stride_ykt,
        stride_kh, stride_ykh, HK, HALF, cos1, cos2, sin1, sin2,
        BACKWARD, BLOCK_H, BLOCK_D,
    )  # fmt: skip


def _rope_triton(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backward: bool
) -> tuple[Tensor, Tensor]:
    B, HQ, T, D = q.shape
    q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k))
    yq, yk = torch.empty_like(q), torch.empty_like(k)  # in the layout that attention gets
    BLOCK_D = block(D // 2)
    BLOCK_H = min(block(HQ), max(2048 // BLOCK_D, 1))
    args = (
        q, k, cos, sin, yq, yk,
        *q.stride()[:3], *k.stride()[:3], *yq.stride()[:3], *yk.stride()[:3],
        0 if cos.shape[0] == 1 else T * D, T, HQ, k.shape[1], D // 2,
    )  # fmt: skip
    launch(_rope_kernel, (B * T, 1, 1), 4, args, backward, BLOCK_H, BLOCK_D)
    return yq, yk


def _rope_torch(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backward: bool
) -> tuple[Tensor, Tensor]:
    acc = accumulate_dtype(q.dtype)
    (cos1, cos2), (sin1, sin2) = (t.to(acc)[:, None].chunk(2, -1) for t in (cos, sin))
    if backward:
        sin1, sin2 = -sin2, -sin1

    def turn(x: Tensor) -> Tensor:
        x1, x2 = x.to(acc).chunk(2, -1)
        y1, y2 = (y := torch.empty_like(x, dtype=acc)).chunk(2, -1)
        y1.copy_(x1).mul_(cos1).addcmul_(x2, sin1, value=-1)
        y2.copy_(x2).mul_(cos2).addcmul_(x1, sin2)
        return rounded(y, x.dtype)

    return turn(q), turn(k)


class _RoPE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, kernels: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.kernels = kernels
        return (_rope_triton if kernels else _rope_torch)(q, k, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        turn_back = _rope_triton if ctx.kernels else _rope_torch
        return *turn_back(dq, dk, cos, sin, True), None, None, None


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by position; the caller's tensors are left as they are.

    Args:
        q: (B, HQ, T, D), any strides, as `linear(x).view(B, T, HQ, D).transpose(1, 2)` gives it.
        k: (B, HK, T, D), likewise; HK may be smaller (grouped-query attention).
        cos, sin: (1 or B, T, D) angles of each position; no gradient flows to them.
        impl: "auto", "triton" or "torch"; see `liger_core.dispatch.use_triton`.

    Returns:
        Rotated q and k in their dtypes, rounded once. Only cos and sin are saved for backward.

    Raises:
        ValueError: shapes that do not fit, an odd D, or tensors on different devices.
    """
    B, _, T, D = q.shape
    if k.dim() != 4 or (k.shape[0], k.shape[2], k.shape[3]) != (B, T, D) or D % 2:
        raise ValueError(
            f"q and k must be (B, heads, T, D) with D even and all but heads equal, "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    for name, t in (("cos", cos), ("sin", sin)):
        if t.shape not in ((1, T, D), (B, T, D)):
            raise ValueError(f"{name} must be (1 or {B}, {T}, {D}), got {tuple(t.shape)}")
    kernels = use_triton(impl, q, k, cos, sin) and q.numel() > 0
    return _RoPE.apply(q, k, cos.contiguous(), sin.contiguous(), kernels)  # pyright: ignore
