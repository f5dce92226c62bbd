"""HF Trainer and Accelerate under one engine: every way of turning the patch on, against none.

    adapters_job.py ENGINE OUTPUT

One JSON line a way: each step's loss, how far the parameters end from those of the plain run, as a
share of how far any of them has moved, and whether the loss was fused.
"""

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import torch
import torch.distributed as dist
import transformers
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor
from transformers import Trainer

import liger_kernel
from liger_kernel.accelerate import LigerAccelerator, LigerPlugin
from liger_kernel.transformers import LigerCallback, TrainingArguments
from tiny import Rows, build, fused

Result = tuple[list[float], dict[str, Tensor], bool]
CUDA = torch.cuda.is_available()
ON_CPU = not CUDA and sys.argv[1:2] == ["ddp"]
STEPS, BATCH, ACCUMULATE, LR = 3, 1, 2, 0.1

FSDP = dict(
    ACCELERATE_USE_FSDP="true", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
    FSDP_TRANSFORMER_CLS_TO_WRAP="LlamaDecoderLayer", FSDP_STATE_DICT_TYPE="FULL_STATE_DICT",
)  # fmt: skip
ENGINES: dict[str, dict[str, str]] = {  # what `accelerate launch` exports for each
    "ddp": {},
    "fsdp1": FSDP | dict(FSDP_VERSION="1", FSDP_USE_ORIG_PARAMS="true"),
    "fsdp2": FSDP | dict(FSDP_VERSION="2"),
    "zero3": dict(
        ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE="3",
        ACCELERATE_GRADIENT_ACCUMULATION_STEPS=str(ACCUMULATE), ACCELERATE_GRADIENT_CLIPPING="1.0",
        ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL="true",
    ),
}  # fmt: skip


def sharding_on_cpu() -> None:
    """accelerate has FSDP and ZeRO for GPUs only; torch and DeepSpeed have them for CPUs too."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    backend = ("gloo", accelerate.DistributedType.MULTI_GPU)
    PartialState._prepare_backend = lambda *_: backend  # pyright: ignore


def model_of() -> Any:
    return build(tie_word_embeddings=True)


def trainer_run(
    on: Callable[[Trainer], object] = id, cls: Any = transformers.TrainingArguments, **extra: Any
) -> Result:
    callbacks = extra.pop("callbacks", [])
    with tempfile.TemporaryDirectory() as folder:
        args = cls(
            output_dir=folder, max_steps=STEPS, per_device_train_batch_size=BATCH, logging_steps=1,
            gradient_accumulation_steps=ACCUMULATE, learning_rate=LR, optim="sgd", report_to=[],
            use_cpu=ON_CPU, disable_tqdm=True, save_strategy="no", seed=0,
            lr_scheduler_type="constant", average_tokens_across_devices=True, **extra,
        )  # fmt: skip
        trainer = Trainer(model_of(), args, train_dataset=Rows(), callbacks=callbacks)
        on(trainer)
        trainer.train()
    losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    return losses, *state(trainer.accelerator, trainer.model_wrapped)


def loop_run(accelerator: Any) -> Result:
    """Public-style: the token mean over the whole window and all processes."""
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    loader = torch.utils.data.DataLoader(Rows(), BATCH)  # pyright: ignore
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses: list[float] = []
    batches = iter(loader)
    for _ in range(STEPS):
        window = [next(batches) for _ in range(ACCUMULATE)]
        scored = torch.stack([(b["labels"][:, 1:] != -100).sum() for b in window]).sum()
        total, whole = accelerator.gather(scored).sum(), 0.0
        for batch in window:
            with accelerator.accumulate(model):
                loss = model(**batch, num_items_in_batch=total).loss
                accelerator.backward(loss * accelerator.num_processes * ACCUMULATE)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            whole += float(accelerator.reduce(loss.detach().clone(), "sum"))
        losses.append(whole)
    return losses, *state(accelerator, model)


def state(accelerator: Any, model: Any) -> tuple[dict[str, Tensor], bool]:
    """Whole parameters, on process zero; whether the loss was fused."""
    found = accelerator.get_state_dict(model, unwrap=False) or {}
    whole = {n.removeprefix("module."): p.detach().float().cpu() for n, p in found.items()}
    return whole, fused(accelerator.unwrap_model(model))


@contextlib.contextmanager
def installed() -> Iterator[None]:
    os.environ["ACCELERATE_USE_LIGER"] = "true"
    liger_kernel.install()
    yield
    liger_kernel.uninstall()
    del os.environ["ACCELERATE_USE_LIGER"]


def by_environment(run: Callable[..., Any], *args: Any) -> Any:
    with installed():
        return run(*args)


def stock(**options: Any) -> Any:
    return accelerate.Accelerator(cpu=ON_CPU, gradient_accumulation_steps=ACCUMULATE, **options)


def ours(**options: Any) -> Any:
    return LigerAccelerator(cpu=ON_CPU, gradient_accumulation_steps=ACCUMULATE, **options)


WAYS: dict[str, Callable[[], Result]] = {
    "trainer": trainer_run,
    "trainer, use_liger": lambda: trainer_run(cls=TrainingArguments, use_liger=True),
    "trainer, use_liger_kernel": lambda: trainer_run(use_liger_kernel=True),
    "trainer, callback": lambda: trainer_run(callbacks=[LigerCallback()]),
    "trainer, plugin": lambda: trainer_run(lambda t: LigerPlugin().apply(t.accelerator)),
    "trainer, environment": lambda: by_environment(trainer_run),
    "loop": lambda: loop_run(stock()),
    "loop, LigerAccelerator": lambda: loop_run(ours(liger_plugin=LigerPlugin())),
    "loop, environment": lambda: by_environment(lambda: loop_run(stock())),
}


def fresh() -> None:
    """Forget the accelerators before."""
    GradientState._reset_state()
    AcceleratorState._reset_state(True)


def furthest(
    got: dict[str, Tensor], want: dict[str, Tensor], start: dict[str, Tensor]
) -> tuple[float, str]:
    moved = max(float((p - start[n]).abs().max()) for n, p in want.items())
    assert got.keys() == want.keys() and moved > 0
    return max((float((got[n] - p).abs().max()) / moved, n) for n, p in want.items())


def main(engine: str, output: Path) -> None:
    os.environ.update(ENGINES[engine])
    if engine != "ddp" and not CUDA:
        sharding_on_cpu()
    start = {n: p.clone() for n, p in model_of().state_dict().items()}
    plain: dict[str, Any] = {}
    for way, run in WAYS.items():
        fresh()
        losses, end, fused = run()
        base = plain.setdefault(way.partition(",")[0], (losses, end))
        line = dict(engine=engine, way=way, fused=fused, losses=losses, plain=base[0])
        if PartialState().is_main_process:
            line["parameters"], line["where"] = furthest(end, base[1], start)
            with output.open("a") as file:
                print(json.dumps(line), file=file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
