"""LigerFusedLinearCrossEntropyLoss, under upstream's name."""

import torch
from torch import Tensor, nn

from liger_core.ops.reduction import Reduction
from liger_kernel.transformers import functional


class LigerFusedLinearCrossEntropyLoss(nn.Module):
    """Cross entropy under a linear head without its logits; see `liger_core.linear_cross_entropy`.

    Args:
        ce_weight: (V,) weights of the classes. use_token_scaling: `token_scaling`.
        lse_square_scale: weight of the z-loss.
        return_*: return a `functional.CrossEntropyOutput` with what was asked for.
        accum_dtype: in which the weight's gradient is summed.
    """

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        super().__init__()
        self.options = {
            "ce_weight": ce_weight,
            "ignore_index": ignore_index,
            "lse_square_scale": lse_square_scale,
            "label_smoothing": label_smoothing,
            "reduction": reduction,
            "softcap": softcap,
            "return_z_loss": return_z_loss,
            "accum_dtype": accum_dtype,
            "use_token_scaling": use_token_scaling,
            "return_token_accuracy": return_token_accuracy,
            "return_predicted_tokens": return_predicted_tokens,
        }

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor | functional.CrossEntropyOutput:
        """(V, H) weight, (N, H) hidden states, (N,) labels and (V,) bias to the loss."""
        return functional.liger_fused_linear_cross_entropy(
            _input, lin_weight, target, bias, **self.options
        )
