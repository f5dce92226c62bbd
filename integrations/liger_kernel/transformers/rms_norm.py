"""LigerRMSNorm and LigerFusedAddRMSNorm, under upstream's names."""

import torch
from torch import Tensor, nn

from liger_core import add_rms_norm, rms_norm
from liger_core.ops.rms_norm import CASTINGS, Casting


class _Norm(nn.Module):
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
        if casting_mode not in CASTINGS:
            raise ValueError(f"casting_mode must be one of {CASTINGS}, got {casting_mode!r}")
        if init_fn not in ("ones", "zeros"):
            raise ValueError(f"init_fn must be 'ones' or 'zeros', got {init_fn!r}")
        self.hidden_size, self.variance_epsilon, self.offset = hidden_size, eps, offset
        self.casting_mode: Casting = casting_mode
        weight = (torch.ones if init_fn == "ones" else torch.zeros)(hidden_size)
        self.weight = nn.Parameter(weight) if elementwise_affine else None

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, eps={self.variance_epsilon}, offset={self.offset}"


class LigerRMSNorm(_Norm):
    """RMSNorm as `liger_core.rms_norm`.

    Args:
        hidden_size: width of the last dimension.
        eps: added to the mean square.
        offset: added to the weight; 1.0 with `init_fn="zeros"` for Gemma.
        casting_mode: "llama", "gemma" or "none".
        init_fn: "ones" or "zeros", the weight's first value.
        in_place, row_mode: accepted for compatibility and without effect: nothing that the caller
            owns is ever written to, and rows are laid out by size.
        elementwise_affine: False for no weight.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(
            hidden_states, self.weight, self.variance_epsilon,
            offset=self.offset, casting=self.casting_mode,
        )  # fmt: skip


class LigerFusedAddRMSNorm(_Norm):
    """(norm(x + r), x + r) as `liger_core.add_rms_norm`; arguments as of `LigerRMSNorm`."""

    def forward(self, hidden_states: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return add_rms_norm(
            hidden_states, residual, self.weight, self.variance_epsilon,
            offset=self.offset, casting=self.casting_mode,
        )  # fmt: skip
