"""Cross entropy of logits, with the label smoothing, z-loss, softcap and scale that models use.

    z = softcap * tanh(scale * logits / softcap)        lse = logsumexp(z)
    loss = lse - (1 - e) * z[y] - e * mean(z) + a * lse^2
    dz = (1 + 2 a lse) * softmax(z) - (1 - e) * onehot(y) - e / V

e is `label_smoothing`, a is `z_loss`. `row_loss` serves `cross_entropy` here, whose logits are the
caller's, and `linear_logprob`, which owns its logits and lets them become their own gradient.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from liger_core.dispatch import (
    Impl,
    accumulate_dtype,
    block,
    fp32,
    launch,
    tl,
    triton,
    use_triton,
)
from liger_core.ops.labels import IGNORE_INDEX, LabelScan, as_labels

Reduction = Literal["mean", "sum", "none"]
TORCH_CHUNK = 64 << 20  # bytes of temporaries that the torch path works in


class RowLoss(NamedTuple):
    """The loss of one row of logits; the module's equation says what each number does."""

    ignore_index: int = IGNORE_INDEX
    softcap: float | None = None
    scale: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def check(self) -> None:
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"softcap must be positive or None, got {self.softcap}")
        if self.scale <= 0:
            raise ValueError(f"scale must be positive, got {self.scale}")
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing must lie in [0, 1], got {self.label_smoothing}")


PLAIN = RowLoss()


def cross_entropy_ref(z: Tensor, y: Tensor, o: RowLoss = PLAIN) -> Tensor:
    """(M,) losses by the definition, in fp32 (fp64 for fp64); 0 where y is ignored."""
    z = z.to(accumulate_dtype(z.dtype)) * o.scale
    if o.softcap is not None:
        z = o.softcap * torch.tanh(z / o.softcap)
    lse = z.logsumexp(-1)
    z_y = z.gather(-1, y.clamp_min(0)[:, None])[:, 0]
    e = o.label_smoothing
    loss = lse - (1 - e) * z_y - e * z.mean(-1) + o.z_loss * lse.square()
    return loss.masked_fill(y == o.ignore_index, 0.0)


@triton.jit
def _load(z_ptr, cols, V, scale):
    """A block of scaled logits in fp32, 0 past the end."""
    return tl.load(z_ptr + cols, mask=cols < V, other=0.0).to(tl.float32) * scale


@triton.jit
def _cap(z, softcap, HAS_SOFTCAP: tl.constexpr):
    """softcap * tanh(z / softcap), by the logistic function s: tanh(v) = s(2v) - s(-2v)."""
    if HAS_SOFTCAP:
        z = softcap * (tl.sigmoid(2 * z / softcap) - tl.sigmoid(-2 * z / softcap))
    return z


@triton.jit
def _row_loss_kernel(
    z_ptr, y_ptr, g_ptr, loss_ptr, lse_ptr, dz_ptr,
    stride_zm, stride_g, stride_dzm, V, ignore_index, scale, softcap, smoothing, z_loss,
    HAS_SOFTCAP: tl.constexpr, HAS_SMOOTHING: tl.constexpr, HAS_LSE: tl.constexpr,
    HAS_G: tl.constexpr, NEED_DZ: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    # Grid (M,): one row a program.  z, dz: (M, V), dz may be z;  y: (M,) integers;
    # g: (M,) upstream gradient, HAS_G;  lse: (M,) fp32, read if HAS_LSE, else written with loss.
    scale, softcap, smoothing, z_loss = fp32(scale), fp32(softcap), fp32(smoothing), fp32(z_loss)
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride_zm
    dz_ptr += row * stride_dzm
    y = tl.load(y_ptr + row)
    offsets = tl.arange(0, BLOCK_V)
    if y == ignore_index:
        if not HAS_LSE:
            tl.store(loss_ptr + row, 0.0)
            tl.store(lse_ptr + row, 0.0)
        if NEED_DZ:
            for start in range(0, V, BLOCK_V):
                cols = start + offsets
                zero = tl.zeros((BLOCK_V,), dz_ptr.dtype.element_ty)
                tl.store(dz_ptr + cols, zero, mask=cols < V)
        return

    valid = (y >= 0) & (y < V)  # a bad label costs its own row a NaN, never an illegal access
    if HAS_LSE:
        lse = tl.load(lse_ptr + row)
    else:
        z_y = tl.load(z_ptr + y, mask=valid, other=float("nan")).to(tl.float32) * scale
        z_y = _cap(z_y, softcap, HAS_SOFTCAP)
        m, s, z_sum = float("-inf"), 0.0, 0.0
        for start in range(0, V, BLOCK_V):
            cols = start + offsets
            z = _cap(_load(z_ptr, cols, V, scale), softcap, HAS_SOFTCAP)
            z = tl.where(cols < V, z, float("-inf"))
            m_new = tl.maximum(m, tl.max(z))
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # -inf - -inf is NaN
            s = s * tl.exp(m - shift) + tl.sum(tl.exp(z - shift))
            m = m_new
            if HAS_SMOOTHING:
                z_sum += tl.sum(tl.where(cols < V, z, 0.0))  # pyright: ignore[reportOperatorIssue]
        lse = m + tl.log(s)
        loss = lse - (1 - smoothing) * z_y + z_loss * lse * lse
        if HAS_SMOOTHING:
            loss -= smoothing * z_sum / V
        tl.store(loss_ptr + row, loss)
        tl.store(lse_ptr + row, lse)

    if NEED_DZ:
        g = scale
        if HAS_G:
            g *= tl.load(g_ptr + row * stride_g).to(tl.float32)
        g = tl.where(valid, g, float("nan"))
        for start in range(0, V, BLOCK_V):
            cols = start + offsets
            z = _load(z_ptr, cols, V, scale)
            p = tl.exp(_cap(z, softcap, HAS_SOFTCAP) - lse)
            dz = (1 + 2 * z_loss * lse) * p - smoothing / V
            dz = tl.where(cols == y, dz - (1 - smoothing), dz) * g
            if HAS_SOFTCAP:  # 1 - tanh^2, without its cancellation
                dz *= 4 * tl.sigmoid(2 * z / softcap) * tl.sigmoid(-2 * z / softcap)
            tl.store(dz_ptr + cols, dz.to(dz_ptr.dtype.element_ty), mask=cols < V)


def _row_loss_triton(
    z: Tensor, y: Tensor, o: RowLoss, lse: Tensor | None, g: Tensor | None, dz: Tensor | None
) -> tuple[Tensor, Tensor]:
    M, V = z.shape
    loss = z.new_empty(M, dtype=torch.float32)
    out = loss.new_empty(M) if lse is None else lse
    if M == 0:
        return loss, out
    BLOCK_V = min(block(V), 4096)
    target, weight = z if dz is None else dz, loss if g is None else g
    args = (
        z, y, weight, loss, out, target,
        z.stride(0), weight.stride(0), target.stride(0), V,
        o.ignore_index, o.scale, o.softcap or 1.0, o.label_smoothing, o.z_loss,
    )  # fmt: skip
    launch(
        _row_loss_kernel, (M, 1, 1), 8, args,
        o.softcap is not None, o.label_smoothing > 0, lse is not None, g is not None,
        dz is not None, BLOCK_V,
    )  # fmt: skip
    return loss, out


def _row_loss_torch(
    z: Tensor, y: Tensor, o: RowLoss, lse: Tensor | None, g: Tensor | None, dz: Tensor | None
) -> tuple[Tensor, Tensor]:
    zf = z.to(accumulate_dtype(z.dtype))
    zf = zf if o.scale == 1.0 else zf * o.scale
    tanh = None
    if o.softcap is not None:
        tanh = torch.tanh(zf / o.softcap)
        zf = tanh * o.softcap
    e, label, ignored = o.label_smoothing, y.clamp(0, z.shape[1] - 1)[:, None], y == o.ignore_index
    bad = (y != label[:, 0]) & ~ignored
    z_y = zf.gather(-1, label)[:, 0]
    z_mean = zf.mean(-1) if e else 0.0
    logp = zf.log_softmax(-1) if lse is None else zf - lse[:, None]
    logp_y = logp.gather(-1, label)[:, 0]
    lse = z_y - logp_y if lse is None else lse
    loss = e * (z_y - z_mean) - logp_y + o.z_loss * lse.square()
    if dz is not None:
        g = (torch.ones_like(loss) if g is None else g.to(loss.dtype)) * o.scale
        g = g.masked_fill(ignored, 0.0).masked_fill_(bad, torch.nan)[:, None]
        p = logp.exp_()
        p = p.mul_(1 + 2 * o.z_loss * lse[:, None]) if o.z_loss else p
        p = p.sub_(e / z.shape[1]) if e else p
        p.scatter_add_(-1, label, torch.full_like(g, e - 1))
        p = p if tanh is None else p.mul_(1 - tanh.square_())
        torch.mul(p, g, out=dz) if dz.dtype == p.dtype else dz.copy_(p.mul_(g))
    return loss.masked_fill_(ignored, 0.0).masked_fill_(bad, torch.nan), lse


def row_loss(
    z: Tensor,
    y: Tensor,
    o: RowLoss,
    *,
    lse: Tensor | None = None,
    g: Tensor | None = None,
    dz: Tensor | None = None,
    kernels: bool,
) -> tuple[Tensor, Tensor]:
    """(M,) losses and lse of logits z (M, V) in fp32; and, into `dz`, the gradient of z times g.

    `dz` may be z itself. Given `lse`, the losses are not computed again (Triton leaves them empty).
    Rows of ignored labels have loss 0 and gradient 0.
    """
    return (_row_loss_triton if kernels else _row_loss_torch)(z, y, o, lse, g, dz)


def join(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """What `row_loss` gave for each chunk, as one."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([loss for loss, _ in parts]), torch.cat([lse for _, lse in parts])


def _in_chunks(z: Tensor, kernels: bool) -> int:
    """Rows at a time: all for a kernel, as many as TORCH_CHUNK holds for torch."""
    return max(z.shape[0] if kernels else TORCH_CHUNK // max(z.shape[1] * 4, 1), 1)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor, o: RowLoss, kernels: bool) -> Tensor:
        step = _in_chunks(z, kernels)
        loss, lse = join(
            [
                row_loss(z_c, y_c, o, kernels=kernels)
                for z_c, y_c in zip(z.split(step), y.split(step), strict=True)
            ]
        )
        ctx.save_for_backward(z, y, lse)
        ctx.o, ctx.kernels = o, kernels
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        z, y, lse = ctx.saved_tensors
        dz, step = z.new_empty(z.shape), _in_chunks(z, ctx.kernels)
        for z_c, y_c, lse_c, g_c, dz_c in zip(
            *(t.split(step) for t in (z, y, lse, g, dz)), strict=True
        ):
            row_loss(z_c, y_c, ctx.o, lse=lse_c, g=g_c, dz=dz_c, kernels=ctx.kernels)
        return dz, None, None, None


def reduce_rows(
    loss: Tensor, y: Tensor, ignore_index: int, reduction: Reduction, total: Tensor | None = None
) -> Tensor:
    """(M,) losses to their sum, their mean over scored rows (0 where there are none), or as is."""
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / ((y != ignore_index).sum().clamp_min(1) if total is None else total)


def cross_entropy(
    z: Tensor,
    y: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    reduction: Reduction = "mean",
    softcap: float | None = None,
    scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    impl: Impl = "auto",
) -> Tensor:
    """Cross entropy of logits that the caller keeps; equals `F.cross_entropy` where both can.

    Args:
        z: (..., V) logits, any float dtype. Not written to.
        y: (...) integer labels in [0, V), or `ignore_index`: loss 0 and gradient 0.
        reduction: "mean" over the scored labels (0, not NaN, where there are none), "sum", or
            "none" for y's shape.
        softcap: z becomes softcap * tanh(z / softcap) (Gemma 2); None for no cap.
        scale: multiplies z before the cap; a temperature's inverse.
        label_smoothing: e in the module's equation (Szegedy et al. 2016, section 7).
        z_loss: weight of lse^2 (PaLM, Chowdhery et al. 2022, section 5).
        impl: "auto", "triton" or "torch"; see `liger_core.dispatch.use_triton`.

    Returns:
        fp32 (fp64 for fp64). Saved for backward: z, y and one fp32 a row. The gradient is one
        buffer of z's size and dtype, made in backward.

    Raises:
        ValueError: shapes or devices that do not fit; labels that are not integers; on a CPU, a
            label out of range. On a GPU, which is not waited for, such a row's loss is NaN.
    """
    if z.shape[:-1] != y.shape:
        raise ValueError(
            f"labels must have shape {tuple(z.shape[:-1])}, that of the logits without the last, "
            f"got {tuple(y.shape)}"
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    o = RowLoss(ignore_index, softcap, scale, label_smoothing, z_loss)
    o.check()
    kernels, labels = use_triton(impl, z, y) and z.numel() > 0, as_labels(y)
    if not (z.is_cuda or torch.compiler.is_compiling()):
        LabelScan(y, z.shape[-1], ignore_index).count()
    rows = z.reshape(y.numel(), z.shape[-1])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    loss = _CrossEntropy.apply(rows, labels, o, kernels)
    loss = reduce_rows(loss, y, ignore_index, reduction)  # pyright: ignore
    return loss.view(y.shape) if reduction == "none" else loss
