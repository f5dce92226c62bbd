"""Every op with its reference and inputs, for the tests that all ops share.

Parameters are chosen so that ignoring one shows: an eps of 0.1, a softcap that bites, cos and sin
whose halves differ.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from liger_core import (
    add_rms_norm,
    cross_entropy,
    glu,
    glu_packed,
    layer_norm,
    linear_cross_entropy,
    linear_logprob,
    linear_loss,
    linear_token_stats,
    rms_norm,
    rope,
    tiled,
)
from liger_core.dispatch import accumulate_dtype
from liger_core.ops.glu import glu_ref
from liger_core.ops.layer_norm import layer_norm_ref
from liger_core.ops.linear_logprob import TokenStats, linear_logprob_ref
from liger_core.ops.linear_loss import LossFn
from liger_core.ops.reduction import CrossEntropyStats
from liger_core.ops.rms_norm import rms_norm_ref
from liger_core.ops.rope import rope_ref
from liger_core.ops.row_loss import RowLoss, row_loss_ref
from numerics import DEVICE, Op

Make = Callable[[], dict[str, Tensor]]


def assert_stats(got: CrossEntropyStats, z: Tensor, y: Tensor, z_loss: Tensor) -> None:
    """What is told beside a loss of logits z and labels y, some of which are hit."""
    scored = y != -100
    hits = (z.argmax(-1) == y)[scored].float()
    assert 0 < hits.mean() < 1
    torch.testing.assert_close(got.z_loss, z_loss.detach())
    torch.testing.assert_close(got.token_accuracy, hits.mean())
    assert torch.equal(got.predicted, z.argmax(-1).masked_fill(~scored, -1))
    assert [t.requires_grad for t in got] == [True, False, False, False]


@dataclass(frozen=True)
class Case:
    name: str
    op: Op  # takes impl=
    ref: Op
    make: Make  # fresh fp32 inputs

    def __repr__(self) -> str:
        return self.name


def _randn(shift: float = 0.0, **shapes: tuple[int, ...]) -> Make:
    def make() -> dict[str, Tensor]:
        return {n: torch.randn(s, device=DEVICE) + shift for n, s in shapes.items()}

    return make


def _soft(**shapes: tuple[int, ...]) -> Make:
    """Logits whose distribution has an entropy worth the name."""
    make = _randn(**shapes)
    return lambda: {n: t / 4 if n in ("w", "v") else t for n, t in make().items()}


def labels(M: int, V: int, ignored: int = 3) -> Tensor:
    """Random labels, every `ignored`-th one left out; the first and last class among them."""
    y = torch.randint(V, (M,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    y[0], y[-1] = V - 1, 0
    return y.masked_fill(torch.arange(M, device=DEVICE) % ignored == 1, -100)


def add_rms_norm_ref(x: Tensor, r: Tensor, w: Tensor | None = None, **kw: Any) -> Any:
    s = x + r
    return rms_norm_ref(s, w, **kw), s


def _norms() -> list[Case]:
    """Rows by the tile, with lanes left over, of one column, by heads, and wider than a program;
    more of them than programs, too, at least in the interpreter."""
    cases: list[Case] = []
    castings = ("llama", 0.0), ("gemma", 1.0), ("none", 0.3)
    for shape in ((1, 64), (7, 100), (9, 1), (200, 129), (2, 3, 4, 24), (3, 8200), (6, 16424)):
        N, name = shape[-1], "x".join(map(str, shape))
        for casting, offset in castings if N < 8000 else castings[:1]:
            kw: dict[str, Any] = dict(eps=0.1, offset=offset, casting=casting)
            norm, ref = partial(rms_norm, **kw), partial(rms_norm_ref, **kw)
            cases.append(Case(f"rms_norm-{casting}-{name}", norm, ref, _randn(x=shape, w=(N,))))
            kw["eps"] = 0.2
            both, ref = partial(add_rms_norm, **kw), partial(add_rms_norm_ref, **kw)
            make = _randn(x=shape, r=shape, w=(N,))
            cases.append(Case(f"add_rms_norm-{casting}-{name}", both, ref, make))
        layer, ref = partial(layer_norm, eps=0.1), partial(layer_norm_ref, eps=0.1)
        for shift in (0.0, 30.0) if N < 8000 else (0.0,):
            make = _randn(shift, x=shape, w=(N,), b=(N,))
            cases.append(Case(f"layer_norm-{name}+{shift:g}", layer, ref, make))
    some, (M, N) = {"eps": 0.1}, (6, 40)
    return [
        *cases,
        Case("layer_norm-no-bias", layer, ref, _randn(x=(2, 3, N), w=(N,))),
        Case("layer_norm-no-weight", layer, ref, _randn(x=(M, N))),
        Case("rms_norm-no-weight", partial(rms_norm, **some), partial(rms_norm_ref, **some),
             _randn(x=(M, N))),
        Case("add_rms_norm-no-weight", partial(add_rms_norm, **some),
             partial(add_rms_norm_ref, **some), _randn(x=(M, N), r=(M, N))),
    ]  # fmt: skip


def _ropes() -> list[Case]:
    cases: list[Case] = []
    for B, T, HQ, HK, D, R, batch, interleaved in (
        (2, 5, 4, 2, 8, 8, 1, False), (2, 3, 3, 1, 80, 80, 2, False), (1, 1, 1, 1, 2, 2, 1, False),
        (2, 3, 3, 1, 96, 96, 1, False), (1, 3, 2, 1, 192, 128, 1, False),
        (2, 3, 5, 2, 12, 6, 2, False), (2, 5, 4, 2, 8, 8, 1, True), (2, 3, 3, 1, 16, 10, 2, True),
        (1, 2, 40, 40, 100, 80, 1, True), (1, 1, 2, 1, 256, 256, 1, False),
    ):  # fmt: skip
        cos, sin = torch.randn(2, batch, T, R, device=DEVICE).unbind()
        kw = dict(cos=cos, sin=sin, interleaved=interleaved)

        def make(B: int = B, T: int = T, HQ: int = HQ, HK: int = HK, D: int = D):
            q, k = (torch.randn(B, T, h, D, device=DEVICE) for h in (HQ, HK))
            return {"q": q.transpose(1, 2), "k": k.transpose(1, 2)}

        name = f"rope-{B}x{HQ}+{HK}x{T}x{D}{f'-{R}' * (R < D)}{'-interleaved' * interleaved}"
        cases.append(Case(name, partial(rope, **kw), partial(rope_ref, **kw), make))
    return cases


def _glus() -> list[Case]:
    def halves(gu: Tensor, op: Op, **kw: Any) -> Tensor:
        return op(*gu.chunk(2, -1), **kw)  # pyright: ignore

    def computed(op: Op, **kw: Any) -> Op:
        """op of what the caller computed, as inplace=True wants it."""
        return lambda impl="auto", **inputs: op(
            **{n: t * 1 for n, t in inputs.items()}, impl=impl, inplace=True, **kw
        )

    cases: list[Case] = []
    for act in ("silu", "gelu", "gelu_tanh"):
        ref, packed = partial(glu_ref, act=act), partial(halves, op=glu_ref, act=act)
        for N in (5, 1030):
            two, one = _randn(g=(2, 3, N), u=(2, 3, N)), _randn(gu=(2, 3, 2 * N))
            cases += [
                Case(f"glu-{act}-{N}", partial(glu, act=act), ref, two),
                Case(f"glu-inplace-{act}-{N}", computed(glu, act=act), ref, two),
                Case(f"glu_packed-{act}-{N}", partial(glu_packed, act=act), packed, one),
                Case(f"glu_packed-inplace-{act}-{N}", computed(glu_packed, act=act), packed, one),
            ]
    fused = partial(halves, op=glu), partial(halves, op=glu_ref), _randn(gu=(3, 2, 34))
    return [*cases, Case("glu-gate_up", *fused)]


def mlp(x: Tensor, w1: Tensor, w2: Tensor, b: Tensor) -> Tensor:
    g, u = F.linear(x, w1).chunk(2, -1)
    return F.linear(F.silu(g) * u, w2, b)


def mlp_in_tiles(
    x: Tensor, w1: Tensor, w2: Tensor, b: Tensor, tiles: int | None = None, impl: str = "auto"
) -> Tensor:
    return tiled(lambda t: mlp(t, w1, w2, b), x, (w1, w2, b), tiles=tiles)


def _tiles() -> list[Case]:
    T, H, N = 11, 8, 12
    make = _soft(x=(2, T, H), w1=(2 * N, H), w2=(H + 1, N), b=(H + 1,))
    return [
        Case(f"tiled-{tiles}", partial(mlp_in_tiles, tiles=tiles), mlp, make)
        for tiles in (3, None, 1, 5, 99)
    ]


OPTIONS = {
    "plain": RowLoss(),
    "softcap": RowLoss(softcap=0.7, scale=1.3),
    "smoothing": RowLoss(label_smoothing=0.2),
    "z_loss": RowLoss(z_loss=0.1),
    "all": RowLoss(-100, 0.7, 1.3, 0.2, 0.1, 1.7),
    "tempered": RowLoss(temperature=0.6),
    "scaled by token": RowLoss(softcap=0.7, token_scaling=True),
}


def _given(o: RowLoss) -> dict[str, Any]:
    """The options of `o` that are not the default."""
    return {k: v for k, v in o._asdict().items() if v != RowLoss._field_defaults[k]}


def _reduced(loss: Tensor, y: Tensor, reduction: str) -> Tensor:
    n = int((y != -100).sum()) if reduction == "mean" else 1
    return loss if reduction == "none" else loss.sum() / n


def _cross_entropies() -> list[Case]:
    cases: list[Case] = []
    for option, M, V, reduction in (
        ("plain", 5, 1, "sum"), ("plain", 5, 37, "mean"), ("plain", 3, 5000, "none"),
        ("softcap", 5, 37, "none"), ("softcap", 5, 37, "mean"), ("smoothing", 5, 37, "mean"),
        ("smoothing", 5, 37, "none"), ("z_loss", 5, 37, "sum"), ("z_loss", 5, 37, "none"),
        ("all", 4, 4097, "none"), ("all", 4, 4097, "mean"), ("all", 5, 37, "sum"),
        ("tempered", 5, 37, "mean"),
    ):  # fmt: skip
        y, o = labels(M, V), OPTIONS[option]

        def ref(z: Tensor, y: Tensor = y, o: RowLoss = o, reduction: str = reduction) -> Tensor:
            return _reduced(row_loss_ref(z, y, o), y, reduction)

        op = partial(cross_entropy, y=y, reduction=reduction, **_given(o))
        cases.append(Case(f"cross_entropy-{option}-{M}x{V}-{reduction}", op, ref, _randn(z=(M, V))))
    return cases


def _classes() -> list[Case]:
    """Weights of classes and other totals: against torch's own loss."""
    M, V = 7, 37
    y, c = labels(M, V), torch.linspace(3.0, 0.2, V, device=DEVICE)
    of_class = c.double()[y[y != -100]].sum()
    one, total = torch.ones((), device=DEVICE), torch.tensor(13.5, device=DEVICE)
    cases: list[Case] = []
    for e, a, reduction, given in (
        (0.0, 0.0, "mean", None), (0.0, 0.0, "sum", None), (0.0, 0.0, "none", None),
        (0.2, 0.0, "mean", None), (0.2, 0.0, "none", None), (0.2, 0.1, "mean", None),
        (0.2, 0.1, "sum", total), (0.0, 0.0, "mean", total),
    ):  # fmt: skip
        by = given if given is not None else of_class if reduction == "mean" else one

        def ref(z: Tensor, e: float = e, a: float = a, reduction: str = reduction,
                by: Tensor = by) -> Tensor:  # fmt: skip
            z = z.to(accumulate_dtype(z.dtype))
            rows = row_ce(z, y, weight=c.to(z.dtype), label_smoothing=e)
            rows = rows + a * z.logsumexp(-1).square() * (y != -100)
            return rows if reduction == "none" else rows.sum() / by.to(rows.dtype)

        op = partial(cross_entropy, y=y, class_weight=c, label_smoothing=e, z_loss=a,
                     reduction=reduction, total=given)  # fmt: skip
        options = f"{'+smoothing' * (e > 0)}{'+z_loss' * (a > 0)}{'+total' * (given is not None)}"
        name = f"cross_entropy-class{options}-{reduction}"
        cases.append(Case(name, op, ref, _randn(z=(M, V))))
    return cases


def _linears() -> list[Case]:
    M, H, V = 9, 16, 37
    y, make, biased = labels(M, V), _randn(x=(M, H), w=(V, H)), _randn(x=(M, H), w=(V, H), b=(V,))
    cases: list[Case] = []
    for option, reduction, rows, inputs in (
        ("plain", "mean", 99, make), ("plain", "sum", 1, biased), ("plain", "none", 2, make),
        ("softcap", "mean", 2, biased), ("smoothing", "sum", 4, make),
        ("z_loss", "none", 4, biased),
        ("all", "mean", 2, biased), ("all", "none", 2, biased), ("scaled by token", "sum", 2, make),
    ):  # fmt: skip
        o = OPTIONS[option]

        def ref(x: Tensor, w: Tensor, b: Tensor | None = None, o: RowLoss = o,
                reduction: str = reduction) -> Tensor:  # fmt: skip
            return _reduced(-linear_logprob_ref(x, w, y, b, o), y, reduction)

        for compact in (True, False):
            op = partial(linear_cross_entropy, y=y, reduction=reduction, compact=compact,
                         memory_budget=rows * V * 4, **_given(o))  # fmt: skip
            name = f"linear_cross_entropy-{option}-{reduction}-{rows}-{'bn'[inputs is make]}"
            cases.append(Case(f"{name}-{'compact' if compact else 'whole'}", op, ref, inputs))
    for o in (RowLoss(), OPTIONS["softcap"]):
        op = partial(linear_logprob, y=y, softcap=o.softcap, scale=o.scale, memory_budget=3 * V * 4)
        name = "linear_logprob" + ("-softcap" if o.softcap else "")
        cases.append(Case(name, op, partial(linear_logprob_ref, y=y, o=o), biased))
    return cases


def _head(op: Op, y: Tensor, rows: int = 2, kept: int = 0, first: bool = False, **kw: Any) -> Op:
    """op as a function of its tensors, with the low-rank ones by name; `rows` of logits at once,
    `kept` of them until backward; of what it returns, the `first`."""

    def call(x: Tensor, w: Tensor, b: Tensor | None = None, u: Tensor | None = None,
             v: Tensor | None = None, **more: Any) -> Any:  # fmt: skip
        size = w.shape[0] * x.element_size()
        more |= kw | ({"saved_logits_budget": kept * size} if kept else {})
        low_rank = None if u is None or v is None else (u, v)
        out = op(x, w, y, b=b, low_rank=low_rank, memory_budget=rows * size, **more)
        return out[0] if first else out

    return call


def full_logits(x: Tensor, w: Tensor, b: Tensor | None = None, u: Tensor | None = None,
                v: Tensor | None = None) -> Tensor:  # fmt: skip
    """What torch computes, for a loss that is taken in fp32 or fp64."""
    z = F.linear(x, w, b)
    z = z if u is None or v is None else z + u @ v.T
    return z.to(accumulate_dtype(z.dtype))


def row_ce(z: Tensor, y: Tensor, **kw: Any) -> Tensor:
    """torch's own cross entropy of each row, in y's shape."""
    return F.cross_entropy(z.flatten(0, -2), y.flatten(), reduction="none", **kw).view(y.shape)


def token_stats_ref(z: Tensor, y: Tensor) -> TokenStats:
    """From full logits (..., V), in torch."""
    log_p, scored = z.log_softmax(-1), y != -100
    return TokenStats(
        log_p.gather(-1, y.clamp_min(0)[..., None])[..., 0] * scored,
        -(log_p.exp() * log_p).sum(-1) * scored,
        log_p.exp().square().sum(-1).log() * scored,
        z.mean(-1) * scored,
        (z.argmax(-1) == y) & scored,
    )


def _weighted() -> list[Case]:
    """Weights of tokens and of classes, temperatures, low-rank terms: against torch's own loss."""
    M, H, V, r = 9, 16, 37, 3
    y, plain = labels(M, V), _randn(x=(M, H), w=(V, H))
    biased = _randn(x=(M, H), w=(V, H), b=(V,))
    low_rank = _randn(x=(M, H), w=(V, H), b=(V,), u=(M, r), v=(V, r))
    each = torch.linspace(0.2, 3.0, M, device=DEVICE)
    c = torch.linspace(3.0, 0.2, V, device=DEVICE)

    def tempered(z: Tensor) -> Tensor:
        return row_ce(z / 0.6, y)

    def by_token(z: Tensor) -> Tensor:
        loss = row_ce(0.7 * torch.tanh(z / 0.7), y)
        return loss * loss.neg().exp().detach()  # the label's probability, a constant

    def by_class(z: Tensor, e: float) -> Tensor:
        return row_ce(z, y, weight=c.to(z.dtype), label_smoothing=e)

    def z_lossy(z: Tensor) -> Tensor:
        return by_class(z, 0.2) + 0.1 * z.logsumexp(-1).square() * (y != -100)

    of_class = c.double()[y.clamp_min(0)]
    smooth = dict(class_weight=c, label_smoothing=0.2)
    cases: list[Case] = []
    for name, reduction, make, loss, weights, kw in (
        ("tempered", "mean", plain, tempered, None, dict(temperature=0.6)),
        ("tempered", "none", biased, tempered, None, dict(temperature=0.6)),
        ("token_scaling", "mean", biased, by_token, None, dict(softcap=0.7, token_scaling=True)),
        ("token_scaling", "none", plain, by_token, None, dict(softcap=0.7, token_scaling=True)),
        ("weights", "mean", plain, partial(row_ce, y=y), each, dict(weights=each)),
        ("weights", "sum", biased, partial(row_ce, y=y), each, dict(weights=each)),
        ("weights", "none", plain, partial(row_ce, y=y), each, dict(weights=each)),
        ("weights+class", "mean", plain, partial(by_class, e=0.2), each * of_class,
         dict(weights=each, **smooth)),
        ("class", "mean", plain, partial(by_class, e=0.0), of_class, dict(class_weight=c)),
        ("class", "none", biased, partial(by_class, e=0.0), of_class, dict(class_weight=c)),
        ("class+smoothing", "mean", biased, partial(by_class, e=0.2), of_class, smooth),
        ("class+smoothing", "sum", plain, partial(by_class, e=0.2), of_class, smooth),
        ("class+smoothing", "none", plain, partial(by_class, e=0.2), of_class, smooth),
        ("class+z_loss", "mean", plain, z_lossy, of_class, dict(z_loss=0.1, **smooth)),
        ("low_rank", "mean", low_rank, partial(row_ce, y=y), None, {}),
        ("low_rank", "none", low_rank, partial(row_ce, y=y), None, {}),
    ):  # fmt: skip

        def ref(loss: Any = loss, weights: Tensor | None = weights, reduction: str = reduction,
                kw: Any = kw, **tensors: Tensor) -> Tensor:  # fmt: skip
            rows = loss(full_logits(**tensors))
            rows = rows if "weights" not in kw else rows * each.to(rows.dtype)
            if weights is None or reduction != "mean":
                return _reduced(rows, y, reduction)
            return rows.sum() / weights.to(rows.dtype)[y != -100].sum()

        for compact in (True, False):
            op = _head(linear_cross_entropy, y, reduction=reduction, compact=compact, **kw)
            name_ = f"linear_cross_entropy-{name}-{reduction}-{'compact' if compact else 'whole'}"
            cases.append(Case(name_, op, ref, make))
    return cases


def _logprobs() -> list[Case]:
    M, H, V, r = 9, 16, 37, 3
    y = labels(M, V)
    plain, make = _soft(x=(M, H), w=(V, H)), _soft(x=(M, H), w=(V, H), b=(V,), u=(M, r), v=(V, r))

    def ref(**tensors: Tensor) -> Tensor:
        return -row_ce(full_logits(**tensors), y)

    def stats_ref(**tensors: Tensor) -> tuple[Tensor, ...]:
        return _through_logp(token_stats_ref(full_logits(**tensors), y))

    def stats(compact: bool, outputs: tuple[str, ...] = STATS) -> Op:
        op = _head(linear_token_stats, y, outputs=outputs, compact=compact)
        return lambda **tensors: _through_logp(op(**tensors))

    return [
        Case("linear_token_stats-compact", stats(True), stats_ref, plain),
        Case("linear_token_stats-whole", stats(False), stats_ref, make),
        *(
            Case(f"linear_logprob-{kept} rows kept", _head(linear_logprob, y, kept=kept), ref, make)
            for kept in (4, 6)
        ),
    ]


STATS = ("entropy", "log_sum_sq_probs", "mean_logit")


def _through_logp(stats: TokenStats) -> tuple[Tensor, ...]:
    """logp, entropy, and what carries no gradient as a factor of logp, which does."""
    values = (t.detach() for t in (stats.log_sum_sq_probs, stats.mean_logit) if t is not None)
    assert stats.entropy is not None
    return stats.logp, stats.entropy, *(stats.logp * value for value in values)


def group_loss(together: str, S: int, T: int) -> LossFn:
    """A loss that needs whole groups of sequences, each sequence and token with its own weight."""
    each = 0.3 + torch.arange(S * T, device=DEVICE).view(S, T) % 7 / 10
    share = torch.linspace(0.5, 1.5, S, device=DEVICE)

    def loss_fn(stats: TokenStats, take: Callable[[Tensor], Tensor]) -> Tensor:
        of_sequence = 0.1 * (stats.logp * take(each).to(stats.logp)).sum(-1)
        some, half = take(share).to(stats.logp), of_sequence.shape[0] // 2
        if together == "pair":
            loss = F.logsigmoid(of_sequence[:half] - of_sequence[half:]) * some[:half]
        elif together == "sequence":
            loss = of_sequence.tanh() * some
        else:
            loss = (of_sequence * some).logsumexp(0)
        assert stats.entropy is not None
        return -loss.sum() - (0.05 * some * stats.entropy.square().sum(-1)).sum()

    return loss_fn


def uneven_labels(S: int, T: int, V: int) -> Tensor:
    """(S, T): sequences of T, T - 1, ... 1 labels, others left out in the middle, too."""
    y = labels(S * T, V, ignored=5).view(S, T)
    lengths = T - torch.arange(S, device=DEVICE) % T
    return y.masked_fill(torch.arange(T, device=DEVICE) >= lengths[:, None], -100)


def _losses() -> list[Case]:
    S, T, H, V, r = 4, 5, 16, 37, 3
    y = uneven_labels(S, T, V)  # 4 + 3 + 2 + 1 scored; pairs of 6 and 4
    biased = _soft(x=(S, T, H), w=(V, H), b=(V,))
    low_rank = _soft(x=(S, T, H), w=(V, H), b=(V,), u=(S, T, r), v=(V, r))
    cases: list[Case] = []
    for together in ("pair", "sequence", "batch"):
        loss_fn = group_loss(together, S, T)

        def ref(loss_fn: LossFn = loss_fn, **tensors: Tensor) -> Tensor:
            return loss_fn(token_stats_ref(full_logits(**tensors), y), lambda t: t)

        for rows in (6, 2, 99):  # several bins, but for a batch; groups in parts; one bin
            for compact in (True, False) if rows == 6 else (True,):
                op = _head(
                    linear_loss, y, rows, first=True, loss_fn=loss_fn, together=together,
                    outputs=("entropy",), compact=compact,
                )  # fmt: skip
                name = f"linear_loss-{together}-{rows}-{'compact' if compact else 'whole'}"
                cases.append(Case(name, op, ref, low_rank if rows == 2 else biased))
    return cases


def _frozen() -> list[Case]:
    """Heads of which only x gets a gradient."""
    S, T, H, V = 4, 5, 16, 37
    y = uneven_labels(S, T, V)
    w = (torch.randn(V, H, generator=torch.Generator().manual_seed(2)) * 8).round().to(DEVICE) / 32
    loss_fn = group_loss("pair", S, T)

    def case(name: str, op: Op, of_logits: Callable[[Tensor], Any]) -> Case:
        return Case(
            f"frozen {name}",
            lambda x, **kw: op(x=x, w=w.to(x.dtype), **kw),
            lambda x: of_logits(full_logits(x, w.to(x.dtype))),
            _randn(x=(S, T, H)),
        )

    stats = _head(linear_token_stats, y, outputs=STATS)
    loss = _head(linear_loss, y, first=True, loss_fn=loss_fn, together="pair", outputs=("entropy",))
    return [
        case("linear_cross_entropy-mean", _head(linear_cross_entropy, y),
             lambda z: _reduced(row_ce(z, y), y, "mean")),
        case("linear_cross_entropy-none", _head(linear_cross_entropy, y, reduction="none"),
             lambda z: row_ce(z, y)),
        case("linear_logprob", _head(linear_logprob, y), lambda z: -row_ce(z, y)),
        case("linear_token_stats", lambda **t: _through_logp(stats(**t)),
             lambda z: _through_logp(token_stats_ref(z, y))),
        case("linear_loss", loss, lambda z: loss_fn(token_stats_ref(z, y), lambda t: t)),
    ]  # fmt: skip


CASES = [
    *_norms(), *_ropes(), *_glus(), *_tiles(), *_cross_entropies(), *_classes(), *_linears(),
    *_weighted(), *_logprobs(), *_losses(), *_frozen(),
]  # fmt: skip

# One of each op, small, for tests of what every op promises whatever its options.
BRIEF = [
    next(c for c in CASES if c.name.startswith(name))
    for name in (
        "rms_norm-llama-7", "rms_norm-gemma-7", "add_rms_norm-llama-7", "layer_norm-7",
        "rope-2x4", "rope-2x3+1x3x16", "rope-2x5+2x3x12", "glu-silu-5", "glu_packed-silu-5",
        "tiled-3", "cross_entropy-plain-5x37-mean", "cross_entropy-softcap-5x37-none",
        "cross_entropy-class+smoothing+z_loss-mean", "linear_cross_entropy-plain-sum",
        "linear_cross_entropy-plain-none", "linear_logprob", "linear_token_stats",
        "linear_loss-pair",
    )
]  # fmt: skip
