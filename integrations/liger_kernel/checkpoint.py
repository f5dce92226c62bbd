"""Which checkpoint can a killed run resume from: the newest one that is whole.

A folder's name proves nothing: a run killed while it saves leaves a folder with a fine name and
half a file. Completeness is judged from the files' structure alone, so it holds for checkpoints of
any framework and needs none installed. Tensor contents are not read; a damaged byte in the middle
of a file of the right size goes unseen.
"""

import json
import re
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

TRAINER_FILES = ("trainer_state.json",)
"""What HF Trainer writes last into a checkpoint, so that its presence means the rest came first."""


def newest_complete(
    folder: str | Path,
    pattern: str = "checkpoint-*",
    required: Sequence[str] = TRAINER_FILES,
) -> Path | None:
    """Return the newest complete checkpoint in `folder`, None if there is none.

    `pattern` is a glob of the checkpoints' names, folders or single files; `required` names the
    files that a checkpoint folder must hold (single-file checkpoints ignore it). Newest is the
    highest step in the name (`step=N`, else the last number) if every name has one, equal steps
    and names without a number go by modification time. Each torn checkpoint newer than the one
    returned is named in a `UserWarning`, with its defect and what is used instead.
    """
    torn: list[tuple[Path, str]] = []
    found = None
    for path in _newest_first(list(Path(folder).glob(pattern))):
        faults = defects(path, required)
        if not faults:
            found = path
            break
        torn.append((path, faults[0]))
    instead = f"{found} is used instead" if found else "there is no complete one to resume from"
    for path, fault in torn:
        warnings.warn(f"checkpoint {path} is torn ({fault}); {instead}", stacklevel=2)
    return found


def defects(path: str | Path, required: Sequence[str] = TRAINER_FILES) -> list[str]:
    """Say what is torn or missing in the checkpoint `path`, a folder or one file; [] if nothing."""
    path = Path(path)
    if not path.is_dir():
        return _file_defects(path, path.name)
    missing = [f"{name} is missing" for name in required if not (path / name).exists()]
    files = sorted(p for p in path.rglob("*") if p.is_file())
    if not files:
        missing.append("it holds no file")
    return missing + [fault for p in files for fault in _file_defects(p, str(p.relative_to(path)))]


def _newest_first(paths: list[Path]) -> list[Path]:
    steps = {path: _step(path) for path in paths}
    numbered = all(step is not None for step in steps.values())

    def age(path: Path) -> tuple[int, float]:
        return ((steps[path] or 0) if numbered else 0, path.stat().st_mtime)

    return sorted(paths, key=age, reverse=True)


def _step(path: Path) -> int | None:
    step = re.search(r"step=(\d+)", path.name)
    numbers = re.findall(r"\d+", path.stem)
    return int(step[1]) if step else int(numbers[-1]) if numbers else None


def _file_defects(path: Path, name: str) -> list[str]:
    check = _CHECKS.get(path.suffix)
    if check is None:
        return []
    try:
        if path.stat().st_size == 0:
            return [f"{name} is empty"]
        fault = check(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as e:
        fault = str(e) or type(e).__name__
    return [f"{name}: {fault}"] if fault else []


def _json(path: Path) -> str | None:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not path.name.endswith(".index.json"):
        return None
    absent = sorted(
        s for s in set(content["weight_map"].values()) if not (path.parent / s).exists()
    )
    return f"its shard {absent[0]} is missing" if absent else None


def _safetensors(path: Path) -> str | None:
    """8 bytes of header length (little endian), the header as JSON, then the tensors end to end."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > size:
            return f"its header takes {length} bytes, the file has {size}"
        header = cast("dict[str, dict[str, list[int]]]", json.loads(file.read(length)))
    spans = sorted(t["data_offsets"] for key, t in header.items() if key != "__metadata__")
    end = 0
    for start, stop in spans:
        if start != end or stop < start:
            return f"its tensors do not lie end to end at offset {start}"
        end = stop
    expected = 8 + length + end
    return None if expected == size else f"its header asks for {expected} bytes, it has {size}"


def _torch_zip(path: Path) -> str | None:
    with path.open("rb") as file:
        magic = file.read(4)
        # Not torch's zip format (a pickle of old, a tokenizer's .bin): its end cannot be told.
        if not (magic == b"PK\x03\x04" or b"PK\x03\x04".startswith(magic)):
            return None
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                if member.header_offset + member.compress_size > archive.start_dir:
                    return f"its member {member.filename} is cut off"
                archive.open(member).close()  # reads the member's own header
    return None


def _sharded(path: Path) -> str | None:
    """torch.distributed.checkpoint writes `.metadata` after all of its .distcp files."""
    return None if (path.parent / ".metadata").exists() else "its .metadata is missing"


_CHECKS: dict[str, Callable[[Path], str | None]] = {
    ".json": _json,
    ".safetensors": _safetensors,
    ".distcp": _sharded,
    **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt", ".pkl"), _torch_zip),
}
