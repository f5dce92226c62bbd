"""A gradient taken before its upstream gradient was known, times that."""

from collections.abc import Iterable

import torch
from torch import Tensor

from liger_core.dispatch import block, launch, rounded, tl, triton


@triton.jit
def _scale_kernel(t_ptr, s_ptr, M, stride_s, N, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    # Grid (M / ROWS,): t[m] *= s[m] for contiguous t (M, N), fp32 s; nothing to do where it is 1.
    first = tl.program_id(0).to(tl.int64) * ROWS
    for row in range(first, tl.minimum(first + ROWS, M)):
        s = tl.load(s_ptr + row * stride_s)
        if s != 1.0:
            for start in range(0, N, BLOCK_N):
                cols = start + tl.arange(0, BLOCK_N)
                t = tl.load(t_ptr + row * N + cols, mask=cols < N)
                t = (t.to(tl.float32) * s).to(t_ptr.dtype.element_ty)
                tl.store(t_ptr + row * N + cols, t, mask=cols < N)


def scaled(
    t: Tensor | None, s: Tensor, like: Tensor | None, own: bool, kernels: bool
) -> Tensor | None:
    """t * s in the dtype of `like`, with s, 0-d or one a row, at its full precision; in t itself
    where it is our `own` and can be.

    torch rounds a 0-d fp32 factor to bf16 before it multiplies a bf16 tensor.
    """
    if t is None or like is None:
        return None
    if not own or t.dtype not in (like.dtype, s.dtype):
        return (t.to(s.dtype) * (s[:, None] if s.dim() else s)).to(like.dtype)
    N = max(t[:1].numel(), 1)
    if kernels and s.dtype == torch.float32 and t.numel():
        M, rows = t.shape[0], min(block(max(65536 // N, 1)), 1024)
        args = (t, s, M, s.stride(0) if s.dim() else 0, N)
        launch(_scale_kernel, (-(-M // rows), 1, 1), 4, args, rows, min(block(N), 4096))
        return rounded(t, like.dtype)
    step = max((1 << 22) // N, 1)
    for i, t_c in enumerate(t.split(step)):
        t_c.copy_(t_c.to(s.dtype) * (s[i * step : (i + 1) * step, None] if s.dim() else s))
    return rounded(t, like.dtype)


def scale_all(
    grads: Iterable[Tensor | None], s: Tensor, like: Iterable[Tensor | None], own: bool,
    kernels: bool,
) -> list[Tensor | None]:  # fmt: skip
    """`scaled` for each."""
    return [scaled(t, s, x, own, kernels) for t, x in zip(grads, like, strict=True)]
