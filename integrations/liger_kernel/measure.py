"""Exact peak memory and collectives of a piece of code, step times of variants taken in turns."""

import itertools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None

__all__ = ["Meter", "PeakMemory", "Traffic", "call_ms", "interleaved_median", "step_times"]


class PeakMemory:
    """Most bytes that tensors took at once inside the `with` block, above those at its entry.

        with PeakMemory("cuda") as peak:
            loss = step()
        peak.bytes, peak.mib

    On CUDA this is the caching allocator's own count (`torch.cuda.max_memory_allocated`, whose
    process-wide peak is reset at entry). On the CPU it is the running sum over every allocation and
    release that torch's allocator reported to `torch.profiler`: exact to the byte where resident
    memory is not, without what other libraries and oneDNN's scratch take. There, releasing inside
    the block what was taken before it does not lower the count: torch does not know its size. It
    slows the block, so time it elsewhere; no other profiler may be active. Raises RuntimeError
    where this torch's profiler reports no memory.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f"peak memory is measured on cpu or cuda, not on {self.device}")
        self.bytes = 0

    @property
    def mib(self) -> float:
        """The peak in units of 2**20 bytes."""
        return self.bytes / 2**20

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._entry = torch.cuda.memory_allocated(self.device)
        else:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it announces its start on stderr
            self._profile = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU],
                profile_memory=True,
                acc_events=True,  # one cycle is all there is, but torch 2.11 warns without it
            )
            self._profile.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._entry
            return
        torch.empty(1, dtype=torch.uint8)  # proves that allocations are reported up to here
        self._profile.__exit__(kind, error, trace)
        if error is None:
            *sizes, taken, released = [0, 0, *_allocations(self._profile)]
            if (taken, released) != (1, -1):
                raise RuntimeError(f"the profiler of torch {torch.__version__} reports no memory")
            self.bytes = max(itertools.accumulate(sizes))
        del self._profile


def step_times(
    fns: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device | str = "cpu",
    warmup: int = 1,
    within: Mapping[str, Callable[[], AbstractContextManager[object]]] | None = None,
) -> dict[str, list[float]]:
    """Milliseconds of each of `repeats` calls of every function, after `warmup` calls not counted.

    The functions take turns, and every round starts with the next one, so that a machine which
    warms up, throttles or has a busy neighbour meets all of them alike. What `within` names runs in
    that context, newly entered each time; hence, with it, one more call of every function that is
    not counted comes before each that is.
    """
    if repeats < 1 or not fns:
        raise ValueError(f"expected repeats >= 1 and a function, got {repeats} and {list(fns)}")
    names = list(fns)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            context = (within or {}).get(name)
            with context() if context else nullcontext():
                if within:
                    fns[name]()
                ms = call_ms(fns[name], device)
            if turn >= warmup:
                times[name].append(ms)
    return times


def interleaved_median(
    fns: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device | str = "cpu",
    warmup: int = 1,
    within: Mapping[str, Callable[[], AbstractContextManager[object]]] | None = None,
) -> dict[str, float]:
    """Median milliseconds a call of each function, see `step_times`."""
    times = step_times(fns, repeats, device, warmup, within)
    return {name: statistics.median(ms) for name, ms in times.items()}


def call_ms(fn: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Milliseconds of one call, on CUDA from an idle device until it is idle again."""
    if torch.device(device).type != "cuda":
        began = time.perf_counter()
        fn()
        return (time.perf_counter() - began) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    fn()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


class Meter:
    """Tokens per second of this process's training, and its peak memory, while it goes on.

    Tokens are positions of `input_ids` (or `inputs_embeds`), padding included, of calls with a
    gradient. They are counted on the device, which is waited for only where the clock starts and
    stops, and under torch.compile too. Peak memory is, on CUDA, what the caching allocator has had
    out since the meter was made (its process-wide peak is reset then), and else the most that was
    ever resident of this process, as the operating system tells.

    Args:
        model: the model itself, within what engines and torch.compile put around it.
        device: where it runs.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._tokens = torch.zeros((), dtype=torch.int64, device=self.device)
        self._hook = model.register_forward_pre_hook(self._count, with_kwargs=True)
        self._seconds, self._since = 0.0, None
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _count(self, model: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.is_grad_enabled():
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is not None:
            self._tokens.add_(ids.numel())
        elif (embeds := kwargs.get("inputs_embeds")) is not None:
            self._tokens.add_(embeds.shape[:-1].numel())

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def reset(self) -> None:
        """Forget tokens and time, not memory."""
        self._tokens.zero_()
        self._seconds, self._since = 0.0, None

    def start(self) -> None:
        """Have time go on, if it stands."""
        if self._since is None:
            self._since = self._now()

    def stop(self) -> None:
        """Have time stand still, if it goes on."""
        if self._since is not None:
            self._seconds, self._since = self._seconds + self._now() - self._since, None

    def close(self) -> dict[str, float]:
        """Take the hook away, and `read` for the last time."""
        self.remove()
        return self.read()

    def remove(self) -> None:
        """Take the hook away; the device is not asked."""
        self._hook.remove()

    def read(self) -> dict[str, float]:
        """`peak_memory_mib`; `tokens_per_second` if any time has passed. Then it counts anew."""
        going = self._since is not None
        self.stop()
        found = {"peak_memory_mib": peak_mib(self.device)}
        if self._seconds and (tokens := int(self._tokens)):
            found["tokens_per_second"] = tokens / self._seconds
        self.reset()
        if going:
            self.start()
        return found


def peak_mib(device: torch.device) -> float:
    """On CUDA the allocator's peak since it was last reset, else this process's resident one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return math.nan
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)


class Traffic(TorchDispatchMode):
    """Collectives within the `with` block and its backward, by op: calls, bytes of their inputs.

        with Traffic() as traffic:
            step()
        traffic.ops  # {"c10d._allgather_base_": [2, 4096]}

    Bytes are those of this process: its own part where one gathers, all of it where one reduces.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(t.__name__ == "DTensor" for t in types):
            return NotImplemented  # it calls its collectives with plain tensors
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__:
            named = zip(func._schema.arguments, args, strict=False)
            inputs = tree_leaves([arg for at, arg in named if not at.name.startswith("output")])
            count = self.ops.setdefault(str(func.overloadpacket), [0, 0])
            count[0] += 1
            count[1] += sum(t.nbytes for t in inputs if isinstance(t, Tensor))
        return func(*args, **(kwargs or {}))


def _allocations(profile: Any) -> list[int]:
    """Bytes taken (+) and given back (−) on the CPU, in order of time."""
    try:
        memory = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        memory = [e for e in memory if e.device_type() == torch.profiler.DeviceType.CPU]
        return [e.nbytes() for e in sorted(memory, key=lambda e: e.start_ns())]
    except AttributeError as e:
        raise RuntimeError(f"the profiler of torch {torch.__version__} has changed: {e}") from e
