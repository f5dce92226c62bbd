"""Preference losses under a linear head: which tokens a completion's log-probability is made of.

    logp[s] = sum over tokens t of a[s, t] logp[s, t]        a: 1 or 1 / length if scored
    loss = mean over pairs of loss(chosen, rejected) + nll * mean over chosen tokens of -logp

All weights are known from the labels before any product, so that `linear_loss` takes the gradients
in forward, a few pairs at a time.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from liger_core.dispatch import accumulate_dtype
from liger_core.losses.preference import KTO, PairLoss, Pairs
from liger_core.ops.labels import IGNORE_INDEX, LabelScan
from liger_core.ops.linear_cross_entropy import linear_cross_entropy
from liger_core.ops.linear_head import HeadOptions
from liger_core.ops.linear_logprob import Output, TokenStats, linear_logprob
from liger_core.ops.linear_loss import LossFn, Together, check_sequences, linear_loss


class PreferenceStats(NamedTuple):
    """Values without gradients. Of pairs, the first half of the S sequences are the chosen ones."""

    logps: Tensor  # (S,) as the loss took them: sums or means over tokens
    rewards: Tensor  # (S,)
    nll: Tensor  # 0-d: mean negative log-likelihood of the chosen tokens; 0 where it has no weight
    tokens: TokenStats  # (S, T) each


def token_weights(
    y: Tensor,
    *,
    average: bool = False,
    ld_alpha: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(S, T) weights of tokens in the log-probability of their sequence; 0 where y is ignored.

    Args:
        y: (S, T) labels, for `ld_alpha` of chosen sequences and then as many rejected ones.
        average: divide by the number of scored labels, 1 for an empty completion.
        ld_alpha: weight of the labels of a pair beyond the shorter one's length (LD-DPO, Liu et
            al. 2024, equation 9); None for 1.
    """
    check_sequences(y, ld_alpha is not None)
    scored = y != ignore_index
    weights, lengths = scored.to(dtype), scored.sum(-1)
    if ld_alpha is not None:
        half = y.shape[0] // 2
        shared = torch.minimum(lengths[:half], lengths[half:]).repeat(2)
        beyond = scored.cumsum(-1) > shared[:, None]
        weights = torch.where(beyond, ld_alpha * weights, weights)
    return weights / lengths.clamp_min(1)[:, None] if average else weights


def linear_sequence_logprob(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    b: Tensor | None = None,
    *,
    average: bool = False,
    ld_alpha: float | None = None,
    **options: Unpack[HeadOptions],
) -> Tensor:
    """(S,) log-probabilities of sequences, such as a reference model's under `torch.no_grad()`.

    Arguments are those of `linear_logprob`, x (S, T, H) and y (S, T), and of `token_weights`.
    """
    logp = linear_logprob(x, w, y, b, **options)
    ignore_index = options.get("ignore_index", IGNORE_INDEX)
    weights = token_weights(
        y, average=average, ld_alpha=ld_alpha, ignore_index=ignore_index, dtype=logp.dtype
    )
    return (logp * weights).sum(-1)


def _weighting(tokens: TokenStats, scored: Tensor) -> Tensor:
    """(p,) weights of pairs: the product of both completions' (WPO, Zhou et al. 2024, equation 2).

    A completion's is exp(mean over tokens of logp - log sum_v p_v^2), a constant.
    """
    assert tokens.log_sum_sq_probs is not None
    aligned = (tokens.logp.detach() - tokens.log_sum_sq_probs) * scored
    weights = (aligned.sum(-1) / scored.sum(-1).clamp_min(1)).exp()
    half = weights.shape[0] // 2
    return weights[:half] * weights[half:]


def _pairs(logps: Tensor, ref_logps: Tensor | None, lengths: Tensor) -> Pairs:
    half = logps.shape[0] // 2
    ref = (None, None) if ref_logps is None else (ref_logps[:half], ref_logps[half:])
    return Pairs(logps[:half], logps[half:], *ref, lengths[:half], lengths[half:])


class PairShare:
    """What `linear_loss` is to be given for a preference loss, with an NLL term of weight `nll`.

    Args:
        loss: a `DPO`, `CPO`, `SimPO` or `ORPO`.
        y: (2P, T) labels of the completions; nll_y: those of the NLL, of which the chosen half
            counts.
        nll: the weight of the mean negative log-likelihood of the chosen tokens.
        ref_logps: (2P,) the reference model's log-probabilities, or None.
        dtype: of the sums.

    Attributes:
        together: as `linear_loss` takes it. needed: outputs that must be among its own.
    """

    def __init__(
        self, loss: PairLoss, y: Tensor, nll_y: Tensor, nll: float, ref_logps: Tensor | None,
        ignore_index: int = IGNORE_INDEX, dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        self.loss, self.nll, self.ref_logps, self.half = loss, nll, ref_logps, y.shape[0] // 2
        self.together: Together = "batch" if loss.whole_batch else "pair"
        self.needed: tuple[Output, ...] = ("log_sum_sq_probs",) if loss.use_weighting else ()
        self.scored = y != ignore_index
        self.lengths = self.scored.sum(-1).clamp_min(1)
        self.weights = token_weights(
            y, average=bool(loss.average), ld_alpha=loss.ld_alpha, ignore_index=ignore_index,
            dtype=dtype,
        )  # fmt: skip
        first = (torch.arange(y.shape[0], device=y.device) < self.half)[:, None]
        chosen = (nll_y != ignore_index) & first
        self.nll_weights = chosen / chosen.sum().clamp_min(1).to(dtype)

    def __call__(self, tokens: TokenStats, take: Callable[[Tensor], Tensor]) -> Tensor:
        logps = (tokens.logp * take(self.weights)).sum(-1)
        if self.half == 0:
            return logps.sum()
        ref = None if self.ref_logps is None else take(self.ref_logps)
        losses = self.loss(_pairs(logps, ref, take(self.lengths)))
        if self.loss.use_weighting:
            losses = losses * _weighting(tokens, take(self.scored))
        total = losses.sum() / self.half
        return (
            total - self.nll * (tokens.logp * take(self.nll_weights)).sum() if self.nll else total
        )


def _linear_pairs(
    x: Tensor, w: Tensor, labels: Tensor, y: Tensor, nll_y: Tensor, loss: PairLoss, nll: float,
    b: Tensor | None, ref_logps: Tensor | None, outputs: Sequence[Output], options: HeadOptions,
) -> tuple[Tensor, PreferenceStats]:  # fmt: skip
    """The loss with an NLL term of weight `nll`; labels are what y and nll_y score together."""
    ignore_index, dtype = options.get("ignore_index", IGNORE_INDEX), accumulate_dtype(x.dtype)
    share = PairShare(loss, y, nll_y, nll, ref_logps, ignore_index, dtype)
    value, tokens = linear_loss(
        x, w, labels, share, b, together=share.together,
        outputs=tuple({*outputs, *share.needed}), **options,
    )  # fmt: skip
    logps = (tokens.logp * share.weights).sum(-1)
    rewards = torch.cat(loss.rewards(_pairs(logps, ref_logps, share.lengths)))
    mean_nll = -(tokens.logp * share.nll_weights).sum() if nll else logps.new_zeros(())
    return value, PreferenceStats(logps, rewards, mean_nll, tokens)


CLASH = -(2**62)  # a label that no vocabulary has


def _union(y: Tensor, nll_y: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """What y or the chosen half of nll_y scores, CLASH where they differ; and where they do."""
    half = y.shape[0] // 2
    nll_y = torch.cat((nll_y[:half], torch.full_like(nll_y[half:], ignore_index)))
    scored, nll_scored = y != ignore_index, nll_y != ignore_index
    clash = scored & nll_scored & (y != nll_y)
    return torch.where(scored, y, nll_y).to(torch.int64).masked_fill(clash, CLASH), clash


def _clashes(labels: Tensor, clash: Tensor, w: Tensor, options: HeadOptions) -> bool:
    """Whether y and nll_y differ. Nothing waits for the device here but the count of the labels."""
    if not options.get("compact", True) or torch.compiler.is_compiling():
        return False  # a row of two labels is a bad one, and gives NaN
    shard = options.get("shard")
    V = w.shape[0] if shard is None else shard.total
    options["labels"] = LabelScan(labels, V, options.get("ignore_index", IGNORE_INDEX))
    try:
        options["labels"].counts()
    except ValueError:
        if not clash.any():
            raise
        return True
    return False


def linear_preference_loss(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    loss: PairLoss,
    b: Tensor | None = None,
    *,
    ref_logps: Tensor | None = None,
    nll_y: Tensor | None = None,
    outputs: Sequence[Output] = (),
    **options: Unpack[HeadOptions],
) -> tuple[Tensor, PreferenceStats]:
    """Mean loss of pairs under a linear head: DPO and its kin, CPO, SimPO, ORPO.

    Args:
        x: (2P, T, H) hidden states, of the chosen sequences and then of the rejected ones.
        w: (V, H) weight and b: (V,) bias of the head.
        y: (2P, T) labels of the completions, `ignore_index` elsewhere.
        loss: a `DPO`, `CPO`, `SimPO` or `ORPO`, which holds the options.
        ref_logps: (2P,) the reference model's log-probabilities (`linear_sequence_logprob` with the
            loss's own `average` and `ld_alpha`), or None.
        nll_y: (2P, T) labels of the NLL term, of which the chosen half counts; None for y. ORPO's
            are those of prompt and response.
        outputs: what `tokens` holds beside logp; see `linear_token_stats`.
        options: see `HeadOptions`.

    Returns:
        The loss, a scalar, and `PreferenceStats`. Products, memory and errors are those of
        `linear_loss`. Where y and nll_y score a position with different labels, the NLL is a
        cross entropy of its own: three products more of the chosen half; where labels are not
        counted (torch.compile, compact=False) such a position gives NaN.
    """
    check_sequences(y, True)
    ignore_index = options.get("ignore_index", IGNORE_INDEX)
    if ref_logps is not None and (ref_logps.shape != y.shape[:1] or ref_logps.requires_grad):
        raise ValueError(
            f"ref_logps must be ({y.shape[0]},) and need no gradient, got "
            f"{tuple(ref_logps.shape)}, requires_grad={ref_logps.requires_grad}"
        )
    if nll_y is None:
        return _linear_pairs(x, w, y, y, y, loss, loss.nll, b, ref_logps, outputs, options)
    if nll_y.shape != y.shape or not loss.nll:
        raise ValueError(
            f"nll_y must have y's shape {tuple(y.shape)}, and the loss an NLL term, got "
            f"{tuple(nll_y.shape)} and nll={loss.nll}; leave it out or set nll_weight"
        )
    labels, clash = _union(y, nll_y, ignore_index)
    if not _clashes(labels, clash, w, options):
        return _linear_pairs(x, w, labels, y, nll_y, loss, loss.nll, b, ref_logps, outputs, options)
    options.pop("labels", None)
    value, stats = _linear_pairs(x, w, y, y, y, loss, 0.0, b, ref_logps, outputs, options)
    half = y.shape[0] // 2
    if (low_rank := options.get("low_rank")) is not None:
        options["low_rank"] = (low_rank[0][:half], low_rank[1])
    nll = linear_cross_entropy(x[:half], w, nll_y[:half], b, **options)
    return value + loss.nll * nll, stats._replace(nll=nll.detach())


def kto_share(
    loss: KTO, weights: Tensor, desirable: Tensor, ref_logps: Tensor | None,
    kl: Tensor | float | None,
) -> LossFn:  # fmt: skip
    """What `linear_loss` is to be given for KTO; weights are `token_weights`, the rest as below."""
    S = weights.shape[0]
    kl_each = isinstance(kl, Tensor) and kl.shape == (S,)

    def share(tokens: TokenStats, take: Callable[[Tensor], Tensor]) -> Tensor:
        logps = (tokens.logp * take(weights)).sum(-1)
        ref = None if ref_logps is None else take(ref_logps)
        point = take(kl) if kl_each and isinstance(kl, Tensor) else kl
        return loss(logps, ref, take(desirable), point).sum() / max(S, 1)

    return share


def linear_kto_loss(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    desirable: Tensor,
    loss: KTO,
    b: Tensor | None = None,
    *,
    ref_logps: Tensor | None = None,
    kl: Tensor | float | None = None,
    outputs: Sequence[Output] = (),
    **options: Unpack[HeadOptions],
) -> tuple[Tensor, PreferenceStats]:
    """Mean loss of single completions under a linear head: KTO and apo_zero_unpaired.

    Args:
        x: (S, T, H) hidden states; w: (V, H) weight and b: (V,) bias of the head.
        y: (S, T) labels of the completions, `ignore_index` elsewhere.
        desirable: (S,) bool.
        loss: a `KTO`, which holds the options.
        ref_logps: (S,) the reference model's log-probabilities, or None.
        kl: the reference point, a scalar or (S,); None for 0. It gets no gradient.
        outputs: what `tokens` holds beside logp; see `linear_token_stats`.
        options: see `HeadOptions`.

    Returns:
        The loss, a scalar, and `PreferenceStats`, whose `nll` is 0. Products, memory and errors are
        those of `linear_loss`.
    """
    S = y.shape[0]
    if ref_logps is not None and (ref_logps.shape != (S,) or ref_logps.requires_grad):
        raise ValueError(
            f"ref_logps must be ({S},) and need no gradient: see linear_preference_loss"
        )
    if desirable.shape != (S,):
        raise ValueError(f"desirable must be ({S},), got {tuple(desirable.shape)}")
    if isinstance(kl, Tensor) and kl.shape not in ((), (1,), (S,)):
        raise ValueError(f"kl must be a scalar or ({S},), got {tuple(kl.shape)}")
    weights = token_weights(
        y, average=loss.average, ignore_index=options.get("ignore_index", IGNORE_INDEX),
        dtype=accumulate_dtype(x.dtype),
    )  # fmt: skip
    share = kto_share(loss, weights, desirable, ref_logps, kl)
    value, tokens = linear_loss(x, w, y, share, b, outputs=outputs, **options)
    logps = (tokens.logp * weights).sum(-1)
    zero = logps.new_zeros(())
    return value, PreferenceStats(logps, loss.rewards(logps, ref_logps), zero, tokens)


def mean_logits(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """(K,) means over positions and classes of x (K, ..., H) @ w.T + b, without logits; fp32.

    mean(x @ w.T) = mean over positions of x · mean over classes of w.
    """
    dtype = accumulate_dtype(x.dtype)
    x, w = x.detach(), w.detach()
    positions = x.flatten(1, -2) if x.dim() > 2 else x[:, None]
    out = (positions.mean(1, dtype=dtype) * w.mean(0, dtype=dtype)).sum(-1)  # never autocast
    return out if b is None else out + b.detach().mean(dtype=dtype)
