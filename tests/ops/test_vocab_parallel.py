"""A head whose rows are split unevenly over two processes gives what the whole head gives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from numerics import GPU
from vocab_parallel_job import ROWS, RUNS, results

JOB = Path(__file__).with_name("vocab_parallel_job.py")
RANKS = range(len(ROWS) - 1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of what both processes saved, and what they said on stderr."""
    folder = tmp_path_factory.mktemp("vocab_parallel")
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    jobs = [
        subprocess.Popen(
            [sys.executable, str(JOB), str(rank), str(folder), str(int(not GPU))],
            env=env, stderr=subprocess.PIPE, text=True,
        )
        for rank in RANKS
    ]  # fmt: skip
    try:
        said = "".join(job.communicate(timeout=120)[1] for job in jobs)
    finally:
        for job in jobs:
            job.kill()
    return folder, said


@pytest.mark.parametrize("name, impl", [r for r in RUNS if not GPU or r[1] != "triton"])
def test_equals_the_whole_head(saved: tuple[Path, str], name: str, impl: str) -> None:
    folder, said = saved
    paths = [folder / f"{name}-{impl}.{rank}.pt" for rank in RANKS]
    assert all(path.exists() for path in paths), said[-2000:]
    parts: list[dict[str, Tensor]] = [torch.load(path) for path in paths]
    want = results(name, impl, None)
    assert all(part.keys() == want.keys() for part in parts)
    for key, whole in want.items():
        mine = [part[key] for part in parts]
        if key in ("dw", "db", "dv"):  # the process's rows
            torch.testing.assert_close(torch.cat(mine), whole)
        elif key in ("dx", "du"):  # its part of a sum
            torch.testing.assert_close(sum(mine), whole)
        else:
            for value in mine:
                torch.testing.assert_close(value, whole)


def test_nothing_is_said(saved: tuple[Path, str]) -> None:
    assert "Warning" not in saved[1] and "Error" not in saved[1], saved[1][-2000:]
