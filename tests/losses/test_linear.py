"""Preference losses under a head against definitions from full logits, one sequence at a time.

The formula of a pair is the loss's own, which test_preference.py holds against the papers; which
tokens count, their weights, WPO's weights, NLL terms and means are written out here.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

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
    linear_sequence_logprob,
    mean_logits,
    token_weights,
)
from numerics import (
    DEVICE,
    FACTOR,
    FLOOR,
    GPU,
    HALVES,
    IMPLS,
    assert_no_worse_than_torch,
    run,
)

S, T, H, V = 8, 7, 16, 37
LENGTHS = (5, 1, 6, 3, 6, 2, 4, 6)  # of completions: pairs of 11, 3, 10 and 9 tokens
rows_held = pytest.mark.parametrize("rows", [99, 15, 4])  # one bin; three; pairs in parts

TYPES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sigmoid_norm", "sft",
)  # fmt: skip
LOSSES: list[PairLoss] = [
    *(DPO(kind) for kind in TYPES if kind not in ("exo_pair", "discopop")),
    DPO("exo_pair", label_smoothing=0.1),
    DPO("discopop", discopop_tau=0.5),  # the default's slope makes much of a rounding
    *(DPO(kind, label_smoothing=0.2) for kind in ("sigmoid", "robust", "aot", "aot_unpaired")),
    DPO(["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.5]),
    DPO(["aot", "ipo", "sft"], nll_weight=0.5),
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
    DPO("robust", average=True, ld_alpha=0.3, use_weighting=True, nll_weight=2.0),
    CPO(),
    CPO("hinge", nll_weight=0.0),
    CPO("ipo"),
    CPO("ipo", average=False, nll_weight=0.2),
    CPO(label_smoothing=0.2, average=True, alpha=0.1, beta=0.5),
    SimPO(),
    SimPO(beta=0.7, gamma=1.0, label_smoothing=0.1, alpha=0.1, nll_weight=0.5),
    ORPO(beta=0.5),
    ORPO(nll_weight=0.0),
]  # fmt: skip
BRIEF = [LOSSES[0], LOSSES[20], DPO("robust", average=True, ld_alpha=0.3, use_weighting=True,
                                    nll_weight=2.0), CPO(), SimPO(), ORPO(beta=0.5)]  # fmt: skip


def operands() -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = dict(x=(S, T, H), w=(V, H), b=(V,))
    return {n: torch.randn(s, device=DEVICE) / (4 if n == "w" else 1) for n, s in shapes.items()}


def completions(lengths: tuple[int, ...] = LENGTHS, T: int = T) -> Tensor:
    """(S, T) labels: a prompt, so many tokens, and, but for the last sequences, one of padding."""
    y = torch.randint(V, (len(lengths), T), generator=torch.Generator().manual_seed(1))
    for s, n in enumerate(lengths):
        pad = int(n < T and s < len(lengths) // 2)
        y[s, : T - pad - n] = y[s, T - pad :] = -100
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
    return near + torch.linspace(-0.7, 0.5, len(y), device=DEVICE)


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
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_pairs_are_those_of_full_logits(loss: PairLoss, rows: int) -> None:
    check(completions(), loss, rows=rows)


@pytest.mark.parametrize(("impl", "dtype"), IMPLS)
@pytest.mark.parametrize("loss", BRIEF, ids=str)
def test_kernels_and_half_precision(loss: PairLoss, impl: Any, dtype: torch.dtype) -> None:
    for rows in (99, 4):
        check(completions(), loss, dtype, rows, impl=impl)


@pytest.mark.parametrize("rows", [99, 4])
@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("loss", BRIEF, ids=str)
@pytest.mark.parametrize(
    ("T", "lengths"),
    [(7, (0, 3, 4, 5, 2, 0, 7, 6)), (7, (0, 3, 4, 1, 0, 2, 5, 6)), (7, (0, 0, 0, 0, 2, 1, 7, 5)),
     (7, (2, 7, 3, 5, 0, 0, 0, 0)), (1, (1,) * 8), (1, (1, 1, 0, 1, 0, 1, 0, 1)), (7, (7,) * 8)],
)  # fmt: skip
def test_completions_of_any_length(
    T: int, lengths: tuple[int, ...], loss: PairLoss, compact: bool, rows: int
) -> None:
    """Empty ones, no chosen tokens at all, one token, all of them."""
    inputs = operands()
    inputs["x"] = inputs["x"][:, :T]
    check(completions(lengths, T), loss, rows=rows, compact=compact, inputs=inputs)


@pytest.mark.parametrize("loss", [*BRIEF, DPO("aot")], ids=str)
def test_nothing_scored(loss: PairLoss) -> None:
    """The loss is that of log-probabilities of 0; gradients are 0, and metrics finite."""
    leaves, y = [t.requires_grad_() for t in operands().values()], completions((0,) * S)
    x, w, b = leaves
    ref = None if reference(y, loss) is None else torch.zeros(S, device=DEVICE)
    value, stats = linear_preference_loss(x, w, y, loss, b, ref_logps=ref)
    torch.testing.assert_close(value, dense(x, w, b, y=y, loss=loss, ref_logps=ref))
    assert all(not grad.any() for grad in torch.autograd.grad(value, leaves))
    assert all(t.isfinite().all() for t in (value, *stats[:3], stats.tokens.logp))


@pytest.mark.parametrize("loss", [BRIEF[1], DPO("aot"), CPO(), ORPO()], ids=str)
def test_no_pairs(loss: PairLoss) -> None:
    x, w = torch.empty(0, T, H, device=DEVICE, requires_grad=True), operands()["w"].requires_grad_()
    y = completions()[:0]
    value, stats = linear_preference_loss(x, w, y, loss, ref_logps=reference(y, loss))
    dx, dw = torch.autograd.grad(value, (x, w))
    assert value == 0 and dx.shape == x.shape and not dw.any() and stats.logps.shape == (0,)


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
    assert_no_worse_than_torch(op, ref, operands(), dtype)


@pytest.mark.parametrize("rows", [99, 9, 4])
@pytest.mark.parametrize("good", GOOD, ids=str)
@pytest.mark.parametrize(
    "kl", [None, 0.3, torch.tensor(0.3), torch.tensor([0.3]), torch.linspace(0, 1, S)], ids=str
)
@pytest.mark.parametrize("loss", KTOS, ids=str)
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


@pytest.mark.parametrize("lengths", [(0, 3, 1, 7, 0, 2, 1, 5), (0,) * 8, (3, 1, 4, 1, 5)], ids=str)
def test_kto_of_completions_of_any_length_and_number(lengths: tuple[int, ...]) -> None:
    good = torch.tensor(GOOD[0][: len(lengths)], device=DEVICE)
    y = completions(lengths)
    x = operands() | {"x": operands()["x"][: len(lengths)]}
    for loss in KTOS:
        given: Any = dict(y=y, good=good, loss=loss, ref_logps=reference(y, loss))
        op = lambda x, w, b, g=given: linear_kto_loss(  # noqa: E731
            x, w, g["y"], g["good"], g["loss"], b, ref_logps=g["ref_logps"]
        )[0]
        ref = lambda g=given, **t: dense_kto(**t, **g)  # noqa: E731
        assert_no_worse_than_torch(op, ref, x, torch.float32)
