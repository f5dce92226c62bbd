"""LayerNorm over the last dimension (Ba et al. 2016), with or without weight and bias.

    y = w * (x - mean) * rstd + b        rstd = 1 / sqrt(var(x) + eps), the variance biased

The backward and the kernels are `row_norm`'s.
"""

import torch
from torch import Tensor

from liger_core.dispatch import Impl, accumulate_dtype
from liger_core.ops.row_norm import Norm, row_norm


def layer_norm_ref(
    x: Tensor, w: Tensor | None = None, b: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """The definition: fp32 statistics and products (fp64 for fp64), rounded once."""
    acc = accumulate_dtype(x.dtype)
    xc = x.to(acc) - x.to(acc).mean(-1, keepdim=True)
    y = xc * torch.rsqrt(xc.square().mean(-1, keepdim=True) + eps)
    y = y if w is None else y * w.to(acc)
    return (y if b is None else y + b.to(acc)).to(x.dtype)


def layer_norm(
    x: Tensor,
    w: Tensor | None = None,
    b: Tensor | None = None,
    eps: float = 1e-5,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Layer norm over the last dimension (Ba et al. 2016, eq. 4), as `F.layer_norm`.

    Args:
        x: (..., N), any float dtype.
        w: (N,), any float dtype; None for no weight.
        b: (N,); None for no bias.
        eps: added to the variance.
        impl: "auto", "triton" or "torch"; see `liger_core.dispatch.use_triton`.

    Returns:
        (..., N) in x.dtype, rounded once. Saved for backward: x, w and two fp32 numbers a row.

    Raises:
        ValueError: `w` or `b` is not (N,), or tensors on different devices.
    """
    return row_norm(x, None, w, b, Norm(center=True, eps=eps), impl)
