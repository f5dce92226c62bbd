"""Preference losses under a head against definitions from full logits, one sequence at a time.

The formula of a pair is the loss's own, which test_preference.py holds against the papers; which
tokens count, their weights, WPO's weights, NLL terms and means are written out here.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import full_logits
from liger_core.losses import (
    CPO,
    DPO,
    KTO,
    ORPO,
    PairLoss,
    Pairs,
    SimPO,
    linear_kto_loss,
    linear_preference_loss,
)
from liger_kernel.check import allowed
from numerics import (
    DEVICE,
    HALVES,
    IMPLS,
    assert_errs_no_more,
    assert_no_worse_than_torch,
    run,
)

S, T, H, V = 8, 7, 16, 13
LENGTHS = (5, 1, 6, 3, 6, 2, 4, 6)  # of completions: pairs of 11, 3, 10 and 9 tokens
rows_held = pytest.mark.parametrize("rows", [99, 15, 4])  # one bin; three; pairs in parts

TYPES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sigmoid_norm", "sft",
)  # fmt: skip
MIXED = DPO(["aot", "ipo", "sft"], nll_weight=0.5)
WEIGHTED = DPO("robust", average=True, ld_alpha=0.3, use_weighting=True, nll_weight=2.0)
LOSSES: list[PairLoss] = [
    *(DPO(kind) for kind in TYPES if kind not in ("exo_pair", "discopop", "sppo_hard")),
    DPO("sppo_hard", beta=0.02),
    DPO("exo_pair", label_smoothing=0.1),
    DPO("discopop", discopop_tau=0.5),  # the default's slope makes much of a rounding
    *(DPO(kind, label_smoothing=0.2) for kind in ("sigmoid", "robust", "aot", "aot_unpaired")),
    DPO(["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.5]),
    MIXED,
    DPO("hinge", f_divergence="js_divergence"),
    DPO(f_divergence="forward_kl", average=True),  # or their e^-x would
    DPO("robust", f_divergence="alpha_divergence", f_alpha=0.3, average=True, nll_weight=0.1),
    DPO(reference_free=True),
    DPO("apo_zero", reference_free=True, nll_weight=0.3),
    DPO(ld_alpha=0.3),
    DPO("sigmoid_norm", ld_alpha=0.0, nll_weight=0.5),
    DPO("aot", ld_alpha=0.6),
    DPO(use_weighting=True),
    DPO(["ipo", "apo_down"], use_weighting=True, ld_alpha=0.3, nll_weight=0.5),
    DPO(average=True, beta=0.5),
    WEIGHTED,
    CPO(),
    CPO("hinge", nll_weight=0.0),
    CPO("ipo"),
    CPO("ipo", beta=0.02, average=False, nll_weight=0.2),
    CPO(label_smoothing=0.2, average=True, alpha=0.1, beta=0.5),
    SimPO(),
    SimPO(beta=0.7, gamma=1.0, label_smoothing=0.1, alpha=0.1, nll_weight=0.5),
    ORPO(beta=0.5),
    ORPO(nll_weight=0.0),
]  # fmt: skip
BRIEF = [DPO(), MIXED, WEIGHTED, CPO(), SimPO(), ORPO(beta=0.5)]


def named(o: Any) -> str:
    given = (f"{f.name}={getattr(o, f.name)}" for f in fields(o) if getattr(o, f.name) != f.default)
    return f"{type(o).__name__}({', '.join(given)})"


def operands() -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = dict(x=(S, T, H), w=(V, H), b=(V,))
    return {n: torch.randn(s, device=DEVICE) / (4 if n == "w" else 1) for n, s in shapes.items()}


def completions(lengths: tuple[int, ...] = LENGTHS, T: int = T) -> Tensor:
    """(S, T) labels: a prompt and so many tokens; then, of the first half, one of padding; and of
    every other sequence the last but one is left out."""
    y = torch.randint(V, (len(lengths), T), generator=torch.Generator().manual_seed(1))
    at = torch.arange(T)
    for s, n in enumerate(lengths):
        stop = T - (n < T and s < len(lengths) // 2)
        hole = stop - 2 if s % 2 and 1 < n < stop else T
        y[s, (at < stop - n - (hole < T)) | (at == hole) | (at >= stop)] = -100
    assert (y != -100).sum(-1).tolist() == [*lengths]
    return y.to(DEVICE)


def scored(log_p: Tensor, y: Tensor, s: int) -> tuple[Tensor, Tensor]:
    """(n, V) log-probabilities where sequence s is scored, and (n,) of its labels."""
    at = [t for t in range(y.shape[1]) if y[s, t] != -100]
    return log_p[s, at], log_p[s, at, y[s, at]]


def dense_logps(log_p: Tensor, y: Tensor, average: Any, ld_alpha: float | None = None) -> Tensor:
    """(S,) log-probabilities of sequences, from those of all classes."""
    tokens, logps = [scored(log_p, y, s)[1] for s in range(len(y))], list[Tensor]()
    for s, mine in enumerate(tokens):
        n, total = mine.numel(), mine.sum()
        if ld_alpha is not None:  # tokens as many as both completions have, and those beyond
            both = min(n, tokens[(s + len(y) // 2) % len(y)].numel())
            total = mine[:both].sum() + ld_alpha * mine[both:].sum()
        logps.append(total / max(n, 1) if average else total)
    return torch.stack(logps)


def reference(y: Tensor, loss: PairLoss | KTO) -> Tensor | None:
    """Log-probabilities near those of `operands`, or None where the loss takes none."""
    if not getattr(loss, "needs_reference", True):
        return None
    x, w, b = operands().values()
    log_p = full_logits(x[: len(y), : y.shape[1]], w, b).log_softmax(-1)
    near = dense_logps(log_p, y, loss.average, getattr(loss, "ld_alpha", None))
    apart = (3 * torch.arange(len(y), device=DEVICE)) % 8 - 3.7  # ranks other than the policy's
    return near + apart * (0.2 if loss.average else 1.0)


def dense(
    x: Tensor, w: Tensor, b: Tensor | None = None, *, y: Tensor, loss: PairLoss,
    ref_logps: Tensor | None = None, nll_y: Tensor | None = None,
) -> Tensor:  # fmt: skip
    log_p, half = full_logits(x, w, b).log_softmax(-1), len(y) // 2
    logps = dense_logps(log_p, y, loss.average, loss.ld_alpha)
    ref = (None, None) if ref_logps is None else ref_logps.to(logps).chunk(2)
    lengths = torch.tensor([int((labels != -100).sum()) for labels in y], device=y.device)
    losses = loss(Pairs(*logps.chunk(2), *ref, *lengths.chunk(2)))
    if loss.use_weighting:
        all_p, p = zip(*(scored(log_p.detach(), y, s) for s in range(2 * half)), strict=True)
        aligned = [t - a.exp().square().sum(-1).log() for a, t in zip(all_p, p, strict=True)]
        wpo = [(a.sum() / max(len(a), 1)).exp() for a in aligned]
        losses = torch.stack([losses[i] * wpo[i] * wpo[half + i] for i in range(half)])
    chosen = torch.cat([scored(log_p, y if nll_y is None else nll_y, s)[1] for s in range(half)])
    return losses.sum() / half - loss.nll * chosen.sum() / max(len(chosen), 1)


def fused(y: Tensor, loss: PairLoss, rows: int = 99, **kw: Any) -> Callable[..., Tensor]:
    """linear_preference_loss as a function of its tensors; `rows` of logits are held at once."""

    def op(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        budget = rows * w.shape[0] * x.element_size()
        return linear_preference_loss(x, w, y, loss, b, memory_budget=budget, **kw)[0]

    return op


def check(
    y: Tensor, loss: PairLoss, dtype: torch.dtype = torch.float32, rows: int = 99,
    nll_y: Tensor | None = None, inputs: dict[str, Tensor] | None = None, **kw: Any,
) -> None:  # fmt: skip
    """Value and gradients of x, w and b, for a random upstream gradient."""
    given: Any = dict(ref_logps=reference(y, loss), nll_y=nll_y)
    ref = lambda **t: dense(**t, y=y, loss=loss, **given)  # noqa: E731
    op = fused(y, loss, rows, **given, **kw)
    assert_no_worse_than_torch(op, ref, inputs or operands(), dtype)


# Values and gradients


@rows_held
@pytest.mark.parametrize("loss", LOSSES, ids=named)
def test_pairs_are_those_of_full_logits(loss: PairLoss, rows: int) -> None:
    check(completions(), loss, rows=rows)


@pytest.mark.parametrize(("impl", "dtype"), IMPLS)
@pytest.mark.parametrize("loss", BRIEF, ids=named)
def test_kernels_and_half_precision(loss: PairLoss, impl: Any, dtype: torch.dtype) -> None:
    for rows in (99, 4):
        check(completions(), loss, dtype, rows, impl=impl)


@pytest.mark.parametrize("rows", [99, 4])
@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("loss", BRIEF, ids=named)
@pytest.mark.parametrize(
    ("T", "lengths"),
    [(7, (0, 3, 4, 5, 2, 0, 7, 6)), (7, (0, 3, 4, 1, 0, 2, 5, 6)), (7, (0, 0, 0, 0, 2, 1, 7, 5)),
     (7, (2, 7, 3, 5, 0, 0, 0, 0)), (1, (1,) * 8), (1, (1, 1, 0, 1, 0, 1, 0, 1)), (7, (7,) * 8),
     (7, (0,) * 8)],
)  # fmt: skip
def test_completions_of_any_length(
    T: int, lengths: tuple[int, ...], loss: PairLoss, compact: bool, rows: int
) -> None:
    """Empty ones, no chosen tokens at all, one token, all of them; none, with gradients of 0."""
    inputs = operands()
    inputs["x"] = inputs["x"][:, :T]
    check(completions(lengths, T), loss, rows=rows, compact=compact, inputs=inputs)


KTOS = [
    KTO(), KTO(beta=0.3, desirable_weight=1.5, undesirable_weight=0.7), KTO(average=True, beta=0.5),
    KTO("apo_zero_unpaired", undesirable_weight=0.5),
]  # fmt: skip
GOOD = [(True, False, False, True, True, False, True, False), (True,) * 8, (False,) * 8]


def dense_kto(
    x: Tensor, w: Tensor, b: Tensor | None = None, *, y: Tensor, good: Tensor, loss: KTO,
    ref_logps: Tensor | None = None, kl: Tensor | float | None = None,
) -> Tensor:  # fmt: skip
    log_p = full_logits(x, w, b).log_softmax(-1)
    logps = dense_logps(log_p, y, loss.average)
    ref = None if ref_logps is None else ref_logps.to(logps)
    kl = kl.to(logps) if isinstance(kl, Tensor) else kl
    return loss(logps, ref, good, kl).sum() / y.shape[0]


def check_kto(
    loss: KTO, good: Tensor, kl: Tensor | float | None, dtype: torch.dtype = torch.float32,
    rows: int = 99, y: Tensor | None = None, referenced: bool = True, **kw: Any,
) -> None:  # fmt: skip
    y = completions() if y is None else y
    kl = None if loss.loss_type != "kto" else kl
    given: Any = dict(ref_logps=reference(y, loss) if referenced else None, kl=kl)

    def op(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        kw["memory_budget"] = rows * V * x.element_size()
        return linear_kto_loss(x, w, y, good, loss, b, **given, **kw)[0]

    ref = lambda **t: dense_kto(**t, y=y, good=good, loss=loss, **given)  # noqa: E731
    inputs = operands()
    inputs["x"] = inputs["x"][: len(y)]
    assert_no_worse_than_torch(op, ref, inputs, dtype)


@pytest.mark.parametrize("rows", [99, 4])
@pytest.mark.parametrize("good", GOOD, ids=str)
@pytest.mark.parametrize(
    "kl", [None, 0.3, torch.tensor(0.3), torch.tensor([0.3]), torch.linspace(0, 1, S)], ids=str
)
@pytest.mark.parametrize("loss", KTOS, ids=named)
def test_kto_is_that_of_full_logits(
    loss: KTO, kl: Tensor | float | None, good: tuple[bool, ...], rows: int
) -> None:
    kl = kl.to(DEVICE) if isinstance(kl, Tensor) else kl
    check_kto(loss, torch.tensor(good, device=DEVICE), kl, rows=rows)


@pytest.mark.parametrize(("impl", "dtype"), IMPLS)
def test_kto_kernels_and_half_precision(impl: Any, dtype: torch.dtype) -> None:
    good, kl = torch.tensor(GOOD[0], device=DEVICE), torch.linspace(0, 1, S, device=DEVICE)
    for rows in (99, 4):
        check_kto(KTOS[1], good, kl, dtype, rows, impl=impl)


@pytest.mark.parametrize("referenced", [True, False])
@pytest.mark.parametrize("lengths", [(0, 3, 1, 7, 0, 2, 1, 5), (0,) * 8, (3, 1, 4, 1, 5)], ids=str)
@pytest.mark.parametrize("loss", KTOS, ids=named)
def test_kto_of_completions_of_any_length_and_number(
    loss: KTO, lengths: tuple[int, ...], referenced: bool
) -> None:
    good = torch.tensor(GOOD[0][: len(lengths)], device=DEVICE)
    check_kto(loss, good, None, y=completions(lengths), referenced=referenced)


# What else goes in


def nll_labels(kind: str, y: Tensor) -> Tensor:
    """Labels of an NLL term beside those of the completions; the rejected half's do not count."""
    other = torch.randint(V, y.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    other[len(y) // 2 :] = 10**6
    other[0, -1] = -100
    if kind == "prompts too":
        return torch.where(y == -100, other, y)
    if kind == "prompts alone":
        return other.masked_fill(y != -100, -100)
    return other if kind == "others" else torch.full_like(y, -100)


@pytest.mark.parametrize("rows", [99, 4])
@pytest.mark.parametrize("kind", ["prompts too", "prompts alone", "others", "none"])
@pytest.mark.parametrize("loss", [ORPO(), CPO(nll_weight=0.4), MIXED], ids=named)
def test_nll_labels_of_their_own(loss: PairLoss, kind: str, rows: int) -> None:
    y = completions()
    check(y, loss, rows=rows, nll_y=nll_labels(kind, y))
    check(y, WEIGHTED, torch.float16, rows, nll_y=nll_labels(kind, y))


@pytest.mark.parametrize("kind", ["prompts too", "others"])
def test_options_of_the_head_reach_all_terms(kind: str) -> None:
    y, loss = completions(), ORPO(beta=0.5)
    nll_y = nll_labels(kind, y)
    inputs = operands() | {"u": torch.randn(S, T, 3), "v": torch.randn(V, 3) / 4}
    kw: Any = dict(softcap=1.5, temperature=0.8, ignore_index=V + 3)
    marked = [t.masked_fill(t == -100, V + 3) for t in (y, nll_y)]

    def op(x: Tensor, w: Tensor, b: Tensor, u: Tensor, v: Tensor) -> Tensor:
        kw["low_rank"] = u, v
        return linear_preference_loss(x, w, marked[0], loss, b, nll_y=marked[1], **kw)[0]

    def ref(**tensors: Tensor) -> Tensor:
        z = full_logits(**tensors)
        eye = torch.eye(V, device=DEVICE, dtype=z.dtype)
        return dense(1.5 * torch.tanh(z / 1.5) / 0.8, eye, y=y, loss=loss, nll_y=nll_y)

    inputs = {n: t.to(DEVICE) for n, t in inputs.items()}
    assert_no_worse_than_torch(op, ref, inputs, torch.float32)


@pytest.mark.parametrize("rows", [99, 4])
@pytest.mark.parametrize("loss", BRIEF, ids=named)
def test_the_loss_goes_on_and_back_twice(loss: PairLoss, rows: int) -> None:
    y = completions()
    ref = reference(y, loss)
    op = fused(y, loss, rows, ref_logps=ref)
    assert_no_worse_than_torch(
        lambda **t: op(**t).square(),
        lambda **t: dense(**t, y=y, loss=loss, ref_logps=ref).square(), operands(), torch.float32,
    )  # fmt: skip
    leaves = [t.requires_grad_() for t in operands().values()]
    value = op(*leaves).square()
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    kept = [t.clone() for t in first]
    torch.testing.assert_close(torch.autograd.grad(value, leaves), first)
    assert all(map(torch.equal, first, kept)), "a second backward wrote to what the first gave"


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("loss", [DPO(), WEIGHTED, ORPO()], ids=named)
def test_autocast_errs_no_more_than_torch(loss: PairLoss, dtype: torch.dtype) -> None:
    """fp32 weights under autocast: products in half precision, gradients in fp32."""
    inputs, y = {n: t.to(dtype).float() for n, t in operands().items()}, completions()
    ref, dy = reference(y, loss), [torch.ones((), device=DEVICE)]

    def definition(**tensors: Tensor) -> Tensor:
        return dense(**tensors, y=y, loss=loss, ref_logps=ref)

    exact = run(definition, inputs, torch.float64, dy)
    with torch.autocast(DEVICE, dtype):
        theirs = run(definition, inputs, torch.float32, dy)
        ours = run(fused(y, loss, 7, ref_logps=ref), inputs, torch.float32, dy)
    assert {t.dtype for t in ours.values()} == {torch.float32}
    assert_errs_no_more(ours, theirs, exact, dtype)


SMALL = [
    DPO(beta=1e-3), DPO("aot", beta=1e-3), CPO(beta=1e-3, nll_weight=1e-3), ORPO(1e-3, 1e-3),
    DPO(beta=1e-3, ld_alpha=0.3, use_weighting=True),
]  # fmt: skip


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("loss", SMALL, ids=named)
def test_fp16_survives_a_loss_scale(loss: PairLoss, impl: Any) -> None:
    """GradScaler's 65,536, on gradients of a class that are about fp16's smallest number."""
    torch.manual_seed(0)
    V = 1024
    inputs = dict(x=torch.randn(S, T, H), w=torch.randn(V, H) / 4)
    inputs = {n: t.half().to(DEVICE) for n, t in inputs.items()}
    y, dy = completions(), [torch.tensor(65536.0, device=DEVICE)]  # the other classes: no target
    ref = torch.full((S,), -20.0, device=DEVICE) if loss.needs_reference else None
    exact = run(lambda **t: dense(**t, y=y, loss=loss, ref_logps=ref), inputs, torch.float64, dy)
    ours = run(fused(y, loss, 15, ref_logps=ref, impl=impl), inputs, torch.float16, dy)
    for got, e in [(ours[n], exact[n]) for n in exact] + [(ours["dw"][13:], exact["dw"][13:])]:
        assert (got - e).norm() <= allowed(0.0, e.norm(), torch.float16)
