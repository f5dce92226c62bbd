"""Fine-tune a language model with HF Trainer, once plain and once with liger, and compare.

    python examples/finetune.py --config configs/demo.yaml [--steps 3 ...]

Started again after a kill, the same command goes on from the newest complete checkpoint; finished
parts are not repeated. The output folder holds `summary.json`, `plot.png` and, for each variant,
the fine-tuned model.
"""

import os
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import _data
import _report
from _settings import Settings, UserError, parse

VARIANTS = ("plain", "liger")
OURS = ("run.json", "model", "blocks.pt", "before.json", *VARIANTS, "plot.png", "summary.json")
WARM_UP = 2  # steps of a start whose time is left out


def main(argv: list[str] | None = None) -> int:
    try:
        return run(*parse(argv))
    except UserError as e:
        print(f"finetune.py: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("finetune.py: stopped; the same command goes on from here", file=sys.stderr)
        return 130


def run(settings: Settings, overwrite: bool) -> int:
    """Do what is left of the run: its data, the plain variant, the patched one, the report."""
    folder = Path(settings.output)
    new = is_new(folder, settings, overwrite)
    if new:
        _data.check(settings)
        if (folder / "run.json").exists():
            hold(folder).close()  # refuses while it runs
        clear(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _report.write(folder / "run.json", settings.recorded())
    os.environ.setdefault("HF_HUB_OFFLINE", str(int(not _data.is_hub_id(settings.model))))
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # Trainer would split the batch over all
    with hold(folder):
        try:
            if not (folder / "blocks.pt").exists():
                _data.prepare(settings, folder)
        except UserError:
            if new:
                clear(folder)
            raise
        for variant in VARIANTS:
            if not (folder / variant / "result.json").exists():
                train(settings, folder, variant)
                start_again(folder)  # in a fresh process, so that no variant inherits memory
        return report(settings, folder)


def report(settings: Settings, folder: Path) -> int:
    """Print the table of a run, which is written if this is the first time."""
    finished = (folder / "summary.json").exists()
    if not finished:
        results = [_report.read(folder / variant / "result.json") for variant in VARIANTS]
        summary = _report.summarise(settings, *results)
        _report.plot(summary, folder / "plot.png")
        _report.write(folder / "summary.json", summary)
    print(_report.table(_report.read(folder / "summary.json")))
    print(f"{folder}/summary.json and {folder}/plot.png hold this")
    if finished:
        print("this run was finished before; --overwrite repeats it")
    return 0


def is_new(folder: Path, settings: Settings, overwrite: bool) -> bool:
    """True if the run starts from nothing, False if it goes on; UserError if the folder is taken.

    Only what this script has written is ever deleted, and that only with `--overwrite`.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output should be a folder, but {folder} is a file; pass another")
    content = {p.name.removesuffix(".tmp") for p in folder.iterdir()} if folder.exists() else set()
    if not content:
        return True
    if not (folder / "run.json").exists():
        if content <= {"run.json"}:
            return True  # killed before it had begun
        raise UserError(
            f"--output should be a new folder or one of this script's, but {folder} holds "
            f"{min(content)} and no run.json; pass another one with --output"
        )
    if overwrite:
        return True
    there, here = _report.read(folder / "run.json"), settings.recorded()
    for name in here.keys() | there.keys():
        if there.get(name) != here.get(name):
            raise UserError(
                f"{folder} holds another run ({name} is {there.get(name)} there and "
                f"{here.get(name)} here); pass --output FOLDER for a new one, or --overwrite to "
                f"delete the one there"
            )
    return False


def clear(folder: Path) -> None:
    """Delete what this script has written there, and the folder if nothing else is in it."""
    for name in [name + end for name in reversed(OURS) for end in ("", ".tmp")]:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()


def hold(folder: Path) -> Any:
    """Lock the run for this process as long as what is returned stays open."""
    lock = (folder / "run.json").open("r+")
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ModuleNotFoundError:
        pass  # no such lock on Windows
    except OSError:
        lock.close()
        raise UserError(
            f"another process is at work in {folder}; wait for it or pass another --output"
        ) from None
    return lock


def start_again(folder: Path) -> None:
    """Replace this process by one that goes on with the recorded settings."""
    sys.stdout.flush()
    sys.stderr.flush()
    command = [__file__, "--config", str(folder / "run.json"), "--output", str(folder)]
    os.execv(sys.executable, [sys.executable, *command])


def train(settings: Settings, folder: Path, variant: str) -> None:
    """Fine-tune one variant to the end, from its newest checkpoint, and write its result.json."""
    import _trainer
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
    from transformers.utils.logging import disable_progress_bar

    from liger_kernel.checkpoint import newest_complete
    from liger_kernel.transformers import patch_of

    print(f"--- {variant} ---", flush=True)
    disable_progress_bar()  # of reading and writing weights; training keeps its own
    here = folder / variant
    blocks = torch.load(folder / "blocks.pt")
    source = _data.model_source(settings, folder)
    dtype = _trainer.weights_dtype(settings)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    trainer = Trainer(
        model,
        _trainer.arguments(settings, here, use_liger=variant == "liger"),
        train_dataset=[{"input_ids": b, "labels": b} for b in blocks["train"]],  # pyright: ignore
        eval_dataset=[{"input_ids": b, "labels": b} for b in blocks["eval"]],  # pyright: ignore
        callbacks=[_trainer.StepTimes(WARM_UP)],
    )
    _trainer.Progress.install(trainer)
    here.mkdir(exist_ok=True)
    if not (before := folder / "before.json").exists():  # the same model for both variants
        _report.write(before, _trainer.perplexity(trainer))
    found = newest_complete(here)
    if found:
        print(f"resuming from {found}", flush=True)
    trainer.train(resume_from_checkpoint=str(found) if found else None)
    steps = [entry for entry in trainer.state.log_history if "step_ms" in entry]
    warm = [entry for entry in steps if entry["warm"]] or steps
    step_ms = statistics.median(entry["step_ms"] for entry in warm)
    patch, batch = str(patch_of(model) or ""), blocks["train"][: settings.per_device_batch]
    result = {
        "loss": [entry["loss"] for entry in steps],
        "step_ms": step_ms,
        "turns": _trainer.times_in_turns(trainer, batch) if patch else {},
        "tokens_per_second": blocks["train"].numel() / settings.steps / step_ms * 1e3,
        "ppl_before": _report.read(before),
        "ppl_after": _trainer.perplexity(trainer),
        "peak_mib": _trainer.step_memory(trainer, batch),
        "patch": patch,
        "device": _trainer.device_name(),
        "versions": _trainer.versions(),
        "dtype": settings.dtype if settings.dtype == "mixed" else str(dtype).removeprefix("torch."),
    }
    trainer.save_model(str(here / "model.tmp"))
    AutoTokenizer.from_pretrained(source).save_pretrained(here / "model.tmp")
    shutil.rmtree(here / "model", ignore_errors=True)
    (here / "model.tmp").rename(here / "model")
    _report.write(here / "result.json", result)
    for checkpoint in here.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


if __name__ == "__main__":
    sys.exit(main())
