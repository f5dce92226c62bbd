"""`concatenated_forward` of ORPO and CPO without logits; SimPO and AlphaPO are CPO's.

TRL's own makes the logits of all positions and takes from them: log-probabilities of completions,
the NLL of the chosen (ORPO's over prompt and response), and the mean of all logits for its metrics.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liger_core.losses import CPO, ORPO, SimPO
from liger_core.losses.linear import PairShare
from liger_kernel.trl.head import Fused, Share, for_now


def _loss(trainer: Any, orpo: bool) -> ORPO | CPO | SimPO | None:
    """The trainer's loss, or None where `liger_core` does not have it."""
    try:
        if orpo:
            return ORPO(beta=trainer.beta)
        given = dict(beta=trainer.beta, alpha=trainer.alpha, nll_weight=trainer.cpo_alpha)
        smoothing = trainer.label_smoothing
        if trainer.loss_type == "simpo":
            return SimPO(gamma=trainer.simpo_gamma, label_smoothing=smoothing, **given)
        if trainer.loss_type == "sigmoid":
            given["label_smoothing"] = smoothing
        return CPO(loss_type=trainer.loss_type, **given)
    except ValueError:
        return None


def concatenated_forward(
    trainer: Any, fused: Fused, orpo: bool, model: nn.Module, batch: dict[str, Any]
) -> tuple[Any, ...]:
    """Replaces that of an ORPOTrainer or a CPOTrainer; in place of logits, (P,) means of them."""
    both = trainer.concatenated_inputs(
        batch,
        is_encoder_decoder=False,
        padding_value=trainer.padding_value if orpo else trainer.pad_token_id,
        device=trainer.accelerator.device,
    )
    ids, mask, y = (both[f"concatenated_{n}"] for n in ("input_ids", "attention_mask", "labels"))
    nll_y = torch.where(mask == 1, ids, -100) if orpo else y
    half = batch["chosen_labels"].shape[0]
    loss = _loss(trainer, orpo)
    averaged, wants_nll = orpo or trainer.loss_type in ("ipo", "simpo"), orpo or trainer.cpo_alpha
    scored = torch.cat((torch.where(y == -100, nll_y, y)[:half], y[half:])) if wants_nll else y
    # The mean of the logits that is logged leaves out the last position in ORPO, and not in CPO.
    given: dict[str, Any] = {"labels": scored} if orpo else {"shift_labels": _shifted(scored)}
    y, nll_y = (t[:, 1:] if orpo else _shifted(t) for t in (y, nll_y))
    if trainer.aux_loss_enabled:
        given["output_router_logits"] = True
    share = None
    if loss is not None:
        share = Share.of(PairShare(loss, y, nll_y, loss.nll, None))
    with for_now(fused, share=share, positions=True, mean=None):
        out: Any = model(ids, attention_mask=mask, use_cache=False, fused_lm_head=True, **given)
        mean: Any = fused.mean
    logps = (out.log_probs * (y != -100)).sum(-1)
    if averaged:
        logps = logps / (y != -100).sum(-1)
    nll = logps.new_zeros(())
    if wants_nll:
        chosen = nll_y[:half] != -100
        nll = -(out.log_probs[:half] * chosen).sum() / chosen.sum()
    found = (logps[:half], logps[half:], mean[:half], mean[half:], nll)
    return (*found, out.aux_loss) if trainer.aux_loss_enabled else found


def _shifted(labels: Tensor) -> Tensor:
    return F.pad(labels[:, 1:], (0, 1), value=-100)
