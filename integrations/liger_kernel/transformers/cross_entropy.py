"""LigerCrossEntropyLoss, under upstream's name."""

from torch import Tensor, nn

from liger_core.ops.cross_entropy import Reduction
from liger_kernel.transformers import functional


class LigerCrossEntropyLoss(nn.Module):
    """Cross entropy of logits; see `liger_core.cross_entropy` for the options.

    Args:
        weight, return_z_loss, return_token_accuracy, return_predicted_tokens: refused.
        lse_square_scale: weight of the z-loss.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        super().__init__()
        functional.refuse(
            weight=weight, return_z_loss=return_z_loss,
            return_token_accuracy=return_token_accuracy,
            return_predicted_tokens=return_predicted_tokens,
        )  # fmt: skip
        self.options = {
            "ignore_index": ignore_index,
            "lse_square_scale": lse_square_scale,
            "label_smoothing": label_smoothing,
            "reduction": reduction,
            "softcap": softcap,
        }

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """(N, V) logits and (N,) labels to the loss."""
        return functional.liger_cross_entropy(input, target, **self.options)
