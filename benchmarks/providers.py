"""How each provider computes a case: ours, peers, and plain torch. Here losses under a head.

`PROVIDERS[name].compute(case)` gives a function of the case's inputs that returns a scalar loss, or
a memory-bound op's outputs (`kernels.py`), or None for what the provider has no way to compute.
Packages are imported only then: each provider runs in a process of its own, and two of them are
called `liger_kernel`.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import kernels
from benchmarks.cases import Case
from benchmarks.shapes import IGNORE_INDEX, Head, HeadInputs

Compute = Callable[[Any], Any]  # of the inputs; a tensor or several
LogProb = Callable[[Tensor, Tensor, Tensor], Tensor]  # of (x, w, y), in y's shape, 0 where ignored

BETA, SIMPO_MARGIN = 0.1, 0.5  # the defaults of Liger-Kernel's loss classes
CHUNKED = {
    "dpo": "LigerFusedLinearDPOLoss",
    "orpo": "LigerFusedLinearORPOLoss",
    "cpo": "LigerFusedLinearCPOLoss",
    "simpo": "LigerFusedLinearSimPOLoss",
    "kto": "LigerFusedLinearKTOLoss",
}


def preference_loss(op: str, logp: Tensor, ref: Tensor | None, t: HeadInputs) -> Tensor:
    """The losses by their definitions, from log-probabilities (B, T), preferred sequences first.

    KTO takes a sequence's mean: the sum over 1024 labels would leave its sigmoid without a slope.
    """
    scored = t.y != IGNORE_INDEX
    sums, half = logp.sum(-1), logp.shape[0] // 2
    means = sums / scored.sum(-1)

    def margin(v: Tensor) -> Tensor:
        return v[:half] - v[half:]

    if op == "logprob":
        return -F.logsigmoid(BETA * margin(sums)).mean()
    if op == "dpo" and ref is not None:
        return -F.logsigmoid(BETA * margin(sums - ref.sum(-1))).mean()
    if op == "kto":
        sign = torch.where(t.preferred, 1.0, -1.0)
        return (1 - torch.sigmoid(BETA * means * sign)).mean()
    nll = -logp[:half].sum() / scored[:half].sum()
    if op == "orpo":
        return nll - BETA * F.logsigmoid(margin(means - torch.log1p(-means.exp()))).mean()
    if op == "cpo":
        return nll - F.logsigmoid(BETA * margin(sums)).mean()
    if op == "simpo":
        return nll - F.logsigmoid(BETA * margin(means) - SIMPO_MARGIN).mean()
    raise ValueError(f"no definition of {op}")


def with_logprob(op: str, logprob: LogProb) -> Compute:
    """A loss of log-probabilities, those of the reference model without a graph."""

    def compute(t: HeadInputs) -> Tensor:
        ref = None
        if t.ref_x is not None and t.ref_w is not None:
            with torch.no_grad():
                ref = logprob(t.ref_x, t.ref_w, t.y)
        return preference_loss(op, logprob(t.x, t.w, t.y), ref, t)

    return compute


def full_logprob(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """From the full logits."""
    logp = F.linear(x, w).float().log_softmax(-1)
    return logp.gather(-1, y.clamp(min=0)[..., None])[..., 0] * (y != IGNORE_INDEX)


def full_cross_entropy(t: HeadInputs) -> Tensor:
    logits = F.linear(t.x.flatten(0, 1), t.w)
    return F.cross_entropy(logits.float(), t.y.flatten(), ignore_index=IGNORE_INDEX)


def eager(case: Case) -> Compute:
    return full_cross_entropy if case.op == "linear_ce" else with_logprob(case.op, full_logprob)


def compiled(case: Case) -> Compute:
    return torch.compile(eager(case), dynamic=False)


def chunked_loss(op: str) -> Compute:
    """The preference losses of `liger_kernel.chunked_loss`, ours or the peer's, called alike."""
    cls = getattr(importlib.import_module("liger_kernel.chunked_loss"), CHUNKED[op])
    if op == "kto":
        kto = cls(average_log_prob=True)
        return lambda t: kto(t.x, t.w, t.y, None, t.preferred)[0]
    loss = cls()
    if op == "dpo":
        return lambda t: loss(t.w, t.x, t.y, None, t.ref_x, t.ref_w)[0]
    return lambda t: loss(t.w, t.x, t.y)[0]


def liger(case: Case) -> Compute:
    """Liger-Kernel. Log-probabilities are what its unreduced cross entropy gives."""
    if case.op in CHUNKED:
        return chunked_loss(case.op)
    cls = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss
    if case.op == "linear_ce":
        mean = cls()
        return lambda t: mean(t.w, t.x.flatten(0, 1), t.y.flatten())
    losses = cls(reduction="none")
    return with_logprob(
        case.op, lambda x, w, y: -losses(w, x.flatten(0, 1), y.flatten()).view(y.shape)
    )


def trl(case: Case) -> Compute:
    """The function in TRL's fused head, called as there: on scored rows, tiles of 32768 entries."""
    function = importlib.import_module("trl.kernels").ChunkedLogProbFunction

    def logprob(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        mask = y != IGNORE_INDEX
        logp = function.apply(x[mask], w, None, y[mask], 1.0, 32768, None, 1.0, ())[0]
        return logp.new_zeros(mask.shape).masked_scatter(mask, logp)

    if case.op == "linear_ce":
        return lambda t: -logprob(t.x, t.w, t.y).sum() / (t.y != IGNORE_INDEX).sum()
    return with_logprob(case.op, logprob)


def cce(case: Case) -> Compute | None:
    """Cut Cross-Entropy, exact: without its gradient filter. It takes no fp32, so that is cast."""
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy

    def loss(x: Tensor, w: Tensor, y: Tensor, reduction: str) -> Tensor:
        if case.shape.fp32:
            x, w = x.bfloat16(), w.bfloat16()
        return function(x, w, y, reduction=reduction, filter_eps=None, impl="cce")

    if case.op == "linear_ce":
        return lambda t: loss(t.x.flatten(0, 1), t.w, t.y.flatten(), "mean")
    if case.op == "logprob":
        return with_logprob(case.op, lambda x, w, y: -loss(x, w, y, "none"))
    return None


def torch_fused(case: Case) -> Compute | None:
    """torch's own loss in chunks, where this torch has one."""
    if case.op != "linear_ce" or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    f, options = F.linear_cross_entropy, torch.nn.LinearCrossEntropyOptions()
    return lambda t: f(t.x.flatten(0, 1), t.w, t.y.flatten(), options=options)


def ours(case: Case) -> Compute:
    """This repository; the only calls of its API here and in `kernels.py`."""
    if case.op in CHUNKED:
        return chunked_loss(case.op)
    core = importlib.import_module("liger_core")
    if case.op == "linear_ce":
        f = core.linear_cross_entropy
        return lambda t: f(t.x.flatten(0, 1), t.w, t.y.flatten(), **case.options)
    return with_logprob(case.op, lambda x, w, y: core.linear_logprob(x, w, y, **case.options))


def nothing(_: Any) -> None:
    return None


@dataclass(frozen=True)
class Provider:
    """head, op: losses under a head by the case, memory-bound ops by their name.

    modules: what it imports. packages: whose versions are reported.
    peer: not of this repository; `--peer` names the folders that it is imported from.
    """

    head: Callable[[Case], Compute | None] = nothing
    op: Callable[[str], kernels.Op | None] = nothing
    modules: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    peer: bool = False

    def compute(self, case: Case) -> Compute | None:
        if isinstance(case.shape, Head):
            return self.head(case)
        function = self.op(case.op)
        return function and (lambda t: function(*t.args.values()))


PROVIDERS: dict[str, Provider] = {
    "eager": Provider(eager, kernels.eager),
    "compile": Provider(compiled, kernels.compiled),
    "torch_fused": Provider(torch_fused),
    "liger": Provider(
        liger, kernels.liger, ("liger_kernel.chunked_loss",), ("liger-kernel",), peer=True
    ),
    # Its backward imports the trainer's utilities.
    "trl": Provider(trl, nothing, ("trl.trainer.utils",), ("trl",), peer=True),
    "cce": Provider(cce, nothing, ("cut_cross_entropy",), ("cut-cross-entropy",), peer=True),
    "quack": Provider(nothing, kernels.quack, ("quack",), ("quack-kernels",), peer=True),
    "ours": Provider(ours, kernels.ours, ("liger_core", "liger_kernel")),
}
