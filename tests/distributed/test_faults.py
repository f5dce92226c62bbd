"""One process's poisoned label stops all with the same error; memory that runs out stops nobody."""

import time
from pathlib import Path

import pytest

from launch import launch, too_few

JOB = Path(__file__).with_name("faults.py")
pytestmark = pytest.mark.skipif(too_few(2), reason="needs 2 GPUs")
FORWARD = ["ddp", "fsdp1", "fsdp2", "fsdp2-head", "zero2", "zero3", "tp-hf"]
BACKWARD = ["ddp", "fsdp2-head", "tp-hf"]  # from a backward that broke off no other recovers


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero3"])
def test_a_poisoned_label_stops_all_with_the_same_error(engine: str) -> None:
    began = time.monotonic()
    ended = launch(JOB, "poison", engine, "patched", timeout=60)
    assert time.monotonic() - began < 60
    for code, said in ended:
        assert code == 1 and "ValueError: labels must lie in [0, 98)" in said, said[-2000:]
    assert "rank 1: ValueError" in ended[0][1] and "went on" not in ended[0][1]


@pytest.mark.parametrize(
    "fault, engine",
    [*(("forward", e) for e in FORWARD), *(("backward", e) for e in BACKWARD)],
)
def test_the_next_smaller_step_is_right_where_memory_ran_out(fault: str, engine: str) -> None:
    for code, said in launch(JOB, fault, engine, "patched", timeout=60):
        assert code == 0 and "far " in said, said[-2000:]
