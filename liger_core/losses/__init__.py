"""Preference losses: pure functions of log-probabilities, and the same under a linear head."""

from liger_core.losses.linear import (
    PreferenceStats,
    linear_kto_loss,
    linear_preference_loss,
    linear_sequence_logprob,
    mean_logits,
    token_weights,
)
from liger_core.losses.preference import CPO, DPO, KTO, ORPO, PairLoss, Pairs, SimPO

__all__ = [
    "CPO",
    "DPO",
    "KTO",
    "ORPO",
    "PairLoss",
    "Pairs",
    "PreferenceStats",
    "SimPO",
    "linear_kto_loss",
    "linear_preference_loss",
    "linear_sequence_logprob",
    "mean_logits",
    "token_weights",
]
