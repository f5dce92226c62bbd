"""TRL's trainers under one engine: `use_liger_loss=True` against TRL's own.

    trl_job.py ENGINE[/slow] OUTPUT

One JSON line a case: how far the logged metrics and the parameters at the end are from those of
the plain run, the latter as a share of how far any of them has moved; whether all processes end
with the same bits, and how often a loss was not the one foreseen in each of them. Where TRL itself
fails under the engine, its error, and the plain run is the one under DDP.
"""

import contextlib
import gc
import hashlib
import json
import math
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import AutoModelForCausalLM

import adapters_job
import liger_kernel.trl
from adapters_job import CUDA, fresh, furthest, sharding_on_cpu
from preferences import pairs, reference, run, tokenizer
from tiny import V, build

Logs = list[dict[str, float]]
ENGINES = adapters_job.ENGINES | {
    "zero3": adapters_job.ENGINES["zero3"] | dict(ACCELERATE_GRADIENT_CLIPPING="0.0")
}
CLOCKS = {"epoch", "step_time"}  # of what is logged, with what is no number
ROWS, BATCH = 11, 2  # of three batches a process: with `UNEVEN`, the last one's have 2 rows and 1
UNEVEN = dict(accelerator_config={"even_batches": False})
TIED, UNTIED = dict(tie_word_embeddings=True), dict(tie_word_embeddings=False)
PREPARE_BACKEND = PartialState._prepare_backend


class Case(NamedTuple):
    trainer: str
    options: dict[str, Any] = {}
    model: dict[str, Any] = TIED
    lora: tuple[str, ...] = ()  # modules with adapters
    slow: bool = False


CASES = {
    "DPO": Case("DPO"),
    "DPO, untied": Case("DPO", model=UNTIED),
    "DPO, LoRA": Case("DPO", lora=("q_proj", "v_proj")),
    "DPO, LoRA on the head": Case("DPO", model=UNTIED, lora=("q_proj", "lm_head")),
    "KTO": Case("KTO", UNEVEN),
    "ORPO": Case("ORPO"),
    "CPO": Case("CPO"),
    "SimPO": Case("CPO", dict(loss_type="simpo", cpo_alpha=0.0)),
    "SFT": Case("SFT", UNEVEN),
    "GRPO": Case("GRPO", dict(num_generations=4, max_completion_length=6, beta=0.1)),
}  # fmt: skip


def rows(trainer: str) -> Dataset:
    """Of uneven lengths, as this trainer takes them."""
    data: Any = list(pairs(ROWS))
    if trainer == "SFT":
        data = [{"prompt": p["prompt"], "completion": p["chosen"]} for p in data]
    elif trainer == "KTO":
        data = [
            {"prompt": p["prompt"], "completion": p[side], "label": side == "chosen"}
            for i, p in enumerate(data)
            for side in ["chosen" if i % 3 else "rejected"]
        ]
    elif trainer == "GRPO":
        data = [{"prompt": p["prompt"]} for p in data]
    return Dataset.from_list(data)


def different_words(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(words.split()))) for words in completions]


class Result(NamedTuple):
    logs: Logs
    start: dict[str, Tensor]
    end: dict[str, Tensor]  # whole, in every process
    gradients: list[dict[str, Tensor]]
    trainer: Any


def trained(case: Case, engine: str, ours: bool, **given: Any) -> Result:
    config, cls = (getattr(liger_kernel.trl, case.trainer + n) for n in ("Config", "Trainer"))
    if not ours:
        config, cls = config.__bases__[-1], cls.__bases__[-1]
    model, start = build(**case.model), dict[str, Tensor]()

    def trainer(*args: Any, **kwargs: Any) -> Any:
        it = cls(*args, **kwargs)
        start.update({n: p.detach().cpu().clone() for n, p in it.model.named_parameters()})
        return it

    with tempfile.TemporaryDirectory() as folder:
        if case.lora:
            given["peft_config"] = LoraConfig(
                r=4, lora_alpha=8, target_modules=list(case.lora), init_lora_weights=False
            )
        elif case.trainer in ("DPO", "KTO"):
            given["ref_model"] = reference(model)
        elif case.trainer == "GRPO":  # which loads its reference from where the model is from
            given["reward_funcs"] = different_words
            model.save_pretrained(folder)
            tokenizer().save_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        it, logs, gradients = run(
            config, trainer, Path(folder), rows(case.trainer), model=model, given=given,  # pyright: ignore
            per_device_train_batch_size=BATCH, use_cpu=not CUDA and engine == "ddp",
            **(dict(use_liger_loss=True) if ours else {}), **case.options,
        )  # fmt: skip
    return Result(logs, start, whole(it), gradients, it)


def whole(trainer: Any) -> dict[str, Tensor]:
    """All parameters, gathered, in every process."""
    wrapped: Any = trainer.model_wrapped
    model = trainer.accelerator.unwrap_model(wrapped)
    named = dict(model.named_parameters())
    sharded = [p for p in named.values() if hasattr(p, "ds_id")]
    gathered: Any = contextlib.nullcontext()
    if sharded:
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(sharded)
    elif isinstance(wrapped, FullyShardedDataParallel):
        gathered = FullyShardedDataParallel.summon_full_params(wrapped, writeback=False)
    with gathered:
        found = {n: p.detach() for n, p in named.items()}
        full: Any = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in found.items()}
        return {n.replace("_fsdp_wrapped_module.", ""): p.float().cpu().clone() for n, p in full.items()}


@contextlib.contextmanager
def under(engine: str) -> Iterator[None]:
    """Environment of an engine, and no accelerator or configuration of the one before."""
    gc.collect()  # DeepSpeed's configuration counts as long as the arguments are there
    fresh()
    before = dict(os.environ)
    os.environ.update(ENGINES[engine] | dict(ACCELERATE_GRADIENT_ACCUMULATION_STEPS="1"))
    if engine != "ddp" and not CUDA:
        sharding_on_cpu()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        PartialState._prepare_backend = PREPARE_BACKEND


def digest(tensors: list[dict[str, Tensor]]) -> str:
    found = hashlib.sha256()
    for t in (t for each in tensors for t in each.values()):
        found.update(t.detach().cpu().numpy().tobytes())
    return found.hexdigest()


def far(got: float, want: float) -> float:
    if math.isnan(want):
        return 0.0 if math.isnan(got) else math.inf
    return abs(got - want) / max(1.0, abs(want))


def metrics(got: Logs, want: Logs) -> tuple[float, str]:
    """The largest difference, as a share of what is larger than 1."""
    assert len(got) == len(want) and [g.keys() for g in got] == [w.keys() for w in want]
    return max(
        (far(g[n], x), n)
        for g, w in zip(got, want, strict=True)
        for n, x in w.items()
        if n not in CLOCKS and isinstance(x, int | float)
    )


def compared(case: Case, engine: str) -> dict[str, Any]:
    line: dict[str, Any] = dict(against="plain", error="")
    try:
        with under(engine):
            want = trained(case, engine, ours=False)
    except Exception as error:
        line |= dict(error=f"{type(error).__name__}: {error}"[:300])
        with under("ddp"):
            line["against"] = "ours under DDP" if case.lora and "lm_head" in case.lora else "plain under DDP"
            want = trained(case, "ddp", ours=line["against"].startswith("ours"))
    want = want._replace(trainer=None)
    with under(engine):
        got = trained(case, engine, ours=True)
        fused = got.trainer._liger.fused[0]
        mine = (digest([got.end, *(got.gradients if engine == "ddp" else [])]), fused.mistaken, fused.foreseen)
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, mine)
        digests, mistaken, foreseen = zip(*every, strict=True)
        line |= dict(same=len(set(digests)) == 1, mistaken=mistaken, foreseen=foreseen)
        line["metrics"], line["metric"] = metrics(got.logs, want.logs)
        line["parameters"], line["where"] = furthest(got.end, want.end, want.start)
    return line


def main(engine: str, output: Path) -> None:
    engine, _, slow = engine.partition("/")
    for name, case in CASES.items():
        if case.slow != bool(slow):
            continue
        if only and name not in only: continue
        began = time.monotonic()
        try:
            line = compared(case, engine)
        except Exception as error:
            traceback.print_exc()
            line = dict(failed=f"{type(error).__name__}: {error}"[:2000])
        line |= dict(engine=engine, way=name, seconds=round(time.monotonic() - began, 1))
        if dist.get_rank() == 0:
            with output.open("a") as file:
                print(json.dumps(line), file=file)
    dist.destroy_process_group()


only = sys.argv[3:]
if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
