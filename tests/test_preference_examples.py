"""The preference example by its recipes: its numbers with and without the fused loss, and kills."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest

from test_examples import ENV, ROOT, TIMES, TORN, kill_and_resume

pytest.importorskip("trl")
NAMES = ["dpo", "kto", "orpo", "cpo", "simpo"]


def line(name: str, model: str, output: Path, pairs: int, *more: str) -> list[str]:
    """The command of a recipe's first line, made small."""
    found = ["--config", str(ROOT / "configs" / "trl" / f"{name}.yaml"), "--model", model]
    found += ["--output_dir", str(output), "--pairs", str(pairs), "--num_train_epochs", "1"]
    found += ["--max_length", "256"]
    found += ["--per_device_train_batch_size", "2", "--learning_rate", "1e-3", "--use_cpu", "True"]
    return [*found, "--save_steps", "2", "--disable_tqdm", "True", *more]


@pytest.fixture
def main(example: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example's, in this process."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")  # as the recipes do; gone after the test
    found = example("preference").main
    gc.freeze()  # accelerate collects at the end of every run: more than half of a run's time
    return found


def logged(output: Path) -> list[dict[str, float]]:
    """What metrics.jsonl has that is no time."""
    rows = [json.loads(row) for row in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


@pytest.mark.parametrize(
    ("name", "flags"), [*((name, ()) for name in NAMES), ("dpo", ("--lora_r", "4"))], ids=str
)
def test_learns_the_same_with_the_fused_loss(
    main: Any, model: str, tmp_path: Path, capfd: Any, name: str, flags: tuple[str, ...]
) -> None:
    for on in ("true", "false"):
        more = (*flags, "--use_liger_loss", on)
        summary = main(line(name, model, tmp_path / on, 8, *more))
        said = capfd.readouterr().out
        assert "resuming from None" in said and json.loads(said.splitlines()[-1]) == summary
        assert len(summary["losses"]) == 4 and summary["peak_memory_mib"] > 10
        assert summary["held_out_before"].keys() == summary["held_out_after"].keys()
        assert ("rewards/accuracies" in summary["held_out_after"]) == (name != "kto")
        assert (tmp_path / on / "metrics.png").read_bytes().startswith(b"\x89PNG")
    ours, plain = logged(tmp_path / "true"), logged(tmp_path / "false")
    assert len(ours) == len(plain) > 4
    for got, want in zip(ours, plain, strict=True):
        assert got == pytest.approx(want, rel=1e-4, abs=1e-4)


def test_pairs_are_of_one_text_and_of_another(example: Any) -> None:
    from pydoc_data.topics import topics

    parts = [" ".join(text.split()) for text in topics.values()]
    train, held_out = example("_data").preferences()
    assert len(train) > 64 and len(held_out) > 16
    for pair in [*train, *held_out]:
        prompt, chosen, rejected = (pair[key].strip() for key in ("prompt", "chosen", "rejected"))
        assert any(f"{prompt} {chosen}" in text for text in parts)
        assert not any(f"{prompt} {rejected}" in text for text in parts)
    known = {pair[key] for pair in train for key in ("prompt", "chosen", "rejected")}
    assert not any(pair[key] in known for pair in held_out for key in ("prompt", "chosen"))


def test_a_finished_run_goes_on_for_more_epochs(main: Any, model: str, tmp_path: Path) -> None:
    constant = ("--lr_scheduler_type", "constant")
    whole = main(line("orpo", model, tmp_path / "whole", 8, *constant, "--num_train_epochs", "2"))
    main(line("orpo", model, tmp_path / "parts", 8, *constant))
    parts = main(line("orpo", model, tmp_path / "parts", 8, *constant, "--num_train_epochs", "2"))
    assert parts["losses"] == whole["losses"] and len(whole["losses"]) == 8
    assert parts["held_out_before"] == whole["held_out_before"]
    assert parts["held_out_after"] == whole["held_out_after"]


def kill(name: str, model: str, folder: Path, seed: int, each: int) -> None:
    def flags(output: Path, steps: int) -> list[str]:
        pairs = 2 * steps  # of which KTO takes a text each
        return line(name, model, output, pairs)

    # TRL counts tokens from 0 when it starts.
    ignore = [*TIMES, "num_tokens"]
    kill_and_resume("preference", flags, TORN["hf_trainer"], folder, seed, each, ENV, ignore)


def test_a_killed_run_ends_bitwise_where_the_unbroken_does(forgetful: str, tmp_path: Path) -> None:
    kill("dpo", forgetful, tmp_path, seed=0, each=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_runs_killed_four_times(forgetful: str, tmp_path: Path, name: str) -> None:
    kill(name, forgetful, tmp_path, seed=4, each=2)
