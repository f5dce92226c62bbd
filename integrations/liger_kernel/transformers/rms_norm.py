"""LigerRMSNorm, under upstream's name."""

import torch
from torch import Tensor, nn

from liger_core import rms_norm
from liger_core.ops.rms_norm import Casting


class LigerRMSNorm(nn.Module):
    """RMSNorm as `liger_core.rms_norm`.

    Args:
        hidden_size: width of the last dimension.
        eps: added to the mean square.
        offset: added to the weight; 1.0 with `init_fn="zeros"` for Gemma.
        casting_mode: "llama" or "gemma".
        init_fn: "ones" or "zeros", the weight's first value.
        in_place, row_mode: accepted for compatibility and without effect: nothing that the caller
            owns is ever written to, and rows are laid out by size.
        elementwise_affine: False for no weight.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        offset: float = 0.0,
        casting_mode: Casting = "llama",
        init_fn: str = "ones",
        in_place: bool = True,
        row_mode: bool | None = None,
        elementwise_affine: bool = True,
    ) -> None:
        super().__init__()
        if casting_mode not in ("llama", "gemma"):
            raise ValueError(f"casting_mode must be 'llama' or 'gemma', got {casting_mode!r}")
        if init_fn not in ("ones", "zeros"):
            raise ValueError(f"init_fn must be 'ones' or 'zeros', got {init_fn!r}")
        self.variance_epsilon, self.offset = eps, offset
        self.casting_mode: Casting = casting_mode
        weight = (torch.ones if init_fn == "ones" else torch.zeros)(hidden_size)
        if elementwise_affine:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", torch.ones(hidden_size) - offset, persistent=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(
            hidden_states, self.weight, self.variance_epsilon,
            offset=self.offset, casting=self.casting_mode,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}, offset={self.offset}"
