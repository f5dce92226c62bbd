"""Upstream's preference losses under a linear head, in its argument order, over liger_core.losses.

Every function returns `(loss, metrics)`; metrics carry no gradient. Arguments that they share:

    _input          (B, T, H) hidden states; of pairs, the chosen half and then the rejected one
    weight, bias    (V, H) and (V,) of the head, bias None for none
    target          (B, T) labels of the completions, ignore_index elsewhere
    ref_*           the reference model's, from which its log-probabilities are taken
    average_log_prob  a sequence's log-probability is the mean over its tokens, not the sum
    compiled, chunk_size  taken and without effect: nothing here is compiled, and memory is bounded
                    by `liger_core.ops.linear_head.HeadOptions`'s budget
    memory_budget   ours: that budget in bytes; None for its default

Metrics of pairs: (chosen_logps (P,), rejected_logps (P,), chosen_logits_mean, rejected_logits_mean,
chosen_nll_loss, *aux), where the means of logits run over all positions, ignored ones too.
ValueError for an option that the loss does not take, or what does not fit.
"""

import torch
from torch import Tensor

from liger_core.losses import (
    CPO,
    DPO,
    KTO,
    ORPO,
    PairLoss,
    Pairs,
    PreferenceStats,
    SimPO,
    linear_kto_loss,
    linear_preference_loss,
    linear_sequence_logprob,
    mean_logits,
)

__all__ = [
    "liger_fused_linear_cpo",
    "liger_fused_linear_dpo",
    "liger_fused_linear_kto",
    "liger_fused_linear_orpo",
    "liger_fused_linear_simpo",
]

Metrics = tuple[Tensor, ...]


def _pair_metrics(stats: PreferenceStats, x: Tensor, w: Tensor, b: Tensor | None) -> Metrics:
    chosen, rejected = mean_logits(x.unflatten(0, (2, -1)), w, b).unbind()
    return *_halves(stats.logps), chosen, rejected, stats.nll, *_halves(stats.rewards)


def _pairs(
    x: Tensor, w: Tensor, y: Tensor, loss: PairLoss, b: Tensor | None, ignore_index: int,
    memory_budget: int | None, ref_logps: Tensor | None = None, nll_y: Tensor | None = None,
) -> tuple[Tensor, PreferenceStats, Metrics]:  # fmt: skip
    value, stats = linear_preference_loss(
        x, w, y, loss, b, ref_logps=ref_logps, nll_y=nll_y, ignore_index=ignore_index,
        memory_budget=memory_budget,
    )  # fmt: skip
    return value, stats, _pair_metrics(stats, x, w, b)


def _reference(
    use_ref_model: bool, x: Tensor | None, w: Tensor | None, b: Tensor | None, y: Tensor,
    average: bool, ignore_index: int, memory_budget: int | None,
) -> Tensor | None:  # fmt: skip
    """(B,) the reference model's log-probabilities, None without one."""
    if not use_ref_model:
        return None
    if x is None or w is None:
        raise ValueError("use_ref_model needs ref_input and ref_weight; pass both or set it False")
    with torch.no_grad():
        return linear_sequence_logprob(
            x, w, y, b, average=average, ignore_index=ignore_index, memory_budget=memory_budget
        )


def _halves(t: Tensor) -> tuple[Tensor, Tensor]:
    half = t.shape[0] // 2
    return t[:half], t[half:]


def liger_fused_linear_dpo(
    _input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ref_input: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ignore_index: int = -100,
    beta: float = 0.1,
    compute_nll_loss: bool = False,
    compiled: bool = True,
    use_ref_model: bool = True,
    average_log_prob: bool = False,
    chunk_size: int = 1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    discopop_tau: float = 0.05,
    alpha: float = 1.0,
    *,
    memory_budget: int | None = None,
) -> tuple[Tensor, Metrics]:
    """`liger_core.losses.DPO` plus alpha times the chosen NLL; aux: chosen and rejected rewards."""
    loss = DPO(
        loss_type, beta=beta, label_smoothing=label_smoothing, discopop_tau=discopop_tau,
        reference_free=not use_ref_model, average=average_log_prob,
        nll_weight=alpha if compute_nll_loss else 0.0,
    )  # fmt: skip
    ref = _reference(
        use_ref_model, ref_input, ref_weight, ref_bias, target, average_log_prob, ignore_index,
        memory_budget,
    )  # fmt: skip
    value, _, metrics = _pairs(_input, weight, target, loss, bias, ignore_index, memory_budget, ref)
    return value, metrics


def liger_fused_linear_orpo(
    _input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    beta: float = 0.1,
    compute_nll_loss: bool = True,
    nll_target: Tensor | None = None,
    compiled: bool = True,
    chunk_size: int = 1,
    *,
    memory_budget: int | None = None,
) -> tuple[Tensor, Metrics]:
    """`liger_core.losses.ORPO`; aux: chosen and rejected rewards, mean log s(log-odds), log-odds.

    nll_target: (B, T) labels of the NLL term, of which the chosen half counts; None for target.
    """
    loss = ORPO(beta, nll_weight=1.0 if compute_nll_loss else 0.0)
    nll_y = nll_target if compute_nll_loss else None
    value, stats, metrics = _pairs(
        _input, weight, target, loss, bias, ignore_index, memory_budget, nll_y=nll_y
    )
    ratio, odds = loss.log_odds(Pairs(*_halves(stats.logps)))
    return value, (*metrics, ratio.mean(), odds.mean())


def liger_fused_linear_cpo(
    _input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    beta: float = 0.1,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
    compute_nll_loss: bool = True,
    compiled: bool = True,
    average_log_prob: bool = False,
    chunk_size: int = 1,
    *,
    memory_budget: int | None = None,
) -> tuple[Tensor, Metrics]:
    """`liger_core.losses.CPO` plus alpha times the chosen NLL; aux: chosen and rejected rewards."""
    loss = CPO(
        beta=beta, label_smoothing=label_smoothing, average=average_log_prob,
        nll_weight=alpha if compute_nll_loss else 0.0,
    )  # fmt: skip
    value, _, metrics = _pairs(_input, weight, target, loss, bias, ignore_index, memory_budget)
    return value, metrics


def liger_fused_linear_simpo(
    _input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    beta: float = 0.1,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
    compute_nll_loss: bool = False,
    compiled: bool = True,
    gamma: float = 0.5,
    chunk_size: int = 1,
    *,
    memory_budget: int | None = None,
) -> tuple[Tensor, Metrics]:
    """`liger_core.losses.SimPO` plus alpha times the chosen NLL; aux: both halves' rewards."""
    loss = SimPO(
        beta=beta, gamma=gamma, label_smoothing=label_smoothing,
        nll_weight=alpha if compute_nll_loss else 0.0,
    )  # fmt: skip
    value, _, metrics = _pairs(_input, weight, target, loss, bias, ignore_index, memory_budget)
    return value, metrics


def liger_fused_linear_kto(
    _input: Tensor,
    weight: Tensor,
    target: Tensor,
    preference_labels: Tensor,
    bias: Tensor | None = None,
    ref_input: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    kl: Tensor | None = None,
    ignore_index: int = -100,
    beta: float = 0.1,
    compiled: bool = True,
    use_ref_model: bool = True,
    average_log_prob: bool = False,
    chunk_size: int = 1,
    *,
    memory_budget: int | None = None,
) -> tuple[Tensor, Metrics]:
    """`liger_core.losses.KTO` of single completions.

    preference_labels: (B,), true for desirable ones. kl: a scalar or (B,), None for 0.

    Metrics: sums over the desirable and over the other sequences, of log-probabilities, of logits
    (all positions and classes) and of rewards: six scalars.
    """
    loss = KTO(beta=beta, average=average_log_prob)
    good = preference_labels.to(torch.bool)
    ref = _reference(
        use_ref_model, ref_input, ref_weight, ref_bias, target, average_log_prob, ignore_index,
        memory_budget,
    )  # fmt: skip
    value, stats = linear_kto_loss(
        _input, weight, target, good, loss, bias, ref_logps=ref, kl=kl, ignore_index=ignore_index,
        memory_budget=memory_budget,
    )  # fmt: skip
    logits = mean_logits(_input, weight, bias) * (_input[0].shape[0] * weight.shape[0])
    sums = (
        (t * side).sum() for t in (stats.logps, logits, stats.rewards) for side in (good, ~good)
    )
    return value, tuple(sums)
