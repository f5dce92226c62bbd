"""Gated linear units (Shazeer 2020): y = act(g) * u, for the gate g and the up projection u.

    silu(g) = g * s(g)                                  s is the logistic function
    gelu(g) = g * (1 + erf(g / sqrt 2)) / 2
    gelu_tanh(g) = g * s(2 c (g + a g^3))               c = sqrt(2 / pi), a = 0.044715

The last is the usual (1 + tanh(v)) / 2 form, which equals s(2v). The backward recomputes act:

    dg = dy * u * act'(g)        du = dy * act(g)

g and u come as two tensors (`glu`) or as the halves of one (`glu_packed`), by the same kernels.
"""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from liger_core.dispatch import (
    HIP,
    Impl,
    accumulate_dtype,
    as_rows,
    block,
    launch,
    overwritable,
    rounded,
    tl,
    triton,
    use_triton,
)
from liger_core.ops.sharded import by_rows, is_dtensor

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
    g_ptr, u_ptr, y_ptr, stride_gm, stride_um, offset_u, N,
    ACT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Grid (M, N / BLOCK_N).  g, y: (M, N), y contiguous;  u: (M, N) from column offset_u on.
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = cols < N
    g = tl.load(g_ptr + row * stride_gm + cols, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + row * stride_um + offset_u + cols, mask=mask, other=0.0).to(tl.float32)
    a, _ = _activation(g, ACT)
    tl.store(y_ptr + row * N + cols, (a * u).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _glu_bwd_kernel(
    dy_ptr, g_ptr, u_ptr, dg_ptr, du_ptr,
    stride_dym, stride_gm, stride_um, stride_dm, offset_u, N,
    PACKED: tl.constexpr, ACT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Grid (M, N / BLOCK_N).  dg, du: like g, u, both of row stride stride_dm; they may be g, u
    # themselves: an element is written after it was read, by the thread that read it or behind a
    # barrier.  PACKED: du is in dg, which is given once, because Inductor takes two names of one
    # tensor for two that are written to.
    if PACKED:
        du_ptr = dg_ptr
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = cols < N
    dy = tl.load(dy_ptr + row * stride_dym + cols, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + row * stride_gm + cols, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + row * stride_um + offset_u + cols, mask=mask, other=0.0).to(tl.float32)
    a, da = _activation(g, ACT)
    dg, du = dg_ptr + row * stride_dm + cols, du_ptr + row * stride_dm + offset_u + cols
    tl.store(dg, (dy * u * da).to(dg_ptr.dtype.element_ty), mask=mask)
    tl.store(du, (dy * a).to(du_ptr.dtype.element_ty), mask=mask)


def _tiling(N: int) -> tuple[int, int]:
    """Columns of a program, whole rows up to 16384, and its warps."""
    BLOCK_N = min(block(N), 16384)
    return BLOCK_N, min(max(BLOCK_N // 512, 1), 16 if HIP else 32)


# Below, u is g itself where that holds both: y's width tells.


def _fwd_triton(g: Tensor, u: Tensor, N: int, act: Activation) -> Tensor:
    (g2, stride_g), (u2, stride_u) = as_rows(g), as_rows(u)
    y, (BLOCK_N, num_warps) = g.new_empty((*g.shape[:-1], N)), _tiling(N)
    grid = y.numel() // N, -(-N // BLOCK_N), 1
    args = g2, u2, y, stride_g, stride_u, g.shape[-1] - N, N
    launch(_glu_fwd_kernel, grid, num_warps, args, act, BLOCK_N)
    return y


def _bwd_triton(dy: Tensor, g: Tensor, u: Tensor, dg: Tensor, du: Tensor, act: Activation) -> None:
    N, width = dy.shape[-1], g.shape[-1]
    (dy, stride_dy), (g2, stride_g), (u2, stride_u) = as_rows(dy), as_rows(g), as_rows(u)
    BLOCK_N, num_warps = _tiling(N)
    grid = dg.numel() // width, -(-N // BLOCK_N), 1
    packed = width > N
    args = dy, g2, u2, dg, dy if packed else du, stride_dy, stride_g, stride_u, width, width - N, N
    launch(_glu_bwd_kernel, grid, num_warps, args, packed, act, BLOCK_N)


def _parts(g: Tensor, u: Tensor, N: int) -> tuple[Tensor, Tensor]:
    return g[..., :N], u[..., u.shape[-1] - N :]


def _fwd_torch(g: Tensor, u: Tensor, N: int, act: Activation) -> Tensor:
    return glu_ref(*_parts(g, u, N), act)


def _bwd_torch(dy: Tensor, g: Tensor, u: Tensor, dg: Tensor, du: Tensor, act: Activation) -> None:
    N, acc = dy.shape[-1], accumulate_dtype(g.dtype)
    (g, u), (dg, du) = _parts(g, u, N), _parts(dg, du, N)
    dyf, gf = dy.to(acc), g.to(acc)
    slope = dyf * u.to(acc)  # of y by act(g), before u's memory may be written to
    if act == "silu":
        du.copy_(F.silu(gf).mul_(dyf))
        dg.copy_(torch.ops.aten.silu_backward(slope, gf))
    else:
        approximate = _APPROXIMATE[act]
        du.copy_(F.gelu(gf, approximate=approximate).mul_(dyf))
        dg.copy_(torch.ops.aten.gelu_backward(slope, gf, approximate=approximate))


def _spend(ctx: Any) -> tuple[Tensor, ...]:
    """What forward saved, for backward to write over; others who saved it get autograd's error."""
    if ctx.spent:
        raise RuntimeError(
            "this glu was called with inplace=True, so that its first backward has put gradients "
            "where its inputs were; call it with inplace=False to go backward twice (for a patched "
            "model, mlp_inplace=False)"
        )
    saved = ctx.saved_tensors
    ctx.spent = True
    torch.autograd.graph.increment_version(saved)
    return saved


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, g: Tensor, u: Tensor | None, N: int, act: Activation, kernels: bool, inplace: bool
    ) -> Tensor:
        ctx.save_for_backward(*((g,) if u is None else (g, u)))
        ctx.act, ctx.kernels, ctx.inplace, ctx.spent = act, kernels, inplace, False
        return (_fwd_triton if kernels else _fwd_torch)(g, g if u is None else u, N, act)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved: tuple[Tensor, ...] = _spend(ctx) if ctx.inplace else ctx.saved_tensors
        if ctx.inplace and all(t.is_contiguous() for t in saved):  # hooks may hand back others
            grads = [t.detach() for t in saved]
        else:
            grads = [t.new_empty(t.shape) for t in saved]
        bwd = _bwd_triton if ctx.kernels else _bwd_torch
        bwd(dy, saved[0], saved[-1], grads[0], grads[-1], ctx.act)
        return grads[0], grads[1] if len(grads) == 2 else None, None, None, None, None


def _ours(*inputs: Tensor) -> bool:
    """Whether backward may write over these: see `glu`."""
    if torch.compiler.is_compiling():
        return False
    g, *u = inputs
    apart = not u or abs(g.data_ptr() - u[0].data_ptr()) >= g.nbytes
    return apart and all(overwritable(t) for t in inputs)


def glu(
    g: Tensor, u: Tensor, act: Activation = "silu", *, inplace: bool = False, impl: Impl = "auto"
) -> Tensor:
    """act(g) * u.

    Args:
        g: (..., N) gate, any float dtype; the last dimension may be a slice of a wider one, as
            `gate_up.chunk(2, -1)` gives it, without a copy.
        u: (..., N) up projection, of g's shape and dtype.
        act: "silu", "gelu" (exact, by erf) or "gelu_tanh".
        inplace: let backward put dg and du where g and u are, so that y is all the memory that the
            op adds. For callers that computed both themselves and use them nowhere else: a second
            backward raises RuntimeError; who saved them for a backward that comes later gets
            autograd's error, but wrong gradients under saved-tensor hooks (non-reentrant
            checkpoints), where autograd does not look; and who reads them then reads gradients.
            No effect under torch.compile, nor unless both are contiguous, plain tensors (no
            subclass) that do not overlap and are neither leaves of autograd nor views of one.
        impl: "auto", "triton" or "torch"; see `liger_core.dispatch.use_triton`.

    Returns:
        (..., N) in g.dtype, computed in fp32 and rounded once. g and u are saved for backward and
        nothing else; neither is written to but by `inplace`.

    Raises:
        ValueError: shapes, dtypes or devices that differ, or an unknown `act`.
    """
    if g.shape != u.shape or g.dtype != u.dtype or g.dim() == 0:
        raise ValueError(
            f"gate and up must be (..., N) and agree in shape and dtype, got "
            f"{tuple(g.shape)} {g.dtype} and {tuple(u.shape)} {u.dtype}"
        )
    _check(act)
    if is_dtensor(g, u):
        return by_rows(lambda g, u: glu(g, u, act, impl=impl), (g, u))
    kernels = use_triton(impl, g, u) and g.numel() > 0
    inplace = inplace and _ours(g, u)
    return _GLU.apply(g, u, g.shape[-1], act, kernels, inplace)  # pyright: ignore


def glu_packed(
    gu: Tensor, act: Activation = "silu", *, inplace: bool = False, impl: Impl = "auto"
) -> Tensor:
    """act(g) * u for `g, u = gu.chunk(2, -1)`: the output of one projection for both.

    Args:
        gu: (..., 2N), the gate first, any float dtype; saved for backward, whose gradient is
            written as one (..., 2N) tensor.
        act, inplace, impl: as in `glu`; with `inplace` that tensor is gu itself.

    Returns:
        (..., N) in gu.dtype, computed in fp32 and rounded once.

    Raises:
        ValueError: an odd last dimension, or an unknown `act`.
    """
    if gu.dim() == 0 or gu.shape[-1] % 2:
        raise ValueError(f"gate and up must be halves of the last dimension of {tuple(gu.shape)}")
    _check(act)
    if is_dtensor(gu):
        op, last = lambda gu: glu_packed(gu, act, impl=impl), gu.dim() - 1
        return by_rows(op, (gu,), split=lambda dim: dim < last)
    kernels = use_triton(impl, gu) and gu.numel() > 0
    inplace = inplace and _ours(gu)
    return _GLU.apply(gu, None, gu.shape[-1] // 2, act, kernels, inplace)  # pyright: ignore


def _check(act: str) -> None:
    if act not in get_args(Activation):
        raise ValueError(f"act must be one of {get_args(Activation)}, got {act!r}")


def swiglu(g: Tensor, u: Tensor, *, impl: Impl = "auto") -> Tensor:
    """silu(g) * u; see `glu`."""
    return glu(g, u, "silu", impl=impl)


def geglu(
    g: Tensor, u: Tensor, *, approximate: Literal["tanh", "none"] = "tanh", impl: Impl = "auto"
) -> Tensor:
    """gelu(g) * u, in the tanh form or exactly ("none"); see `glu`."""
    return glu(g, u, "gelu_tanh" if approximate == "tanh" else "gelu", impl=impl)
