"""Gated linear units (Shazeer 2020): y = act(g) * u, for the gate g and the up projection u.

    silu(g) = g * s(g)                                  s is the logistic function
    gelu(g) = g * (1 + erf(g / sqrt 2)) / 2
    gelu_tanh(g) = g * s(2 c (g + a g^3))               c = sqrt(2 / pi), a = 0.044715

The last is the usual (1 + tanh(v)) / 2 form, which equals s(2v). The backward recomputes act:

    dg = dy * u * act'(g)        du = dy * act(g)
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from liger_core.dispatch import (
    Impl,
    accumulate_dtype,
    as_rows,
    block,
    launch,
    rounded,
    tl,
    triton,
    use_triton,
)

Activation = Literal["silu", "gelu", "gelu_tanh"]


def glu_ref(g: Tensor, u: Tensor, act: Activation = "silu") -> Tensor:
    """The definition in fp32 (fp64 for fp64), rounded once."""
    acc = accumulate_dtype(g.dtype)
    gf = g.to(acc)
    a = F.silu(gf) if act == "silu" else F.gelu(gf, approximate=_APPROXIMATE[act])
    return rounded(a * u.to(acc), g.dtype)


_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


@triton.jit
def _activation(g, ACT: tl.constexpr):
    """act(g) and act'(g), in fp32."""
    if ACT == "silu":
        s = tl.sigmoid(g)
        return g * s, s * (1 + g * (1 - s))
    if ACT == "gelu":
        s = 0.5 * (1 + tl.erf(g * 0.7071067811865476))
        return g * s, s + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    v2 = 1.5957691216057308 * g * (1 + 0.044715 * g * g)
    s = tl.sigmoid(v2)
    return g * s, s + g * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * g * g)


@triton.jit
def _glu_fwd_kernel(
    g_ptr, u_ptr, y_ptr, stride_gm, stride_um, N,
    ACT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Grid (M, N / BLOCK_N).  g, u, y: (M, N), y contiguous.
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = cols < N
    g = tl.load(g_ptr + row * stride_gm + cols, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + row * stride_um + cols, mask=mask, other=0.0).to(tl.float32)
    a, _ = _activation(g, ACT)
    tl.store(y_ptr + row * N + cols, (a * u).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _glu_bwd_kernel(
    dy_ptr, g_ptr, u_ptr, dg_ptr, du_ptr, stride_dym, stride_gm, stride_um, N,
    ACT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Grid (M, N / BLOCK_N).  dg, du: (M, N) contiguous.
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = cols < N
    dy = tl.load(dy_ptr + row * stride_dym + cols, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + row * stride_gm + cols, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + row * stride_um + cols, mask=mask, other=0.0).to(tl.float32)
    a, da = _activation(g, ACT)
    tl.store(dg_ptr + row * N + cols, (dy * u * da).to(dg_ptr.dtype.element_ty), mask=mask)
    tl.store(du_ptr + row * N + cols, (dy * a).to(du_ptr.dtype.element_ty), mask=mask)


def _fwd_triton(g: Tensor, u: Tensor, act: Activation) -> Tensor:
    N = g.shape[-1]
    (g2, stride_g), (u2, stride_u) = as_rows(g), as_rows(u)
    y, BLOCK_N = g.new_empty(g.shape), min(block(N), 1024)
    grid = g.numel() // N, -(-N // BLOCK_N), 1
    launch(_glu_fwd_kernel, grid, 4, (g2, u2, y, stride_g, stride_u, N), act, BLOCK_N)
    return y


def _bwd_triton(dy: Tensor, g: Tensor, u: Tensor, act: Activation) -> tuple[Tensor, Tensor]:
    N = g.shape[-1]
    (dy, stride_dy), (g2, stride_g), (u2, stride_u) = as_rows(dy), as_rows(g), as_rows(u)
    dg, du, BLOCK_N = g.new_empty(g.shape), u.new_empty(u.shape), min(block(N), 1024)
    grid = g.numel() // N, -(-N // BLOCK_N), 1
    args = dy, g2, u2, dg, du, stride_dy, stride_g, stride_u, N
    launch(_glu_bwd_kernel, grid, 4, args, act, BLOCK_N)
    return dg, du


def _bwd_torch(dy: Tensor, g: Tensor, u: Tensor, act: Activation) -> tuple[Tensor, Tensor]:
    acc = accumulate_dtype(g.dtype)
    dyf, gf = dy.to(acc), g.to(acc)
    if act == "silu":
        du = F.silu(gf).mul_(dyf)
        dg = torch.ops.aten.silu_backward(dyf * u.to(acc), gf)
    else:
        approximate = _APPROXIMATE[act]
        du = F.gelu(gf, approximate=approximate).mul_(dyf)
        dg = torch.ops.aten.gelu_backward(dyf * u.to(acc), gf, approximate=approximate)
    return dg.to(g.dtype), du.to(u.dtype)


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor, act: Activation, kernels: bool) -> Tensor:
        ctx.save_for_backward(g, u)
        ctx.act, ctx.kernels = act, kernels
        return (_fwd_triton if kernels else glu_ref)(g, u, act)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        g, u = ctx.saved_tensors
        dg, du = (_bwd_triton if ctx.kernels else _bwd_torch)(dy, g, u, ctx.act)
        return dg, du, None, None


def glu(g: Tensor, u: Tensor, act: Activation = "silu", *, impl: Impl = "auto") -> Tensor:
    """act(g) * u.

    Args:
        g: (..., N) gate, any float dtype; the last dimension may be a slice of a wider one, as
            `gate_up.chunk(2, -1)` gives it, without a copy.
        u: (..., N) up projection, of g's shape and dtype.
        act: "silu", "gelu" (exact, by erf) or "gelu_tanh".
        impl: "auto", "triton" or "torch"; see `liger_core.dispatch.use_triton`.

    Returns:
        (..., N) in g.dtype, computed in fp32 and rounded once. g and u are saved for backward and
        nothing else; neither is written to.

    Raises:
        ValueError: shapes, dtypes or devices that differ, or an unknown `act`.
    """
    if g.shape != u.shape or g.dtype != u.dtype:
        raise ValueError(
            f"gate and up must agree in shape and dtype, got {tuple(g.shape)} {g.dtype} "
            f"and {tuple(u.shape)} {u.dtype}"
        )
    if act not in ("silu", "gelu", "gelu_tanh"):
        raise ValueError(f"act must be 'silu', 'gelu' or 'gelu_tanh', got {act!r}")
    kernels = use_triton(impl, g, u) and g.numel() > 0
    return _GLU.apply(g, u, act, kernels)  # pyright: ignore


def swiglu(g: Tensor, u: Tensor, *, impl: Impl = "auto") -> Tensor:
    """silu(g) * u; see `glu`."""
    return glu(g, u, "silu", impl=impl)


def geglu(
    g: Tensor, u: Tensor, *, approximate: Literal["tanh", "none"] = "tanh", impl: Impl = "auto"
) -> Tensor:
    """gelu(g) * u, in the tanh form or exactly ("none"); see `glu`."""
    return glu(g, u, "gelu_tanh" if approximate == "tanh" else "gelu", impl=impl)
