"""TRL's trainers under one engine: `use_liger_loss=True` against TRL's own.

trl_job.py ENGINE[/slow] OUTPUT     One JSON line a case, see `compared`
trl_job.py ENGINE/poison OUTPUT     A label of the last process is out of range in its second
                                    step: all are to stop
"""

import contextlib
import gc
import hashlib
import importlib
import json
import math
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from accelerate.state import PartialState
from peft import LoraConfig
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import AutoModelForCausalLM, TrainerCallback

import adapters_job
from adapters_job import CUDA, fresh, furthest, sharding_on_cpu
from job import start
from liger_kernel import together
from liger_kernel.trl import head
from preferences import TIMES, data_of, needed, run, trainer_of
from tiny import V, build

Logs = list[dict[str, float]]
Parameters = dict[str, Tensor]

ENGINES = adapters_job.ENGINES | {  # accelerate clips at 1 where DeepSpeed is told not to
    "zero3": adapters_job.ENGINES["zero3"] | dict(ACCELERATE_GRADIENT_CLIPPING="auto")
}
# FSDP1, as accelerate sets it up for PEFT, makes each adapter a unit of its own, which a head with
# one refuses; and there GRPO's run did not end, TRL's or ours is not known.
NOT_FSDP1 = tuple(e for e in ENGINES if e != "fsdp1")
STOCK_BACKEND = PartialState._prepare_backend
ROWS, BATCH = 11, 2  # three batches a process
NONE: dict[str, Any] = {}
UNEVEN = dict(accelerator_config={"even_batches": False})  # the last ones have 2 rows and 1


class Case(NamedTuple):
    trainer: str
    options: dict[str, Any] = NONE
    tied: bool = True
    lora: tuple[str, ...] = ()  # modules with adapters
    environment: dict[str, str] = NONE
    engines: tuple[str, ...] = tuple(ENGINES)
    wrong: bool = False  # TRL's own run
    mistaken: bool = False  # no gradient counts as the one foreseen
    slow: bool = False

    @property
    def foreseen(self) -> bool:
        """Whether gradients are taken in forward, as a known loss has them."""
        frozen = self.lora and "lm_head" not in self.lora
        known = self.trainer in ("DPO", "KTO", "ORPO", "CPO")
        return known and not frozen and not self.mistaken


LORA, LORA_HEAD = ("q_proj", "v_proj"), ("q_proj", "lm_head")
LINEARS = dict(FSDP_TRANSFORMER_CLS_TO_WRAP="Linear")  # each of them a unit, the head too
SHORT: dict[str, Any] = dict(num_generations=4, max_completion_length=6, beta=0.1)
CASES = {
    "DPO": Case("DPO"),
    "DPO, untied": Case("DPO", tied=False, slow=True),
    "DPO, the head a unit": Case(
        "DPO", tied=False, environment=LINEARS, engines=("fsdp2",), wrong=True
    ),
    "DPO, the head a unit, mistaken": Case(
        "DPO", tied=False, environment=LINEARS, engines=("fsdp2",), wrong=True, mistaken=True
    ),
    "DPO, mistaken": Case("DPO", mistaken=True),
    "DPO, LoRA": Case("DPO", lora=LORA),
    "DPO, LoRA on the head": Case("DPO", tied=False, lora=LORA_HEAD, engines=("fsdp2", "zero3")),
    "DPO, checkpointed": Case("DPO", dict(gradient_checkpointing=True), slow=True),
    "DPO, evaluated": Case("DPO", dict(eval_strategy="steps", eval_steps=2), slow=True),
    "KTO": Case("KTO", UNEVEN),
    "KTO, LoRA": Case("KTO", UNEVEN, lora=LORA, slow=True),
    "ORPO": Case("ORPO"),
    "ORPO, LoRA on the head": Case("ORPO", tied=False, lora=LORA_HEAD, engines=NOT_FSDP1),
    "ORPO, LoRA on the head, mistaken": Case(
        "ORPO", tied=False, lora=LORA_HEAD, mistaken=True, slow=True, engines=NOT_FSDP1
    ),
    "CPO": Case("CPO", slow=True),
    "SimPO": Case("CPO", dict(loss_type="simpo", cpo_alpha=0.0)),
    "SFT": Case("SFT", UNEVEN),
    "SFT, accumulated": Case("SFT", dict(gradient_accumulation_steps=2), slow=True),
    "GRPO": Case("GRPO", SHORT, engines=NOT_FSDP1),
    "RLOO": Case("RLOO", SHORT, slow=True, engines=NOT_FSDP1),
}


def named(engine: str, slow: bool) -> dict[str, Case]:
    return {n: c for n, c in CASES.items() if c.slow == slow and engine in c.engines}


def saved(folder: Path) -> Path:
    """The model, which process 0 writes for all."""
    if dist.get_rank() == 0 and not folder.exists():
        build(tie_word_embeddings=True).save_pretrained(folder)
    dist.barrier()
    return folder


class Result(NamedTuple):
    logs: Logs
    start: Parameters
    end: Parameters
    gradients: list[Parameters]
    trainer: Any


def trained(
    case: Case, engine: str, ours: bool, output: Path, prepare: Callable[[Any], object] = id
) -> Result:
    """Three steps of a trainer, which `prepare` has before them."""
    config, cls = trainer_of(case.trainer, ours)
    options = case.options | (dict(use_liger_loss=True) if ours else {})
    data = data_of(case.trainer).select(range(ROWS))
    model = build(tie_word_embeddings=case.tied)
    given = needed(case.trainer, model)
    if case.lora:
        given = dict(
            peft_config=LoraConfig(
                r=4, lora_alpha=8, target_modules=list(case.lora), init_lora_weights=False
            )
        )
    if "eval_strategy" in case.options:
        given["eval_dataset"] = data
    if case.trainer in ("GRPO", "RLOO"):  # the reference is loaded from where the model is from
        folder = saved(output.with_name("model"))
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    start: Parameters = {}

    def trainer(*args: Any, **kwargs: Any) -> Any:
        it = cls(*args, **kwargs)
        start.update({n: p.detach().cpu().clone() for n, p in it.model.named_parameters()})
        prepare(it)
        return it

    build_it: Any = trainer
    with tempfile.TemporaryDirectory() as folder:
        it, _, gradients = run(
            config, build_it, Path(folder), data, model=model, given=given,
            per_device_train_batch_size=BATCH, use_cpu=not CUDA and engine == "ddp", **options,
        )  # fmt: skip
    logs = it.state.log_history[:-1]  # the last has times alone
    return Result(logs, start, whole(it), gradients, it)


def whole(trainer: Any) -> Parameters:
    """All parameters, gathered, in every process."""
    wrapped: Any = trainer.model_wrapped
    parameters = dict(trainer.accelerator.unwrap_model(wrapped).named_parameters())
    gathered: Any = contextlib.nullcontext()
    if sharded := [p for p in parameters.values() if hasattr(p, "ds_id")]:
        zero: Any = importlib.import_module("deepspeed").zero
        gathered = zero.GatheredParameters(sharded)
    elif isinstance(wrapped, FullyShardedDataParallel):
        gathered = FullyShardedDataParallel.summon_full_params(wrapped, writeback=False)
    found: Parameters = {}
    with gathered:
        for name, p in parameters.items():
            full: Any = p.detach()
            full = full.full_tensor() if hasattr(full, "full_tensor") else full
            found[name.replace("_fsdp_wrapped_module.", "")] = full.float().cpu().clone()
    return found


@contextlib.contextmanager
def under(engine: str, case: Case) -> Iterator[None]:
    """What a case under an engine is to find; no accelerator or configuration of those before."""
    gc.collect()  # DeepSpeed's configuration counts as long as the arguments are there
    fresh()
    before, same = dict(os.environ), head.SAME
    if case.mistaken:
        head.SAME = -1.0
    accumulate = str(case.options.get("gradient_accumulation_steps", 1))
    given = dict(ACCELERATE_GRADIENT_ACCUMULATION_STEPS=accumulate) | case.environment
    os.environ.update(ENGINES[engine] | given)
    if engine != "ddp" and not CUDA:
        sharding_on_cpu()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        head.SAME, PartialState._prepare_backend = same, STOCK_BACKEND


def digest(tensors: list[Parameters]) -> str:
    found = hashlib.sha256()
    for t in (t for each in tensors for t in each.values()):
        found.update(t.detach().cpu().numpy().tobytes())
    return found.hexdigest()


def far(got: float, want: float) -> float:
    if math.isnan(got) or math.isnan(want):
        return 0.0 if math.isnan(got) and math.isnan(want) else math.inf
    return abs(got - want) / max(1.0, abs(want))


def farthest(got: Logs, want: Logs) -> tuple[float, str]:
    """The largest difference of what is logged, as a share of values larger than 1."""
    assert [step.keys() for step in got] == [step.keys() for step in want]
    return max(
        (far(g[name], value), name)
        for g, w in zip(got, want, strict=True)
        for name, value in w.items()
        if not name.endswith(("runtime", "_per_second", *TIMES))
    )


def plain(case: Case, engine: str, output: Path) -> tuple[Result, dict[str, Any]]:
    """What TRL itself comes to, or else what it, or this project, comes to under DDP; and which."""
    want, error = None, ""
    try:
        with under(engine, case):
            want = trained(case, engine, False, output)._replace(trainer=None)
    except Exception as e:
        traceback.print_exc()
        error = f"{type(e).__name__}: {e}"
    if want is not None and not case.wrong:
        return want, dict(against="plain", error="")
    ours = "lm_head" in case.lora
    with under("ddp", case):  # not in the except clause: the error holds on to the arguments
        base = trained(case, "ddp", ours, output)._replace(trainer=None)
    line: dict[str, Any] = dict(against=f"{'ours' if ours else 'plain'} under ddp", error=error)
    if want is not None:
        line["plain"] = furthest(want.end, base.end, base.start)
    return base, line


def compared(case: Case, engine: str, output: Path) -> dict[str, Any]:
    """A line.

    against: what the run is compared with; error: of TRL itself, where that fails; plain: how far
    TRL itself is from DDP, where that is wrong. metrics, parameters: the largest difference, of the
    latter as a share of how far any of them has moved. same: whether all processes have the same
    bits at the end, and the same gradients under DDP. foreseen, mistaken: of each process.
    """
    want, line = plain(case, engine, output)
    with under(engine, case):
        got = trained(case, engine, True, output)
        fused = got.trainer._liger.fused[0]
        bits = digest([got.end, *(got.gradients if engine == "ddp" else ())])
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, (bits, fused.foreseen, fused.mistaken))
        digests, foreseen, mistaken = zip(*every, strict=True)
        return line | dict(
            kind=type(got.trainer.model_wrapped).__name__, same=len(set(digests)) == 1,
            foreseen=foreseen, mistaken=mistaken, metrics=farthest(got.logs, want.logs),
            parameters=furthest(got.end, want.end, want.start),
        )  # fmt: skip


class Poison(TrainerCallback):
    """A label out of range, in the second step of the last process."""

    def on_step_begin(self, _: Any, state: Any, *args: Any, model: Any, **kwargs: Any) -> None:
        def poison(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            labels = kwargs["labels"].clone()
            labels[:, -1] = V
            return args, kwargs | dict(labels=labels)

        if state.global_step == 1 and dist.get_rank() == dist.get_world_size() - 1:
            model.register_forward_pre_hook(poison, with_kwargs=True)


def main(engine: str, part: str, output: Path) -> None:
    start(timedelta(seconds=60) if part != "poison" else timedelta(minutes=10))
    if part == "poison":
        together.INTERVAL = 1.0
        with under(engine, case := CASES["DPO"]):
            trained(case, engine, True, output, lambda it: it.add_callback(Poison()))
        print("went on", file=sys.stderr)
        return
    cases = named(engine, part == "slow")
    for case in cases.values():  # before there is anything but modules, whose garbage it freezes
        trainer_of(case.trainer)
        trainer_of(case.trainer, True)
    for name, case in cases.items():
        began = time.perf_counter()
        try:
            line = compared(case, engine, output)
        except Exception:
            line = dict(failed=traceback.format_exc()[-2000:])
        line |= dict(engine=engine, way=name, seconds=round(time.perf_counter() - began, 1))
        if dist.get_rank() == 0:
            with output.open("a") as file:
                print(json.dumps(line), file=file)
    dist.destroy_process_group()


if __name__ == "__main__":
    engine, _, part = sys.argv[1].partition("/")
    main(engine, part, Path(sys.argv[2]))
