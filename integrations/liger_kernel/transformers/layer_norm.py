"""LigerLayerNorm, under upstream's name."""

import torch
from torch import Tensor, nn

from liger_core import layer_norm
from liger_core.dispatch import Impl


class LigerLayerNorm(nn.Module):
    """LayerNorm as `liger_core.layer_norm`.

    Args:
        hidden_size: width of the last dimension.
        eps: added to the variance.
        bias: True for a bias that is trained; False leaves it at 0, a parameter all the same, so
            that state dicts fit upstream's.
        init_fn: "ones" or "zeros", the weight's first value.
        impl: see `liger_core.dispatch.use_triton`.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        bias: bool = False,
        init_fn: str = "ones",
        impl: Impl | None = None,
    ) -> None:
        super().__init__()
        if init_fn not in ("ones", "zeros"):
            raise ValueError(f"init_fn must be 'ones' or 'zeros', got {init_fn!r}")
        weight = (torch.ones if init_fn == "ones" else torch.zeros)(hidden_size)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(hidden_size), requires_grad=bias)
        self.variance_epsilon: float = eps
        self.impl: Impl = impl or "auto"

    def forward(self, hidden_states: Tensor) -> Tensor:
        return layer_norm(
            hidden_states, self.weight, self.bias, self.variance_epsilon, impl=self.impl
        )

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"
