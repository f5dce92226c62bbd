"""Kill a training command with SIGKILL, start it again until it is done, compare the final states.

The command is any script that resumes by itself when it is started again. `run_killed` drives it;
`stall_half_way`, called inside that script, makes a kill in the middle of a save possible;
`differences` compares two final checkpoints bit by bit.
"""

import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HALF_WAY = "half-way through"
"""What a writer stalled by `stall_half_way` prints, with the path after it."""


@dataclass(frozen=True)
class Kill:
    """SIGKILL `delay` seconds after a line of the output contains `marker` (None: after start).

    `arguments` are added to the command of the start that is killed.
    """

    marker: str | None = None
    delay: float = 0.0
    arguments: Sequence[str] = ()


def run_killed(
    command: Sequence[str],
    kills: Sequence[Kill],
    *,
    env: Mapping[str, str] | None = None,
    limit: float = 300.0,
) -> list[str]:
    """Start `command` once for each of `kills` and kill it then, start it again and let it finish.

    `env` is added to this process's environment. Returns what each start wrote, stdout and stderr
    together. AssertionError with that text if a start ended before it was killed, if the last one
    failed, or if one took more than `limit` seconds.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})}
    killed = [_start([*command, *k.arguments], k, environment, limit) for k in kills]
    return [*killed, _start(command, None, environment, limit)]


def _start(command: Sequence[str], kill: Kill | None, env: dict[str, str], limit: float) -> str:
    process = subprocess.Popen(
        command,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that the kill reaches what the command has started, too
    )
    assert process.stdout is not None
    lines: queue.Queue[str | None] = queue.Queue()

    def read(stream: Any = process.stdout) -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    deadline = time.monotonic() + limit
    output: list[str] = []
    try:
        if kill is not None:
            if kill.marker is not None:
                _read(lines, output, deadline, kill.marker)
            time.sleep(kill.delay)
            assert process.poll() is None, f"ended before {kill}:\n{''.join(output)}"
            os.killpg(process.pid, signal.SIGKILL)
        _read(lines, output, deadline, None)
        code = process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        reader.join(5)
        process.stdout.close()
    assert code == (0 if kill is None else -signal.SIGKILL), f"exit {code}:\n{''.join(output)}"
    return "".join(output)


def _read(
    lines: "queue.Queue[str | None]", output: list[str], deadline: float, marker: str | None
) -> None:
    """Move lines to `output` until one contains `marker`, or until the end if that is None."""
    while True:
        try:
            line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise AssertionError(f"waited too long for {marker}:\n{''.join(output)}") from None
        if line is None:
            assert marker is None, f"ended without saying {marker!r}:\n{''.join(output)}"
            return
        output.append(line)
        if marker is not None and marker in line:
            return


def stall_half_way(write: Callable[..., Any], ending: str, seconds: float = 60.0) -> Any:
    """Wrap `write`: a file whose path ends with `ending` stays half written for `seconds`.

    A half-written file is what a reader or a kill finds while any writer is at work; here it lasts
    long enough to be hit. Meanwhile the line `HALF_WAY path` is on stdout.
    """

    def stalled(*args: Any, **kwargs: Any) -> Any:
        result = write(*args, **kwargs)
        paths = [str(a) for a in (*args, *kwargs.values()) if isinstance(a, str | os.PathLike)]
        for path in (p for p in paths if p.endswith(ending)):
            whole = Path(path).read_bytes()
            os.truncate(path, len(whole) // 2)
            print(HALF_WAY, path, flush=True)
            time.sleep(seconds)
            Path(path).write_bytes(whole)
        return result

    return stalled


def differences(ours: Path, theirs: Path, ignore: Sequence[str] = ()) -> list[str]:
    """Name what differs between two checkpoint folders: files, tensors bit by bit, values.

    `ignore` names files, and keys of JSON files, that hold paths or times.
    """
    names = sorted(
        {str(p.relative_to(d)) for d in (ours, theirs) for p in d.rglob("*") if p.is_file()}
    )
    found: list[str] = []
    for name in (n for n in names if n not in ignore):
        if not (ours / name).exists() or not (theirs / name).exists():
            found.append(f"{name} is in one of them only")
        else:
            found += _differ(_load(ours / name), _load(theirs / name), name, ignore)
    return found


def _load(path: Path) -> Any:
    import torch  # here, so that a script which only stalls a writer starts quickly
    from safetensors.torch import load_file

    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        return torch.load(path, map_location="cpu", weights_only=False)
    return json.loads(path.read_bytes()) if path.suffix == ".json" else path.read_bytes()


def _differ(a: Any, b: Any, name: str, ignore: Sequence[str]) -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [k for k in {**a, **b} if k not in ignore]
        lone = [f"{name}[{k!r}] is in one of them only" for k in keys if (k in a) != (k in b)]
        both = [k for k in keys if k in a and k in b]
        return lone + [d for k in both for d in _differ(a[k], b[k], f"{name}[{k!r}]", ignore)]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [d for i, (x, y) in pairs for d in _differ(x, y, f"{name}[{i}]", ignore)]
    return [] if _same(a, b) else [name]


def _same(a: Any, b: Any) -> bool:
    import torch

    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        bits = [t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        return torch.equal(*bits)
    if hasattr(a, "tobytes") and hasattr(b, "tobytes"):  # numpy's generator state
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return type(a) is type(b) and a == b
