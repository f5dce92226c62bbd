"""Upstream's GRPO loss under a linear head, which TRL before 1.13 calls; gradients in forward."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from liger_core.ops.linear_head import HeadOptions
from liger_core.ops.linear_logprob import TokenStats, linear_logprob
from liger_core.ops.linear_loss import linear_loss
from liger_kernel.chunked_loss.functional import Metrics
from liger_kernel.chunked_loss.modules import _FusedLinearLoss

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
BY_TOKENS = ("dapo", "cispo", "vespo")  # divided by the tokens of all processes' batches
LOSS_TYPES = (*CLIPPED, "cispo", "sapo", "vespo")
LEVELS = ("token", "sequence")


class _Sampled(NamedTuple):
    """What is known of some completions; (B, T) each but for advantages, (B,)."""

    mask: Tensor
    advantages: Tensor
    old: Tensor | None
    ref: Tensor | None
    ratio: Tensor | None  # of the trainer's probabilities to the sampler's; (B, 1) too


class LigerFusedLinearGRPOLoss(_FusedLinearLoss):
    """GRPO and its kin, of the log-probabilities of sampled tokens.

    Called with `attention_mask` (B, T) for what counts of `selected_token_ids`, `advantages` (B,),
    and log-probabilities by the policy that sampled, by the reference and by the sampler's own
    arithmetic (`vllm_is_ratio`). Metrics: mean KL, where beta is not 0; the share clipped.

    Raises:
        ValueError: options that are not known or not positive; dr_grpo without
            `max_completion_length`; `beta` without a reference.
    """

    beta: float
    use_ref_model: bool
    epsilon_low: float
    epsilon_high: float
    loss_type: str
    max_completion_length: int | None
    importance_sampling_level: str
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    temperature: float
    delta: float | None
    use_bias_correction_kl: bool
    vespo_k_pos: float
    vespo_lambda_pos: float
    vespo_k_neg: float
    vespo_lambda_neg: float
    memory_budget: int | None

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
        *,
        memory_budget: int | None = None,
    ) -> None:
        for name, value, known in (
            ("loss_type", loss_type, LOSS_TYPES),
            ("importance_sampling_level", importance_sampling_level, LEVELS),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
        for name, value in (
            ("sapo_temperature_pos", sapo_temperature_pos),
            ("sapo_temperature_neg", sapo_temperature_neg),
            ("delta", delta),
        ):
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if loss_type == "dr_grpo" and max_completion_length is None:
            raise ValueError("dr_grpo divides by max_completion_length; pass it")
        super().__init__(
            beta=beta, compiled=compiled, use_ref_model=use_ref_model, chunk_size=chunk_size,
            epsilon_low=epsilon_low, epsilon_high=epsilon_high, loss_type=loss_type,
            max_completion_length=max_completion_length,
            importance_sampling_level=importance_sampling_level,
            sapo_temperature_pos=sapo_temperature_pos, sapo_temperature_neg=sapo_temperature_neg,
            temperature=temperature, delta=delta, use_bias_correction_kl=use_bias_correction_kl,
            vespo_k_pos=vespo_k_pos, vespo_lambda_pos=vespo_lambda_pos, vespo_k_neg=vespo_k_neg,
            vespo_lambda_neg=vespo_lambda_neg, memory_budget=memory_budget,
        )  # fmt: skip

    def forward(
        self, _input: Tensor, lin_weight: Tensor, selected_token_ids: Tensor,
        attention_mask: Tensor, advantages: Tensor, bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None, old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None, ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None, vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> tuple[Tensor, Metrics]:  # fmt: skip
        mask = attention_mask != 0
        y = selected_token_ids.masked_fill(~mask, -100)
        o = HeadOptions(temperature=self.temperature, memory_budget=self.memory_budget)
        ref = ref_per_token_logps
        if self.beta and self.use_ref_model and ref is None:
            if ref_input is None or ref_weight is None:
                raise ValueError("beta needs ref_per_token_logps, or ref_input and ref_weight")
            with torch.no_grad():
                ref = linear_logprob(ref_input, ref_weight, y, ref_bias, **o)
        # What is not scored has log-probability 0 here, and must not get a ratio from there.
        old, ref = (
            None if t is None else t.float().masked_fill(~mask, 0)
            for t in (old_per_token_logps, ref)
        )
        sampled = _Sampled(mask, advantages, old, ref, vllm_is_ratio)
        weights = self._weights(mask, num_items_in_batch)

        def share(tokens: TokenStats, take: Callable[[Tensor], Tensor]) -> Tensor:
            some = _Sampled(*(None if t is None else take(t) for t in sampled))  # pyright: ignore
            losses = self._terms(tokens.logp, some)[0]
            return ((losses * some.mask).sum(-1) * take(weights)).sum()

        loss, tokens = linear_loss(_input, lin_weight, y, share, bias, **o)
        _, *rest = self._terms(tokens.logp, sampled)
        count = mask.sum().clamp_min(1)
        return loss, tuple((t * mask).sum() / count for t in rest if t is not None)

    def _weights(self, mask: Tensor, num_items: Tensor | float | None) -> Tensor:
        """(B,) of the sum over each completion's tokens."""
        lengths = mask.sum(-1).float()
        if self.loss_type in ("grpo", "sapo"):
            return 1 / (len(mask) * lengths.clamp_min(1))
        if self.loss_type == "bnpo":
            divisor = lengths.sum()
        elif self.loss_type in BY_TOKENS:
            parallel = dist.is_available() and dist.is_initialized()
            if num_items is None:
                divisor = lengths.sum()
                if parallel:
                    dist.all_reduce(divisor)
            else:
                divisor = torch.as_tensor(num_items, device=mask.device).float()
            divisor = divisor / (dist.get_world_size() if parallel else 1)
        else:
            most = self.max_completion_length if self.loss_type == "dr_grpo" else None
            divisor = lengths.new_tensor(float(len(mask) * (most or 1)))
        return (1 / divisor.clamp_min(1)).expand(len(mask))

    def _terms(self, logp: Tensor, some: _Sampled) -> tuple[Tensor, Tensor | None, Tensor]:
        """Each token's loss, its KL where beta is not 0, and whether its ratio is clipped."""
        a = some.advantages[:, None] if some.advantages.dim() == 1 else some.advantages
        log_ratio = logp - (logp.detach() if some.old is None else some.old)
        if self.importance_sampling_level == "sequence":
            lengths = some.mask.sum(-1, keepdim=True).clamp_min(1)
            ratio = ((log_ratio * some.mask).sum(-1, keepdim=True) / lengths).exp()
        else:
            ratio = log_ratio.exp()
        low, high = ratio < 1 - self.epsilon_low, ratio > 1 + self.epsilon_high
        if self.loss_type == "cispo":
            low, high = torch.zeros_like(low), ratio > self.epsilon_high
            loss = -ratio.clamp(max=self.epsilon_high).detach() * a * logp
        elif self.loss_type == "sapo":
            low = high = torch.zeros_like(low)
            t = torch.where(a > 0, self.sapo_temperature_pos, self.sapo_temperature_neg)
            loss = -torch.sigmoid(t * (ratio - 1)) * 4 / t * a
        elif self.loss_type == "vespo":
            low = high = torch.zeros_like(low)
            loss = -self._gamma(log_ratio.detach(), a, some) * a * logp
        else:
            clipped = ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
            most = ratio if self.delta is None else ratio.clamp(max=self.delta)
            loss = -torch.min(most * a, clipped * a)
        if some.ratio is not None and self.loss_type != "vespo":
            loss = loss * some.ratio
        kl = None
        if self.beta:
            log_ref = (logp.detach() if some.ref is None else some.ref) - logp
            kl = log_ref.exp() - log_ref - 1
            kl = kl * ratio if self.use_bias_correction_kl else kl
            loss = loss + self.beta * kl
        return loss, kl, (low & (a < 0)) | (high & (a > 0))

    def _gamma(self, log_ratio: Tensor, a: Tensor, some: _Sampled) -> Tensor:
        """(B, 1) weights of VESPO: e^l w^k e^(-l w), w the ratio of whole completions."""
        least = torch.tensor(1e-8).log().item()
        log_w = (log_ratio.clamp(-20, 20) * some.mask).sum(-1, keepdim=True)
        if some.ratio is not None:
            log_w = log_w + some.ratio.log().clamp(least, 20).sum(-1, keepdim=True)
        log_w = log_w.clamp(least, 20)
        k = torch.where(a >= 0, self.vespo_k_pos, self.vespo_k_neg)
        rate = torch.where(a >= 0, self.vespo_lambda_pos, self.vespo_lambda_neg).clamp_min(1e-4)
        return (rate + k * log_w - rate * log_w.exp()).exp().nan_to_num(0.0, 0.0, 0.0)
