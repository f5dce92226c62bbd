"""Preference losses against the papers' formulas in fp64, against TRL's own code, and at extremes.

The formulas here are written as the papers write them, with probabilities and no care for
overflow; TRL's code, where it is installed, has to agree with them as well as the losses do.
"""

from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace as Namespace
from typing import Any

import pytest
import torch
from torch import Tensor

from liger_core.losses import CPO, DPO, KTO, ORPO, PairLoss, Pairs, SimPO
from numerics import DEVICE, assert_no_worse_than_torch

P = 16
LENGTHS = (torch.arange(P) % 5 + 1).to(DEVICE), (torch.arange(P) % 3 + 2).to(DEVICE)

DPOS = [
    DPO(beta=0.3),
    DPO(label_smoothing=0.2),
    DPO("hinge", beta=0.7),
    DPO("ipo", beta=0.4),
    DPO("exo_pair", beta=0.3, label_smoothing=0.1),
    DPO("nca_pair", beta=0.3),
    DPO("robust", beta=0.3),
    DPO("robust", beta=0.3, label_smoothing=0.2),
    DPO("bco_pair", beta=0.3),
    DPO("sppo_hard", beta=0.4),
    DPO("aot", beta=0.3),
    DPO("aot", beta=0.3, label_smoothing=0.2),
    DPO("aot_unpaired", beta=0.3, label_smoothing=0.2),
    DPO("apo_zero", beta=0.3),
    DPO("apo_down", beta=0.3),
    DPO("discopop", beta=0.3),
    DPO("discopop", beta=0.3, discopop_tau=1.5),
    DPO("sigmoid_norm", beta=0.6),
    DPO(beta=0.3, f_divergence="forward_kl"),
    DPO("ipo", beta=0.4, f_divergence="forward_kl"),
    DPO("sigmoid_norm", beta=0.6, f_divergence="js_divergence"),
    DPO("discopop", discopop_tau=0.4, f_divergence="js_divergence"),
    DPO("hinge", f_divergence="alpha_divergence", f_alpha=0.3),
    DPO("ipo", f_divergence="alpha_divergence"),
    DPO("exo_pair", f_divergence="alpha_divergence", f_alpha=1.0, label_smoothing=0.1),
    DPO(["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.5], beta=0.3),
    DPO(["robust", "hinge"], label_smoothing=0.1),
]
REFERENCE_FREE = [
    DPO(beta=0.3, reference_free=True),
    DPO("aot", beta=0.3, reference_free=True),
    DPO("sft", reference_free=True),
    CPO(beta=0.3),
    CPO(label_smoothing=0.2, alpha=0.25),
    CPO("hinge", beta=0.7),
    CPO("ipo", beta=0.4, alpha=-0.2),
    SimPO(),
    SimPO(beta=2.0, gamma=1.0, label_smoothing=0.1, alpha=0.25),
    ORPO(beta=0.3),
]
KTOS = [KTO(beta=0.3, desirable_weight=1.5, undesirable_weight=0.7), KTO("apo_zero_unpaired")]


def s(z: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-z))


def smoothed(z: Tensor, e: float) -> Tensor:
    return -(1 - e) * torch.log(s(z)) - e * torch.log(s(-z))


def f_prime(o: DPO, u: Tensor) -> Tensor:
    alpha = {"forward_kl": 1.0, "alpha_divergence": 1 - o.f_alpha}.get(o.f_divergence, 0.0)
    if o.f_divergence == "js_divergence":
        return torch.log(2 * u / (1 + u))
    return (1 - u**-alpha) / alpha if alpha else torch.log(u)


def dense_dpo(o: DPO, kind: str, pairs: Pairs) -> Tensor:
    beta, e = o.beta, o.label_smoothing
    none = torch.zeros_like(pairs.chosen)
    ref_w = none if pairs.ref_chosen is None else pairs.ref_chosen
    ref_l = none if pairs.ref_rejected is None else pairs.ref_rejected
    x_w, x_l = pairs.chosen - ref_w, pairs.rejected - ref_l
    w, l, f_w, f_l = beta * x_w, beta * x_l, f_prime(o, x_w.exp()), f_prime(o, x_l.exp())  # noqa: E741
    d, d_n, p = beta * (f_w - f_l), f_w / LENGTHS[0] - f_l / LENGTHS[1], s(beta * (f_w - f_l))
    mix = s(d / o.discopop_tau)
    formulas: dict[str, Callable[[], Tensor]] = {
        "sigmoid": lambda: smoothed(d, e),
        "hinge": lambda: (1 - d).clamp(min=0),
        "ipo": lambda: (d_n - 1 / (2 * beta)) ** 2,
        "exo_pair": lambda: p * torch.log(p / (1 - e)) + (1 - p) * torch.log((1 - p) / e),
        "nca_pair": lambda: -torch.log(s(w)) - 0.5 * torch.log(s(-w)) - 0.5 * torch.log(s(-l)),
        "robust": lambda: ((1 - e) * smoothed(d, 0) - e * smoothed(-d, 0)) / (1 - 2 * e),
        "bco_pair": lambda: -torch.log(s(w)) - torch.log(s(-l)),
        "sppo_hard": lambda: (x_w - 1 / (2 * beta)) ** 2 + (x_l + 1 / (2 * beta)) ** 2,
        "aot": lambda: smoothed(
            beta * ((pairs.chosen - pairs.rejected).sort()[0] - (ref_w - ref_l).sort()[0]), e
        ),
        "aot_unpaired": lambda: smoothed(beta * (x_w.sort()[0] - x_l.sort()[0]), e),
        "apo_zero": lambda: (1 - s(w)) + s(l),
        "apo_down": lambda: s(w) + (1 - s(w - l)),
        "discopop": lambda: (1 - mix) * smoothed(d, 0) + mix * torch.exp(-d),
        "sigmoid_norm": lambda: smoothed(beta * d_n, 0),
        "sft": lambda: 0 * (x_w + x_l),
    }
    return formulas[kind]()


def dense(o: PairLoss, pairs: Pairs) -> Tensor:
    if isinstance(o, DPO):
        weights = o.loss_weights or [1.0] * len(o.loss_type)
        terms = zip(weights, o.loss_type, strict=True)
        return torch.stack([c * dense_dpo(o, kind, pairs) for c, kind in terms]).sum(0)
    p, q = pairs.chosen.exp(), pairs.rejected.exp()
    if isinstance(o, ORPO):
        return -o.beta * torch.log(s(torch.log((p / (1 - p)) / (q / (1 - q)))))
    assert isinstance(o, CPO | SimPO)
    d = torch.log(p) - torch.log(q)
    if o.alpha:
        d = (1 - p**-o.alpha) / o.alpha - (1 - q**-o.alpha) / o.alpha
    if isinstance(o, SimPO):
        return smoothed(o.beta * d - o.gamma, o.label_smoothing)
    return {
        "sigmoid": smoothed(o.beta * d, o.label_smoothing),
        "hinge": (1 - o.beta * d).clamp(min=0),
        "ipo": (d - 1 / (2 * o.beta)) ** 2,
    }[o.loss_type]


def dense_kto(
    o: KTO, logp: Tensor, ref_logp: Tensor, good: Tensor, kl: Tensor | float | None
) -> Tensor:
    z = o.beta * (logp - ref_logp - (0.0 if kl is None else kl))
    return torch.where(good, o.desirable_weight * (1 - s(z)), o.undesirable_weight * (1 - s(-z)))


def sequences(reference: bool = True) -> dict[str, Tensor]:
    torch.manual_seed(0)
    names = ("chosen", "rejected", "ref_chosen", "ref_rejected")[: 4 if reference else 2]
    return {name: (-3 * torch.rand(P) - 0.1).to(DEVICE) for name in names}


def as_pairs(**logps: Tensor) -> Pairs:
    return Pairs(**logps, chosen_length=LENGTHS[0], rejected_length=LENGTHS[1])


@pytest.mark.parametrize("o", [*DPOS, *REFERENCE_FREE], ids=str)
def test_values_and_gradients_are_those_of_the_paper(o: PairLoss) -> None:
    inputs = sequences(o.needs_reference)
    assert o(as_pairs(**inputs)).shape == (P,)
    assert o(as_pairs(**{k: v.double() for k, v in inputs.items()})).dtype == torch.float64
    assert_no_worse_than_torch(
        lambda **x: o(as_pairs(**x)), lambda **x: dense(o, as_pairs(**x)), inputs, torch.float32
    )


@pytest.mark.parametrize("kl", [None, 0.3, torch.tensor(0.3), torch.linspace(0, 1, P)], ids=str)
@pytest.mark.parametrize("o", KTOS, ids=str)
def test_kto_values_and_gradients_are_those_of_the_paper(o: KTO, kl: Tensor | float | None) -> None:
    kl = None if o.loss_type != "kto" else kl
    kl = kl.to(DEVICE) if isinstance(kl, Tensor) else kl
    inputs, good = sequences(), torch.arange(P, device=DEVICE) % 3 == 0
    inputs = {"logp": inputs["chosen"], "ref_logp": inputs["ref_chosen"]}
    ours = lambda logp, ref_logp: o(logp, ref_logp, good, kl)  # noqa: E731
    theirs = lambda logp, ref_logp: dense_kto(o, logp, ref_logp, good, kl)  # noqa: E731
    assert_no_worse_than_torch(ours, theirs, inputs, torch.float32)
    free = o(inputs["logp"], None, good, kl)
    torch.testing.assert_close(free, o(inputs["logp"], torch.zeros_like(free), good, kl))


# --- TRL's code, which sits in methods of its trainers: it is called with what it reads of them ---


def trl_self(model: Any, **more: Any) -> Namespace:
    accelerator = Namespace(
        device=torch.device(DEVICE), gather=lambda t: t, gather_for_metrics=lambda t: t
    )
    return Namespace(
        model=model, accelerator=accelerator, aux_loss_enabled=False, precompute_ref_logps=True,
        ld_alpha=None, use_weighting=False, _metrics={"train": defaultdict(list)},
        _total_train_tokens=0, _tp_size=1, **more,
    )  # fmt: skip


def trl_batch(logps: Tensor, lengths: Tensor) -> tuple[Any, dict[str, Tensor]]:
    """A model and its inputs, for completions whose first token has all of the log-probability."""
    mask = torch.arange(lengths.max() + 1, device=DEVICE) <= lengths[:, None]
    mask[:, 0] = False  # the prompt, a token long
    tokens = torch.nn.functional.pad(logps[:, None], (0, mask.shape[1] - 2))
    zeros = torch.zeros_like(tokens)
    out = Namespace(log_probs=tokens, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    def model(**_: Any) -> Namespace:
        return out

    model.training = True  # pyright: ignore[reportFunctionMemberAccess]
    ids = torch.zeros_like(mask, dtype=torch.long)
    return model, {"input_ids": ids, "completion_mask": mask.long(), "attention_mask": ids + 1}


def trl_dpo(o: DPO, metrics: dict[str, list[float]], **logps: Tensor) -> Tensor:
    from trl import DPOTrainer

    pair = torch.cat([logps["chosen"], logps["rejected"]])
    model, inputs = trl_batch(pair, torch.cat(LENGTHS))
    inputs |= {f"{name}_logps": t for name, t in logps.items() if name.startswith("ref")}
    this = trl_self(
        model, f_divergence_type=o.f_divergence, f_alpha_divergence_coef=o.f_alpha, beta=o.beta,
        loss_types=o.loss_type, loss_weights=o.loss_weights or [1.0] * len(o.loss_type),
        label_smoothing=o.label_smoothing, args=Namespace(discopop_tau=o.discopop_tau),
    )  # fmt: skip
    loss = DPOTrainer._compute_loss(this, model, inputs, return_outputs=False)
    metrics |= this._metrics["train"]
    return loss


# TRL's sigmoid takes no label_smoothing; its discopop loses digits at the default tau.
NOT_TRLS = {DPO(label_smoothing=0.2), DPO("discopop", beta=0.3)}


@pytest.mark.parametrize("o", [o for o in DPOS if o not in NOT_TRLS], ids=str)
def test_dpo_is_trls(o: DPO) -> None:
    pytest.importorskip("trl")
    inputs, metrics = sequences(), {}

    def paper(**x: Tensor) -> Tensor:
        nll = -x["chosen"].sum() / LENGTHS[0].sum()
        return dense(o, as_pairs(**x)).mean() + o.nll * nll

    assert_no_worse_than_torch(lambda **x: trl_dpo(o, metrics, **x), paper, inputs, torch.float32)
    means = [r.mean().item() for r in o.rewards(as_pairs(**inputs))]
    assert means == pytest.approx([metrics["rewards/chosen"][-1], metrics["rewards/rejected"][-1]])


@pytest.mark.parametrize("o", [o for o in REFERENCE_FREE if not isinstance(o, DPO)], ids=str)
def test_cpo_simpo_and_orpo_are_trls(o: CPO | SimPO | ORPO) -> None:
    pytest.importorskip("trl")
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    kind = "simpo" if isinstance(o, SimPO) else getattr(o, "loss_type", "")
    this = trl_self(None, beta=o.beta, alpha=o.alpha, loss_type=kind,
                    simpo_gamma=getattr(o, "gamma", 0.0),
                    label_smoothing=getattr(o, "label_smoothing", 0.0))  # fmt: skip

    def theirs(chosen: Tensor, rejected: Tensor) -> Tensor:
        if isinstance(o, ORPO):
            return -ORPOTrainer.odds_ratio_loss(this, chosen, rejected)[0]
        return CPOTrainer.cpo_loss(this, chosen, rejected)[0]

    inputs = sequences(reference=False)
    pairs = Pairs(**inputs)
    assert_no_worse_than_torch(theirs, lambda **x: dense(o, Pairs(**x)), inputs, torch.float32)
    method = ORPOTrainer.odds_ratio_loss if isinstance(o, ORPO) else CPOTrainer.cpo_loss
    _, *rewards = method(this, *inputs.values())
    torch.testing.assert_close(o.rewards(pairs), tuple(rewards[:2]))
    if isinstance(o, ORPO):
        torch.testing.assert_close([t.mean() for t in o.log_odds(pairs)], rewards[2:])


@pytest.mark.parametrize("shift", [1.0, -1.0])  # a mean log-ratio below 0 counts as 0
@pytest.mark.parametrize("o", KTOS, ids=str)
def test_kto_is_trls(o: KTO, shift: float) -> None:
    pytest.importorskip("trl")
    from trl import KTOTrainer

    good, logps = torch.arange(P, device=DEVICE) % 3 == 0, sequences()
    kl_logps, ref_kl_logps = logps["rejected"] + shift, logps["ref_rejected"]
    kl = (kl_logps - ref_kl_logps).mean().clamp_min(0) if o.loss_type == "kto" else None
    metrics: dict[str, list[float]] = {}

    def theirs(logp: Tensor, ref_logp: Tensor) -> Tensor:
        model, inputs = trl_batch(logp, LENGTHS[0])
        inputs |= {"label": good, "ref_logps": ref_logp, "ref_KL_logps": ref_kl_logps}
        this = trl_self(
            model, beta=o.beta, loss_type=o.loss_type, calculate_KL=o.loss_type == "kto",
            desirable_weight=o.desirable_weight, undesirable_weight=o.undesirable_weight,
            _compute_kl_logps=lambda *_: kl_logps,
        )  # fmt: skip
        loss = KTOTrainer._compute_loss(this, model, inputs, return_outputs=False)
        metrics.update(this._metrics["train"])
        return loss

    def paper(logp: Tensor, ref_logp: Tensor) -> Tensor:
        return dense_kto(o, logp, ref_logp, good, kl).mean()

    inputs = {"logp": logps["chosen"], "ref_logp": logps["ref_chosen"]}
    assert_no_worse_than_torch(theirs, paper, inputs, torch.float32)
    reward = o.rewards(**inputs)[good].mean().item()
    assert reward == pytest.approx(metrics["rewards/chosen"][-1])


@pytest.mark.parametrize("o", [*DPOS, *REFERENCE_FREE, DPO("discopop", discopop_tau=4.0)], ids=str)
def test_any_log_ratio_gives_finite_losses_and_gradients(o: PairLoss) -> None:
    sizes = torch.tensor([-1e4, -1.0, -1e-8, 0.0, 1e4], device=DEVICE)
    w, l = torch.cartesian_prod(sizes, sizes).T.clone().requires_grad_()  # noqa: E741
    ref, length = torch.zeros(25, device=DEVICE), torch.arange(25, device=DEVICE) % 2
    pairs = Pairs(w, l, *[ref if o.needs_reference else None] * 2, length, length)
    losses = o(pairs)
    grads = torch.autograd.grad(losses.sum(), (w, l))
    assert all(t.isfinite().all() for t in (losses, *grads, *o.rewards(pairs)))


def test_kto_is_finite_for_any_log_ratio() -> None:
    x = torch.tensor([-1e4, 0.0, 1e4], device=DEVICE).repeat(2).requires_grad_()
    kl, good = torch.tensor([1e4], device=DEVICE), torch.arange(6, device=DEVICE) < 3
    losses = KTO()(x, None, good, kl)
    (grad,) = torch.autograd.grad(losses.sum(), x)
    assert not KTO()(x.detach(), None, good, kl.requires_grad_()).requires_grad
    assert losses.isfinite().all() and grad.isfinite().all()


def test_orpo_without_tokens_has_no_gradient() -> None:
    x = torch.tensor([0.0, -1.0], device=DEVICE, requires_grad=True)
    losses = ORPO()(Pairs(x, x.flip(0)))
    (grad,) = torch.autograd.grad(losses[1], x)
    assert losses[1] > losses[0] >= 0 and grad[0] == 0 and grad[1] < 0


def test_what_makers_of_pairs_are_told() -> None:
    mixture = DPO(["sigmoid", "sft", "sft"], loss_weights=[1, 0.25, 0.5], nll_weight=2.0)
    assert mixture.loss_type == ("sigmoid", "sft", "sft") and mixture.nll == 2.75
    assert mixture == DPO(("sigmoid", "sft", "sft"), (1, 0.25, 0.5), nll_weight=2.0)
    assert [DPO(kind).whole_batch for kind in ("aot", "aot_unpaired", "ipo")] == [True, True, False]
    needs = [DPO(), DPO("sft"), DPO(reference_free=True), CPO(), SimPO(), ORPO()]
    assert [o.needs_reference for o in needs] == [True, False, False, False, False, False]
    average = [DPO(), CPO(), CPO("ipo"), CPO("ipo", average=False), SimPO(), ORPO()]
    assert [o.average for o in average] == [False, False, True, False, True, True]
    assert [o.nll for o in (DPO(), CPO(), SimPO(), ORPO())] == [0, 1, 0, 1]
    assert not any(
        t.requires_grad for t in mixture.rewards(Pairs(*[torch.ones(2).requires_grad_()] * 4))
    )
    assert DPO()(Pairs(*[torch.ones(0)] * 4)).shape == (0,)


SEVEN = torch.zeros(7)
REFUSED = [
    (lambda: DPO("kto"), "loss_type must be one of sigmoid, hinge, .* sft; got 'kto'"),
    (lambda: CPO("simpo"), "loss_type must be one of sigmoid, hinge, ipo; got 'simpo'"),
    (lambda: KTO("bco"), "one of kto, apo_zero_unpaired"),
    (lambda: DPO(f_divergence="tv"), "f_divergence must be one of reverse_kl, .* got 'tv'"),
    (lambda: DPO([]), "name a loss_type"),
    (lambda: DPO(["ipo", "sft"], loss_weights=[1.0]), "loss_weights: None, or one for each"),
    (lambda: DPO(beta=0.0), "beta must be positive"),
    (lambda: CPO(beta=-1.0), "beta must be positive"),
    (lambda: SimPO(beta=float("nan")), "beta must be positive"),
    (lambda: ORPO(beta=float("inf")), "beta must be positive and finite"),
    (lambda: KTO(beta=0.0), "beta must be positive"),
    (lambda: DPO("discopop", discopop_tau=0.0), "discopop_tau must be positive"),
    (lambda: SimPO(gamma=-1.0), "gamma must be at least 0"),
    (lambda: CPO(nll_weight=-1.0), "nll_weight must be at least 0"),
    (lambda: KTO(undesirable_weight=-1.0), "undesirable_weight must be at least 0"),
    (lambda: CPO(alpha=float("nan")), "alpha must be finite"),
    (lambda: DPO("robust", label_smoothing=0.5), r"label_smoothing must lie in \[0, 0.5\)"),
    (lambda: CPO(label_smoothing=-0.1), r"label_smoothing must lie in \[0, 0.5\)"),
    (lambda: DPO("hinge", label_smoothing=0.1), "label_smoothing=0.1 has no meaning .*hinge"),
    (lambda: CPO("ipo", label_smoothing=0.1), "label_smoothing is no option of ipo"),
    (lambda: DPO("exo_pair"), "exo_pair needs a label_smoothing above 0"),
    (lambda: DPO(discopop_tau=0.1), "discopop_tau=0.1 has no meaning .* leave it at 0.05"),
    (lambda: DPO(f_alpha=0.1), "f_alpha=0.1 has no meaning .*reverse_kl"),
    (lambda: DPO(["sigmoid", "nca_pair"], f_divergence="forward_kl"), "no meaning .*nca_pair"),
    (lambda: DPO(f_divergence="forward_kl", reference_free=True), "no meaning .*reference_free"),
    (lambda: DPO(ld_alpha=1.5), r"ld_alpha must be None or lie in \[0, 1\], got 1.5"),
    *[(lambda kind=kind: DPO(kind, use_weighting=True), f"use_weighting=True .*'{kind}'")
      for kind in ("aot", "aot_unpaired", "sft")],
    (lambda: DPO("ipo", average=True), "average=True has no meaning .*ipo"),
    (lambda: DPO("ipo")(Pairs(SEVEN, SEVEN, SEVEN, SEVEN)), "need chosen_length"),
    (lambda: DPO("sigmoid_norm")(Pairs(SEVEN, SEVEN, SEVEN, SEVEN, SEVEN)), "need chosen_length"),
    (lambda: DPO()(Pairs(SEVEN, SEVEN)), "give a reference in Pairs, or set reference_free"),
    (lambda: DPO()(Pairs(SEVEN, SEVEN, SEVEN)), "ref_chosen and ref_rejected, or neither"),
    (lambda: DPO(reference_free=True)(Pairs(SEVEN, SEVEN, SEVEN, SEVEN)), "is reference-free"),
    (lambda: ORPO()(Pairs(SEVEN, SEVEN, SEVEN, SEVEN)), "is reference-free: give none"),
    (lambda: CPO()(Pairs(SEVEN, SEVEN[1:])), r"chosen has \(7,\), rejected \(6,\)"),
    (lambda: SimPO()(Pairs(SEVEN[None], SEVEN[None])), r"one shape \(P,\)"),
    (lambda: KTO()(SEVEN, SEVEN, SEVEN, None), "desirable must be bool"),
    (lambda: KTO()(SEVEN, SEVEN[1:], SEVEN > 0, None), "ref_logp the same"),
    (lambda: KTO()(SEVEN, None, SEVEN > 0, SEVEN[1:]), "kl must be a scalar"),
    (lambda: KTO("apo_zero_unpaired")(SEVEN, None, SEVEN > 0, 0.0), "has no kl: pass None"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "match"), REFUSED, ids=[match for _, match in REFUSED])
def test_what_does_not_fit_is_refused(make: Callable[[], object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_losses_compile_whole_for_all_sizes() -> None:
    losses = [DPO(["sigmoid", "aot", "discopop"]), CPO(alpha=0.25), ORPO()]

    def total(*x: Tensor) -> list[Tensor]:
        return [o(Pairs(*x) if o.needs_reference else Pairs(*x[:2])) for o in losses]

    compiled = torch.compile(total, fullgraph=True, dynamic=True, backend="eager")
    for size in (5, 9):
        x = [-torch.rand(size) for _ in range(4)]
        torch.testing.assert_close(compiled(*x), total(*x))
