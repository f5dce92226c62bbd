"""A model that computes as exactly as it can, for a while: without chance, and in a wider dtype."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

WIDER = {
    torch.float32: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}
IN_ANY_DTYPE = {  # of the implementations that transformers knows, by where it keeps the choice
    "_attn_implementation_internal": ("sdpa", "eager", "flex_attention"),
    "_experts_implementation_internal": ("eager", "batched_mm"),
}


@contextmanager
def steady(model: nn.Module) -> Iterator[None]:
    """In training mode without dropout, router noise and recomputation; all of it is put back."""
    modes = [(m, m.training) for m in model.modules()]
    random = [
        (m, name, value)
        for m in model.modules()
        for name, value in vars(m).items()
        if (name == "gradient_checkpointing" and value is True)
        or (
            type(value) is float
            and ("drop" in name or "jitter" in name or (name == "p" and isinstance(m, _DropoutNd)))
        )
    ]
    gradients = [(p, p.grad) for p in model.parameters()]
    try:
        model.train().zero_grad()
        for m, name, value in random:
            setattr(m, name, type(value)())
        yield
    finally:
        for m, name, value in random:
            setattr(m, name, value)
        for m, mode in modes:
            m.training = mode
        for p, gradient in gradients:
            p.grad = gradient


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """What forwards leave in modules is put back: attributes, what those hold, and buffers."""
    holders: list[Any] = [vars(m) for m in model.modules()]
    holders += [v for own in holders for v in own.values() if type(v) in (dict, list, set)]
    before = [(h, copy.copy(h)) for h in holders]
    tensors = [
        (t, t.detach().clone())
        for h in holders
        if type(h) is dict
        for t in h.values()
        if isinstance(t, Tensor) and not isinstance(t, nn.Parameter)
    ]
    try:
        yield
    finally:
        for h, there in before:  # what is new goes too: a rotation's second set of frequencies
            h.clear()
            h.extend(there) if type(h) is list else h.update(there)
        with torch.no_grad():
            for t, value in tensors:
                if not torch.equal(t, value):
                    t.copy_(value)


@contextmanager
def wider(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """The model in a wider dtype, with implementations that take it; memory holds it twice.

    In fp64, what it would compute in fp32 is fp64 too.
    """
    parameters = [(p, p.data) for p in model.parameters() if p.is_floating_point()]
    buffers = [
        (m, name, b)
        for m in model.modules()
        for name, b in m._buffers.items()
        if b is not None and b.is_floating_point()
    ]
    configs = [getattr(getattr(m, "config", None), "__dict__", {}) for m in model.modules()]
    settings = [(c, key, c[key]) for c in configs for key in IN_ANY_DTYPE if c.get(key)]
    try:
        for c, key, there in settings:
            c[key] = there if there in IN_ANY_DTYPE[key] else IN_ANY_DTYPE[key][0]
        for p, _ in parameters:
            p.data = p.data.to(dtype)
        for m, name, b in buffers:
            m._buffers[name] = b.to(dtype)
        with _NoFp32() if dtype == torch.float64 else nullcontext():
            yield
    finally:
        model.zero_grad()
        for c, key, there in settings:
            c[key] = there
        for m, name, b in buffers:  # their values may not fit what the parameters go back to
            m._buffers[name] = b
        for p, own in parameters:  # some may share storage
            p.data = own


class SameRoutes(TorchFunctionMode):
    """Routers, which call topk, choose in every block what they chose in the first one.

    Which experts are the best is not continuous: rounding alone may choose others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.chosen: list[Tensor] = []

    def __enter__(self) -> "SameRoutes":
        self.turn = 0
        return super().__enter__()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        out = func(*args, **named)
        if func not in (torch.topk, Tensor.topk):
            return out
        if self.turn == len(self.chosen):
            self.chosen.append(out.indices)
        indices = self.chosen[self.turn]
        self.turn += 1
        named |= zip(("input", "k", "dim"), args, strict=False)
        return type(out)((named["input"].gather(named.get("dim", -1), indices), indices))


class _NoFp32(TorchFunctionMode):
    """Whoever asks torch for fp32 gets fp64: norms, softmax and the loss of transformers do."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        func = Tensor.double if func is Tensor.float else func
        named = {name: _double(value) for name, value in (kwargs or {}).items()}
        return func(*map(_double, args), **named)


def _double(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
