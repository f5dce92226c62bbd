"""Peak memory to the byte, and step times that tell a slow function from a fast one."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from liger_kernel import measure
from liger_kernel.measure import Meter, PeakMemory, interleaved_median, step_times

MIB = 2**20


def _take(mib: int) -> torch.Tensor:
    return torch.empty(mib * MIB, dtype=torch.uint8)


def test_peak_counts_to_the_byte() -> None:
    with PeakMemory() as peak:
        kept = _take(64)
    assert peak.bytes == 64 * MIB and peak.mib == 64
    del kept


def test_a_freed_temporary_counts_and_what_follows_it_does_not_add_up() -> None:
    with PeakMemory() as peak:
        _take(48)
        kept = [_take(16), _take(16)]
    assert peak.bytes == 48 * MIB
    del kept


def test_what_was_there_before_is_not_counted() -> None:
    before = _take(64)
    with PeakMemory() as peak:
        kept = before[: 8 * MIB].clone()
    assert peak.bytes == 8 * MIB
    del kept


def test_a_training_step_is_measured_through_autograd() -> None:
    x = torch.ones(MIB, requires_grad=True)  # 4 MiB
    x.grad = torch.zeros_like(x)
    with PeakMemory() as peak:
        x.exp().sum().backward()
    # exp's result and, in backward, its gradient: 2 of 4 MiB, and a few scalars
    assert 8 * MIB <= peak.bytes < 8 * MIB + 4096


def test_an_error_inside_the_block_comes_through_and_the_next_measure_works() -> None:
    with pytest.raises(KeyError, match="inside"), PeakMemory():
        raise KeyError("inside")
    with PeakMemory() as peak:
        _take(3)
    assert peak.bytes == 3 * MIB


def test_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="not on meta"):
        PeakMemory("meta")


def test_the_profiler_keeps_quiet() -> None:
    code = "from liger_kernel.measure import PeakMemory\nwith PeakMemory() as p: pass"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.gpu
def test_peak_on_cuda() -> None:
    held = torch.empty(8 * MIB, dtype=torch.uint8, device="cuda")
    with PeakMemory("cuda") as peak:
        torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
        kept = torch.empty(32 * MIB, dtype=torch.uint8, device="cuda")
    assert peak.bytes == 64 * MIB
    del held, kept


@pytest.mark.gpu
def test_cuda_times_wait_for_the_device() -> None:
    x = torch.randn(8192, 8192, device="cuda")
    ms = interleaved_median({"one": lambda: x @ x, "four": lambda: x @ x @ x @ x @ x}, 5, "cuda")
    assert 3 < ms["four"] / ms["one"] < 5


def test_functions_take_turns_and_warm_up() -> None:
    calls: list[str] = []
    fns = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = step_times(fns, repeats=3, warmup=1)
    assert "".join(calls) == "abbaabba"
    assert [len(t) for t in times.values()] == [3, 3]


def test_within_a_context_one_call_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    right = measure.call_ms

    def counted(fn: Callable[[], object], device: torch.device | str) -> float:
        seen.append("t")
        return right(fn, device)

    @contextmanager
    def patched() -> Iterator[None]:
        seen.append("(")
        yield
        seen.append(")")

    monkeypatch.setattr(measure, "call_ms", counted)
    fns = {"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}
    times = step_times(fns, repeats=1, warmup=0, within={"b": patched})
    assert "".join(seen) == "ata(btb)" and [len(t) for t in times.values()] == [1, 1]


def test_median_in_milliseconds() -> None:
    pauses = iter([0.3, 0.03, 0.03, 0.9])  # warm-up and one outlier
    ms = interleaved_median({"pause": lambda: time.sleep(next(pauses))}, repeats=3)
    assert 30 <= ms["pause"] < 200


def test_nothing_to_time_is_an_error() -> None:
    with pytest.raises(ValueError, match="repeats >= 1"):
        interleaved_median({"f": lambda: None}, repeats=0)


class Tokens(torch.nn.Module):
    def forward(self, input_ids: Any = None, inputs_embeds: Any = None) -> Any:
        return 2 * (input_ids if inputs_embeds is None else inputs_embeds)


def test_a_meter_counts_training_while_it_runs() -> None:
    model = Tokens()
    meter = Meter(model, "cpu")
    model(torch.zeros(2, 9))
    meter.reset()
    meter.start()
    model(input_ids=torch.zeros(2, 25))
    model(inputs_embeds=torch.zeros(2, 5, 4))
    time.sleep(0.05)
    meter.stop()
    time.sleep(0.5)
    meter.start()
    with torch.no_grad():
        model(torch.zeros(2, 100))
    found = meter.close()
    assert 60 / 0.4 < found["tokens_per_second"] < 60 / 0.05
    assert found["peak_memory_mib"] > 10
    assert not model._forward_pre_hooks


def test_a_meter_counts_under_compile_without_a_recompilation() -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = Tokens()
    meter = Meter(model, "cpu")
    call = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    call(input_ids=torch.zeros(2, 9))
    first = len(graphs)
    for length in range(3, 8):
        call(input_ids=torch.zeros(2, length))
    assert int(meter._tokens) == 18 + 2 * sum(range(3, 8)) and len(graphs) == first


def test_a_meter_that_saw_nothing_says_nothing() -> None:
    assert Meter(Tokens(), "cpu").close().keys() == {"peak_memory_mib"}
