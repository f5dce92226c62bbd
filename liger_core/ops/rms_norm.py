"""RMSNorm over the last dimension (Zhang and Sennrich 2019), alone or after a residual addition.

    y = (w + offset) * x * rstd        rstd = 1 / sqrt(mean(x^2) + eps)

The backward and the kernels are `row_norm`'s.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from liger_core.dispatch import Impl, accumulate_dtype
from liger_core.ops.row_norm import Norm, row_norm

Casting = Literal["llama", "gemma", "none"]
CASTINGS = get_args(Casting)


def rms_norm_ref(
    x: Tensor,
    w: Tensor | None = None,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    casting: Casting = "llama",
) -> Tensor:
    """The definition, with the roundings of the model families that it is named for."""
    acc = accumulate_dtype(x.dtype)
    xf = x.to(acc)
    xhat = xf * torch.rsqrt(xf.square().mean(-1, keepdim=True) + eps)
    if w is None:
        return xhat.to(x.dtype)
    if casting == "llama":
        return (w + offset) * xhat.to(x.dtype)
    y = xhat * (w.to(acc) + offset)
    return y.to(x.dtype if casting == "gemma" else torch.promote_types(x.dtype, w.dtype))


def _options(eps: float, offset: float, casting: Casting) -> Norm:
    if casting not in CASTINGS:
        raise ValueError(f"casting must be one of {CASTINGS}, got {casting!r}")
    return Norm(
        center=False, eps=eps, offset=offset,
        round_xhat=casting == "llama", promote=casting != "gemma",
    )  # fmt: skip


def rms_norm(
    x: Tensor,
    w: Tensor | None = None,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    casting: Casting = "llama",
    impl: Impl = "auto",
) -> Tensor:
    """Root-mean-square layer norm over the last dimension (Zhang and Sennrich 2019, eq. 4).

    Args:
        x: (..., N), any float dtype; a head's queries or keys, (B, T, heads, N), are rows as well.
        w: (N,), any float dtype; None for no weight.
        eps: added to the mean square, not to its root.
        offset: added to `w`; 1.0 for Gemma, whose weights are stored minus one.
        casting: where it is rounded. "llama": x * rstd to x.dtype before it meets `w`, then the
            product to the promoted dtype of the two. "gemma", also OLMo 2's: once, to x.dtype.
            "none": once, to the promoted dtype.
        impl: "auto", "triton" or "torch"; see `liger_core.dispatch.use_triton`.

    Returns:
        (..., N). Statistics are fp32 (fp64 for fp64). Saved for backward: x, w and one fp32 a row.

    Raises:
        ValueError: `w` is not (N,), tensors on different devices, or an unknown casting.
    """
    return row_norm(x, None, w, None, _options(eps, offset, casting), impl)


def add_rms_norm(
    x: Tensor,
    r: Tensor,
    w: Tensor | None = None,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    casting: Casting = "llama",
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """s = x + r and y = rms_norm(s), in one pass: (y, s), as a transformer's block needs both.

    Args:
        x: (..., N) output of a layer. r: the residual stream, of x's shape and dtype.
        w, eps, offset, casting, impl: as in `rms_norm`.

    Returns:
        y (..., N), and s (..., N) in x.dtype. The gradients that reach y and s come back as one
        tensor for both x and r. Saved for backward: s, w and one fp32 a row.

    Raises:
        ValueError: x and r differ in shape or dtype, and as `rms_norm`.
    """
    if x.shape != r.shape or x.dtype != r.dtype:
        raise ValueError(
            f"x and r must agree in shape and dtype, got {tuple(x.shape)} {x.dtype} and "
            f"{tuple(r.shape)} {r.dtype}"
        )
    return row_norm(x, r, w, None, _options(eps, offset, casting), impl)
