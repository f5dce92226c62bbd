"""Preference losses as functions of the log-probabilities of whole completions.

A loss is a frozen dataclass: its fields are the options, checked when it is built; called, it gives
one differentiable loss a pair (KTO: an example). In the equations s is the logistic function, e the
label_smoothing, x the log-ratio logp - ref_logp, and w and l are beta * x of the chosen and the
rejected. Log-ratios of any size give finite losses and gradients; see EXP_MAX.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

# Exponents end here, and with them the gradient. e^40 is finite in fp32 even when ipo squares it.
EXP_MAX = 40.0


class Pairs(NamedTuple):
    """Log-probabilities of P pairs of completions, fp32 (fp64 for fp64)."""

    chosen: Tensor  # (P,)
    rejected: Tensor  # (P,)
    ref_chosen: Tensor | None = None  # (P,); None without a reference
    ref_rejected: Tensor | None = None
    chosen_length: Tensor | None = None  # (P,) scored tokens; for ipo and sigmoid_norm
    rejected_length: Tensor | None = None


class PairLoss(Protocol):
    """What makers of `Pairs` rely on; they take the mean of the losses over all pairs.

    Theirs to do: sums over tokens or, with `average` (never None once built), means; tokens past
    the pair's shorter length weighted by `ld_alpha` (None for 1); losses times WPO weights if
    `use_weighting`; all pairs in one call if `whole_batch`; and, on top, `nll` times the mean
    negative log-likelihood of the chosen tokens.
    """

    @property
    def average(self) -> bool | None: ...
    @property
    def ld_alpha(self) -> float | None: ...
    @property
    def use_weighting(self) -> bool: ...
    @property
    def whole_batch(self) -> bool: ...
    @property
    def needs_reference(self) -> bool: ...
    @property
    def nll(self) -> float: ...

    def __call__(self, pairs: Pairs) -> Tensor: ...  # (P,)
    def rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]: ...  # (P,) each, detached


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise ValueError(sentence)


def _check_options(o: Any) -> None:
    for name in ("beta", "discopop_tau"):
        value = getattr(o, name, 1.0)
        _require(0 < value < math.inf, f"{name} must be positive and finite, got {value}")
    for name in ("gamma", "nll_weight", "desirable_weight", "undesirable_weight"):
        value = getattr(o, name, 0.0)
        _require(0 <= value < math.inf, f"{name} must be at least 0 and finite, got {value}")
    for name in ("alpha", "f_alpha"):
        value = getattr(o, name, 0.0)
        _require(math.isfinite(value), f"{name} must be finite, got {value}")
    e = getattr(o, "label_smoothing", 0.0)
    _require(0 <= e < 0.5, f"label_smoothing must lie in [0, 0.5), got {e}")


def _check_name(option: str, name: str, table: Iterable[str]) -> None:
    _require(name in table, f"{option} must be one of {', '.join(table)}; got {name!r}")


def _check_pairs(pairs: Pairs, needs_reference: bool, takes_reference: bool) -> None:
    for name, t in zip(Pairs._fields, pairs, strict=True):
        if t is not None and (t.ndim != 1 or t.shape != pairs.chosen.shape):
            raise ValueError(
                f"all of Pairs must have one shape (P,): chosen has {tuple(pairs.chosen.shape)}, "
                f"{name} {tuple(t.shape)}"
            )
    given = pairs.ref_chosen is not None
    both = given == (pairs.ref_rejected is not None)
    _require(both, "give ref_chosen and ref_rejected, or neither")
    _require(given or not needs_reference, "give a reference in Pairs, or set reference_free")
    _require(takes_reference or not given, "this loss is reference-free: give none in Pairs")


def _logistic(z: Tensor, e: float) -> Tensor:
    """-(1 - e) log s(z) - e log s(-z), by log s(-z) = log s(z) - z."""
    return e * z - logsigmoid(z) if e else -logsigmoid(z)


def _power(x: Tensor, a: float) -> Tensor:
    """(e^(a x) - 1) / a, and x, its limit, at a = 0."""
    return torch.expm1((a * x).clamp_max(EXP_MAX)) / a if a else x


# f'(e^x), each f shifted such that f'(1) = 0: Wang et al. 2023, Table 1. None for x itself.
_SCORES: dict[str, Callable[[Tensor, "DPO"], Tensor] | None] = {
    "reverse_kl": None,
    "forward_kl": lambda x, o: _power(x, -1.0),
    "js_divergence": lambda x, o: math.log(2) + logsigmoid(x),
    "alpha_divergence": lambda x, o: _power(x, o.f_alpha - 1),
}


class _Terms(NamedTuple):
    """P pairs as the loss types of DPO see them."""

    o: "DPO"
    pairs: Pairs
    chosen: Tensor  # (P,) rewards, beta x
    rejected: Tensor
    score_chosen: Tensor  # (P,) beta f'(e^x)
    score_rejected: Tensor

    def margin(self) -> Tensor:
        return self.score_chosen - self.score_rejected

    def token_margin(self) -> Tensor:
        """The margin of scores over lengths; an empty completion's length counts as 1."""
        chosen, rejected = self.pairs.chosen_length, self.pairs.rejected_length
        if chosen is None or rejected is None:
            raise ValueError("ipo and sigmoid_norm need chosen_length and rejected_length in Pairs")
        return self.score_chosen / chosen.clamp_min(1) - self.score_rejected / rejected.clamp_min(1)


def _exo_pair(t: _Terms) -> Tensor:
    z, e = t.margin(), t.o.label_smoothing
    win = torch.sigmoid(z) * (logsigmoid(z) - math.log1p(-e))
    return win + torch.sigmoid(-z) * (logsigmoid(-z) - math.log(e))


def _aot(t: _Terms) -> Tensor:
    p = t.pairs
    z = (p.chosen - p.rejected).sort().values
    if p.ref_chosen is not None and p.ref_rejected is not None:
        z = z - (p.ref_chosen - p.ref_rejected).sort().values
    return _logistic(t.o.beta * z, t.o.label_smoothing)


def _discopop(t: _Terms) -> Tensor:
    z = t.margin()
    logistic = -logsigmoid(z)
    # torch's gradient of sigmoid, s (1 - s), is inexact where s is almost 1; this one is not.
    mix = logsigmoid(z / t.o.discopop_tau).exp()
    return logistic + mix * ((-z).clamp_max(EXP_MAX).exp() - logistic)


_LOSSES: dict[str, Callable[[_Terms], Tensor]] = {
    "sigmoid": lambda t: _logistic(t.margin(), t.o.label_smoothing),
    "hinge": lambda t: torch.relu(1 - t.margin()),
    "ipo": lambda t: ((t.token_margin() - 0.5) / t.o.beta).square(),
    "exo_pair": _exo_pair,
    "nca_pair": lambda t: (
        _logistic(t.chosen, 0.5) - (logsigmoid(t.chosen) + logsigmoid(-t.rejected)) / 2
    ),
    "robust": lambda t: _logistic(t.margin(), t.o.label_smoothing / (2 * t.o.label_smoothing - 1)),
    "bco_pair": lambda t: -logsigmoid(t.chosen) - logsigmoid(-t.rejected),
    "sppo_hard": lambda t: (
        ((t.chosen - 0.5) / t.o.beta).square() + ((t.rejected + 0.5) / t.o.beta).square()
    ),
    "aot": _aot,
    "aot_unpaired": lambda t: _logistic(
        t.chosen.sort().values - t.rejected.sort().values, t.o.label_smoothing
    ),
    "apo_zero": lambda t: torch.sigmoid(-t.chosen) + torch.sigmoid(t.rejected),
    "apo_down": lambda t: torch.sigmoid(t.chosen) + torch.sigmoid(t.rejected - t.chosen),
    "discopop": _discopop,
    "sigmoid_norm": lambda t: -logsigmoid(t.token_margin()),
    "sft": lambda t: 0.0 * t.margin(),
}
_SORTED = {"aot", "aot_unpaired"}
_SMOOTHED = {"sigmoid", "exo_pair", "robust"} | _SORTED
_PER_TOKEN = {"ipo", "sigmoid_norm"}
# Functions of each completion's reward on its own, where f-DPO's normaliser does not cancel.
_NO_DIVERGENCE = {"nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down"} | _SORTED


@dataclass(frozen=True)
class DPO:
    """Direct preference optimisation (Rafailov et al. 2023, equation 7) and its kin.

    d = beta (f'(x_w) - f'(x_l)); n_w and n_l are lengths; ValueError for what does not fit.

        sigmoid       -(1 - e) log s(d) - e log s(-d);  e > 0: conservative DPO, Mitchell 2023
        hinge         max(0, 1 - d);  Zhao et al. 2023 (SLiC-HF), section 2
        ipo           (f'(x_w)/n_w - f'(x_l)/n_l - 1/(2 beta))^2;  Azar et al. 2023, equation 17
        exo_pair      KL((s(d), s(-d)) || (1 - e, e)), e > 0;  Ji et al. 2024, equation 16
        nca_pair      -log s(w) - log s(-w)/2 - log s(-l)/2;  Chen et al. 2024, section 4
        robust        (-(1 - e) log s(d) + e log s(-d))/(1 - 2e);  Chowdhury et al. 2024, section 3
        bco_pair      -log s(w) - log s(-l);  Jung et al. 2024, section 4
        sppo_hard     (x_w - 1/(2 beta))^2 + (x_l + 1/(2 beta))^2;  Wu et al. 2024, equation 4.7
        aot           sigmoid of d = beta (sort(logp_w - logp_l) - sort(ref_w - ref_l)), and
        aot_unpaired  of d = sort(w) - sort(l), over all pairs;  Melnyk et al. 2024, section 3
        apo_zero      s(-w) + s(l);  D'Oosterlinck et al. 2024, equation 7
        apo_down      s(w) + s(l - w);  the same, equation 8
        discopop      -s(-d/tau) log s(d) + s(d/tau) e^-d;  Lu et al. 2024, equation 5
        sigmoid_norm  -log s(beta (f'(x_w)/n_w - f'(x_l)/n_l));  Lambert et al. 2024 (Tulu 3)
        sft           0 here; its weight is part of `nll`

    f' is x for reverse_kl, 1 - e^-x for forward_kl, log(2 s(x)) for js_divergence, and
    (e^(a x) - 1)/a, a = f_alpha - 1, for alpha_divergence (Wang et al. 2023, Table 1: alpha is -a).
    """

    loss_type: str | Sequence[str] = "sigmoid"  # several are summed (MPO); stored as a tuple
    loss_weights: Sequence[float] | None = None  # one a type; None for 1 each
    beta: float = 0.1
    label_smoothing: float = 0.0  # e; of several types, those with an e take it
    discopop_tau: float = 0.05
    f_divergence: str = "reverse_kl"
    f_alpha: float = 0.5
    reference_free: bool = False  # x is logp; Pairs without a reference
    ld_alpha: float | None = None  # LD-DPO, Liu et al. 2024; this and the next: see `PairLoss`
    use_weighting: bool = False  # WPO, Zhou et al. 2024, equation 2
    average: bool = False
    nll_weight: float = 0.0

    def __post_init__(self) -> None:
        names = (self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type)
        object.__setattr__(self, "loss_type", names)
        if self.loss_weights is not None:
            object.__setattr__(self, "loss_weights", tuple(self.loss_weights))
        for name in names:
            _check_name("loss_type", name, _LOSSES)
        _check_name("f_divergence", self.f_divergence, _SCORES)
        _check_options(self)
        self._check_combination(set(names))

    def _check_combination(self, names: set[str]) -> None:
        weights, f = self.loss_weights, self.f_divergence
        counts = weights is None or len(weights) == len(self.loss_type)
        _require(bool(names) and counts, "name a loss_type; loss_weights: None, or one for each")
        smoothed = "exo_pair" not in names or self.label_smoothing > 0
        _require(smoothed, "exo_pair needs a label_smoothing above 0; its paper recommends 1e-3")
        ld = self.ld_alpha is None or 0 <= self.ld_alpha <= 1
        _require(ld, f"ld_alpha must be None or lie in [0, 1], got {self.ld_alpha}")
        taken = {
            "label_smoothing": not names.isdisjoint(_SMOOTHED),
            "discopop_tau": "discopop" in names,
            "f_divergence": names.isdisjoint(_NO_DIVERGENCE) and not self.reference_free,
            "f_alpha": f == "alpha_divergence",
            "use_weighting": names.isdisjoint(_SORTED | {"sft"}),  # they keep no pair's own loss
            "average": names.isdisjoint(_PER_TOKEN),  # or they would divide by the length twice
        }
        for option, takes in taken.items():
            value, default = getattr(self, option), getattr(DPO, option)
            _require(
                takes or value == default,
                f"{option}={value!r} has no meaning with {self.loss_type}, f_divergence={f!r}, "
                f"reference_free={self.reference_free}: leave it at {default!r}",
            )

    def _weighted(self) -> list[tuple[str, float]]:
        weights = self.loss_weights or [1.0] * len(self.loss_type)
        return list(zip(self.loss_type, weights, strict=True))

    @property
    def whole_batch(self) -> bool:
        return not _SORTED.isdisjoint(self.loss_type)

    @property
    def needs_reference(self) -> bool:
        return not self.reference_free and any(name != "sft" for name in self.loss_type)

    @property
    def nll(self) -> float:
        return self.nll_weight + sum(weight for name, weight in self._weighted() if name == "sft")

    def _terms(self, pairs: Pairs) -> _Terms:
        _check_pairs(pairs, self.needs_reference, not self.reference_free)
        x, y, f = pairs.chosen, pairs.rejected, _SCORES[self.f_divergence]
        if pairs.ref_chosen is not None and pairs.ref_rejected is not None:
            x, y = x - pairs.ref_chosen, y - pairs.ref_rejected
        rewards = self.beta * x, self.beta * y
        scores = rewards if f is None else (self.beta * f(x, self), self.beta * f(y, self))
        return _Terms(self, pairs, *rewards, *scores)

    def __call__(self, pairs: Pairs) -> Tensor:
        t = self._terms(pairs)
        first, *others = (weight * _LOSSES[name](t) for name, weight in self._weighted())
        return sum(others, start=first)

    def rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        t = self._terms(pairs)
        return t.chosen.detach(), t.rejected.detach()


class _ReferenceFree:
    """What CPO, SimPO and ORPO share."""

    beta: float
    nll_weight: float
    alpha: float = 0.0
    ld_alpha: float | None = None
    use_weighting: bool = False
    whole_batch: bool = False
    needs_reference: bool = False

    def __post_init__(self) -> None:
        _check_options(self)

    @property
    def nll(self) -> float:
        return self.nll_weight

    def _shaped(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        _check_pairs(pairs, False, False)
        return _power(pairs.chosen, -self.alpha), _power(pairs.rejected, -self.alpha)

    def rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        chosen, rejected = self._shaped(pairs)
        return self.beta * chosen.detach(), self.beta * rejected.detach()


@dataclass(frozen=True)
class CPO(_ReferenceFree):
    """Contrastive preference optimisation (Xu et al. 2024, equation 3). With d = r_w - r_l:

        sigmoid  -(1 - e) log s(beta d) - e log s(-beta d)
        hinge    max(0, 1 - beta d)
        ipo      (d - 1/(2 beta))^2

    r is logp or, with alpha, AlphaPO's (1 - p^-alpha)/alpha, p = e^logp (Gupta et al. 2025), meant
    for means over tokens: see EXP_MAX. ValueError for what does not fit, a reference included.
    """

    loss_type: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    alpha: float = 0.0
    average: bool | None = None  # of logp over tokens; None for True with ipo, else False
    nll_weight: float = 1.0

    def __post_init__(self) -> None:
        _check_name("loss_type", self.loss_type, _CPO_LOSSES)
        super().__post_init__()
        smooth = self.label_smoothing == 0 or self.loss_type == "sigmoid"
        _require(smooth, f"label_smoothing is no option of {self.loss_type}: leave it at 0")
        if self.average is None:
            object.__setattr__(self, "average", self.loss_type == "ipo")

    def __call__(self, pairs: Pairs) -> Tensor:
        chosen, rejected = self._shaped(pairs)
        return _CPO_LOSSES[self.loss_type](chosen - rejected, self)


_CPO_LOSSES: dict[str, Callable[[Tensor, CPO], Tensor]] = {
    "sigmoid": lambda d, o: _logistic(o.beta * d, o.label_smoothing),
    "hinge": lambda d, o: torch.relu(1 - o.beta * d),
    "ipo": lambda d, o: (d - 0.5 / o.beta).square(),
}


@dataclass(frozen=True)
class SimPO(_ReferenceFree):
    """Simple preference optimisation (Meng et al. 2024, equation 6), on means over tokens.

        -(1 - e) log s(z) - e log s(-z),  z = beta (r_w - r_l) - gamma

    r and the errors are those of `CPO`.
    """

    beta: float = 0.1
    gamma: float = 0.5
    label_smoothing: float = 0.0
    alpha: float = 0.0
    nll_weight: float = 0.0
    average = True  # no annotation: not an option

    def __call__(self, pairs: Pairs) -> Tensor:
        chosen, rejected = self._shaped(pairs)
        return _logistic(self.beta * (chosen - rejected) - self.gamma, self.label_smoothing)


@dataclass(frozen=True)
class ORPO(_ReferenceFree):
    """Odds ratio preference optimisation (Hong et al. 2024, equations 4, 7), on means over tokens.

        -beta log s(o_w - o_l),  o = logp - log(1 - e^logp)

    logp counts as at most minus one machine epsilon, without a gradient beyond: the odds of
    probability 1, and of an empty completion, whose mean is 0, are infinite.
    """

    beta: float = 0.1
    nll_weight: float = 1.0
    average = True  # no annotation: not an option

    def __call__(self, pairs: Pairs) -> Tensor:
        return -self.beta * logsigmoid(self._ratio(pairs))

    def log_odds(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """(P,) log s(o_w - o_l) and o_w - o_l, detached: what is logged."""
        ratio = self._ratio(pairs).detach()
        return logsigmoid(ratio), ratio

    def _ratio(self, pairs: Pairs) -> Tensor:
        _check_pairs(pairs, False, False)
        top = -torch.finfo(pairs.chosen.dtype).eps
        x, y = pairs.chosen.clamp_max(top), pairs.rejected.clamp_max(top)
        return x - y + torch.log(torch.expm1(y) / torch.expm1(x))


@dataclass(frozen=True)
class KTO:
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, equation 7), on single completions.

        desirable_weight * s(-beta (x - kl))  or  undesirable_weight * s(beta (x - kl))

    x is logp without a reference. apo_zero_unpaired is the same without kl (D'Oosterlinck et al.
    2024, equation 7). ValueError for what does not fit.
    """

    loss_type: str = "kto"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    average: bool = False  # of logp over tokens, by the caller

    def __post_init__(self) -> None:
        _check_name("loss_type", self.loss_type, ("kto", "apo_zero_unpaired"))
        _check_options(self)

    def __call__(
        self, logp: Tensor, ref_logp: Tensor | None, desirable: Tensor, kl: Tensor | float | None
    ) -> Tensor:
        """(S,) weighted losses of (S,) log-probabilities; `desirable` is (S,) bool.

        kl is a scalar or (S,), None for 0, and used as it is, without gradient; in the paper it is
        the mean log-ratio of mismatched completions, or 0 where that is negative.
        """
        z, shape = self._reward(logp, ref_logp), logp.shape
        if desirable.dtype != torch.bool or desirable.shape != shape:
            raise ValueError(
                f"desirable must be bool of logp's shape {tuple(shape)}, got {desirable.dtype} of "
                f"shape {tuple(desirable.shape)}"
            )
        _require(kl is None or self.loss_type == "kto", f"{self.loss_type} has no kl: pass None")
        if isinstance(kl, Tensor):
            kl = kl.detach()
            fits = kl.ndim == 0 or kl.shape in ((1,), shape)
            _require(fits, "kl must be a scalar, or a tensor of logp's shape")
        z = z if kl is None else z - self.beta * kl
        good, bad = torch.sigmoid(-z), torch.sigmoid(z)
        return torch.where(desirable, self.desirable_weight * good, self.undesirable_weight * bad)

    def rewards(self, logp: Tensor, ref_logp: Tensor | None) -> Tensor:
        """(S,) beta * x, detached."""
        return self._reward(logp, ref_logp).detach()

    def _reward(self, logp: Tensor, ref_logp: Tensor | None) -> Tensor:
        fits = logp.ndim == 1 and (ref_logp is None or ref_logp.shape == logp.shape)
        _require(fits, "logp must have shape (S,), and ref_logp the same")
        return self.beta * (logp if ref_logp is None else logp - ref_logp)
