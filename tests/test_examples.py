"""The examples as a user runs them, on a tiny model: their numbers, and what a kill leaves."""

import inspect
import json
import os
import random
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from kill_resume import HALF_WAY, Kill, differences, run_killed

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
SFT = str(ROOT / "configs" / "trl" / "sft.yaml")
JOB = [sys.executable, str(Path(__file__).with_name("examples_job.py"))]
ENV = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "HF_HUB_OFFLINE": "1"}


def _trainer(model: str, output: Path, *more: str) -> list[str]:
    line = ["--model", model, "--output_dir", str(output), "--max_length", "48"]
    line += ["--per_device_train_batch_size", "2", "--learning_rate", "1e-2", "--use_cpu", "True"]
    return [*line, "--save_steps", "2", "--disable_tqdm", "True", *more]


def _loop(model: str, output: Path, *more: str) -> list[str]:
    line = ["--model", model, "--output", str(output), "--max_length", "48"]
    return [*line, "--learning_rate", "1e-2", "--save_steps", "2", *more]


def test_trainer_learns_the_same_with_liger(
    example: Any, model: str, tmp_path: Path, capfd: Any
) -> None:
    runs = {}
    for name, flags in {"plain": [], "liger": ["--use_liger", "True"]}.items():
        line = _trainer(model, tmp_path / name, "--texts", "24", *flags)
        runs[name] = example("hf_trainer").main([*line, "--gradient_accumulation_steps", "2"])
        said = capfd.readouterr().out
        assert json.loads(said.splitlines()[-1]) == runs[name]
        assert ("fused linear cross entropy" in said) == (name == "liger")
        assert (tmp_path / name / "model.safetensors").exists()
    plain, liger = runs["plain"], runs["liger"]
    assert len(plain["losses"]) == 6
    for key in ("losses", "eval_loss_before", "eval_loss_after"):
        assert liger[key] == pytest.approx(plain[key], rel=1e-5)
    assert plain["eval_loss_after"] < plain["eval_loss_before"] - 0.5


def test_loop_accumulates_what_one_batch_is(example: Any, model: str, tmp_path: Path) -> None:
    runs = []
    for batch, accumulation in (4, 1), (1, 4):
        line = _loop(model, tmp_path / str(batch), "--texts", "24", "--batch_size", str(batch))
        runs.append(example("accelerate_loop").main([*line, "--accumulation", str(accumulation)]))
    assert len(runs[0]["losses"]) == 6
    assert runs[1]["losses"] == pytest.approx(runs[0]["losses"], rel=1e-5)
    assert runs[0]["losses"][-1] < runs[0]["losses"][0] - 0.5


def test_loop_learns_the_same_with_liger(
    example: Any, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import liger_kernel
    from liger_kernel.transformers import within

    loop = example("accelerate_loop")
    more = ["--texts", "24", "--batch_size", "2", "--accumulation", "2"]
    plain = loop.main(_loop(model, tmp_path / "plain", *more))
    patches = []
    apply = within.apply
    monkeypatch.setattr(within, "apply", lambda *a: patches.append(apply(*a)) or patches[-1])
    monkeypatch.setenv("ACCELERATE_USE_LIGER", "true")
    liger_kernel.install("accelerate")
    try:
        liger = loop.main(_loop(model, tmp_path / "liger", *more))
    finally:
        liger_kernel.uninstall("accelerate")
    assert "fused linear cross entropy" in str(patches[0])
    assert len(plain["losses"]) == 6
    assert liger["losses"] == pytest.approx(plain["losses"], rel=1e-5)


def test_loop_learns_the_same_on_two_processes(example: Any, model: str, tmp_path: Path) -> None:
    more = ["--texts", "24", "--epochs", "2"]
    line = _loop(model, tmp_path / "one", *more, "--batch_size", "8", "--accumulation", "1")
    one = example("accelerate_loop").main(line)
    line = _loop(model, tmp_path / "two", *more, "--batch_size", "2", "--accumulation", "2")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "liger_kernel.accelerate.run", str(EXAMPLES / "accelerate_loop.py"), *line]
    on = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_LIGER": "true", "OMP_NUM_THREADS": "1"}
    said = run_killed(command, [], env=ENV | on)[0]
    two = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
    assert len(one["losses"]) == 6
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)


def test_loop_goes_on_where_it_was_stopped(
    example: Any, forgetful: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import skip_first_batches

    loop = example("accelerate_loop")
    # 6 texts are 3 steps an epoch, so that saves fall into the middle of epochs
    more = ["--texts", "6", "--batch_size", "1", "--accumulation", "2", "--epochs", "3"]
    epochs = []

    def skip(*args: Any) -> Any:
        batches = list(skip_first_batches(*args))
        epochs.append([batch["input_ids"].tolist() for batch in batches])
        return batches

    with monkeypatch.context() as patch:
        patch.setattr(loop, "skip_first_batches", skip)
        whole = loop.main(_loop(forgetful, tmp_path / "whole", *more))
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[2])
    line = _loop(forgetful, tmp_path / "stopped", *more)
    save = loop.save

    def stop(*args: Any) -> None:
        save(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save", stop)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                loop.main(line)
    last = loop.main(line)
    assert last["first_step"] == 5
    assert last["losses"] == whole["losses"][4:] and len(whole["losses"]) == 9
    ours, theirs = tmp_path / "stopped" / "checkpoint-9", tmp_path / "whole" / "checkpoint-9"
    assert differences(ours, theirs) == []
    assert [p.name for p in ours.parent.glob("checkpoint-*")] == ["checkpoint-9"]


def test_sft_learns_the_same_with_liger(
    example: Any, model: str, tmp_path: Path, capfd: Any
) -> None:
    pytest.importorskip("trl")
    losses = {}
    for liger in ("False", "True"):
        line = ["--model", model, "--output_dir", str(tmp_path / liger), "--texts", "24"]
        line += ["--max_length", "48", "--learning_rate", "1e-2", "--save_steps", "4"]
        line += ["--use_cpu", "True", "--disable_tqdm", "True", "--use_liger", liger]
        line += ["--use_liger_loss", liger, "--warmup_steps", "0", "--config", SFT]
        losses[liger] = example("sft").main(line)["losses"]
        said = capfd.readouterr().out
        assert ("LlamaRMSNorm" in said) == (liger == "True")
        assert "fused linear cross entropy" not in said
    assert len(losses["False"]) == 6 and losses["False"][-1] < losses["False"][0] - 0.5
    assert losses["True"] == pytest.approx(losses["False"], rel=1e-5)


# Snippets for other frameworks


def test_axolotls_keys_patch_all_there_is(model: str) -> None:
    from transformers import AutoModelForCausalLM

    from liger_kernel import LigerConfig
    from liger_kernel.transformers import patch_of
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    keys = yaml.safe_load((ROOT / "configs" / "axolotl.yaml").read_text())
    assert keys.pop("plugins") == ["axolotl.integrations.liger.LigerPlugin"]
    # as pre_model_load of that plugin does it
    apply = MODEL_TYPE_TO_APPLY_LIGER_FN["llama"]
    names = ("rope", "rms_norm", "layer_norm", "cross_entropy", "fused_linear_cross_entropy")
    flags = {name: f"liger_{name}" for name in names} | {"swiglu": "liger_glu_activation"}
    assert set(keys) <= set(flags.values())
    known = inspect.signature(apply).parameters
    with apply(**{flag: keys.get(key) for flag, key in flags.items() if flag in known}):
        patch = patch_of(AutoModelForCausalLM.from_pretrained(model))
    assert patch is not None and patch.config == LigerConfig() and not patch.left


def test_llama_factorys_key_finds_its_function() -> None:
    keys = yaml.safe_load((ROOT / "configs" / "llama_factory.yaml").read_text())
    assert keys == {"enable_liger_kernel": True}
    # as apply_liger_kernel of llamafactory.model.model_utils does it where a loss needs logits
    from liger_kernel.transformers import apply_liger_kernel_to_llama as apply_liger_kernel

    assert "fused_linear_cross_entropy" in inspect.signature(apply_liger_kernel).parameters
    with apply_liger_kernel(fused_linear_cross_entropy=False, cross_entropy=True) as patch:
        assert patch.config.cross_entropy and not patch.config.fused_head


# Kills

TIMES = ["training_args.bin", "train_runtime", "train_samples_per_second", "train_loss"]
TIMES += ["train_steps_per_second", "eval_runtime", "eval_samples_per_second"]
TIMES += ["eval_steps_per_second"]
TORN = {
    "hf_trainer": ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"],
    "accelerate_loop": [
        f"unfinished/{name}"
        for name in ("model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl")
    ],
}


def kill_and_resume(
    name: str, flags: Callable[[Path, int], list[str]], torn: list[str], folder: Path, seed: int,
    each: int, env: dict[str, str] = ENV, ignore: list[str] = TIMES,
) -> None:  # fmt: skip
    """Kill a run `each` times at a random moment and as often in a save; then the end.

    Of the example `name`, as `flags` of an output folder and a number of steps start it.
    """
    rng = random.Random(seed)
    kills = [Kill(f"step {rng.randint(1, 4)} done", rng.uniform(0, 0.3)) for _ in range(each)]
    kills += [Kill(HALF_WAY, arguments=["--stall", file]) for file in rng.choices(torn, k=each)]
    rng.shuffle(kills)
    print(f"seed {seed}: {kills}")  # shown where it fails
    steps = 5 * each + 2  # more than a kill at a random moment takes, up to 5
    killed, unbroken = folder / "killed", folder / "unbroken"

    def command(output: Path) -> list[str]:
        return [*JOB, str(EXAMPLES / f"{name}.py"), *flags(output, steps)]

    with ThreadPoolExecutor() as pool:
        whole = pool.submit(run_killed, command(unbroken), [], env=env)
        said = run_killed(command(killed), kills, env=env)
        whole.result()
    assert "resuming from None" not in said[-1] and "starting at step 0 " not in said[-1]
    last = f"checkpoint-{steps}"
    assert (killed / last).exists() and not (killed / "unfinished").exists()
    assert differences(killed / last, unbroken / last, ignore=ignore) == []


def _kill_and_resume(name: str, model: str, folder: Path, seed: int, each: int) -> None:
    def flags(output: Path, steps: int) -> list[str]:
        texts = ["--texts", str(2 * steps)]
        if name == "hf_trainer":
            return _trainer(model, output, *texts, "--use_liger", "True")
        return _loop(model, output, *texts, "--batch_size", "2")

    on = {"ACCELERATE_USE_LIGER": "true"} if name == "accelerate_loop" else {}
    kill_and_resume(name, flags, TORN[name], folder, seed, each, ENV | on)


@pytest.mark.parametrize("name", ["hf_trainer", "accelerate_loop"])
def test_a_killed_run_ends_bitwise_where_the_unbroken_does(
    forgetful: str, tmp_path: Path, name: str
) -> None:
    _kill_and_resume(name, forgetful, tmp_path, seed=0, each=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [4, 6])
@pytest.mark.parametrize("name", ["hf_trainer", "accelerate_loop"])
def test_runs_killed_ten_times(forgetful: str, tmp_path: Path, name: str, seed: int) -> None:
    _kill_and_resume(name, forgetful, tmp_path, seed, each=5)
