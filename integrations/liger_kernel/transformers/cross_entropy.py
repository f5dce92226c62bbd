"""LigerCrossEntropyLoss, under upstream's name."""

from torch import Tensor, nn

from liger_core.ops.reduction import Reduction
from liger_kernel.transformers import functional


class LigerCrossEntropyLoss(nn.Module):
    """Cross entropy of logits; see `liger_core.cross_entropy` for the options.

    Args:
        weight: (V,) weights of the classes. lse_square_scale: weight of the z-loss.
        return_*: return a `functional.CrossEntropyOutput` with what was asked for.
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
        self.options = {
            "weight": weight,
            "ignore_index": ignore_index,
            "lse_square_scale": lse_square_scale,
            "label_smoothing": label_smoothing,
            "reduction": reduction,
            "softcap": softcap,
            "return_z_loss": return_z_loss,
            "return_token_accuracy": return_token_accuracy,
            "return_predicted_tokens": return_predicted_tokens,
        }

    def forward(self, input: Tensor, target: Tensor) -> Tensor | functional.CrossEntropyOutput:
        """(N, V) logits and (N,) labels to the loss."""
        return functional.liger_cross_entropy(input, target, **self.options)
