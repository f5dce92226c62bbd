"""The loss of one row of logits, its gradient and its statistics: one kernel for every loss here.

    z = softcap * tanh(scale * logits / softcap) / temperature        lse = logsumexp(z)
    p = exp(z - lse)        C = sum_j c[j]
    loss = c[y] (1 - e) (lse - z[y]) + e / V * sum_j c[j] (lse - z[j]) + a lse^2
    dloss/dz[k] = (c[y] (1 - e) + e C / V + 2 a lse) p[k] - c[y] (1 - e) [k = y] - e c[k] / V
    entropy = lse - sum_j p[j] z[j]        dentropy/dz[k] = -p[k] (z[k] - lse + entropy)

e is `label_smoothing`, a is `z_loss`, c the class weights (1 where there are none). A row is read
once for its statistics and once more for its gradient, which may take the place of the logits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from liger_core.dispatch import accumulate_dtype, block, fp32, launch, tl, triton
from liger_core.ops.labels import IGNORE_INDEX


class RowLoss(NamedTuple):
    """The loss of one row of logits; the module's equation says what each number does.

    `token_scaling` multiplies a row's loss by its label's own probability, taken as a constant
    (DFT, Wu et al. 2025, equation 9).
    """

    ignore_index: int = IGNORE_INDEX
    softcap: float | None = None
    scale: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    temperature: float = 1.0
    token_scaling: bool = False

    def check(self) -> None:
        for name in ("softcap", "scale", "temperature"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive{' or None' * (name == 'softcap')}, "
                                 f"got {value}")  # fmt: skip
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing must lie in [0, 1], got {self.label_smoothing}")
        if self.token_scaling and (self.label_smoothing or self.z_loss):
            raise ValueError(
                "token_scaling weighs the plain loss; leave label_smoothing and z_loss out"
            )

    def logits(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """z of the equation in the dtype that it is computed in, and its tanh where there is one.

        May be `z` itself."""
        z, tanh = z.to(accumulate_dtype(z.dtype)), None
        scale = self.scale if self.softcap is not None else self.scale / self.temperature
        z = z if scale == 1.0 else z * scale
        if self.softcap is not None:
            tanh = torch.tanh(z / self.softcap)
            z = tanh * (self.softcap / self.temperature)
        return z, tanh


PLAIN = RowLoss()
Columns = tuple[int, int]  # the first class that the logits have, and how many there are in all


class Want(NamedTuple):
    """Statistics of a row beside its loss."""

    mean_logit: bool = False
    entropy: bool = False
    log_sum_sq_probs: bool = False
    top: bool = False


NOTHING = Want()


class Rows(NamedTuple):
    """(M,) values of M rows in fp32 (fp64 for fp64), 0 where the label is ignored; None if not
    wanted."""

    loss: Tensor
    lse: Tensor
    mean_logit: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    top: Tensor | None = None  # int64 class of the largest logit, the first of several; -1
    top_logit: Tensor | None = None

    def hits(self, y: Tensor, ignore_index: int) -> Tensor | None:
        """(M,) bool: the label is scored, and is the class of the largest logit."""
        return None if self.top is None else (self.top == y) & (y != ignore_index)

    def without(self, ignored: Tensor) -> "Rows":
        """With 0, for `top` -1, in rows whose label is ignored."""
        values = (None if t is None else t.masked_fill(ignored, -(t is self.top)) for t in self)
        return Rows(*values)  # pyright: ignore[reportArgumentType]


def row_loss_ref(z: Tensor, y: Tensor, o: RowLoss = PLAIN, c: Tensor | None = None) -> Tensor:
    """(M,) losses by the definition, in fp32 (fp64 for fp64); 0 where y is ignored."""
    z, _ = o.logits(z)
    lse, e, label = z.logsumexp(-1), o.label_smoothing, y.clamp_min(0)
    c = torch.ones_like(z[0]) if c is None else c.to(z.dtype)
    hit = c[label] * (lse - z.gather(-1, label[:, None])[:, 0])
    loss = (1 - e) * hit + e * (c * (lse[:, None] - z)).mean(-1) + o.z_loss * lse.square()
    loss = loss * hit.neg().exp().detach() if o.token_scaling else loss
    return loss.masked_fill(y == o.ignore_index, 0.0)


LOWEST = tl.constexpr(-1e30)  # stands for -inf where that would be multiplied by 0


@triton.jit
def _load(z_ptr, cols, V, scale, KEEP: tl.constexpr):
    """A block of scaled logits in fp32, -inf past the end; kept in L2 for a second read."""
    evict: tl.constexpr = "evict_last" if KEEP else ""  # pyright: ignore
    z = tl.load(z_ptr + cols, mask=cols < V, other=float("-inf"), eviction_policy=evict)  # pyright: ignore
    return z.to(tl.float32) * scale


@triton.jit
def _cap(z, softcap, inv_t, HAS_SOFTCAP: tl.constexpr):
    """softcap * tanh(z / softcap) / temperature, by the logistic function: tanh(v) = s(2v) - s(-2v)."""  # noqa: E501
    if HAS_SOFTCAP:
        z = softcap * inv_t * (tl.sigmoid(2 * z / softcap) - tl.sigmoid(-2 * z / softcap))
    return z


@triton.jit
def _ignored_row(
    loss_ptr, lse_ptr, mean_ptr, entropy_ptr, sq_ptr, top_ptr, top_z_ptr, dz_ptr, row, V,
    HAS_LSE: tl.constexpr, MEAN: tl.constexpr, ENTROPY: tl.constexpr, SQ: tl.constexpr,
    TOP: tl.constexpr, NEED_DZ: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    if not HAS_LSE:
        tl.store(loss_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
        if MEAN:
            tl.store(mean_ptr + row, 0.0)
        if ENTROPY:
            tl.store(entropy_ptr + row, 0.0)
        if SQ:
            tl.store(sq_ptr + row, 0.0)
        if TOP:
            tl.store(top_ptr + row, -1)
            tl.store(top_z_ptr + row, 0.0)
    if NEED_DZ:
        for start in range(0, V, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            zero = tl.zeros((BLOCK_V,), dz_ptr.dtype.element_ty)
            tl.store(dz_ptr + cols, zero, mask=cols < V)


@triton.jit
def _row_loss_kernel(
    z_ptr, y_ptr, c_ptr, c_sum_ptr, g_ptr, dh_ptr,
    loss_ptr, lse_ptr, mean_ptr, entropy_ptr, sq_ptr, top_ptr, top_z_ptr, dz_ptr,
    stride_zm, stride_g, stride_dh, stride_dzm, V, first, total, ignore_index,
    scale, inv_t, softcap, smoothing, z_loss,
    HAS_SOFTCAP: tl.constexpr, HAS_SMOOTHING: tl.constexpr, HAS_C: tl.constexpr,
    TOKEN_SCALING: tl.constexpr, HAS_LSE: tl.constexpr, HAS_G: tl.constexpr, HAS_DH: tl.constexpr,
    PARTIAL: tl.constexpr, MEAN: tl.constexpr, ENTROPY: tl.constexpr, SQ: tl.constexpr,
    TOP: tl.constexpr, NEED_DZ: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    # Grid (M,): one row a program.  z, dz: (M, V), dz may be z;  y: (M,) integers;  c: (V,), its
    # sum C over all classes: 0-d;  g, dh: (M,) upstream gradients of loss and entropy;  lse and
    # entropy: (M,), read if HAS_LSE, else written with the rest.  PARTIAL: loss is z[y] or 0.
    scale, inv_t, softcap = fp32(scale), fp32(inv_t), fp32(softcap)
    smoothing, z_loss = fp32(smoothing), fp32(z_loss)
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride_zm
    dz_ptr += row * stride_dzm
    y = tl.load(y_ptr + row)
    if y == ignore_index:
        _ignored_row(
            loss_ptr, lse_ptr, mean_ptr, entropy_ptr, sq_ptr, top_ptr, top_z_ptr, dz_ptr, row, V,
            HAS_LSE, MEAN, ENTROPY, SQ, TOP, NEED_DZ, BLOCK_V,
        )  # fmt: skip
        return

    offsets = tl.arange(0, BLOCK_V)
    valid = (y >= 0) & (y < total)  # a bad label costs its own row a NaN, never an illegal access
    y -= first
    own = valid & (y >= 0) & (y < V)
    y = tl.where(own, y, -1)
    c_y, c_sum = 1.0, fp32(total)
    if HAS_C:
        c_y = tl.load(c_ptr + y, mask=own, other=0.0)
        if HAS_SMOOTHING:
            c_sum = tl.load(c_sum_ptr)
    g = tl.where(valid, 1.0, float("nan"))
    if HAS_LSE:
        lse = tl.load(lse_ptr + row)
    else:
        z_y = tl.load(z_ptr + y, mask=own, other=0.0).to(tl.float32) * scale
        z_y = tl.where(valid, _cap(z_y, softcap, inv_t, HAS_SOFTCAP), float("nan"))
        m, top, s, s_z, s_d, s_sq = float("-inf"), -1, 0.0, 0.0, 0.0, 0.0
        for start in range(0, V, BLOCK_V):
            cols = start + offsets
            z = _cap(_load(z_ptr, cols, V, scale, NEED_DZ), softcap, inv_t, HAS_SOFTCAP)
            if MEAN:
                weighed = tl.where(cols < V, z, 0.0)
                if HAS_C:
                    weighed *= tl.load(c_ptr + cols, mask=cols < V, other=0.0)
                s_z += tl.sum(weighed)  # pyright: ignore[reportOperatorIssue]
            if HAS_SOFTCAP:
                z = tl.where(cols < V, z, float("-inf"))
            z_max = tl.max(z)
            if TOP:
                better = z_max > m  # pyright: ignore[reportOperatorIssue]
                top = tl.where(better, start + tl.argmax(z, 0), top)
            m_new = tl.maximum(m, z_max)
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # -inf - -inf is NaN
            r, e = tl.exp(m - shift), tl.exp(z - shift)
            if ENTROPY:  # sum of exp(z - m) (z - m)
                s_d = r * (s_d + s * tl.where(m == float("-inf"), 0.0, m - shift))
                s_d += tl.sum(e * tl.maximum(z - shift, LOWEST))  # 0 * -inf is NaN
            if SQ:
                s_sq = s_sq * (r * r) + tl.sum(e * e)
            s = s * r + tl.sum(e)
            m = m_new
        lse = m + tl.log(s)
        if PARTIAL:
            loss = tl.where(own, z_y, tl.where(valid, 0.0, float("nan")))
        else:
            loss = c_y * (1 - smoothing) * (lse - z_y) + z_loss * lse * lse
            if HAS_SMOOTHING:
                loss += smoothing / total * (c_sum * lse - s_z)
        if TOKEN_SCALING:
            g *= tl.exp(z_y - lse)
            loss *= tl.exp(z_y - lse)
        tl.store(loss_ptr + row, loss)
        tl.store(lse_ptr + row, lse)
        if MEAN:
            tl.store(mean_ptr + row, s_z / total)
        if ENTROPY:
            tl.store(entropy_ptr + row, tl.log(s) - s_d / s)
        if SQ:
            tl.store(sq_ptr + row, tl.log(s_sq) - 2 * tl.log(s))
        if TOP:
            tl.store(top_ptr + row, (first + top).to(tl.int64))
            tl.store(top_z_ptr + row, m)

    if NEED_DZ:
        if HAS_G:
            g *= tl.load(g_ptr + row * stride_g).to(tl.float32)
        slope = scale * inv_t if HAS_SOFTCAP else scale  # of z in the logits, but for the cap's own
        g, hit = g * slope, c_y * (1 - smoothing)
        p_scale = hit + smoothing * (c_sum / total) + 2 * z_loss * lse
        dh, entropy = 0.0, 0.0
        if HAS_DH:
            dh = tl.load(dh_ptr + row * stride_dh).to(tl.float32) * slope
            entropy = tl.load(entropy_ptr + row)
        last = (V - 1) // BLOCK_V * BLOCK_V
        for back in range(0, V, BLOCK_V):  # backwards: what was read last is in L1 and L2 still
            cols = last - back + offsets
            raw = _load(z_ptr, cols, V, scale, False)
            log_p = _cap(raw, softcap, inv_t, HAS_SOFTCAP) - lse
            p = tl.exp(log_p)
            here = tl.where(cols == y, hit, 0.0)
            if HAS_SMOOTHING:
                c = 1.0
                if HAS_C:
                    c = tl.load(c_ptr + cols, mask=cols < V, other=0.0)
                here += smoothing / total * c
            dz = (p_scale * p - here) * g
            if HAS_DH:
                dz -= dh * p * (tl.maximum(log_p, LOWEST) + entropy)
            if HAS_SOFTCAP:  # 1 - tanh^2, without its cancellation
                dz *= 4 * tl.sigmoid(2 * raw / softcap) * tl.sigmoid(-2 * raw / softcap)
            dz = dz.to(dz_ptr.dtype.element_ty)
            tl.store(dz_ptr + cols, dz, mask=cols < V, cache_modifier=".cs")  # first out of L2


def _launch_shape(V: int, twice: bool) -> tuple[int, int]:
    """Columns at a time and warps, measured on an H100: benchmarks/NOTES.md. A row that is read
    twice should be in the caches still: fewer programs at once, each with much in flight.
    """
    columns, num_warps = (16384, 16) if twice and V > 32768 else (8192, 8)
    columns = min(block(V), columns)
    return columns, min(num_warps, max(columns // 256, 1))


def _triton(
    z: Tensor, y: Tensor, o: RowLoss, c: Tensor | None, cols: Columns | None, want: Want | None,
    rows: Rows, g: Tensor | None, dh: Tensor | None, dz: Tensor | None,
) -> None:  # fmt: skip
    """Fill `rows` as far as `want` says, None for not at all, and dz where there is one."""
    M, V = z.shape
    if M == 0:
        return
    loss, (first, total) = rows.loss, (0, V) if cols is None else cols
    capped, smooth = o.softcap is not None, o.label_smoothing > 0
    flags = NOTHING if want is None else want
    mean = rows.mean_logit
    if smooth and want is not None and mean is None:
        flags, mean = flags._replace(mean_logit=True), loss.new_empty(M)
    weight, dh_in = loss if g is None else g, loss if dh is None else dh
    dz_out = z if dz is None else dz
    args = (
        z, y, loss if c is None else c, c.sum() if smooth and c is not None else loss,
        weight, dh_in, loss, rows.lse,
        *(loss if t is None else t for t in (mean, *rows[3:])), dz_out,
        z.stride(0), weight.stride(0), dh_in.stride(0), dz_out.stride(0),
        V, first, total, o.ignore_index, o.scale if capped else o.scale / o.temperature,
        1 / o.temperature, o.softcap or 1.0, o.label_smoothing, o.z_loss,
    )  # fmt: skip
    BLOCK_V, num_warps = _launch_shape(V, dz is not None)
    launch(
        _row_loss_kernel, (M, 1, 1), num_warps, args,
        capped, smooth, c is not None, o.token_scaling, want is None, g is not None,
        dh is not None, cols is not None, *flags, dz is not None, BLOCK_V,
    )  # fmt: skip


def _torch_rows(
    z: Tensor, y: Tensor, o: RowLoss, c: Tensor | None, cols: Columns | None, want: Want
) -> Rows:
    """The statistics, from z of the equation."""
    first, total = (0, z.shape[1]) if cols is None else cols
    local = y - first
    own = (local >= 0) & (local < z.shape[1])
    label = local.clamp(0, z.shape[1] - 1)
    e, lse = o.label_smoothing, z.logsumexp(-1)
    hit = lse - z.gather(-1, label[:, None])[:, 0]
    z_sum = z.sum(-1) if c is None and (e or want.mean_logit) else lse if c is None else z.mv(c)
    if cols is None:
        c_y, c_sum = (1.0, total) if c is None else (c[label], c.sum())
        loss = c_y * (1 - e) * hit + o.z_loss * lse.square()
        loss = loss + e / total * (c_sum * lse - z_sum) if e else loss
    else:
        loss = (lse - hit).masked_fill(~own, 0.0)
    entropy = square = top = top_z = None
    if want.entropy or want.log_sum_sq_probs:
        log_p = z - lse[:, None]
        p = log_p.exp()
        if want.entropy:  # over sum(p), so that an error of lse falls out of log_p + entropy
            entropy = -(p * log_p.masked_fill_(p == 0, 0.0)).sum(-1) / p.sum(-1)
        square = p.square_().sum(-1).log() if want.log_sum_sq_probs else None
    if want.top:
        top_z, top = z.max(-1)
        top = top + first
    mean = z_sum / total if want.mean_logit else None
    ignored, bad = y == o.ignore_index, (y < 0) | (y >= total)
    loss = loss.masked_fill(bad, torch.nan)
    return Rows(loss, lse, mean, entropy, square, top, top_z).without(ignored)


def _torch_grad(
    z: Tensor, tanh: Tensor | None, y: Tensor, o: RowLoss, c: Tensor | None, cols: Columns | None,
    rows: Rows, g: Tensor | None, dh: Tensor | None, dz: Tensor,
) -> None:  # fmt: skip
    """The gradient into dz, from z of the equation, which is written to."""
    first, total = (0, z.shape[1]) if cols is None else cols
    local, e = (y - first)[:, None], o.label_smoothing
    own = (local >= 0) & (local < z.shape[1])
    label = local.clamp(0, z.shape[1] - 1)
    g = torch.ones_like(rows.lse) if g is None else g.to(rows.lse.dtype)
    ignored = y == o.ignore_index
    g = g.masked_fill((y < 0) | (y >= total), torch.nan).masked_fill(ignored, 0.0)[:, None]
    c_y, c_sum = (1.0, total) if c is None else (c[label], c.sum())
    log_p = z.sub_(rows.lse[:, None])
    h = None
    if dh is not None and rows.entropy is not None:
        h = (log_p + rows.entropy[:, None]).masked_fill_(log_p.isneginf(), 0.0)
    p = log_p.exp_()
    h = None if h is None or dh is None else h.mul_(p).mul_(dh[:, None])
    p = p.mul_(g * (c_y * (1 - e) + e * c_sum / total + 2 * o.z_loss * rows.lse[:, None]))
    p = p if not e else p.sub_(g * (e / total) * (1.0 if c is None else c))
    p = p.scatter_add_(-1, label, (g * (e - 1) * c_y).masked_fill(~own, 0.0))
    p = p if h is None else p.sub_(h)
    if tanh is not None:
        p = p.mul_(1 - tanh.square_())
    p = p.mul_(o.scale / o.temperature)
    p = p.masked_fill_(ignored[:, None], 0.0)
    if p is not dz:
        dz.copy_(p)


def _new_rows(z: Tensor, y: Tensor, want: Want) -> Rows:
    loss = z.new_empty(z.shape[0], dtype=torch.float32)
    mean, entropy, square, top_z = (torch.empty_like(loss) if on else None for on in want)
    top = torch.empty_like(y) if want.top else None
    return Rows(loss, torch.empty_like(loss), mean, entropy, square, top, top_z)


def row_loss(
    z: Tensor,
    y: Tensor,
    o: RowLoss,
    *,
    c: Tensor | None = None,
    cols: Columns | None = None,
    want: Want = NOTHING,
    g: Tensor | None = None,
    dz: Tensor | None = None,
    kernels: bool,
) -> Rows:
    """Losses and wanted statistics of logits z (M, V); and, into `dz`, the gradient of loss * g.

    c: (V,) fp32 class weights; g: (M,), None for 1; y: (M,) int64. `dz` may be z itself. With
    `cols`, z holds some columns only, and the values are partial: the loss is z[y], or 0.
    """
    if kernels:
        rows = _new_rows(z, y, want)
        _triton(z, y, o, c, cols, want, rows, g, None, dz)
        return rows
    zf, tanh = o.logits(z)
    rows = _torch_rows(zf, y, o, c, cols, want)
    if o.token_scaling:
        p_y = (-rows.loss).exp()
        rows, g = rows._replace(loss=rows.loss * p_y), p_y if g is None else g * p_y
    if dz is not None:
        zf = zf.clone() if zf is z and dz is not z else zf
        _torch_grad(zf, tanh, y, o, c, cols, rows, g, None, dz)
    return rows


def row_grad(
    z: Tensor,
    y: Tensor,
    o: RowLoss,
    rows: Rows,
    *,
    c: Tensor | None = None,
    cols: Columns | None = None,
    g: Tensor | None,
    dh: Tensor | None = None,
    dz: Tensor,
    kernels: bool,
) -> None:
    """Into `dz`, which may be z, the gradient of loss * g + entropy * dh, by the rows' lse.

    g of `token_scaling` is the caller's to scale.
    """
    if kernels:
        _triton(z, y, o._replace(token_scaling=False), c, cols, None, rows, g, dh, dz)
    else:
        zf, tanh = o.logits(z)
        zf = zf.clone() if zf is z and dz is not z else zf
        _torch_grad(zf, tanh, y, o, c, cols, rows, g, dh, dz)


def join(parts: list[Rows]) -> Rows:
    """The rows of several chunks as one."""
    if len(parts) == 1:
        return parts[0]
    columns = zip(*parts, strict=True)
    return Rows(*(None if t[0] is None else torch.cat(t) for t in columns))  # pyright: ignore
