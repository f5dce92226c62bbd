"""The pieces of HF Trainer that finetune.py needs for one variant."""

import contextlib
import importlib.metadata
import math
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from _settings import Settings
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ProgressCallback

import liger_kernel
from liger_kernel.measure import PeakMemory, call_ms
from liger_kernel.transformers import TrainingArguments, apply, patch_of


def weights_dtype(settings: Settings) -> torch.dtype:
    """The dtype that the weights are loaded in."""
    if settings.dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32


def arguments(settings: Settings, folder: Path, use_liger: bool) -> transformers.TrainingArguments:
    """The two variants' arguments: the flag and its options are all that differs."""
    cuda = torch.cuda.is_available()
    return TrainingArguments(
        use_liger=use_liger,
        liger_config=settings.liger_config if use_liger else None,
        output_dir=str(folder),
        # One epoch over exactly the blocks of all steps: max_steps would let a run that was
        # killed after its last checkpoint make one step too many when it resumes.
        num_train_epochs=1,
        per_device_train_batch_size=settings.per_device_batch,
        per_device_eval_batch_size=settings.per_device_batch,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        # transformers' "constant" would ignore warmup_steps
        lr_scheduler_type=settings.schedule.replace("constant", "constant_with_warmup"),
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        seed=settings.seed,
        bf16=settings.dtype == "mixed",
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=settings.save_steps,
        save_total_limit=1,
        use_cpu=not cuda,
        dataloader_pin_memory=cuda,
        report_to="none",
        disable_tqdm=False,
    )


class StepTimes(TrainerCallback):
    """Add `step_ms` and `warm` to the log entry of each step, which checkpoints carry along.

    Trainer logs the loss itself unrounded. `warm` is False for the first steps of a process.
    """

    def __init__(self, warm_up: int) -> None:
        self.left = warm_up
        self.start = self.step_ms = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = _now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_ms = (_now() - self.start) * 1e3

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "loss" in state.log_history[-1]:
            state.log_history[-1].update(step_ms=self.step_ms, warm=self.left <= 0)
            self.left -= 1


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Progress(ProgressCallback):
    """Trainer's progress bar, with the loss beside it and not a line a step."""

    @classmethod
    def install(cls, trainer: Trainer) -> None:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(cls())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4f}")


def perplexity(trainer: Trainer) -> float:
    """Of the held-out blocks, which are all of one length: every token counts the same."""
    return math.exp(trainer.evaluate()["eval_loss"])


def device_name() -> str:
    """The GPU, or how many threads of the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Of what has a hand in the figures."""
    packages = [torch, transformers, accelerate, liger_kernel]
    found = {"python": platform.python_version()} | {p.__name__: p.__version__ for p in packages}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # Windows, macOS
        found["triton"] = importlib.metadata.version("triton")
    return found


def forward_backward(trainer: Trainer, batch: Tensor) -> None:
    """One training step of `batch` without the optimizer's."""
    model: Any = trainer.model_wrapped
    predicted = torch.tensor(batch.numel() - len(batch), device=trainer.args.device)
    inputs = {"input_ids": batch, "labels": batch}
    trainer.training_step(model, inputs, num_items_in_batch=predicted)


def step_memory(trainer: Trainer, batch: Tensor) -> float:
    """MiB that forward and backward of `batch` take beyond what is there between steps."""
    model: Any = trainer.model_wrapped
    for parameter in model.parameters():  # the gradients, which are no part of it
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    with PeakMemory(trainer.args.device) as peak:
        forward_backward(trainer, batch)
    model.zero_grad()
    return peak.mib


def times_in_turns(trainer: Trainer, batch: Tensor) -> dict[str, float]:
    """Median ms of forward and backward of the patched model, plain and patched in turns.

    The two runs come one after the other; a machine that drifts would favour one of them.
    """
    model: Any = trainer.model
    cuda = trainer.args.device.type == "cuda"
    config = getattr(patch_of(model), "config", None)  # None under LIGER_DISABLE
    times: dict[str, list[float]] = {"plain": [], "liger": []}
    for _ in range(11 if cuda else 2):
        for name, ms in times.items():
            if (patch := patch_of(model)) is not None:
                patch.revert()
            if name == "liger":
                apply(model, config)
            if cuda:
                forward_backward(trainer, batch)  # what is first run on a GPU takes longer
            ms.append(call_ms(lambda: forward_backward(trainer, batch), trainer.args.device))
    model.zero_grad()
    return {name: statistics.median(ms) for name, ms in times.items()}
