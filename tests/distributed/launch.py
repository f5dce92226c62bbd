"""Start the processes of a job, on this machine, and stop them in any case."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

JOB = Path(__file__).with_name("job.py")
ROOT = JOB.parents[2]
FOLDERS = (".", "integrations", "tests", "tests/integrations", "tests/distributed")


def too_few(world: int) -> bool:
    """Whether there are GPUs, but not one for each process."""
    return 0 < torch.cuda.device_count() < world


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    folders = [str(ROOT / folder) for folder in FOLDERS]
    before = os.environ.get("PYTHONPATH")
    env = os.environ | dict(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false",
        PYTHONPATH=os.pathsep.join([*folders, *([before] if before else [])]),
    )  # fmt: skip
    if not torch.cuda.is_available():
        env["DS_ACCELERATOR"] = "cpu"
    return env


def launch(script: Path, *args: str, world: int = 2, timeout: float = 900) -> list[tuple[int, str]]:
    """Exit codes and what each process said on stderr."""
    port = free_port()
    jobs = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script), *args],
            env=environment(r, world, port),
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for r in range(world)
    ]  # fmt: skip
    said = list[str]()
    try:
        for job in jobs:
            said.append(job.communicate(timeout=timeout)[1])
    except subprocess.TimeoutExpired:
        pass
    finally:
        for job in jobs:
            job.kill()
    said += [job.communicate()[1] for job in jobs[len(said) :]]
    return [(job.returncode, text) for job, text in zip(jobs, said, strict=True)]


def by_way(script: Path, case: str, folder: Path) -> tuple[dict[str, Any], str]:
    """The JSON lines that two processes of a job write for a case, by `way`; what they said."""
    output = folder / "lines"
    said = launch(script, case, str(output), timeout=300)
    text = output.read_text() if output.exists() else ""
    found = {line["way"]: line for line in map(json.loads, text.splitlines())}
    return found, "\n".join(words[-3000:] for _, words in said)


def results(runs: list[dict[str, Any]], folder: Path, world: int = 2, timeout: float = 900) -> Any:
    """What `job.py` found for each run, by its name, and what the processes said."""
    todo, done = folder / "runs.json", folder / "results.jsonl"
    todo.write_text(json.dumps(runs))
    said = launch(JOB, str(todo), str(done), world=world, timeout=timeout)
    lines = done.read_text().splitlines() if done.exists() else []
    found: dict[str, Any] = {}
    for line in map(json.loads, lines):
        if line["run"] not in found or "error" in line:
            found[line["run"]] = line
    return found, "\n".join(text[-2000:] for _, text in said)


if __name__ == "__main__":  # launch.py RUNS.json FOLDER [processes]
    found, said = results(
        json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), *map(int, sys.argv[3:])
    )
    for line in found.values():
        print(json.dumps(line))
    print(said, file=sys.stderr)
