"""Train a tiny model for a few steps under an engine, and without one. Started by `launch`.

job.py RUNS RESULTS: RUNS holds a JSON list of runs, each a dict of `engine` and what `Run` has.
Process 0 writes a line of JSON for each run to RESULTS as soon as it is done.
"""

import contextlib
import dataclasses
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import families
from engines import ENGINES, Engine, hf
from liger_kernel.check import allowed
from liger_kernel.measure import Traffic
from liger_kernel.transformers import patch

LENGTH, V = 16, 98  # transformers' tensor parallelism wants an even number of classes
SCALE = 3.0  # of the loss, as a loss scaler would have it
CUDA = torch.cuda.is_available()


@dataclasses.dataclass(frozen=True)
class Run:
    """One engine and one way to use it."""

    engine: str
    model: str = "llama"
    over: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the configuration
    dtype: str = "float32"
    patched: bool = True
    order: str = "patch-engine"  # who comes first: also "engine-patch", "patch-peft-engine"
    peft: str | None = None  # "lora", "lora-head", "save-head"
    total: str = "tensor"  # num_items_in_batch: "tensor", "int", "float", "none"
    shifted: bool = False  # labels come as shift_labels
    twice: bool = False  # two calls, then one backward
    accumulate: bool = False  # a backward for each row, reduced with the last
    checkpointing: bool = False
    compile: bool = False
    autocast: bool = False
    evaluate: bool = False  # two calls without a gradient first, one of them with the loss fused
    logits: bool = False  # the first step with full logits, whose backward needs the weight
    again: bool = False  # backward twice, of which the second counts
    revert: bool = False  # a step more without the patch, whose gradients count
    ignored: bool = False  # all labels of process 1
    steps: int = 1
    seed: int = 0  # of the batches
    traffic: bool = False  # count what is communicated, with the patch and without
    refused: str = ""  # part of the error that is expected

    @property
    def name(self) -> str:
        parts = [self.engine, *(f"{key}={value}" for key, value in self.over.items())]
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if field.name not in ("over", "refused") and value != field.default:
                parts.append(field.name if value is True else f"{field.name}={value}")
        return " ".join(parts)

    @property
    def calls(self) -> int:
        return 2 if self.twice or self.accumulate else 1


SEEDS = 4  # batches over which errors in fewer bits are averaged


def batch(run: Run, rank: int) -> tuple[Tensor, Tensor]:
    """(2, 16) ids and labels of a process, of which it scores other numbers than the others do."""
    ids = torch.arange(2 * LENGTH).view(2, LENGTH) * (7 + rank) + 5 * rank + 11 * run.seed
    ids = ids % (V - 3) + 3
    first = torch.tensor([[5 - rank % 3], [8 - 4 * (rank % 2)]])
    labels = ids.where(torch.arange(LENGTH) >= first, -100)
    return ids, torch.full_like(labels, -100) if run.ignored and rank == 1 else labels


def shift(labels: Tensor) -> Tensor:
    return nn.functional.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()


def build(run: Run) -> Any:
    model = families.build(run.model, vocab_size=V, **run.over)
    if run.checkpointing:
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
        model.enable_input_require_grads()
    return model


def with_peft(run: Run, model: nn.Module) -> nn.Module:
    if run.peft is None:
        return model
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    targets = ["q_proj", "lm_head"] if run.peft == "lora-head" else ["q_proj", "v_proj"]
    config = LoraConfig(
        r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False,
        modules_to_save=["lm_head"] if run.peft == "save-head" else None,
    )  # fmt: skip
    return get_peft_model(model, config).train()


def prepared(run: Run, engine: Engine, patched: bool) -> Any:
    """Model, PEFT, patch and engine, in the order asked for."""
    first = run.order.split("-")[0]
    apply = partial(patch.apply, config=dict(mlp_inplace=not run.again))
    model = build(run)
    if patched and run.order == "patch-peft-engine":
        apply(model)
    model = with_peft(run, model)
    if hasattr(engine, "before"):
        model = engine.before(model)
    if patched and first == "patch":
        apply(model)
    model = engine.wrap(model)
    if patched and first == "engine":
        apply(model)
    if run.compile:
        model = torch.compile(model, backend="aot_eager")
    engine.optimize(model)
    return model


def one_loss(
    run: Run, engine: Engine, model: Any, patched: bool, ids: Tensor, labels: Tensor, total: int,
    **more: Any,
) -> Tensor:  # fmt: skip
    kinds: dict[str, Any] = dict(
        tensor=lambda n: torch.tensor(n, device=engine.device), int=int, float=float,
        bf16=lambda n: torch.tensor(n, dtype=torch.bfloat16, device=engine.device),
        none=lambda _: None,
    )  # fmt: skip
    more |= engine.inputs(ids.to(engine.device), labels.to(engine.device))
    if run.shifted and patched:
        more["shift_labels"] = shift(more.pop("labels"))
    if run.total != "none":
        more["num_items_in_batch"] = kinds[run.total](total)
    on = torch.autocast(engine.device.type, torch.bfloat16, enabled=run.autocast)
    with on:
        out = model(use_cache=False, **more)
    widths.add(out.logits.shape[-1])
    return whole(out.loss)


widths: set[int] = set()  # of the logits of a run's calls


def whole(loss: Tensor) -> Tensor:
    return loss.full_tensor() if hasattr(loss, "full_tensor") else loss  # pyright: ignore


def counted(run: Run) -> int:
    """The scored labels of all processes."""
    every = (shift(batch(run, rank)[1]) for rank in range(dist.get_world_size()))
    return sum(int((y != -100).sum()) for y in every)


def batches(run: Run, ranks: Iterable[int]) -> tuple[Tensor, Tensor]:
    ids, labels = zip(*(batch(run, rank) for rank in ranks), strict=True)
    return torch.cat(ids), torch.cat(labels)


def one_step(run: Run, engine: Engine, model: Any, patched: bool, **more: Any) -> float:
    """Forward and backward, in as many calls as the run has; this process's part of the loss."""
    ids, labels = batches(run, engine.share())
    total, loss, held = counted(run), 0.0, list[Tensor]()
    for i, (x, y) in enumerate(zip(ids.chunk(run.calls), labels.chunk(run.calls), strict=True)):
        last = i == run.calls - 1
        with engine.held(model, last or not run.accumulate):
            part = one_loss(run, engine, model, patched, x, y, total, **more)
            # engines take the mean over processes, also of what is divided by the count of all
            part = part / run.calls if run.total == "none" else part * engine.world
            loss += part.item() / engine.world
            held.append(part * SCALE)
            if run.accumulate:
                engine.backward(model, held.pop())
                if not last:
                    engine.between(model)
    if run.again:
        held[0].backward(retain_graph=True)
        engine.clear(model)
    if held:
        engine.backward(model, sum(held[1:], held[0]))
    return loss


def train(run: Run, engine: Engine, patched: bool) -> dict[str, Any]:
    """Losses, the first step's gradients, what becomes of the parameters, what is communicated."""
    model = prepared(run, engine, patched)
    if run.evaluate:
        evaluate(run, engine, model, patched)
    losses, gradients, traffic = list[float](), dict[str, Tensor](), Traffic()
    for step in range(run.steps):
        full = dict(skip_logits=False) if run.logits and patched and not step else {}
        with traffic if run.traffic else contextlib.nullcontext():
            loss = torch.tensor(one_step(run, engine, model, patched, **full), device=engine.device)
        dist.all_reduce(loss)
        losses.append(loss.item() * engine.world / dist.get_world_size())
        if step == 0:
            gradients = engine.gradients(model)
        if run.steps > 1:
            engine.step(model)
    if run.revert and patched:
        seen = widths.copy()
        model_patch: Any = patch.patch_of(hf(model))
        model_patch.revert()
        engine.clear(model)
        one_step(run, engine, model, False)
        gradients = engine.gradients(model)
        assert widths - seen == {V}
        widths.discard(V)
    after = engine.parameters(model) if run.steps > 1 else {}
    return dict(losses=losses, gradients=gradients, parameters=after, traffic=traffic.ops)


def evaluate(run: Run, engine: Engine, model: Any, patched: bool) -> None:
    """Calls without gradients, in training and not, with the loss fused and not: all give it."""
    ids, labels = batches(run, engine.share())
    with torch.no_grad():
        a = one_loss(run, engine, model, patched, ids, labels, counted(run))
        model.eval()
        b = one_loss(run, engine, model, patched, ids, labels, counted(run))
        fused = dict(skip_logits=True) if patched else {}
        c = one_loss(run, engine, model, patched, ids, labels, counted(run), **fused)
    torch.testing.assert_close(torch.stack([b, c]), a.expand(2))
    model.train()
    widths.clear()


class Alone(Engine):
    """One process with the batches of all."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device, torch.float32, 1)
        self.rank, self.world = 0, 1  # of one, with as many batches as there are processes


def reference(run: Run, engine: Engine) -> dict[str, Any]:
    """The unpatched model, in one process and fp32. What is a mean of a process's own labels, or
    has a loss of its experts, is averaged over the batches of all."""
    alone = Alone(engine.device)
    run = dataclasses.replace(run, autocast=False, compile=False)
    additive = engine.world == 1 or (run.total != "none" and run.model != "mixtral")
    model = prepared(run, alone, False)
    groups = 1 if additive else engine.world * run.calls
    ids, labels = batches(run, alone.share())
    losses, gradients = list[float](), dict[str, Tensor]()
    for step in range(run.steps):
        loss = 0.0
        for x, y in zip(ids.chunk(groups), labels.chunk(groups), strict=True):
            part = one_loss(run, alone, model, False, x, y, counted(run))
            part = part / groups if run.total == "none" else part
            (part * SCALE).backward()
            loss += part.item()
        losses.append(loss)
        if step == 0:
            gradients = alone.gradients(model)
        if run.steps > 1:
            alone.step(model)
    widths.clear()
    return dict(losses=losses, gradients=gradients, parameters=alone.parameters(model))


def farthest(
    got: dict[str, Tensor], want: dict[str, Tensor], untied: bool = False
) -> tuple[float, str]:
    """The largest max|difference| / max|wanted| of all, and whose it is.

    untied: where the engine makes two parameters of a tied one, whose gradients then add up.
    """
    if untied and "lm_head.weight" in got.keys() - want.keys():
        head = got.pop("lm_head.weight")
        got["model.embed_tokens.weight"] = got["model.embed_tokens.weight"] + head
    zeros = {n for n in got.keys() - want.keys() if not got[n].any()}  # FSDP1 has some for frozen
    apart = (got.keys() ^ want.keys()) - zeros
    assert not apart, f"not in both: {sorted(apart)[:3]}"
    return max(
        ((got[n].cpu() - w.cpu()).abs().max().item() / max(w.abs().max().item(), 1e-12), n)
        for n, w in want.items()
    )


def spread(gradients: dict[str, Tensor], device: torch.device) -> float:
    """How far the processes' gradients are from each other: 0, where each has all of them."""
    far = 0.0
    for _, g in sorted(gradients.items()):
        most, least = g.to(device).clone(), g.to(device).clone()
        dist.all_reduce(most, dist.ReduceOp.MAX)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        far = max(far, (most - least).abs().max().item())
    return far


def used(run: Run, engine: Callable[[], Engine]) -> tuple[float, str]:
    """In fewer bits than fp32, the largest share of the error allowed by the plain model's own."""
    squares: dict[str, Tensor] = {}
    for seed in range(SEEDS):
        one = dataclasses.replace(run, seed=seed)
        want = reference(one, engine())["gradients"]
        theirs, ours = (train(one, engine(), patched)["gradients"] for patched in (False, True))
        for n, w in want.items():
            norms = torch.stack([(ours[n] - w).norm(), (theirs[n] - w).norm(), w.norm()])
            squares[n] = squares.get(n, 0) + norms.double().square()
    shares = {}
    for n, both in squares.items():
        error, theirs_error, norm = both.sqrt().unbind()
        shares[n] = (error / allowed(theirs_error, norm, torch.bfloat16)).item()
    where = max(shares, key=shares.__getitem__)
    return shares[where], where


def refusal(run: Run, engine: Engine) -> dict[str, Any]:
    try:
        train(run, engine, run.patched)
    except Exception as e:
        assert run.refused in str(e), f"another error: {e!r}"
        return dict(refused=str(e))
    raise AssertionError("was not refused")


def compare(run: Run, device: torch.device) -> dict[str, Any]:
    calls = run.calls if run.accumulate else 1
    engine = partial(ENGINES[run.engine], device, getattr(torch, run.dtype), calls)
    if run.refused:
        return refusal(run, engine())
    want = reference(run, engine())
    got = train(run, engine(), run.patched)
    losses = zip(got["losses"], want["losses"], strict=True)
    result: dict[str, Any] = dict(
        width=max(widths),
        loss=max(abs(g - w) / abs(w) for g, w in losses),
        spread=spread(got["gradients"], device),
    )
    if run.traffic:
        plain = train(run, engine(), False)
        result["traffic"] = dict(plain=plain["traffic"], patched=got["traffic"])
    if run.dtype != "float32" or run.autocast:
        return result | dict(zip(("used", "where"), used(run, engine), strict=True))
    far = farthest(got["gradients"], want["gradients"], "tp-" in run.engine)
    result |= dict(zip(("gradient", "where"), far, strict=True))
    if run.steps > 1:
        among = {n: want["parameters"][n] for n in got["parameters"]}  # some name what they train
        result["parameters"], _ = farthest(got["parameters"], among)
    return result


def start(timeout: timedelta) -> torch.device:
    """The process group, and this process's device: a GPU of its own, where there are any."""
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if CUDA else "gloo", timeout=timeout)
    if not CUDA:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def main(runs: list[dict[str, Any]], results: Path) -> None:
    rank = int(os.environ["RANK"])
    device = start(timedelta(seconds=20))
    for fields in runs:
        run, began = Run(**fields), time.perf_counter()
        try:
            result = compare(run, device)
        except Exception as e:
            result = dict(error=f"{e!r}\n{traceback.format_exc()[-1500:]}")
        torch.compiler.reset()
        gc.collect()  # engines hold their buffers in cycles
        result["seconds"] = round(time.perf_counter() - began, 1)
        if rank == 0 or "error" in result:
            with results.open("a") as f:
                f.write(json.dumps(dict(run=run.name, rank=rank) | result) + "\n")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # DeepSpeed and FSDP1 leave threads behind


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
