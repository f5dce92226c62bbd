"""What engines of parallel training make of modules, and what a fused head has to know of it."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from liger_core.ops.sharded import is_dtensor

WRAPPERS = ("_fsdp_wrapped_module", "_orig_mod")


def class_of(module: nn.Module) -> type[nn.Module]:
    """The module's class, and not the one that FSDP2's `fully_shard` derives from it."""
    cls, *bases = type(module).__mro__
    if not bases[0].__module__.startswith("torch.distributed."):
        return cls
    return next(c for c in bases if not c.__module__.startswith("torch.distributed."))


def is_linear(module: nn.Module | None) -> bool:
    """Whether it is `nn.Linear` and no subclass, but for FSDP2's own."""
    return type(module) is nn.Linear or (module is not None and class_of(module) is nn.Linear)


def seen(*hooks: Mapping[int, Any]) -> bool:
    """Whether somebody is among these hooks; DeepSpeed's, which gather weights, are nobody's."""
    return any(
        not (getattr(hook, "__module__", None) or "").startswith("deepspeed.")
        for each in hooks
        for hook in each.values()
    )


def split_by_engine(forward: Any) -> bool:
    """Whether this closure around a head's forward only moves tensors: transformers' TP."""
    return (getattr(forward, "__module__", None) or "").endswith(".tensor_parallel")


def check_tied(model: Any, head: nn.Module) -> None:
    """RuntimeError where FSDP splits a tied head apart from the embedding: the two then lose each
    other's gradients, with a patch or without. torch 2.13 refuses it itself under FSDP2.
    """
    apart = "_fsdp_wrapped_module" in head._modules or _own_unit(head)
    if apart and model.config.get_text_config().tie_word_embeddings:
        raise RuntimeError(
            "lm_head is an FSDP unit of its own, but its weight is shared with the embedding, and "
            "FSDP then trains them apart; leave lm_head in the root unit, or untie the two "
            "(config.tie_word_embeddings=False)"
        )


def _own_unit(head: Any) -> bool:
    """Whether FSDP2 gathers this module by itself."""
    state = head._get_fsdp_state() if hasattr(head, "_get_fsdp_state") else None
    return getattr(state, "_modules", None) == (head,)


def skip_gather(head: Any, loss: Tensor) -> None:
    """Have FSDP2 not gather the weight of a head that is a unit by itself for this loss's backward.

    The fused head has its gradients by then, and the weight is the largest that there is.
    """
    if not torch.compiler.is_compiling() and loss.requires_grad and _own_unit(head):
        head.set_unshard_in_backward(False)
        loss.register_hook(partial(gather, head))  # once FSDP's own hook, on the logits, has run


def gather(head: Any, _: object = None) -> None:
    """Have FSDP2 gather the weight again in backwards to come."""
    if not torch.compiler.is_compiling() and _own_unit(head):
        head.set_unshard_in_backward(True)


def like_input(logits: Tensor, x: Tensor) -> Tensor:
    """(..., 0) logits as a DTensor where x is one; all processes hold all of them."""
    if not is_dtensor(x):
        return logits
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(x, DTensor)
    places = [Replicate()] * x.device_mesh.ndim
    return DTensor.from_local(logits, x.device_mesh, places, run_check=False)
