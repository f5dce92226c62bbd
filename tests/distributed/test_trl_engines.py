"""TRL's trainers with `use_liger_loss` under every engine, by the numbers of TRL's own."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import by_way, launch, too_few

for module in ("trl", "peft", "datasets"):
    pytest.importorskip(module)

from test_adapters import ON_CPU  # noqa: E402
from trl_job import ENGINES, named  # noqa: E402

JOB = Path(__file__).with_name("trl_job.py")
SLOW = pytest.mark.slow
KINDS = {  # how the class begins that the engine makes of the model
    "ddp": "DistributedDataParallel", "fsdp1": "FullyShardedDataParallel", "fsdp2": "FSDP",
    "zero3": "DeepSpeedEngine",
}  # fmt: skip
STEPS, CLOSE = 3, 1e-4
NO_HEAD = "Applying a PEFT adapter to `lm_head` is not supported"
FAILS = {  # TRL itself, by the error; the other engine's numbers stand in for its own
    ("DPO, LoRA on the head", engine): NO_HEAD for engine in ("fsdp2", "zero3")
}  # fmt: skip


def needs(engine: str) -> None:
    if too_few(2) or not (torch.cuda.is_available() or engine in ON_CPU):
        pytest.skip("needs 2 GPUs")
    if engine == "zero3":
        pytest.importorskip("deepspeed")


@pytest.mark.parametrize("part", ["", pytest.param("slow", marks=SLOW)])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_is_the_plain_one(engine: str, part: str, tmp_path: Path) -> None:
    needs(engine)
    found, said = by_way(JOB, f"{engine}/{part}", tmp_path)
    cases = named(engine, part == "slow")
    assert found.keys() == cases.keys(), said
    for way, line in found.items():
        assert "failed" not in line, f"{way}: {line['failed']}"
        fails, case = FAILS.get((way, engine), ""), cases[way]
        assert fails in line["error"] and bool(fails) == bool(line["error"]), way
        assert (line["against"] == "plain") == (not fails and not case.wrong), way
        assert not case.wrong or line["plain"][0] > 100 * CLOSE, f"{way}: TRL's own is right now"
        assert line["kind"].startswith(KINDS[engine]), way
        assert line["same"], f"{way}: the processes differ"
        assert line["mistaken"] == [STEPS * case.mistaken] * 2, way
        assert line["foreseen"] == [STEPS * case.foreseen] * 2, way
        for of in ("metrics", "parameters"):
            largest, where = line[of]
            assert largest <= CLOSE, f"{way}: {of} {largest:.1e} ({where})"


@pytest.mark.parametrize(
    "engine", ["ddp", pytest.param("fsdp2", marks=SLOW), pytest.param("zero3", marks=SLOW)]
)
def test_a_poisoned_label_stops_all_with_the_same_error(engine: str, tmp_path: Path) -> None:
    needs(engine)
    began = time.monotonic()
    ended: Any = launch(JOB, f"{engine}/poison", str(tmp_path / "lines"), timeout=120)
    assert time.monotonic() - began < 120
    for code, said in ended:
        assert code == 1 and "ValueError: labels must lie in [0, 97)" in said, said[-2000:]
    assert "rank 1: ValueError" in ended[0][1] and "went on" not in ended[0][1]
