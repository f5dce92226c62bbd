"""One provider's process: does what `run.py` asks over stdin, a line of JSON each way.

    prepare  inputs, compilation, values for comparison, peak memory
    round    one timing round, and the machine's ceilings right after it
    free     gives the memory back

It holds a case's inputs from prepare to free, and everything else only while it works. After an
error it has let go of the case.
"""

import gc
import importlib
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import CASES, Case
from benchmarks.providers import PROVIDERS, Compute, Provider

MOST_CALLS = 40  # of some 25 launches each: as many as wait for a device before the host does
ROOT = Path(__file__).parents[1]


def check(provider: Provider) -> None:
    """Imports what the provider needs; raises ImportError where it is not the package meant."""
    for name in provider.modules:
        file = Path(importlib.import_module(name).__file__ or "").resolve()
        own = any(file.is_relative_to(ROOT / d) for d in ("liger_core", "integrations"))
        if own == provider.peer:
            raise ImportError(f"{name} found is {'' if own else 'not '}this repository's")


def hello(provider: Provider, device: str) -> dict[str, Any]:
    """Where and with what this process works."""
    check(provider)
    cuda = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "CPU",
        "python": platform.python_version(),
        "versions": {p: metadata.version(p) for p in ("torch", "triton")},
        "provider": {p: version(p) for p in provider.packages},
    }


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "from source"


class Clock:
    """Times on one device."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def ms(self, fn: Callable[[], object], calls: int, host_us: float = 0.0) -> float:
        """Milliseconds a call of `calls` in a row: the device's own, because it first waits for as
        long as the host takes to have all of them ready, `host_us` each.
        """
        self.wait()
        if self.cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(int(calls * host_us * 2000))  # cycles of at most 2 GHz
            start.record()
            for _ in range(calls):
                fn()
            end.record()
            self.wait()
            return start.elapsed_time(end) / calls
        began = time.perf_counter()
        for _ in range(calls):
            fn()
        return (time.perf_counter() - began) * 1e3 / calls

    def host_us(self, fn: Callable[[], object]) -> float:
        """Microseconds until one call returns, from an idle device; the device may lag behind."""
        self.wait()
        began = time.perf_counter()
        fn()
        us = (time.perf_counter() - began) * 1e6
        self.wait()
        return us

    def sustained_ms(
        self, fn: Callable[[], object], total_ms: float, calls: int = 1, most: int = 1000
    ) -> float:
        """Milliseconds a call, of `calls` to `most` calls in about `total_ms`, after a warm-up."""
        fn()
        calls = max(math.ceil(total_ms / max(self.ms(fn, 1), 1e-3)), calls)
        return self.ms(fn, min(calls, most), 1.5 * self.host_us(fn))


def matmul_rate(clock: Clock, gemm: tuple[int, int, int], device: str, ms: float) -> float:
    """Operations a second of (m, k) @ (k, n) in bf16, on random numbers."""
    m, k, n = gemm
    a = torch.randn(m, k, dtype=torch.bfloat16, device=device)
    b = torch.randn(n, k, dtype=torch.bfloat16, device=device).mul_(0.02)
    out = torch.empty(m, n, dtype=torch.bfloat16, device=device)
    return 2e3 * m * k * n / clock.sustained_ms(lambda: torch.mm(a, b.T, out=out), ms)


def copy_rate(clock: Clock, device: str, ms: float) -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    size = 1 << 29 if clock.cuda else 1 << 24
    a = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2e3 * size / clock.sustained_ms(lambda: b.copy_(a), ms)


def extra_mib(clock: Clock, fn: Callable[[], object]) -> float | None:
    """Peak MiB of a call above what is there before it, its results included.

    On a GPU as `liger_kernel.measure.PeakMemory` has it, which peers' processes lack; without a GPU
    by that class where it can be had, else None.
    """
    if clock.cuda:
        clock.wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        clock.wait()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        measure = importlib.import_module("liger_kernel.measure")
    except ImportError:
        fn()
        return None
    with measure.PeakMemory("cpu") as peak:
        fn()
    return peak.mib


def size(value: torch.Tensor) -> float:
    """A scalar's value, else the norm."""
    return float(torch.linalg.vector_norm(value, dtype=torch.float32) if value.dim() else value)


class Worker:
    def __init__(self, provider: Provider, device: str, smoke: bool) -> None:
        self.provider, self.device, self.smoke = provider, device, smoke
        self.clock = Clock(device)
        self.cases = {c.name: c.tiny() if smoke else c for c in CASES}
        self.case: Case | None = None
        self.compute: Compute | None = None
        self.inputs: Any = None
        self.leaves: dict[str, torch.Tensor] = {}

    def forward(self) -> Any:
        """The loss or the outputs, with a graph."""
        case, compute = self.case, self.compute
        assert case is not None and compute is not None
        half = torch.autocast(self.device, torch.bfloat16) if case.shape.fp32 else nullcontext()
        with half:
            return compute(self.inputs)

    def step(self) -> tuple[Any, tuple[torch.Tensor, ...]]:
        """One forward and backward: the loss or the outputs, and fresh gradients."""
        outputs = self.forward()
        dys = self.inputs.dys or None
        return outputs, torch.autograd.grad(outputs, list(self.leaves.values()), dys)

    def make_inputs(self) -> None:
        """Anew, after the old ones: some providers write into theirs."""
        assert self.case is not None
        self.inputs, self.leaves = None, {}
        self.release()
        self.inputs = self.case.shape.inputs(self.device)
        self.leaves = self.case.shape.leaves(self.inputs)

    def prepare(self, name: str) -> dict[str, Any]:
        self.case = self.cases[name]
        self.compute = self.provider.compute(self.case)
        if self.compute is None:
            return {"error": "not offered"}
        self.make_inputs()
        self.step()  # compiles, and tunes what is tuned
        self.make_inputs()
        result: list[torch.Tensor] = []

        def step() -> None:
            outputs, gradients = self.step()
            result.extend([outputs] if isinstance(outputs, torch.Tensor) else outputs)
            result.extend(gradients)

        extra = extra_mib(self.clock, step)
        names = [*self.case.shape.outputs, *self.leaves]
        values = {k: size(v.detach()) for k, v in zip(names, result, strict=True)}
        result.clear()
        self.release()
        return {"values": values, "extra_mib": extra}

    def round(self, calls: int, round_ms: float, ceiling_ms: float) -> dict[str, Any]:
        """Times and ceilings side by side; the first call takes its memory anew, uncounted.

        Providers that overwrite their inputs are timed on what they left there. Host time is a
        median of five calls, of steps longer than `round_ms` one.
        """
        assert self.case is not None
        ms = self.clock.sustained_ms(self.step, round_ms, calls, MOST_CALLS)
        forward_ms = self.clock.sustained_ms(self.forward, round_ms, calls, MOST_CALLS)
        single = [self.clock.host_us(self.step) for _ in range(5 if ms < round_ms else 1)]
        self.release()
        gemm = self.case.shape.floor.gemm
        rates = {"flops": matmul_rate(self.clock, gemm, self.device, ceiling_ms)} if gemm else {}
        rates["bytes"] = copy_rate(self.clock, self.device, ceiling_ms / 5)
        self.release()
        host_us = statistics.median(single)
        return {"ms": ms, "forward_ms": forward_ms, "host_us": host_us, "rates": rates}

    def free(self) -> dict[str, Any]:
        self.case = self.compute = self.inputs = None
        self.leaves = {}
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        self.release()
        return {}

    def release(self) -> None:
        gc.collect()
        if self.clock.cuda:
            torch.cuda.empty_cache()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            return getattr(self, request.pop("do"))(**request)
        except Exception as e:  # whatever a provider raises is its result
            text = f"{type(e).__name__}: {' '.join(str(e).split())}"[:300]
        self.free()
        return {"error": text, "fatal": "CUDA error" in text}


def main() -> None:
    name, device, smoke = sys.argv[1:]
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply

    def reply(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=replies, flush=True)

    try:
        reply(hello(PROVIDERS[name], device))
    except Exception as e:  # a package that is broken here is as good as absent
        reply({"absent": f"{type(e).__name__}: {' '.join(str(e).split())}"[:200]})
        return
    gc.freeze()  # what is imported stays, and need not be looked through again
    worker = Worker(PROVIDERS[name], device, smoke == "smoke")
    for line in sys.stdin:
        message = worker.answer(json.loads(line))
        reply(message)
        if message.get("fatal"):
            return  # the context is lost; run.py starts another process


if __name__ == "__main__":
    main()
