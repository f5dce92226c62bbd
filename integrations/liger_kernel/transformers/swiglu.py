"""The gated MLPs with silu, under upstream's names and with transformers' parameter names.

Backward uses up the gate and the up projection, `inplace` of `liger_core.glu`, where nobody else
can have seen them.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from liger_core import glu, glu_packed, tiled
from liger_core.dispatch import Impl
from liger_core.ops.glu import Activation
from liger_kernel.transformers.engines import seen


def unseen(*linears: nn.Module) -> bool:
    """Whether nobody but the caller sees what these return: plain linears without hooks. Autograd's
    own check of versions is off under the saved-tensor hooks of checkpointing.
    """
    return not (torch.compiler.is_compiling() or nn_module._global_forward_hooks) and all(
        type(m) is nn.Linear and not seen(m._forward_hooks) and "forward" not in vars(m)
        for m in linears
    )


def gated(module: Any, act: Activation, impl: Impl, inplace: bool, x: Tensor) -> Tensor:
    """down_proj(act(gate_proj(x)) * up_proj(x)) of a module with these projections.

    inplace: let backward use up the first two's outputs where they are `unseen`.
    """
    g, u = module.gate_proj(x), module.up_proj(x)
    inplace = inplace and unseen(module.gate_proj, module.up_proj)
    return module.down_proj(glu(g, u, act, inplace=inplace, impl=impl))


def packed(module: Any, act: Activation, impl: Impl, inplace: bool, x: Tensor) -> Tensor:
    """The same where one `gate_up_proj` gives both, the gate first."""
    gu = module.gate_up_proj(x)
    inplace = inplace and unseen(module.gate_up_proj)
    return module.down_proj(glu_packed(gu, act, inplace=inplace, impl=impl))


def packed_gate(act: Activation, impl: Impl, inplace: bool, gate_up_out: Tensor) -> Tensor:
    """`_apply_gate` of transformers' stacked experts, whose products nobody else sees."""
    inplace = inplace and not torch.compiler.is_compiling()
    return glu_packed(gate_up_out, act, inplace=inplace, impl=impl)


class MLP(nn.Module):
    """What the MLPs below have in common.

    Args:
        config: has `hidden_size`, `intermediate_size` and the activation's name, in `hidden_act` or
            `hidden_activation`.

    Raises:
        ValueError: an activation that this class does not compute.
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


class GatedMLP(MLP):
    """down_proj(act(gate_proj(x)) * up_proj(x)); biases where `config.mlp_bias` is true."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        bias = getattr(config, "mlp_bias", False)
        self.gate_proj = nn.Linear(self.hidden_size, self.intermediate_size, bias=bias)
        self.up_proj = nn.Linear(self.hidden_size, self.intermediate_size, bias=bias)
        self.down_proj = nn.Linear(self.intermediate_size, self.hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return gated(self, self.act, "auto", True, x)


class TiledMLP(GatedMLP):
    """A GatedMLP over tiles of tokens, for long contexts: `liger_core.tiled`.

    Args:
        config: as for GatedMLP.
        num_shards: how many tiles; None for sequence length over hidden size, rounded up.
    """

    def __init__(self, config: Any, num_shards: int | None = None) -> None:
        super().__init__(config)
        self.num_shards = num_shards

    def forward(self, x: Tensor) -> Tensor:
        return tiled(super().forward, x, self.parameters(), tiles=self.num_shards)


class LigerSwiGLUMLP(GatedMLP):
    """The MLP of Llama and its kin: silu."""

    act = "silu"
    names = ("silu", "swish")


class LigerTiledSwiGLUMLP(TiledMLP, LigerSwiGLUMLP):
    """LigerSwiGLUMLP over tiles of tokens."""


class LigerPhi3SwiGLUMLP(MLP):
    """The MLP of Phi-3 and GLM-4: gate and up in one projection, the gate first; no biases."""

    act = "silu"
    names = ("silu", "swish")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.gate_up_proj = nn.Linear(self.hidden_size, 2 * self.intermediate_size, bias=False)
        self.down_proj = nn.Linear(self.intermediate_size, self.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return packed(self, self.act, "auto", True, hidden_states)
