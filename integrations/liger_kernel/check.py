"""Does a patched model compute what the plain one does? Loss and every gradient of one step.

The one tolerance policy of this project: a result may err at most FACTOR times as much as PyTorch's
in the same dtype, norm-wise against the exact one, plus FLOOR machine epsilons of its norm (PyTorch
is now and then exact by luck, on scalars above all).
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from liger_kernel.config import LigerConfig
from liger_kernel.exact import WIDER, SameRoutes, kept, steady, wider
from liger_kernel.measure import PeakMemory, interleaved_median
from liger_kernel.transformers.patch import apply, patch_of

__all__ = ["FACTOR", "FLOOR", "Figures", "Report", "Row", "allowed", "check"]

FACTOR = 2.0
FLOOR = 2.0  # machine epsilons
SCALE = {torch.float16: 1024.0}  # of the loss, without which fp16 gradients vanish
SHOWN = 5  # worst results; four times as many that differ


def allowed(theirs: Any, norm: Any, dtype: torch.dtype) -> Any:
    """The error, float or tensor, that a result may have; `theirs` is PyTorch's own in dtype."""
    return FACTOR * theirs + FLOOR * torch.finfo(dtype).eps * norm


@dataclass(frozen=True, slots=True)
class Row:
    """The loss, or one parameter's gradient: the exact one's norm, and how far both are from it."""

    name: str
    norm: float
    plain: float
    patched: float
    allowed: float

    @property
    def ok(self) -> bool:
        return isfinite(self.allowed) and self.patched <= self.allowed  # not so for NaN

    @property
    def used(self) -> float:
        """The share of what is allowed."""
        if not isfinite(self.allowed) or not isfinite(self.patched):
            return float("inf")  # NaN has no place in an order
        return self.patched / self.allowed if self.allowed else 0.0 if self.ok else float("inf")

    def __str__(self) -> str:
        shown = [e / (self.norm or 1) for e in (self.plain, self.patched, self.allowed)]
        return f"{shown[0]:10.1e} {shown[1]:10.1e} {shown[2]:10.1e}   {self.name}"


@dataclass(frozen=True, slots=True)
class Figures:
    """One variant: loss, peak beyond the model (gradients included), median time of a step."""

    loss: float
    peak_mib: float
    step_ms: float | None = None  # None where no step was timed


@dataclass(frozen=True, slots=True)
class Report:
    """What `check` has found; printed, a table."""

    model: str
    dtype: str
    device: str
    shape: tuple[int, ...]  # of the batch
    patch: str  # what was replaced and what was left, as Patch says it
    left: Mapping[str, str]
    problems: tuple[str, ...]  # all in which the patched model differs
    rows: tuple[Row, ...] = ()  # the loss first
    exact_loss: float | None = None
    plain: Figures | None = None
    patched: Figures | None = None
    idle: tuple[str, ...] = ()  # replaced modules that the batch did not reach, by class

    @property
    def worst(self) -> list[Row]:
        """The rows that come closest to what is allowed."""
        return sorted(self.rows, key=lambda row: row.used, reverse=True)[:SHOWN]

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for JSON."""
        return asdict(self) | {"ok": self.ok}

    def __str__(self) -> str:
        size = " x ".join(map(str, self.shape))
        lines = [
            f"{self.model}: one step of {size} tokens, {self.dtype} on {self.device}",
            self.patch,
        ]
        if self.plain and self.patched:
            a, b = self.plain, self.patched
            lines += [
                "",
                f"{'':10}{'plain':>12}{'patched':>12}{'ratio':>8}",
                f"{'loss':10}{a.loss:12.6f}{b.loss:12.6f}",
            ]
            if a.step_ms and b.step_ms:
                lines.append(_line("step, ms", a.step_ms, b.step_ms))
            lines.append(_line("peak, MiB", a.peak_mib, b.peak_mib))
        if self.rows:
            lines += [
                "",
                f"the worst of {len(self.rows)} errors against the exact result, by its norm",
                f"{'plain':>10} {'patched':>10} {'allowed':>10}",
                *map(str, self.worst),
            ]
        if self.idle:
            lines += ["", f"not reached by this batch: {', '.join(self.idle)}"]
        shown, more = self.problems[: 4 * SHOWN], len(self.problems) - 4 * SHOWN
        lines += ["", *shown, *([f"and {more} more"] if more > 0 else [])]
        gradients = f"loss and {len(self.rows) - 1} gradients"
        return "\n".join([*lines, f"OK: {gradients} agree" if self.ok else "MISMATCH"])


def _line(name: str, plain: float, patched: float) -> str:
    ratio = f"{patched / plain:8.2f}" if plain else ""
    return f"{name:10}{plain:12.1f}{patched:12.1f}{ratio}"


def check(
    model: nn.Module,
    batch: Mapping[str, Any],
    config: LigerConfig | Mapping[str, Any] | str | None = None,
    *,
    steps: int = 5,
) -> Report:
    """Compare one training step of the patched model with the plain one's, and time both.

    The exact result is the plain model's own in fp64, for 16-bit models in fp32. Dropout is off,
    and routers choose the same experts throughout. The model comes back as it was. The exact run
    holds it twice, once in the wider dtype, which its gradients have too; they go to the CPU.

    Args:
        model: in fp32, bf16 or fp16, on any device, and not patched.
        batch: what its forward takes, labels included.
        config: what `LigerConfig.of` takes.
        steps: to time of each variant, taken in turns; 0 for none.

    Raises:
        ValueError: what `apply` raises; a model that is patched, in another dtype or has no
            parameter to train; a batch without labels.
    """
    config = LigerConfig.of(config)
    if config.label_smoothing:
        raise ValueError("the plain model's loss has no label_smoothing; check without it")
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    dtypes = {p.dtype for p in parameters}
    if patch_of(model) is not None:
        raise ValueError("the model is patched; revert() that before it is checked")
    if not dtypes or not dtypes <= WIDER.keys():
        raise ValueError(f"the model must be in fp32, bf16 or fp16, got {sorted(map(str, dtypes))}")
    if not any(p.requires_grad for p in parameters):
        raise ValueError("no parameter of the model requires a gradient")
    dtype = max(dtypes, key=lambda d: torch.finfo(d).eps)
    device = parameters[0].device
    with apply(model, config) as patch:
        told, left = str(patch), dict(patch.left)
        changed = [patch.model.get_submodule(c.path) for c in patch.changes]
    shape = tuple(batch["input_ids"].shape) if "input_ids" in batch else ()
    name = str(dtype).removeprefix("torch.")
    report = partial(Report, type(model).__name__, name, str(device), shape, told, left)
    if not changed:
        why = "; ".join(dict.fromkeys(left.values())) or "the configuration asks for nothing"
        return report((f"nothing is patched: {why}",))
    # Every run starts from the numbers that the model's own dtype holds.
    step = _Step(model, {k: _cast(v, dtype, device) for k, v in batch.items()}, dtype)
    with steady(model):
        with kept(model), wider(model, WIDER[dtype]):
            exact_loss, exact = step.exact(WIDER[dtype])
        with kept(model):
            plain, theirs = step.measured(exact_loss, exact)
        with kept(model), apply(model, config), _calls(changed) as called:
            patched, ours = step.measured(exact_loss, exact)
        with kept(model):
            times = _times(step, config, steps)
    norms = {n: float(g.norm()) for n, g in exact.items()} | {"loss": abs(exact_loss)}
    rows = tuple(
        Row(n, norms.get(n, 0.0), error, ours[n], allowed(error, norms.get(n, 0.0), dtype))
        for n, error in theirs.items()
        if n in ours
    )
    problems = _problems(rows, theirs.keys(), ours.keys(), plain.loss)
    plain = replace(plain, step_ms=times.get("plain"))
    patched = replace(patched, step_ms=times.get("patched"))
    counts = Counter(type(m).__name__ for m in changed if m not in called)
    idle = tuple(f"{name} x{n}" for name, n in sorted(counts.items()))
    return report(problems, rows, exact_loss, plain, patched, idle)


@contextmanager
def _calls(modules: Sequence[nn.Module]) -> Iterator[set[nn.Module]]:
    """Those of the modules that are called meanwhile."""
    called: set[nn.Module] = set()
    hooks = [m.register_forward_pre_hook(lambda m, _: called.add(m)) for m in modules]
    try:
        yield called
    finally:
        for hook in hooks:
            hook.remove()


def _problems(
    rows: Sequence[Row], theirs: Set[str], ours: Set[str], loss: float
) -> tuple[str, ...]:
    if not isfinite(loss):
        return (f"the plain model's own loss is {loss}: there is nothing to compare",)
    one, other = sorted(theirs - ours), sorted(ours - theirs)
    found = [f"{n}: the patched model has no gradient, the plain one has" for n in one]
    found += [f"{n}: the plain model has no gradient, the patched one has" for n in other]
    for row in (row for row in rows if not row.ok):
        what = f"error {row.patched:.2e} > {row.allowed:.2e} allowed"
        if not isfinite(row.allowed):
            what = "the plain model's own is not finite: nothing to compare"
        found.append(f"{row.name}: {what}")
    return tuple(found)


class _Step:
    """Forward and backward of one batch."""

    def __init__(self, model: nn.Module, batch: dict[str, Any], dtype: torch.dtype) -> None:
        self.model, self.batch, self.scale = model, batch, SCALE.get(dtype, 1.0)
        self.device, self.routes = next(model.parameters()).device, SameRoutes()

    def __call__(self, batch: dict[str, Any] | None = None) -> Tensor:
        """The loss; the gradients are in place of those that were there."""
        self.model.zero_grad()
        loss = self.model(**(batch or self.batch)).loss
        if loss is None:
            raise ValueError("the model returns no loss: the batch must hold labels")
        (loss * self.scale).backward()
        return loss.detach()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        for name, p in self.model.named_parameters():
            if p.grad is not None:
                yield name, p.grad
                p.grad = None

    def exact(self, dtype: torch.dtype) -> tuple[float, dict[str, Tensor]]:
        """Loss, and gradients on the CPU, of a batch in that dtype."""
        with self.routes:
            loss = self({k: _cast(v, dtype, self.device) for k, v in self.batch.items()})
        return float(loss), {n: g.cpu() for n, g in self.gradients()}

    def measured(
        self, exact_loss: float, exact: Mapping[str, Tensor]
    ) -> tuple[Figures, dict[str, float]]:
        """Figures without time; errors of the loss and of each gradient that there is."""
        self.model.zero_grad()
        with self.routes, PeakMemory(self.device) as peak:
            loss = float(self())
        errors = {"loss": abs(loss - exact_loss)}
        for name, g in self.gradients():
            e = exact.get(name)
            errors[name] = float((g if e is None else g - e.to(g.device)).norm())
        return Figures(loss, peak.mib), errors


def _times(step: _Step, config: LigerConfig, steps: int) -> dict[str, float]:
    if not steps:
        return {}
    patched = {"patched": partial(apply, step.model, config)}
    return interleaved_median({"plain": step, "patched": step}, steps, step.device, within=patched)


def _cast(value: Any, dtype: torch.dtype, device: torch.device) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else None)
