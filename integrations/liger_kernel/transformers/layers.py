"""What takes the place of a layer's forward: module-level functions of the module they serve.

They are bound as partials, never closures: deepcopy then rebinds them to the copy (a DPO reference
model is a deepcopy) and pickle can carry them.
"""

import sys
import types
from collections.abc import Callable
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from liger_core import layer_norm, rms_norm
from liger_core.dispatch import Impl
from liger_core.ops.glu import Activation
from liger_kernel.config import LigerConfig
from liger_kernel.transformers.recipes import Glu, LayerNorm, Norm, Part, Rope
from liger_kernel.transformers.rope import (
    liger_multimodal_rotary_pos_emb,
    liger_rotary_pos_emb,
    liger_rotary_pos_emb_vision,
)
from liger_kernel.transformers.swiglu import gated, packed, packed_gate

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


ROTARY = {
    "half": {
        "apply_rotary_pos_emb": liger_rotary_pos_emb,
        "apply_multimodal_rotary_pos_emb": liger_multimodal_rotary_pos_emb,
    },
    "interleaved": {"apply_rotary_pos_emb": partial(liger_rotary_pos_emb, interleaved=True)},
    "vision": {"apply_rotary_pos_emb_vision": liger_rotary_pos_emb_vision},
}
"""What an attention's forward calls, and what it is to call instead."""


def replacement(
    module: nn.Module, part: Part, config: LigerConfig
) -> tuple[str, Callable[..., Any], str] | str:
    """(attribute, what to put there, the op's name for the report), or why not."""
    impl, fn = config.impl, type(module).forward
    if isinstance(part, Rope):
        if not any(calls(fn, name) for name in ROTARY[part.kind]):
            return f"its forward does not call {' or '.join(ROTARY[part.kind])}"
        _rebind(type(module), part, impl)
        return "forward", partial(_attention, module, part, impl), "rope"
    if not fn.__module__.startswith(("transformers.models.", "torch.nn.")):
        return f"its forward is {fn.__module__}'s own"
    if isinstance(part, Norm):
        return "forward", partial(_norm, module, part, impl), "rms_norm"
    if isinstance(part, LayerNorm):
        if len(cast(nn.LayerNorm, module).normalized_shape) != 1:
            return "it normalises over several dimensions"
        return "forward", partial(_layer_norm, module, impl), "layer_norm"
    return _glu(module, part, config)


def _glu(
    module: nn.Module, part: Glu, config: LigerConfig
) -> tuple[str, Callable[..., Any], str] | str:
    fn: Any = getattr(module, part.act)
    if (act := _activations().get(type(fn))) is None:
        return f"its activation is {type(fn).__name__}"
    if fn._forward_hooks or fn._forward_pre_hooks:
        return "its activation has hooks"
    bound = module, act, config.impl, config.mlp_inplace
    if part.kind == "experts":
        if getattr(module.config, "_experts_implementation", None) == "eager":
            return "its experts run one by one; see set_experts_implementation"
        return "_apply_gate", partial(packed_gate, *bound[1:]), f"glu[{act}]"
    return "forward", partial(gated if part.kind == "split" else packed, *bound), f"glu[{act}]"


def calls(forward: Callable[..., Any], name: str) -> bool:
    """Whether the function names this global or attribute."""
    code = getattr(forward, "__code__", None)
    return code is not None and name in code.co_names


@cache
def _activations() -> dict[type, Activation]:
    from transformers.activations import ACT2FN

    return {type(ACT2FN[name]): act for name, act in ACTIVATIONS.items()}


def _norm(module: nn.Module, part: Norm, impl: Impl, x: Tensor) -> Tensor:
    eps, weight = cast(float, getattr(module, part.eps)), cast(Tensor, module.weight)
    return rms_norm(x, weight, eps, offset=part.offset, casting=part.casting, impl=impl)


def _layer_norm(module: Any, impl: Impl, input: Tensor) -> Tensor:
    device = input.device.type  # autocast runs torch's own in fp32, but on CPUs
    if device != "cpu" and torch.is_autocast_enabled(device) and input.dtype != torch.float64:
        input = input.float()
    return layer_norm(input, module.weight, module.bias, module.eps, impl=impl)


_WITH_ROTARY: dict[tuple[type, Impl], types.FunctionType] = {}  # torch.compile cannot trace a cache


def _attention(module: nn.Module, part: Rope, impl: Impl, *args: Any, **kwargs: Any) -> Any:
    key = type(module), impl
    if key not in _WITH_ROTARY:  # a model that was unpickled
        _rebind(type(module), part, impl)
    return _WITH_ROTARY[key](module, *args, **kwargs)


def _rebind(cls: type, part: Rope, impl: Impl) -> None:
    """Keep `cls.forward` over a copy of its globals in which the rotary function is ours.

    The copy is a module of its own: torch.compile looks globals up by the module's name.
    """
    fn = cast(types.FunctionType, cls.forward)  # pyright: ignore
    name = f"{__name__}.{fn.__module__}.{cls.__name__}_{impl}"
    copy = sys.modules.setdefault(name, types.ModuleType(name))
    vars(copy).update(fn.__globals__, __name__=name)
    vars(copy).update({name: partial(fn, impl=impl) for name, fn in ROTARY[part.kind].items()})
    there = _WITH_ROTARY.get((cls, impl))
    if there is not None and there.__code__ is fn.__code__:
        return
    own = types.FunctionType(fn.__code__, vars(copy), fn.__name__, fn.__defaults__, fn.__closure__)
    own.__kwdefaults__ = fn.__kwdefaults__
    _WITH_ROTARY[cls, impl] = own
