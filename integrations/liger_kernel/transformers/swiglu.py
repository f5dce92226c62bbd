"""LigerSwiGLUMLP, under upstream's name, with the parameter names of transformers' MLPs."""

from typing import Any, ClassVar

from torch import Tensor, nn

from liger_core import glu
from liger_core.ops.glu import Activation


class GatedMLP(nn.Module):
    """down_proj(act(gate_proj(x)) * up_proj(x)).

    Args:
        config: has `hidden_size`, `intermediate_size`, optionally `mlp_bias`, and the activation's
            name in `hidden_act` or `hidden_activation`.
    """

    act: ClassVar[Activation]
    names: ClassVar[tuple[str, ...]]  # of the activation in a model's configuration

    def __init__(self, config: Any) -> None:
        super().__init__()
        name = getattr(config, "hidden_activation", None) or config.hidden_act
        if name not in self.names:
            raise ValueError(
                f"{type(self).__name__} computes {self.names[0]}, but the configuration names "
                f"{name!r}; use the model's own MLP"
            )
        self.config = config
        self.hidden_size, self.intermediate_size = config.hidden_size, config.intermediate_size
        bias = getattr(config, "mlp_bias", False)
        self.gate_proj = nn.Linear(self.hidden_size, self.intermediate_size, bias=bias)
        self.up_proj = nn.Linear(self.hidden_size, self.intermediate_size, bias=bias)
        self.down_proj = nn.Linear(self.intermediate_size, self.hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(glu(self.gate_proj(x), self.up_proj(x), self.act))


class LigerSwiGLUMLP(GatedMLP):
    """The MLP of Llama and its kin: silu."""

    act = "silu"
    names = ("silu", "swish")
