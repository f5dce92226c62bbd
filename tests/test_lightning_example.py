"""The Lightning example by its own configuration file: its numbers, and what a kill leaves."""

import csv
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kill_resume import HALF_WAY, Kill, differences, run_killed
from test_examples import ENV, EXAMPLES, JOB, ROOT

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:Warning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:Warning"),
]


def line(model: str, output: Path, texts: int, *more: str) -> list[str]:
    """The command of the configuration file's first line, made small."""
    found = ["fit", "--config", str(ROOT / "configs" / "lightning.yaml"), "--data.model", model]
    found += ["--data.texts", str(texts), "--data.max_length", "256", "--data.batch_size", "1"]
    found += ["--trainer.default_root_dir", str(output), "--model.learning_rate", "1e-2"]
    found += ["--trainer.enable_progress_bar", "false", "--checkpoint.every_n_train_steps", "2"]
    return [*found, *more]


@pytest.fixture
def run(example: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the example in this process; what its newest CSV has, by name."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # gone after the test
    monkeypatch.setenv("PL_SEED_WORKERS", "1")
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of what Lightning calls
    monkeypatch.setattr(sys, "argv", ["lightning_finetune.py"])

    def run(model: str, output: Path, texts: int, *more: str) -> dict[str, list[float]]:
        trainer = example("lightning_finetune").main(line(model, output, texts, *more)).trainer
        with open(Path(trainer.logger.log_dir) / "metrics.csv") as file:
            rows = list(csv.DictReader(file))
        return {name: [float(row[name]) for row in rows if row[name]] for name in rows[0]}

    return run


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    state = torch.load(folder / "checkpoints" / f"step={step}.ckpt")["state_dict"]
    return {name.removeprefix("model."): value for name, value in state.items()}


def close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name] - value).norm() <= 1e-4 * value.norm(), name


def test_learns_the_same_with_liger(
    run: Any, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    found = {}
    for name, disabled in {"liger": "0", "plain": "1"}.items():
        monkeypatch.setenv("LIGER_DISABLE", disabled)
        found[name] = run(model, tmp_path / name, 24, "--data.batch_size", "2")
        assert "resuming from None" in capfd.readouterr().out
    for key in ("train_loss", "val_loss"):
        assert found["liger"][key] == pytest.approx(found["plain"][key], rel=1e-5)
    for figures in found.values():
        assert len(figures["train_loss"]) == 6 and len(figures["val_loss"]) == 2
        assert len(figures["liger_tokens_per_second"]) == 6
        assert min(figures["liger_tokens_per_second"]) > 0
        assert min(figures["liger_peak_memory_mib"]) > 10
    assert found["plain"]["val_loss"][1] < found["plain"]["val_loss"][0] < 5.5
    ours = AutoModelForCausalLM.from_pretrained(model)
    ours.load_state_dict(weights(tmp_path / "liger", 6), strict=True)
    close(ours.state_dict(), weights(tmp_path / "plain", 6))
    kept = {p.name for p in (tmp_path / "liger" / "checkpoints").iterdir()}
    assert kept == {"step=4.ckpt", "step=6.ckpt"}


def test_accumulates_what_one_batch_is(run: Any, model: str, tmp_path: Path) -> None:
    found = []
    for batch, windows in (4, 1), (1, 4):
        more = ["--trainer.accumulate_grad_batches", str(windows)]
        run(model, tmp_path / str(batch), 24, *more, "--data.batch_size", str(batch))
        found.append(weights(tmp_path / str(batch), 6))
    close(*found)


PLACES = ["callbacks", "folder"]  # ModelCheckpoint's has nothing but names and numbers of steps


def kill_and_resume(model: str, folder: Path, seed: int, each: int) -> None:
    """Kill a run `each` times at a random moment and as often in a save; then the end."""
    rng = random.Random(seed)
    kills = [Kill(f"step {rng.randint(1, 4)} done", rng.uniform(0, 0.3)) for _ in range(each)]
    stalled = ["--stall", ".ckpt"]
    kills += [Kill(HALF_WAY, arguments=stalled) for _ in range(each)]
    rng.shuffle(kills)
    print(f"seed {seed}: {kills}")  # shown where it fails
    killed, unbroken = folder / "killed", folder / "unbroken"
    # Epochs that end in the middle of a window; more steps than a kill takes, up to 5.
    texts = (5 * each + 2) // 2 * 2 + 1
    script = str(EXAMPLES / "lightning_finetune.py")

    def command(output: Path) -> list[str]:
        return [*JOB, script, *line(model, output, texts, "--trainer.max_epochs", "2")]

    with ThreadPoolExecutor() as pool:
        whole = pool.submit(run_killed, command(unbroken), [], env=ENV)
        said = run_killed(command(killed), kills, env=ENV)
        whole.result()
    assert "resuming from None" not in said[-1]
    last = Path("checkpoints") / f"step={texts + 1}.ckpt"
    for part in killed, unbroken:
        (part / "last").mkdir()
        (part / last).rename(part / "last" / "last.ckpt")
    assert differences(killed / "last", unbroken / "last", ignore=PLACES) == []


def test_a_killed_run_ends_bitwise_where_the_unbroken_does(forgetful: str, tmp_path: Path) -> None:
    kill_and_resume(forgetful, tmp_path, seed=0, each=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [4, 6])
def test_runs_killed_ten_times(forgetful: str, tmp_path: Path, seed: int) -> None:
    kill_and_resume(forgetful, tmp_path, seed, each=5)
