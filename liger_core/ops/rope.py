"""Rotary position embedding (Su et al. 2021, eq. 34): a head's first R dimensions turn in pairs.

    y1 = x1 * cos1 - x2 * sin1        y2 = x2 * cos2 + x1 * sin2

Half layout: dimension d turns with d + R/2, and cos, sin hold R angles a position, one for each.
Interleaved (GLM-4): 2i turns with 2i + 1, both by angle i. Dimensions from R on pass through. The
backward is the transposed rotation, which is the same one with sin1, sin2 = -sin2, -sin1.
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
from liger_core.ops.sharded import by_rows, is_dtensor


def rope_ref(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """The definition, on (B, H, T, D) and (1 or B, T, R): fp32 (fp64 for fp64), rounded once."""
    acc, R = accumulate_dtype(q.dtype), cos.shape[-1]
    cos, sin = cos.to(acc)[:, None], sin.to(acc)[:, None]
    if interleaved:
        cos, sin = (t[..., : R // 2].repeat_interleave(2, -1) for t in (cos, sin))

    def turn(x: Tensor) -> Tensor:
        xf = x[..., :R].to(acc)
        if interleaved:
            across = torch.stack((-xf[..., 1::2], xf[..., ::2]), -1).flatten(-2)
        else:
            across = torch.cat((-xf[..., R // 2 :], xf[..., : R // 2]), -1)
        return torch.cat(((xf * cos + across * sin).to(x.dtype), x[..., R:]), -1)

    return turn(q), turn(k)


@triton.jit
def _turn(
    x_ptr, y_ptr, stride_xh, stride_yh, cos1, cos2, sin1, sin2,
    H: tl.constexpr, R: tl.constexpr, D: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    # All H heads of one token, BLOCK_H at a time.
    for start in tl.static_range(0, H, BLOCK_H):  # pyright: ignore[reportGeneralTypeIssues]
        h = (start + tl.arange(0, BLOCK_H)[:, None]).to(tl.int64)
        x, y = x_ptr + h * stride_xh, y_ptr + h * stride_yh
        if INTERLEAVED:  # pairs are split in registers: memory is read and written in wide words
            d = tl.arange(0, 2 * BLOCK_R)[None, :]
            mask = (h < H) & (d < R)
            pairs = tl.load(x + d, mask=mask, other=0.0).to(tl.float32)
            x1, x2 = tl.split(tl.reshape(pairs, (BLOCK_H, BLOCK_R, 2)))
        else:
            d = tl.arange(0, BLOCK_R)[None, :]
            mask = (h < H) & (d < R // 2)
            x1 = tl.load(x + d, mask=mask, other=0.0).to(tl.float32)
            x2 = tl.load(x + R // 2 + d, mask=mask, other=0.0).to(tl.float32)
        y1, y2 = x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2
        if INTERLEAVED:
            pairs = tl.reshape(tl.join(y1, y2), (BLOCK_H, 2 * BLOCK_R))
            tl.store(y + d, pairs.to(y_ptr.dtype.element_ty), mask=mask)
        else:
            tl.store(y + d, y1.to(y_ptr.dtype.element_ty), mask=mask)
            tl.store(y + R // 2 + d, y2.to(y_ptr.dtype.element_ty), mask=mask)
        if R < D:
            d = R + tl.arange(0, BLOCK_P)[None, :]
            mask = (h < H) & (d < D)
            tl.store(y + d, tl.load(x + d, mask=mask), mask=mask)


@triton.jit
def _rope_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, yq_ptr, yk_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_yqb, stride_yqh, stride_yqt, stride_ykb, stride_ykh, stride_ykt,
    stride_cb, T,
    HQ: tl.constexpr, HK: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    INTERLEAVED: tl.constexpr, BACKWARD: tl.constexpr,
    BLOCK_HQ: tl.constexpr, BLOCK_HK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    # Grid (B * T,): one token a program.  q, yq: (B, HQ, T, D);  k, yk: (B, HK, T, D);  cos, sin:
    # (1 or B, T, R) contiguous, stride_cb 0 for the former.  BLOCK_R holds R / 2, BLOCK_P D - R.
    # R and D are constants, so that widths such as 80 are known to be multiples of 16 bytes; the
    # heads are, so that the loops over them unroll.
    b, t = tl.program_id(0).to(tl.int64) // T, tl.program_id(0).to(tl.int64) % T
    d = tl.arange(0, BLOCK_R)[None, :]
    mask = d < R // 2
    cos, sin = cos_ptr + b * stride_cb + t * R + d, sin_ptr + b * stride_cb + t * R + d
    cos1 = tl.load(cos, mask=mask, other=0.0).to(tl.float32)
    sin1 = tl.load(sin, mask=mask, other=0.0).to(tl.float32)
    if INTERLEAVED:
        cos2, sin2 = cos1, sin1
    else:
        cos2 = tl.load(cos + R // 2, mask=mask, other=0.0).to(tl.float32)
        sin2 = tl.load(sin + R // 2, mask=mask, other=0.0).to(tl.float32)
    if BACKWARD:
        sin1, sin2 = -sin2, -sin1
    _turn(
        q_ptr + b * stride_qb + t * stride_qt, yq_ptr + b * stride_yqb + t * stride_yqt,
        stride_qh, stride_yqh, cos1, cos2, sin1, sin2,
        HQ, R, D, INTERLEAVED, BLOCK_HQ, BLOCK_R, BLOCK_P,
    )  # fmt: skip
    _turn(
        k_ptr + b * stride_kb + t * stride_kt, yk_ptr + b * stride_ykb + t * stride_ykt,
        stride_kh, stride_ykh, cos1, cos2, sin1, sin2,
        HK, R, D, INTERLEAVED, BLOCK_HK, BLOCK_R, BLOCK_P,
    )  # fmt: skip


def _tiling(HQ: int, HK: int, BLOCK_R: int) -> tuple[int, int, int]:
    """Warps a program, and heads of q and of k at a time: 8 pairs a thread, 16 bytes twice."""
    heads = max(1024 // BLOCK_R, 1)
    num_warps = min(max(block(HQ) * BLOCK_R // 256, 1), 4)
    return num_warps, min(block(HQ), heads), min(block(HK), heads)


def _rope_triton(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, backward: bool
) -> tuple[Tensor, Tensor]:
    (B, HQ, T, D), HK, R = q.shape, k.shape[1], cos.shape[-1]
    q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k))
    yq, yk = torch.empty_like(q), torch.empty_like(k)  # in the layout that attention gets
    BLOCK_R, BLOCK_P = block(R // 2), block(D - R)
    num_warps, BLOCK_HQ, BLOCK_HK = _tiling(HQ, HK, BLOCK_R)
    args = (
        q, k, cos, sin, yq, yk,
        *q.stride()[:3], *k.stride()[:3], *yq.stride()[:3], *yk.stride()[:3],
        0 if cos.shape[0] == 1 else T * R, T,
    )  # fmt: skip
    constants = HQ, HK, R, D, interleaved, backward, BLOCK_HQ, BLOCK_HK, BLOCK_R, BLOCK_P
    launch(_rope_kernel, (B * T, 1, 1), num_warps, args, *constants)
    return yq, yk


def _rope_torch(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, backward: bool
) -> tuple[Tensor, Tensor]:
    acc, R = accumulate_dtype(q.dtype), cos.shape[-1]
    cos, sin = cos.to(acc)[:, None], sin.to(acc)[:, None]
    (cos1, cos2), (sin1, sin2) = cos.chunk(2, -1), sin.chunk(2, -1)
    if interleaved:
        cos2, sin2 = cos1, sin1
    if backward:
        sin1, sin2 = -sin2, -sin1

    def pairs(x: Tensor) -> tuple[Tensor, Tensor]:
        if interleaved:
            return x[..., :R:2], x[..., 1:R:2]
        return x[..., : R // 2], x[..., R // 2 : R]

    def turn(x: Tensor) -> Tensor:
        (x1, x2), y = pairs(x.to(acc)), torch.empty_like(x, dtype=acc)
        y1, y2 = pairs(y)
        y1.copy_(x1).mul_(cos1).addcmul_(x2, sin1, value=-1)
        y2.copy_(x2).mul_(cos2).addcmul_(x1, sin2)
        y[..., R:].copy_(x[..., R:])
        return rounded(y, x.dtype)

    return turn(q), turn(k)


class _RoPE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, kernels: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved, ctx.kernels = interleaved, kernels
        return (_rope_triton if kernels else _rope_torch)(q, k, cos, sin, interleaved, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        turn_back = _rope_triton if ctx.kernels else _rope_torch
        return *turn_back(dq, dk, cos, sin, ctx.interleaved, True), None, None, None, None


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by position; the caller's tensors are left as they are.

    Args:
        q: (B, HQ, T, D), any strides, as `linear(x).view(B, T, HQ, D).transpose(1, 2)` gives it.
        k: (B, HK, T, D), likewise; HK may be smaller (grouped-query attention).
        cos, sin: (1 or B, T, R) angles of each position, any float dtype, R even and at most D; no
            gradient flows to them. Dimensions from R on pass through (partial rotary).
        interleaved: dimension 2i turns with 2i + 1, by angle i of the first R/2; else d with
            d + R/2, each by its own angle.
        impl: "auto", "triton" or "torch"; see `liger_core.dispatch.use_triton`.

    Returns:
        Rotated q and k in their dtypes and layouts, computed in fp32 and rounded once. Only cos and
        sin are saved for backward.

    Raises:
        ValueError: shapes that do not fit, an odd R, or tensors on different devices.
    """
    if q.dim() != 4:
        raise ValueError(f"q must be (B, heads, T, D), got {tuple(q.shape)}")
    B, _, T, D = q.shape
    if k.dim() != 4 or (k.shape[0], k.shape[2], k.shape[3]) != (B, T, D):
        raise ValueError(
            f"q and k must be (B, heads, T, D) and all but heads equal, "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    R = cos.shape[-1]
    if cos.shape not in ((1, T, R), (B, T, R)) or sin.shape != cos.shape:
        raise ValueError(
            f"cos and sin must both be (1 or {B}, {T}, R), "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if R % 2 or not 0 < R <= D:
        raise ValueError(f"the angles must be an even number up to D = {D}, got {R}")
    if is_dtensor(q, k, cos, sin):
        op = lambda q, k, cos, sin: rope(q, k, cos, sin, interleaved=interleaved, impl=impl)  # noqa: E731
        return by_rows(op, (q, k), (cos, sin), split=lambda dim: dim == 1)
    kernels = use_triton(impl, q, k, cos, sin) and q.numel() > 0
    return _RoPE.apply(q, k, cos.contiguous(), sin.contiguous(), interleaved, kernels)  # pyright: ignore
