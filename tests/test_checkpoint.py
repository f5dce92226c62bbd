"""Checkpoints that a kill, a full disk or a lost file left torn are told from whole ones."""

import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kill_resume import HALF_WAY, Kill, differences, run_killed
from liger_kernel.checkpoint import defects, newest_complete

JOB = [sys.executable, str(Path(__file__).with_name("kill_resume_job.py"))]
ENV = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "HF_HUB_OFFLINE": "1"}


def _save(folder: Path) -> Path:
    """A checkpoint with a file of every kind."""
    folder.mkdir(parents=True)
    tensors = {"w": torch.arange(300.0), "b": torch.ones(7, dtype=torch.bfloat16)}
    for shard in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        save_file(tensors, folder / shard, metadata={"format": "pt"})
    index = {"weight_map": {"w": "model-00001-of-00002.safetensors"}}
    index["weight_map"]["b"] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.save(tensors, folder / "optimizer.pt")
    torch.save({"seed": 1}, folder / "rng_state.pth")
    torch.save(tensors, folder / "training_args.bin")
    (folder / "notes.txt").write_text("")
    (folder / "trainer_state.json").write_text('{"global_step": 3}')
    return folder


TENSOR_FILES = [
    "model-00002-of-00002.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "training_args.bin",
]


def test_a_whole_checkpoint_has_no_defects(tmp_path: Path) -> None:
    assert defects(_save(tmp_path / "checkpoint-3")) == []


@pytest.mark.parametrize("name", [*TENSOR_FILES, "trainer_state.json"])
def test_a_file_cut_off_anywhere_is_torn(tmp_path: Path, name: str) -> None:
    path = _save(tmp_path / "checkpoint-3") / name
    whole = path.read_bytes()
    cuts = {0, 1, 3, 4, 8, 9, len(whole) // 2, len(whole) - 1} | set(range(0, len(whole), 97))
    for cut in (c for c in cuts if c < len(whole)):
        path.write_bytes(whole[:cut])
        assert [d for d in defects(path.parent) if d.startswith(name)], f"cut to {cut} bytes"
    path.write_bytes(whole)
    assert defects(path.parent) == []


def test_safetensors_with_a_byte_too_many_or_a_gap_is_torn(tmp_path: Path) -> None:
    path = _save(tmp_path / "checkpoint-3") / TENSOR_FILES[0]
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0")
    assert "asks for" in defects(path.parent)[0]
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    header["b"]["data_offsets"][0] += 2
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])
    assert "end to end" in defects(path.parent)[0]


@pytest.mark.parametrize("name", ["trainer_state.json", "model-00001-of-00002.safetensors"])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    folder = _save(tmp_path / "checkpoint-3")
    (folder / name).unlink()
    assert [d for d in defects(folder) if name in d and "missing" in d]


def test_files_that_only_look_like_torchs_are_not_judged(tmp_path: Path) -> None:
    folder = _save(tmp_path / "checkpoint-3")
    torch.save([1], folder / "old.pt", _use_new_zipfile_serialization=False)
    (folder / "spiece.bin").write_bytes(b"anything else")
    assert defects(folder) == []


def test_sharded_checkpoints_need_their_metadata(tmp_path: Path) -> None:
    folder = _save(tmp_path / "checkpoint-3")
    shards = folder / "pytorch_model_fsdp_0"
    shards.mkdir()
    torch.save([1], shards / "__0_0.distcp")
    assert defects(folder) == [
        f"{Path('pytorch_model_fsdp_0/__0_0.distcp')}: its .metadata is missing"
    ]
    (shards / ".metadata").write_bytes(b"\x80")
    assert defects(folder) == []


def test_the_newest_is_found_by_step_and_not_by_name(tmp_path: Path) -> None:
    for step in (100, 20, 3):
        _save(tmp_path / f"checkpoint-{step}")
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-100"


def test_torn_ones_are_skipped_with_a_warning_each(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        _save(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-1" / "trainer_state.json").unlink()  # older: of no interest
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()
    os.truncate(tmp_path / "checkpoint-3" / "optimizer.pt", 700)
    with pytest.warns(UserWarning) as caught:
        assert newest_complete(tmp_path) == tmp_path / "checkpoint-2"
    said = [str(w.message) for w in caught]
    assert len(said) == 2 and all("checkpoint-2 is used instead" in text for text in said)
    assert "checkpoint-4 is torn (trainer_state.json is missing)" in said[0]
    assert "checkpoint-3 is torn (optimizer.pt" in said[1]


def test_none_is_complete(tmp_path: Path) -> None:
    assert newest_complete(tmp_path / "absent") is None
    (tmp_path / "checkpoint-7").mkdir()
    with pytest.warns(UserWarning, match="no complete one"):
        assert newest_complete(tmp_path) is None


def test_single_files_and_names_without_steps(tmp_path: Path) -> None:
    for name in ("epoch=0-step=20.ckpt", "epoch=1-step=5.ckpt"):
        torch.save({"state_dict": {}}, tmp_path / name)
    assert newest_complete(tmp_path, "*.ckpt") == tmp_path / "epoch=0-step=20.ckpt"
    torch.save({"state_dict": {}}, tmp_path / "last.ckpt")
    os.utime(tmp_path / "last.ckpt", (2e9, 2e9))
    assert newest_complete(tmp_path, "*.ckpt") == tmp_path / "last.ckpt"
    os.truncate(tmp_path / "last.ckpt", 100)
    os.utime(tmp_path / "last.ckpt", (2e9, 2e9))
    os.utime(tmp_path / "epoch=1-step=5.ckpt", (1e9, 1e9))
    with pytest.warns(UserWarning, match=r"last\.ckpt is torn"):
        assert newest_complete(tmp_path, "*.ckpt") == tmp_path / "epoch=0-step=20.ckpt"


def test_the_helper_needs_no_framework() -> None:
    source = sys.modules[newest_complete.__module__].__file__
    code = f"import runpy, sys; runpy.run_path({source!r}); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# The harness itself


def test_differences_are_seen_bit_by_bit(tmp_path: Path) -> None:
    ours, theirs = _save(tmp_path / "a"), _save(tmp_path / "b")
    assert differences(ours, theirs) == []
    torch.save({"w": torch.arange(300.0), "b": -torch.zeros(7)}, ours / "optimizer.pt")
    torch.save({"w": torch.arange(300.0), "b": torch.zeros(7)}, theirs / "optimizer.pt")
    (theirs / "trainer_state.json").write_text('{"global_step": 4, "time": 1}')
    (theirs / "more.txt").write_text("")
    assert differences(ours, theirs, ignore=["time"]) == [
        "more.txt is in one of them only",
        "optimizer.pt['b']",
        "trainer_state.json['global_step']",
    ]


def test_a_writer_killed_half_way_leaves_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "state.txt"
    code = """if True:
        import pathlib, sys
        from kill_resume import stall_half_way
        def write(path, text): pathlib.Path(path).write_text(text)
        if "--stall" in sys.argv: write = stall_half_way(write, "state.txt")
        if pathlib.Path(sys.argv[1]).exists():
            print("found", pathlib.Path(sys.argv[1]).read_text())
        write(sys.argv[1], "12345678")
    """
    command = [sys.executable, "-c", code, str(path)]
    said = run_killed(command, [Kill(HALF_WAY, arguments=["--stall"])], env=ENV)
    assert said == [f"{HALF_WAY} {path}\n", "found 1234\n"]
    assert path.read_text() == "12345678"


def test_a_kill_that_comes_too_late_fails() -> None:
    with pytest.raises(AssertionError, match="ended"):
        run_killed([sys.executable, "-c", "print('hello')"], [Kill("never said")])
    with pytest.raises(AssertionError, match="exit 3"):
        run_killed([sys.executable, "-c", "raise SystemExit(3)"], [])


# Kill and resume


def _kill_and_resume(folder: Path, seed: int) -> None:
    """One kill at a random moment, one half-way through a file of the third save; then the end."""
    rng = random.Random(seed)
    torn = rng.choice(["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
    kills = [
        Kill(f"step {rng.randint(1, 3)} done", rng.uniform(0, 0.3)),
        Kill(HALF_WAY, arguments=["--stall", f"checkpoint-6/{torn}"]),
    ]
    killed, unbroken = folder / "killed", folder / "unbroken"
    with ThreadPoolExecutor() as pool:
        whole = pool.submit(run_killed, [*JOB, str(unbroken)], [], env=ENV)
        said = run_killed([*JOB, str(killed)], kills, env=ENV)
        whole.result()
    assert (
        "checkpoint-6 is torn" in said[-1]
        and f"resuming from {killed / 'checkpoint-4'}" in said[-1]
    )
    times = ["training_args.bin", "train_runtime", "train_samples_per_second"]
    times += ["train_steps_per_second", "train_loss"]
    assert differences(killed / "checkpoint-8", unbroken / "checkpoint-8", ignore=times) == []
    assert differences(killed / "checkpoint-2", unbroken / "checkpoint-8", ignore=times)


def test_a_killed_run_ends_bitwise_where_the_unbroken_one_does(tmp_path: Path) -> None:
    _kill_and_resume(tmp_path, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 21))
def test_killed_runs_end_bitwise_where_the_unbroken_one_does(tmp_path: Path, seed: int) -> None:
    _kill_and_resume(tmp_path, seed)
