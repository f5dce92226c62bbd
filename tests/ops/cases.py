"""Every op with its reference and inputs, for the tests that all ops share.

Parameters are chosen so that ignoring one shows: an eps of 0.1, a softcap that bites, cos and sin
whose halves differ.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from liger_core import (
    cross_entropy,
    glu,
    layer_norm,
    linear_cross_entropy,
    linear_logprob,
    rms_norm,
    rope,
)
from liger_core.ops.row_loss import RowLoss, row_loss_ref
from liger_core.ops.glu import glu_ref
from liger_core.ops.layer_norm import layer_norm_ref
from liger_core.ops.linear_logprob import linear_logprob_ref
from liger_core.ops.rms_norm import rms_norm_ref
from liger_core.ops.rope import rope_ref
from numerics import DEVICE, Op

Make = Callable[[], dict[str, Tensor]]


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


def labels(M: int, V: int, ignored: int = 3) -> Tensor:
    """Random labels, every `ignored`-th one left out; the first and last class among them."""
    y = torch.randint(V, (M,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    y[0], y[-1] = V - 1, 0
    return y.masked_fill(torch.arange(M, device=DEVICE) % ignored == 1, -100)


def _norms() -> list[Case]:
    cases: list[Case] = []
    for M, N in ((1, 64), (7, 100), (9, 1), (33, 129)):
        for casting, offset in (("llama", 0.0), ("gemma", 1.0)):
            kw = dict(eps=0.1, offset=offset, casting=casting)
            cases.append(
                Case(f"rms_norm-{casting}-{M}x{N}", partial(rms_norm, **kw),
                     partial(rms_norm_ref, **kw), _randn(x=(M, N), w=(N,)))
            )  # fmt: skip
        layer, ref = partial(layer_norm, eps=0.1), partial(layer_norm_ref, eps=0.1)
        for shift in (0.0, 30.0):
            make = _randn(shift, x=(M, N), w=(N,), b=(N,))
            cases.append(Case(f"layer_norm-{M}x{N}+{shift:g}", layer, ref, make))
    return [*cases, Case("layer_norm-no-bias", layer, ref, _randn(x=(2, 3, 40), w=(40,)))]


def _ropes() -> list[Case]:
    cases: list[Case] = []
    for B, T, HQ, HK, D, batch in ((2, 5, 4, 2, 8, 1), (2, 3, 3, 1, 80, 2), (1, 1, 1, 1, 2, 1)):
        cos, sin = torch.randn(2, batch, T, D, device=DEVICE).unbind()

        def make(B: int = B, T: int = T, HQ: int = HQ, HK: int = HK, D: int = D):
            q, k = (torch.randn(B, T, h, D, device=DEVICE) for h in (HQ, HK))
            return {"q": q.transpose(1, 2), "k": k.transpose(1, 2)}

        cases.append(
            Case(f"rope-{B}x{HQ}+{HK}x{T}x{D}", partial(rope, cos=cos, sin=sin),
                 partial(rope_ref, cos=cos, sin=sin), make)
        )  # fmt: skip
    return cases


def _glus() -> list[Case]:
    def halves(gu: Tensor, op: Op, **kw: str) -> Tensor:
        return op(*gu.chunk(2, -1), **kw)  # pyright: ignore

    cases = [
        Case(f"glu-{act}-{N}", partial(glu, act=act), partial(glu_ref, act=act),
             _randn(g=(2, 3, N), u=(2, 3, N)))
        for act in ("silu", "gelu", "gelu_tanh")
        for N in (5, 1030)
    ]  # fmt: skip
    fused = partial(halves, op=glu), partial(halves, op=glu_ref), _randn(gu=(3, 2, 34))
    return [*cases, Case("glu-gate_up", *fused)]


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
        ("softcap", 5, 37, "none"), ("smoothing", 5, 37, "mean"), ("z_loss", 5, 37, "sum"),
        ("all", 4, 4097, "none"),
    ):  # fmt: skip
        y, o = labels(M, V), OPTIONS[option]

        def ref(z: Tensor, y: Tensor = y, o: RowLoss = o, reduction: str = reduction) -> Tensor:
            return _reduced(row_loss_ref(z, y, o), y, reduction)

        op = partial(cross_entropy, y=y, reduction=reduction, **_given(o))
        cases.append(Case(f"cross_entropy-{option}-{M}x{V}-{reduction}", op, ref, _randn(z=(M, V))))
    return cases


def _linears() -> list[Case]:
    M, H, V = 9, 16, 37
    y, make, biased = labels(M, V), _randn(x=(M, H), w=(V, H)), _randn(x=(M, H), w=(V, H), b=(V,))
    cases: list[Case] = []
    for option, reduction, rows, inputs in (
        ("plain", "mean", 99, make), ("plain", "sum", 1, biased), ("plain", "none", 2, make),
        ("softcap", "mean", 2, biased), ("smoothing", "sum", 4, make),
        ("z_loss", "none", 4, biased),
        ("all", "mean", 2, biased), ("all", "none", 2, biased),
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


CASES = [*_norms(), *_ropes(), *_glus(), *_cross_entropies(), *_linears()]

# One of each op, small, for tests of what every op promises whatever its options.
BRIEF = [
    next(c for c in CASES if c.name.startswith(name))
    for name in (
        "rms_norm-llama-7", "rms_norm-gemma-7", "layer_norm-7", "rope-2x4", "glu-silu-5",
        "cross_entropy-plain-5x37-mean", "linear_cross_entropy-plain-sum",
        "linear_cross_entropy-plain-none", "linear_logprob",
    )
]  # fmt: skip
