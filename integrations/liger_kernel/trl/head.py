"""Our engine behind TRL's fused head.

    model(..., labels=labels, fused_lm_head=True)    TRL's own forward, on this model over a copy of
                                                     its globals, in which four names are replaced
      the backbone                                   TRL's
      _ChunkedLogProbFunction.apply(hidden, ...)     calls lm_head, whose forward answers with
                                                     log-probabilities: `linear_token_stats`
      losses, shifts, the router's loss              TRL's

Being called, lm_head has its weight gathered by FSDP and ZeRO-3, forward and backward, and keeps
what PEFT and tensor parallelism have made of it; TRL's head reads `lm_head.weight` alone.

Where a loss of whole sequences is known beforehand (`Fused.share`), `linear_loss` takes the
gradients in forward, which saves a product. TRL computes the loss all the same: its gradient is the
one that counts, and where it is not the one that was foreseen, ours is computed again from it.
"""

import functools
import sys
import threading
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from liger_core import LabelScan, linear_logprob, linear_loss, linear_token_stats
from liger_core.losses.linear import PairShare, mean_logits
from liger_core.ops.linear_logprob import Output, TokenStats
from liger_core.ops.linear_loss import LossFn, Together
from liger_core.ops.sharded import is_dtensor
from liger_kernel import together
from liger_kernel.config import LigerConfig
from liger_kernel.transformers.engines import class_of, is_linear
from liger_kernel.transformers.head import fuse_sites, noted
from liger_kernel.transformers.lora import linear
from liger_kernel.transformers.patch import Patch, patch_of

OUTPUTS: dict[str, Output] = {  # TRL's names, in the order in which it takes them
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logit",
    "is_top1": "is_top1",
}
KNOWS = "use_liger_loss knows TRL 1.16"
SAME = 1e-3  # of the largest: how far a gradient may be from a multiple of the one foreseen. The
# sums over tokens of two orders, of log-probabilities of thousands, differ by some 1e-4.


class Share(NamedTuple):
    """A loss that is known when lm_head is called: see `linear_loss`."""

    loss_fn: LossFn
    together: Together
    needed: tuple[Output, ...] = ()

    @classmethod
    def of(cls, share: PairShare) -> "Share":
        return cls(share, share.together, share.needed)


@dataclass
class Fused:
    """What one model's fused head is told, and what it tells besides.

    Attributes:
        memory_budget: bytes of logits held at once. saved_logits_budget: bytes of logits kept from
            forward to backward. See `linear_token_stats`.
        share: the loss that is going to be made of the log-probabilities, where that is known.
        positions: whether `mean` is asked for: (B,) means of the logits over all classes and
            positions, those included that are not scored.
    """

    memory_budget: int | None = None
    saved_logits_budget: int | None = None
    share: Share | None = None
    positions: bool = False
    mean: Tensor | None = None
    foreseen: int = 0  # backwards whose gradients were known in forward,
    mistaken: int = 0  # and those where they were not the ones foreseen


@contextmanager
def for_now(thing: Any, **values: Any) -> Iterator[None]:
    """Attributes for the time being."""
    own = vars(thing)
    before = {name: own[name] for name in values if name in own}
    own.update(values)
    try:
        yield
    finally:
        for name in values:
            del own[name]
        own.update(before)


class _Call(NamedTuple):
    fused: Fused
    head: nn.Module
    y: Tensor  # (B, T) shifted labels
    scan: LabelScan | None


class _Calls(threading.local):
    """Those that a thread is in."""

    def __init__(self) -> None:
        self.stack: list[_Call] = []


_calls = _Calls()


def fused_of(model: nn.Module) -> Fused:
    """Of a model that `take_over` was given."""
    return vars(model)["_liger_fused"]


def take_over(model: nn.Module, fused: Fused) -> Patch:
    """Put our engine behind the fused head that TRL has just added to this model.

    Raises:
        RuntimeError: TRL's head is not what it is in TRL 1.16.
        ValueError: the model's head is none that can be fused, or computes its own loss already.
    """
    if (there := patch_of(model)) is not None and there.config.fused_head:
        raise ValueError(
            "this model's head is patched to compute its own loss, which goes by TRL's; patch the "
            "layers alone, with fused_head=False, or use use_liger_loss=False"
        )
    theirs = vars(model).get("forward")
    fn = getattr(theirs, "__func__", None)
    names = fn.__code__.co_names if isinstance(fn, types.FunctionType) else ()
    if not isinstance(fn, types.FunctionType) or not OURS.keys() <= set(names):
        gone = ", ".join(sorted(OURS.keys() - set(names)))
        raise RuntimeError(f"TRL's fused head does not use {gone} any more; {KNOWS}")
    patch = Patch(model, LigerConfig.of({}))
    head: Any = model.get_output_embeddings()  # pyright: ignore
    if _cast_by_trl(head):
        why = None if is_linear(head) else "cast_lm_head_to_fp32 leaves out its adapter"
    else:
        why = fuse_sites(patch, head)
    if why is not None:
        patch.revert()
        raise ValueError(f"use_liger_loss cannot fuse this model's head: {why}")
    patch.set(model, "_liger_fused", fused)
    patch.set(model, "forward", types.MethodType(_forward(_copy(fn), fn, type(model)), model))
    return patch


def _cast_by_trl(head: Any) -> bool:
    """Whether GRPO's `cast_lm_head_to_fp32` has put a closure in place of the head's forward."""
    forward = vars(head).get("forward")
    return getattr(forward, "__name__", "") == "cast_forward_to_fp32"


def _copy(fn: types.FunctionType) -> types.FunctionType:
    """TRL's forward over globals of which four are ours, in a module that torch.compile finds."""
    name = f"{__name__}.{fn.__module__}"
    copy = sys.modules.setdefault(name, types.ModuleType(name))
    vars(copy).update(fn.__globals__, __name__=name, **OURS)
    own = types.FunctionType(fn.__code__, vars(copy), fn.__name__, fn.__defaults__, fn.__closure__)
    own.__kwdefaults__ = fn.__kwdefaults__
    return own


class _Nothing:
    """Stands for DTensor: lm_head is called, and gathers its weight itself."""


def _no_context(*_: object) -> Any:
    return nullcontext()


def _scores_all(_: object) -> bool:
    """For `_use_triton`, which has TRL drop rows: the engine does."""
    return False


def _forward(theirs: types.FunctionType, stock: types.FunctionType, cls: type[nn.Module]) -> Any:
    """TRL's forward over our globals; or its own, `stock`, once the patch is reverted: accelerate
    keeps this one within its autocast."""

    @functools.wraps(cls.forward)  # generate() and Trainer look at the signature
    def forward(
        self: Any, *args: Any, fused_lm_head: bool = False, labels: Tensor | None = None,
        shift_labels: Tensor | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        given = dict(labels=labels, shift_labels=shift_labels, **kwargs)
        fused: Fused | None = vars(self).get("_liger_fused")
        if fused is None or not fused_lm_head:
            return stock(self, *args, fused_lm_head=fused_lm_head, **given)
        y = shift_labels if labels is None or shift_labels is not None else labels[:, 1:]
        if y is None:
            raise ValueError("fused_lm_head=True needs labels or shift_labels")
        scan, head = None, self.get_output_embeddings()
        y = y.to(head.weight.device)
        if not torch.compiler.is_compiling():
            if torch.is_grad_enabled():
                together.watch()
            scan = None if fused.positions else LabelScan(y, _classes(head))
        _calls.stack.append(_Call(fused, head, y, scan))
        try:
            return theirs(self, *args, fused_lm_head=True, **given)
        finally:
            _calls.stack.pop()

    return forward


def _classes(head: nn.Module) -> int:
    found = noted(head)
    return (head if found is None else linear(found[0])).out_features  # pyright: ignore


class _LogProbs:
    """Stands for TRL's autograd function."""

    @staticmethod
    def apply(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float,
        chunk_size: int, softcap: float | None = None, logit_scale: float = 1.0,
        outputs: Sequence[str] = (),
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        call = _calls.stack[-1]
        x = hidden.view(*call.y.shape, hidden.shape[-1])
        options = dict(
            temperature=temperature, softcap=softcap, scale=logit_scale, labels=call.scan,
            memory_budget=call.fused.memory_budget, impl=LigerConfig.of().impl,
        )  # fmt: skip
        wanted = [name for name in OUTPUTS if name in outputs]
        answer = partial(_answer, call, [OUTPUTS[name] for name in wanted], options)
        if (found := noted(call.head)) is not None:
            found[1].request = answer
            try:
                logp, *rest = call.head(x)
            finally:
                found[1].request = None  # what lm_head raises before it answers would leave it
        elif _cast_by_trl(call.head):
            w: Any = call.head.weight
            w = w.full_tensor() if is_dtensor(w) else w
            if w.numel() == 0:
                raise ValueError("cast_lm_head_to_fp32 with ZeRO-3 needs use_liger_loss=False")
            logp, *rest = answer(x, w, {"b": call.head.bias})
        else:
            raise RuntimeError(
                f"lm_head ({class_of(call.head).__name__}) was replaced after the trainer was "
                f"built; build the trainer last, or use use_liger_loss=False"
            )
        by_name = dict(zip(wanted, rest, strict=True))
        return logp.flatten(), *(
            None if (t := by_name.get(n)) is None else t.flatten() for n in OUTPUTS
        )


OURS: dict[str, Any] = {  # in place of the globals of TRL's head
    "_ChunkedLogProbFunction": _LogProbs,
    "DTensor": _Nothing,
    "maybe_gather_lm_head_ctx": _no_context,
    "_use_triton": _scores_all,
}


def _answer(
    call: _Call, outputs: list[Output], options: dict[str, Any], x: Tensor, w: Tensor,
    added: dict[str, Any],
) -> tuple[Tensor, ...]:  # fmt: skip
    """What lm_head returns: log-probabilities and the outputs, in their order."""
    fused, y, b = call.fused, call.y.to(x.device), added["b"]
    low_rank = added.get("low_rank")
    options = {**options, "low_rank": low_rank}
    if not torch.is_autocast_enabled(x.device.type):
        w, b = w.to(x.dtype), None if b is None else b.to(x.dtype)
    asked: Sequence[Output] = outputs
    if fused.positions:
        if options["softcap"] is None and low_rank is None and not is_dtensor(x, w):
            fused.mean = mean_logits(x, w, b) * (options["scale"] / options["temperature"])
        else:  # no product of means is the mean of these
            asked = (*outputs, "mean_logit")
            y = y.clamp_min(0)
    frozen = not any(t is not None and t.requires_grad for t in (w, b, *(low_rank or ())[1:]))
    known = fused.share if torch.is_grad_enabled() and not frozen else None
    if known is None or torch.compiler.is_compiling() or is_dtensor(x, w):
        stats = linear_token_stats(
            x, w, y, b, outputs=asked, saved_logits_budget=fused.saved_logits_budget, **options
        )
    else:
        stats = _foreseen(fused, known, x, w, y, b, asked, options)
    if fused.positions and fused.mean is None:
        assert stats.mean_logit is not None
        fused.mean = stats.mean_logit.mean(-1)
    by_name = stats._asdict()
    return (stats.logp, *(by_name[name] for name in outputs))


def _foreseen(
    fused: Fused, share: Share, x: Tensor, w: Tensor, y: Tensor, b: Tensor | None,
    outputs: Sequence[Output], options: dict[str, Any],
) -> TokenStats:  # fmt: skip
    """Log-probabilities whose gradients are taken now, as the known loss has them."""
    loss, stats = linear_loss(
        x, w, y, share.loss_fn, b, together=share.together,
        outputs=tuple({*outputs, *share.needed}), **options,
    )  # fmt: skip
    with torch.enable_grad():
        logp = stats.logp.detach().requires_grad_()
        value = share.loss_fn(stats._replace(logp=logp), lambda t: t)
        (slope,) = torch.autograd.grad(value, logp)
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    again = _Again(fused, y, options, autocast)
    low_rank = options.get("low_rank") or (None, None)
    return stats._replace(
        logp=_Foreseen.apply(loss, stats.logp, slope, again, x, w, b, *low_rank)  # pyright: ignore
    )


class _Again(NamedTuple):
    """How the gradients are computed where they were not foreseen."""

    fused: Fused
    y: Tensor
    options: dict[str, Any]
    autocast: torch.dtype | None  # backward runs outside of the forward's autocast

    def __call__(
        self, tensors: Sequence[Tensor | None], need: Sequence[bool], g: Tensor
    ) -> list[Any]:
        leaves = [
            None if t is None else t.detach().requires_grad_(n)
            for t, n in zip(tensors, need, strict=True)
        ]
        x, w, b, u, v = leaves
        assert x is not None and w is not None
        device = x.device.type
        options = {**self.options, "low_rank": None if u is None else (u, v)}
        enabled = self.autocast is not None
        with torch.enable_grad(), torch.autocast(device, self.autocast, enabled=enabled):
            logp = linear_logprob(x, w, self.y, b, **options)
        found = iter(
            torch.autograd.grad(logp, [t for t in leaves if t is not None and t.requires_grad], g)
        )
        return [None if t is None or not t.requires_grad else next(found) for t in leaves]


class _Foreseen(torch.autograd.Function):
    """logp; backward passes on the scale to which its gradient is `slope`, or computes it."""

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, logp: Tensor, slope: Tensor, again: _Again, *tensors: Tensor | None
    ) -> Tensor:
        ctx.again = again
        ctx.save_for_backward(slope, *tensors)
        return logp.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        slope, *tensors = ctx.saved_tensors
        tiny = torch.finfo(slope.dtype).tiny
        s = (g * slope).sum() / slope.square().sum().clamp_min(tiny)
        same = (g - s * slope).abs().amax() <= SAME * g.abs().amax()
        fused = ctx.again.fused
        if bool(same):
            fused.foreseen += 1
            return s, *[None] * (3 + len(tensors))
        fused.mistaken += 1
        grads = ctx.again(tensors, ctx.needs_input_grad[4:], g)
        return None, None, None, None, *grads
