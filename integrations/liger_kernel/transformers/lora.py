"""What PEFT and engines put around a head: where its product is, and what is added to it."""

from typing import Any

import torch
from torch import Tensor, nn

from liger_core.ops.sharded import is_dtensor
from liger_kernel.transformers.engines import WRAPPERS, class_of, is_linear, seen


def inner(head: Any) -> nn.Module | None:
    """What this module calls in order to be a head; None where it is one itself."""
    at = head._modules
    if "modules_to_save" in at:  # the condition is that of PEFT's own forward
        name = None if head.disable_adapters else next(iter(head.active_adapters), None)
        saved = at["modules_to_save"]
        return saved[name] if name in saved else at["original_module"]
    return next((at[name] for name in WRAPPERS if name in at), None)


def sites(head: nn.Module) -> list[nn.Module]:
    """The modules that may be the head's own product: plain linears, LoRA around one."""
    at: Any = head._modules
    if "modules_to_save" in at:
        return [*sites(at["original_module"]), *sites(at["modules_to_save"])]
    if "_checkpoint_wrapped_module" in at:  # would run the head again, with nothing in the note
        return []
    if isinstance(head, nn.ModuleDict):
        return [site for module in head.values() for site in sites(module)]
    if (name := next((n for n in WRAPPERS if n in at), None)) is not None:
        return sites(at[name])
    cls = class_of(head)
    lora = cls.__module__ == "peft.tuners.lora.layer" and cls.__name__ == "Linear"
    plain = is_linear(at.get("base_layer") if lora else head)
    return [head] if plain and not getattr(head, "fan_in_fan_out", False) else []


def linear(head: Any) -> nn.Linear:
    """The product of one of the `sites`."""
    return head if is_linear(head) else head.base_layer


def added(head: Any, x: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any] | None:
    """Bias and LoRA, as PEFT's forward has them: `b` and `low_rank` of the losses under a head.

    None where they are more than that: DoRA and its kin, adapters by row, hooks that would be
    passed over, adapters that PEFT is about to unmerge, or that are around a head that is split.
    """
    base = linear(head)
    if base is head:
        return {"b": base.bias}
    if (head.merged and head.disable_adapters) or not _plain(base):
        return None
    if head.merged or head.disable_adapters:
        return {"b": base.bias}
    active = [name for name in head.active_adapters if name in head.lora_A]
    if active and is_dtensor(x, base.weight):
        return None
    if kwargs or args or any(name in head.lora_variant for name in active):
        return None
    b, us, vs = base.bias, list[Tensor](), list[Tensor]()
    for name in active:
        A, B, s = head.lora_A[name], head.lora_B[name], head.scaling[name]
        if not _plain(B):
            return None
        u = A(head.lora_dropout[name](head._cast_input_dtype(x, A.weight.dtype))) * s
        us.append(u.to(x.dtype))
        vs.append(B.weight.to(base.weight.dtype))
        if B.bias is not None:
            b = b + (B.bias * s).to(b.dtype)
    return {"b": b} | ({"low_rank": (torch.cat(us, -1), torch.cat(vs, -1))} if us else {})


def _plain(module: Any) -> bool:
    """A linear layer that nobody has put anything around; its own forward may be a fused one."""
    return is_linear(module) and not seen(module._forward_hooks, module._forward_pre_hooks)
