"""The benchmark of engines, at a tiny size on two processes of this machine's CPU."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SIZE = {"shape": "tiny", "length": 32, "batch": 1, "steps": 2}


def run(out: Path, *options: str) -> dict[str, Any]:
    size = [f"--{k}={v}" for k, v in SIZE.items()]
    command = [sys.executable, "-m", "benchmarks.sharded", *size, f"--out={out}", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def gathered(traffic: dict[str, list[int]]) -> int:
    return sum(size for op, (_, size) in traffic.items() if "gather" in op)


@pytest.mark.parametrize(
    "engine",
    ["fsdp2-head", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp2", "zero3"))],
)
def test_both_variants_train_alike_and_the_patch_adds_no_traffic(
    engine: str, tmp_path: Path
) -> None:
    report = run(tmp_path / "out.json", "--engines", engine)
    assert report["commit"] and SIZE.items() <= report["setting"].items()
    plain, patched = report[engine]["plain"], report[engine]["patched"]
    for found in (plain, patched):
        assert "error" not in found and found["peak_gib"] is None and len(found["all_ms"]) == 2
        assert found["tokens_per_s"] == pytest.approx(2 * 32 / found["step_ms"] * 1e3)
        assert len(found["losses"]) == 3 and found["losses"][2] < found["losses"][0]
    assert report[engine]["loss_difference"] < 2e-4
    before, after = plain["traffic"], patched["traffic"]
    assert after.keys() == before.keys()
    for op in before:
        assert after[op][0] <= before[op][0] and after[op][1] <= before[op][1], op
    # tiny: 131072 weights of the head, 73728 of the layers' matrices, 320 of the norms
    head, layers, norms = (n * 2 // 2 for n in (64 * 2048, 73728, 320))  # bf16, over two processes
    every = head + layers + norms
    reduced = sum(size for op, (_, size) in before.items() if "reduce_scatter" in op)
    untied = head if engine == "fsdp2-head" else 0
    assert reduced == 2 * (every + untied)
    if engine != "zero3":  # which layers it keeps is DeepSpeed's to decide
        again = layers + 4 * 64  # what is gathered once more in backward: all but the root
        assert gathered(before) == every + again + 2 * untied
        assert gathered(after) == every + again + untied


@pytest.mark.slow
def test_a_variant_that_fails_says_so_and_the_others_go_on(tmp_path: Path) -> None:
    report = run(tmp_path / "out.json", "--engines", "fsdp2", "--timeout", "0.5")
    for variant in ("plain", "patched"):
        assert report["fsdp2"][variant]["error"].startswith("no result: status -9")
    assert report["fsdp2"]["loss_difference"] is None
