"""A linear head in chunks of rows: its logits, one chunk at a time, and the products of a gradient.

    z = x @ w.T + b + u @ v.T
    dx = dz @ w        dw = dz.T @ x        db = sum over rows of dz        du, dv like dx, dw

u and v are a low-rank term, such as LoRA on the head, that costs no copy of w. `linear_logprob` and
`linear_cross_entropy` are what is made of this.
"""

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, NamedTuple, ParamSpec, TypedDict, TypeVar

import torch
from torch import Tensor

from liger_core.dispatch import (
    BF16_SUMS,
    Impl,
    accumulate_dtype,
    no_autocast,
    sum_dtype,
    use_triton,
)
from liger_core.ops.labels import IGNORE_INDEX, LabelScan, as_labels
from liger_core.ops.row_loss import RowLoss, Rows, Want, row_grad, row_loss
from liger_core.ops.sharded import by_classes, is_dtensor
from liger_core.ops.vocab_parallel import VocabShard, combine

MIN_BUDGET, MAX_BUDGET = 32 << 20, 1 << 30  # bytes of logits, where the caller names none
CHUNKS = BF16_SUMS
P = ParamSpec("P")
R = TypeVar("R")


class HeadOptions(TypedDict, total=False):
    """What every loss under a linear head takes by keyword.

    ignore_index: the label that is not scored; default -100.
    softcap: z becomes softcap * tanh(z / softcap) (Gemma 2); None, the default, for no cap.
    scale: multiplies z before the cap (Cohere's logit_scale, 1 / Granite's logits_scaling).
    temperature: divides z after the cap.
    low_rank: u (..., r) and v (V, r), whose product u @ v.T is added to the logits. LoRA on the
        head is u = scaling * (dropout(x) @ A.T), v = B.
    shard: a `VocabShard` where w holds one process's rows of the head; a w that is a DTensor, split
        by its rows, needs none.
    labels: a `LabelScan` of y made earlier, which saves waiting for the device here.
    compact: drop ignored rows first. False never waits for the device (CUDA graphs), and a bad
        label then gives NaN; under torch.compile it is always so.
    memory_budget: bytes of logits held at once; None for a quarter of them (an eighth where w gets
        no gradient, a third where w has more bits than the products), within 32 MiB and 1 GiB.
    accum_dtype: in which dw is summed; None for w's where that is as exact as torch, else fp32.
    impl: "auto", "triton" or "torch"; see `liger_core.dispatch.use_triton`.
    """

    ignore_index: int
    softcap: float | None
    scale: float
    temperature: float
    low_rank: tuple[Tensor, Tensor] | None
    shard: VocabShard | None
    labels: LabelScan | None
    compact: bool
    memory_budget: int | None
    accum_dtype: torch.dtype | None
    impl: Impl


class Options(NamedTuple):
    """`HeadOptions` with its defaults."""

    ignore_index: int = IGNORE_INDEX
    softcap: float | None = None
    scale: float = 1.0
    temperature: float = 1.0
    low_rank: tuple[Tensor, Tensor] | None = None
    shard: VocabShard | None = None
    labels: LabelScan | None = None
    compact: bool = True
    memory_budget: int | None = None
    accum_dtype: torch.dtype | None = None
    impl: Impl = "auto"

    def row_loss(
        self, label_smoothing: float = 0.0, z_loss: float = 0.0, token_scaling: bool = False
    ) -> RowLoss:
        """A row's loss under these options; ValueError if a number is out of range."""
        o = RowLoss(
            self.ignore_index, self.softcap, self.scale, label_smoothing, z_loss,
            self.temperature, token_scaling,
        )  # fmt: skip
        o.check()
        return o


class Head(NamedTuple):
    """The tensors of a head as rows; or, as a gradient, what belongs to each."""

    x: Tensor  # (M, H)
    w: Tensor  # (V, H)
    b: Tensor | None = None  # (V,)
    u: Tensor | None = None  # (M, r)
    v: Tensor | None = None  # (V, r)


Grads = tuple[Tensor | None, ...]  # of x, w, b, u, v


class Plan(NamedTuple):
    """All that is not a tensor."""

    o: RowLoss
    dtype: torch.dtype  # of the products
    dw_dtype: torch.dtype  # in which dw is summed over chunks
    chunks: int
    need: tuple[bool, ...]  # gradients of x, w, b, u, v
    kernels: bool
    shard: VocabShard | None
    row_bytes: int  # of one row's logits, as chunks are planned: the same in all processes

    @property
    def frozen(self) -> bool:
        """Whether only x gets a gradient, so that one row's does not touch another's."""
        return self.need == (True, False, False, False, False)

    @property
    def unit(self) -> bool:
        """Whether gradients of rows must be near 1 until the products are done: fp16 has little
        range."""
        return self.dtype == torch.float16


class Call(NamedTuple):
    """A checked call: the head, (M,) labels, the scored rows (None for all), and a plan."""

    head: Head
    y: Tensor
    rows: Tensor | None
    plan: Plan
    n: int
    counts: list[int]  # scored labels of each sequence; empty if they were not counted

    def labels(self) -> Tensor:
        """(n,) labels of the scored rows."""
        return self.y if self.rows is None else self.y[self.rows]

    def spread(self, t: Tensor, like: Tensor, fill: float = 0.0) -> Tensor:
        """Values of the scored rows in the shape of `like`, `fill` elsewhere."""
        if self.rows is not None:
            t = t.new_full(self.y.shape, fill).index_copy(0, self.rows, t)
        return t.view(like.shape)


def chunk_count(n: int, V: int, itemsize: int, budget: int | None, share: int = CHUNKS) -> int:
    """Into how many chunks n rows go, for each one's logits to fit the budget: by default `share`,
    fewer or more where chunks would be smaller or larger than the default's limits.

    Under torch.compile n is a symbol and the count is guarded on, so that one graph serves many n.
    """
    row_bytes = V * itemsize
    if budget is None and torch.compiler.is_compiling():
        return max(share, -(-n // max(MAX_BUDGET // row_bytes, 1)))
    if budget is None:
        least, most = MIN_BUDGET // row_bytes, max(MAX_BUDGET // row_bytes, 1)
        if least <= -(-n // share) <= most:
            return min(share, max(n, 1))
        budget = MIN_BUDGET if n < least * share else MAX_BUDGET
    return split(n, max(budget // row_bytes, 1))


def chunk_rows(n: int, chunks: int) -> int:
    """Rows a chunk, evenly spread; a multiple of 128 where that costs no chunk."""
    rows = -(-n // chunks)
    if torch.compiler.is_compiling():
        return rows
    round_rows = -(-rows // 128) * 128
    return round_rows if rows > 128 and (chunks - 1) * round_rows < n else rows


def split(n: int, most: int) -> int:
    """Into how many chunks of at most `most` rows n rows go; `chunk_rows` may round them up."""
    if n <= most:
        return 1
    return -(-n // (most // 128 * 128 if most > 128 else most))


def spans(start: int, stop: int, chunks: int) -> list[slice]:
    """start ... stop in chunks."""
    n = stop - start
    step = chunk_rows(n, chunks)
    return [slice(start + min(i * step, n), start + min((i + 1) * step, n)) for i in range(chunks)]


def prepare(x: Tensor, w: Tensor, y: Tensor, b: Tensor | None, o: RowLoss, opt: Options) -> Call:
    """Check what was given; ValueError if it does not fit together."""
    if w.dim() != 2 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"w must be (V, {x.shape[-1]}), as x is (..., H), got {tuple(w.shape)}")
    if y.shape != x.shape[:-1]:
        raise ValueError(
            f"labels must have shape {tuple(x.shape[:-1])}, that of x without the last, "
            f"got {tuple(y.shape)}"
        )
    if b is not None and b.shape != w.shape[:1]:
        raise ValueError(f"b must be ({w.shape[0]},), got {tuple(b.shape)}")
    if y.device != x.device:
        raise ValueError(f"labels must be on x's device, {x.device}, got {y.device}")
    u, v = opt.low_rank or (None, None)
    if u is not None and v is not None:
        if u.shape[:-1] != x.shape[:-1] or v.shape != (w.shape[0], u.shape[-1]):
            raise ValueError(
                f"low_rank must be u {(*x.shape[:-1], 'r')} and v ({w.shape[0]}, r), "
                f"got {tuple(u.shape)} and {tuple(v.shape)}"
            )
        u = u.reshape(-1, u.shape[-1])
    if is_dtensor(x, w):
        if opt.shard is not None or u is not None:
            raise ValueError("a DTensor says how the head is split; leave shard and low_rank out")
        x, w, b, shard = by_classes(x, w, b)
        opt = opt._replace(shard=shard)
    V = w.shape[0] if opt.shard is None else opt.shard.total
    rows: Tensor | None = None
    counts: list[int] = []
    if opt.compact and not torch.compiler.is_compiling():
        scan = opt.labels or LabelScan(y, V, o.ignore_index)
        if (scan.y.numel(), scan.V, scan.ignore_index) != (y.numel(), V, o.ignore_index):
            raise ValueError(
                f"labels must be a LabelScan of y, V={V} and ignore_index={o.ignore_index}, got "
                f"one of {scan.y.numel()} labels, V={scan.V} and ignore_index={scan.ignore_index}"
            )
        rows, counts = scan.rows(), scan.counts()
    head = Head(x.reshape(-1, x.shape[-1]), w, b, u, v)
    n = head.x.shape[0] if rows is None else rows.shape[0]
    return Call(head, as_labels(y), rows, _plan(head, n, o, opt), n, counts)


def _plan(head: Head, n: int, o: RowLoss, opt: Options) -> Plan:
    x, w = head.x, head.w
    device, dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    elif any(t is not None and t.dtype != dtype for t in head):
        given = ", ".join(
            f"{k} {t.dtype}" for k, t in zip(Head._fields, head, strict=True) if t is not None
        )
        raise ValueError(
            f"the head's tensors must have one dtype outside of autocast, got {given}; "
            f"convert them or use torch.autocast"
        )
    wanted = torch.is_grad_enabled()
    need = tuple(wanted and t is not None and t.requires_grad for t in head)
    share = 2 * CHUNKS if not need[1] else CHUNKS - (w.dtype.itemsize > dtype.itemsize)
    classes = w.shape[0]
    if opt.shard is not None:  # all processes must go through as many chunks
        classes = -(-opt.shard.total // opt.shard.group.size())
    chunks = chunk_count(n, classes, dtype.itemsize, opt.memory_budget, share)
    dw_dtype = opt.accum_dtype or sum_dtype(w.dtype, chunks)
    kernels = use_triton(opt.impl, *head) and n > 0  # pyright: ignore
    return Plan(o, dtype, dw_dtype, chunks, need, kernels, opt.shard, classes * dtype.itemsize)


def largest(t: Tensor) -> Tensor:
    """0-d: the largest finite magnitude in t, 1 where there is none."""
    most = t.abs().nan_to_num(0.0, 0.0).amax() if t.numel() else t.new_ones(())
    return most.masked_fill(most == 0, 1.0)


def without_autocast(
    fn: Callable[Concatenate[Plan, Head, P], R],
) -> Callable[Concatenate[Plan, Head, P], R]:
    """The plan's dtype says it all."""

    @wraps(fn)
    def run(plan: Plan, head: Head, *args: P.args, **kwargs: P.kwargs) -> R:
        with no_autocast(head.x.device.type):
            return fn(plan, head, *args, **kwargs)

    return run


def _add_product(out: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """out + a @ b in `dtype`; out may be None for 0, and is written to."""
    if dtype == a.dtype:
        return a @ b if out is None else out.addmm_(a, b)
    if a.is_cuda and dtype == torch.float32:  # bf16 or fp16 operands, fp32 sum
        if out is None or torch.compiler.is_compiling():  # Dynamo knows no such addmm
            part = torch.mm(a, b, out_dtype=dtype)
            return part if out is None else out.add_(part)
        return torch.addmm(out, a, b, out_dtype=dtype, out=out)  # in one pass
    return (a @ b).to(dtype) if out is None else out.add_(a @ b)


class Walk:
    """One walk over the scored rows of a head, chunk by chunk, that adds up gradients."""

    def __init__(self, plan: Plan, head: Head, rows: Tensor | None) -> None:
        self.plan, self.head, self.rows = plan, head, rows
        self.w = head.w.to(plan.dtype)
        self.b = None if head.b is None else head.b.to(plan.dtype)
        self.v = None if head.v is None else head.v.to(plan.dtype)
        self.dx = self._rows_like(head.x, 0)
        self.du = self._rows_like(head.u, 3)
        self.dw: Tensor | None = None
        self.db: Tensor | None = None
        self.dv: Tensor | None = None
        self._at: slice | Tensor = slice(0)
        self._x, self._u = head.x[:0], head.u

    def _rows_like(self, t: Tensor | None, i: int) -> Tensor | None:
        if t is None or not self.plan.need[i]:
            return None
        make = t.new_empty if self.rows is None else t.new_zeros
        return make(t.shape, dtype=self.plan.dtype)

    def buffer(self, part: slice) -> Tensor:
        """Room for the logits of a part, the first one of `spans` being the largest."""
        rows = part.stop - part.start
        return self.head.x.new_empty(rows, self.w.shape[0], dtype=self.plan.dtype)

    def take(self, part: slice) -> None:
        """Turn to the rows of a part."""
        self._at = at = part if self.rows is None else self.rows[part]
        self._x = self.head.x[at].to(self.plan.dtype)
        self._u = None if self.head.u is None else self.head.u[at].to(self.plan.dtype)

    def logits(self, part: slice, out: Tensor) -> Tensor:
        """Turn to the rows of a part, and compute their z in the first rows of `out`."""
        self.take(part)
        z = out[: part.stop - part.start]
        if self.b is None:
            torch.mm(self._x, self.w.T, out=z)
        else:
            torch.addmm(self.b, self._x, self.w.T, out=z)
        if self._u is not None and self.v is not None:
            z.addmm_(self._u, self.v.T)
        return z

    def loss(
        self, z: Tensor, y: Tensor, c: Tensor | None, want: Want, g: Tensor | None, grad: bool
    ) -> Rows:
        """Losses of the rows of z and, in z itself if `grad`, their gradient times g."""
        o, kernels, shard = self.plan.o, self.plan.kernels, self.plan.shard
        if shard is None:
            return row_loss(z, y, o, c=c, want=want, g=g, dz=z if grad else None, kernels=kernels)
        if o.label_smoothing:
            want = want._replace(mean_logit=True)
        part = row_loss(
            z, y, o._replace(token_scaling=False), cols=shard[:2], want=want, kernels=kernels
        )
        rows = combine(part, y, o, shard)
        if o.token_scaling:
            p_y = (-rows.loss).exp()
            rows, g = rows._replace(loss=rows.loss * p_y), p_y if g is None else g * p_y
        if grad:
            self.grad(z, y, rows, g, c=c)
        return rows

    def grad(
        self, z: Tensor, y: Tensor, rows: Rows, g: Tensor | None, dh: Tensor | None = None,
        c: Tensor | None = None,
    ) -> None:  # fmt: skip
        """In z itself, the gradient of losses times g and of entropies times dh."""
        cols = None if self.plan.shard is None else self.plan.shard[:2]
        row_grad(
            z, y, self.plan.o, rows, c=c, cols=cols, g=g, dh=dh, dz=z, kernels=self.plan.kernels
        )

    def add(self, dz: Tensor) -> None:
        """Add up the products of the gradient of the rows' z."""
        need, sums = self.plan.need, self.plan.dw_dtype
        self._add_rows(self.dx, dz, self.w)
        if need[1]:
            self.dw = _add_product(self.dw, dz.T, self._x, sums)
        if need[2]:
            db = dz.sum(0, dtype=accumulate_dtype(dz.dtype))
            self.db = db if self.db is None else self.db.add_(db)
        if self._u is not None and self.v is not None:
            self._add_rows(self.du, dz, self.v)
            if need[4]:
                self.dv = _add_product(self.dv, dz.T, self._u, accumulate_dtype(dz.dtype))

    def _add_rows(self, out: Tensor | None, dz: Tensor, w: Tensor) -> None:
        if out is None:
            return
        if isinstance(self._at, Tensor):
            out.index_copy_(0, self._at, dz @ w)
        else:
            torch.mm(dz, w, out=out[self._at])

    def grads(self) -> Grads:
        """(M, H), (V, H), (V,), (M, r), (V, r); 0 in rows not scored, None where not needed."""
        return self.dx, self.dw, self.db, self.du, self.dv
