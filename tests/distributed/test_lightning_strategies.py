"""Every way of turning the patch on under Lightning's strategies, by the plain run's numbers."""

import math
from pathlib import Path

import pytest
import torch

from launch import by_way, too_few
from lightning_job import STRATEGIES, WAYS

ON_CPU = ("ddp", "model_parallel")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_is_the_plain_one(strategy: str, tmp_path: Path) -> None:
    if too_few(2) or not (torch.cuda.is_available() or strategy in ON_CPU):
        pytest.skip("needs 2 GPUs")
    found, said = by_way(Path(__file__).with_name("lightning_job.py"), strategy, tmp_path)
    assert found.keys() == WAYS.keys(), said
    for way, line in found.items():
        assert len(line["losses"]) == 6 and line["widths"] == [97 if way == "plain" else 0], way
        assert line["losses"] == pytest.approx(line["plain"], rel=1e-5), way
        if strategy != "deepspeed":  # which gives no whole parameters
            assert not math.isnan(line["parameters"]) and line["parameters"] <= 1e-4, way
