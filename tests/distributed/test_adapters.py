"""Every way of turning the patch on under HF Trainer and Accelerate, by the plain run's numbers."""

from pathlib import Path

import pytest
import torch

from adapters_job import ENGINES, WAYS
from launch import by_way, too_few

ON_CPU = ("ddp", "fsdp2", "zero3")  # FSDP1 ends in a segmentation fault there


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_is_the_plain_one(engine: str, tmp_path: Path) -> None:
    if too_few(2) or not (torch.cuda.is_available() or engine in ON_CPU):
        pytest.skip("needs 2 GPUs")
    if engine == "zero3":
        pytest.importorskip("deepspeed")
    found, said = by_way(Path(__file__).with_name("adapters_job.py"), engine, tmp_path)
    assert found.keys() == WAYS.keys(), said
    for way, line in found.items():
        assert line["fused"] == ("," in way), way
        assert line["losses"] == pytest.approx(line["plain"], rel=1e-5), way
        assert line["parameters"] <= 1e-4, f"{way}: {line['parameters']:.1e} ({line['where']})"
