"""A step under every engine is that of one process on the batches of all: loss and gradients."""

from pathlib import Path
from typing import Any

import pytest

from job import Run
from launch import results, too_few
from runs import FOUR, JOBS, SLOW, Case


def problems(found: dict[str, Any], run: Run) -> str:
    """What is wrong with a run's result, or ""."""
    if (got := found.get(run.name)) is None:
        return "has no result"
    if "error" in got or run.refused:
        return got.get("error", "")
    limits = dict(loss=1e-2, used=1.0) if "used" in got else dict(loss=1e-5, gradient=1e-5)
    wrong = [
        f"{k} {got[k]:.1e} ({got['where']})" for k, most in limits.items() if not got[k] <= most
    ]
    if got["spread"]:
        wrong.append(f"processes' gradients differ by {got['spread']:.1e}")
    if run.steps > 1 and not got["parameters"] <= 1e-4:
        wrong.append(f"parameters {got['parameters']:.1e}")
    if got["width"] != (98 if run.logits else 0):
        wrong.append(f"logits are {got['width']} wide")
    return "; ".join(wrong + more_traffic(got.get("traffic", {})))


def more_traffic(traffic: dict[str, Any]) -> list[str]:
    """Where the patched model communicates more than the plain one: other ops, more bytes."""
    if not traffic:
        return []
    plain, patched = traffic["plain"], traffic["patched"]
    if patched.keys() <= plain.keys():
        more = [op for op, counts in patched.items() if counts > plain[op]]
        return [f"{op}: {plain[op]} -> {patched[op]}" for op in more]
    totals = [[sum(each[i] for each in ops.values()) for i in (0, 1)] for ops in (plain, patched)]
    more = [f"{name} of collectives: {a} -> {b}"
            for name, a, b in zip(("calls", "bytes"), *totals, strict=True) if b > a]  # fmt: skip
    return more if sum(totals[0]) else ["no collective was seen"]


def check(cases: list[Case], folder: Path, world: int) -> None:
    if too_few(world):
        pytest.skip(f"needs {world} GPUs")
    runs = [Run(**case) for case in cases]
    assert len({run.name for run in runs}) == len(runs)
    found, said = results(cases, folder, world, timeout=400)
    wrong = {run.name: why for run in runs if (why := problems(found, run))}
    assert not wrong, "\n".join([*(f"{n}: {w}" for n, w in wrong.items()), said[-3000:]])


@pytest.mark.parametrize("job", JOBS)
def test_a_step_is_that_of_one_process(job: str, tmp_path: Path) -> None:
    check(JOBS[job], tmp_path, 2)


def test_a_step_of_two_dimensions_is_that_of_one_process(tmp_path: Path) -> None:
    check(FOUR, tmp_path, 4)


@pytest.mark.slow
def test_what_takes_longer_is_that_of_one_process(tmp_path: Path) -> None:
    check(SLOW, tmp_path, 2)
