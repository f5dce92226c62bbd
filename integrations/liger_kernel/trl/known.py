"""What DPO and KTO are going to make of log-probabilities, before they are there.

TRL computes the policy's log-probabilities before the reference's; here the reference goes first,
as where it is precomputed. With it the loss of each pair is known inside lm_head, as `head.py`
has it. A combination of options that `liger_core` has no loss for is not foreseen, which costs
one product.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from liger_core.losses import DPO, KTO
from liger_core.losses.linear import PairShare, kto_share, token_weights
from liger_kernel.trl.head import Fused, Share, for_now

TEXT = {  # all that KTO's compute_ref_log_probs takes: no pictures
    *("label", "input_ids", "attention_mask", "completion_mask"),
    *("KL_input_ids", "KL_attention_mask", "KL_completion_mask"),
}
SMOOTHED = {"exo_pair", "robust", "aot", "aot_unpaired"}  # by TRL; its sigmoid is not


def dpo_loss(trainer: Any) -> DPO | None:
    """The trainer's loss, or None where `liger_core` does not have it."""
    types = set(trainer.loss_types)
    smoothing = trainer.label_smoothing if types & SMOOTHED else 0.0
    if smoothing and "sigmoid" in types:
        return None
    alpha = trainer.f_alpha_divergence_coef
    f = trainer.f_divergence_type
    try:
        return DPO(
            loss_type=tuple(trainer.loss_types),
            loss_weights=tuple(trainer.loss_weights),
            beta=trainer.beta,
            label_smoothing=smoothing,
            ld_alpha=trainer.ld_alpha,
            use_weighting=trainer.use_weighting,
            f_divergence=f,
            **({"f_alpha": alpha} if f == "alpha_divergence" else {}),
            **({"discopop_tau": trainer.args.discopop_tau} if "discopop" in types else {}),
        )
    except ValueError:
        return None


def kto_loss(trainer: Any) -> KTO | None:
    """The same of a KTOTrainer."""
    try:
        return KTO(
            loss_type=trainer.loss_type,
            beta=trainer.beta,
            desirable_weight=trainer.desirable_weight,
            undesirable_weight=trainer.undesirable_weight,
        )
    except ValueError:
        return None


def _labels(inputs: dict[str, Any]) -> Tensor:
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    return labels[:, 1:]


def _reference(trainer: Any, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    model = trainer.model if trainer.ref_model is None else trainer.ref_model
    return trainer.compute_ref_log_probs(model, inputs)


def compute_dpo_loss(
    trainer: Any, fused: Fused, own: Callable[..., Any], model: Any, inputs: Any,
    return_outputs: bool,
) -> Any:  # fmt: skip
    """Replaces a DPOTrainer's `_compute_loss`, which is `own`."""
    loss = dpo_loss(trainer) if torch.is_grad_enabled() else None
    if loss is None:
        return own(model, inputs, return_outputs)
    names = ("ref_chosen_logps", "ref_rejected_logps")
    if not trainer.precompute_ref_logps:
        inputs = {**inputs, **dict(zip(names, _reference(trainer, inputs), strict=True))}
    ref = torch.cat([inputs[name] for name in names]).float()
    share = PairShare(loss, y := _labels(inputs), y, loss.nll, ref)
    share.lengths = inputs["completion_mask"].sum(-1).clamp_min(1)  # TRL counts a first token too
    with for_now(trainer, precompute_ref_logps=True), for_now(fused, share=Share.of(share)):
        return own(model, inputs, return_outputs)


def compute_kto_loss(
    trainer: Any, fused: Fused, own: Callable[..., Any], model: Any, inputs: Any,
    return_outputs: bool,
) -> Any:  # fmt: skip
    """Replaces a KTOTrainer's `_compute_loss`, which is `own`."""
    ready = trainer.precompute_ref_logps or set(inputs) <= TEXT
    loss = kto_loss(trainer) if ready and torch.is_grad_enabled() else None
    if loss is None:
        return own(model, inputs, return_outputs)
    if not trainer.precompute_ref_logps:
        found = dict(zip(("ref_logps", "ref_KL_logps"), _reference(trainer, inputs), strict=True))
        inputs = {**inputs, **{name: t for name, t in found.items() if t is not None}}
    compute_kl, point = trainer._compute_kl_logps, list[Tensor]()

    def compute_kl_logps(*args: Any) -> Any:
        """TRL's, of the policy; and what it makes of it, the mean over processes or 0."""
        if (logps := compute_kl(*args)) is not None:
            kl = (logps - inputs["ref_KL_logps"].to(logps.device)).mean().detach()
            point.append(trainer.accelerator.gather_for_metrics(kl).mean().clamp(min=0))
        return logps

    y, desirable = _labels(inputs), inputs["label"].bool()
    weights, ref = token_weights(y), inputs["ref_logps"].float()

    def share(tokens: Any, take: Callable[[Tensor], Tensor]) -> Tensor:
        kl = point[-1] if point else None
        return kto_share(loss, weights, desirable, ref, kl)(tokens, take)

    with (
        for_now(trainer, precompute_ref_logps=True),
        for_now(fused, share=Share(share, "sequence")),
        for_now(trainer, _compute_kl_logps=compute_kl_logps),
    ):
        return own(model, inputs, return_outputs)
