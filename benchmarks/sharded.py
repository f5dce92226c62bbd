"""A training step on N processes under FSDP2 or ZeRO-3, plain and patched: time, memory, traffic.

    python -m benchmarks.sharded --processes 2 --engines fsdp2 fsdp2-head zero3 --out FILE.json

Each engine and variant has N processes of its own, one a GPU (gloo on a CPU), that train a Llama of
random bf16 weights on a batch of random tokens each. "fsdp2-head" has untied embeddings, and
lm_head in a unit by itself. Traffic is that of one step on rank 0, in bytes of the collectives'
inputs: a process's own part where one gathers, all of it where one reduces. A variant that fails
says so in its place.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from datetime import timedelta
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoConfig

from benchmarks.families import text
from benchmarks.training_step import machine
from liger_kernel.measure import Traffic, call_ms
from liger_kernel.transformers.patch import apply
from liger_kernel.transformers.sample import sample_model

sys.path.append(str(Path(__file__).parents[1] / "tests" / "distributed"))
from engines import FSDP2, Zero, zero_config
from launch import launch

WARM_UP = 3
LLAMA_1B = dict(head_dim=64, rope_parameters=dict(rope_type="default", rope_theta=500000.0))
SHAPES = {
    "llama-1b": text(2048, 8192, 32, 8, 128256, 1e-5, num_hidden_layers=16, **LLAMA_1B),
    "tiny": text(64, 128, 4, 2, 2048, num_hidden_layers=2),  # ZeRO-3 splits no smaller head
}


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)


class Fsdp2(FSDP2):
    """Weights, gradients and the optimizer's state in the model's dtype."""

    def __init__(self, device: torch.device, head: bool = False) -> None:
        super().__init__(device, torch.float32, 1, head=head)  # fp32: no policy that casts

    def optimize(self, model: Any) -> None:
        self.optimizer = adamw(model)


class Zero3(Zero):
    """Everything as DeepSpeed has it by default, but that it does not clip."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device, torch.bfloat16, 1, stage=3)
        self.config = zero_config(3, 1, torch.bfloat16, False) | {"zero_optimization": {"stage": 3}}

    def wrap(self, model: nn.Module) -> nn.Module:
        import deepspeed

        return deepspeed.initialize(model=model, optimizer=adamw(model), config=self.config)[0]


ENGINES: dict[str, Any] = {"fsdp2": Fsdp2, "fsdp2-head": partial(Fsdp2, head=True), "zero3": Zero3}


def measured(name: str, variant: str, args: argparse.Namespace) -> dict[str, Any]:
    """What one process finds of one engine and variant; all find the same but for the traffic."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    # a process that waits for one that has failed ends after a minute
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=60))
    tied = name != "fsdp2-head"
    config = AutoConfig.for_model("llama", **SHAPES[args.shape], tie_word_embeddings=tied)
    model = sample_model(config, dtype=torch.bfloat16, device=device).train()
    if args.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if variant == "patched":
        apply(model)
    engine = ENGINES[name](device)
    model = engine.wrap(model)
    engine.optimize(model)
    size, world = (args.batch, args.length), dist.get_world_size()
    rng = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(config.vocab_size, size, generator=rng).to(device)
    total = torch.tensor(args.batch * (args.length - 1) * world, device=device)
    losses: list[Tensor] = []

    def step() -> None:
        # Nothing holds the logits during backward, as nothing does under Trainer.
        loss = model(input_ids=ids, labels=ids, num_items_in_batch=total, use_cache=False).loss
        losses.append(loss.detach())
        engine.backward(model, loss * world)  # the engines average gradients over processes
        engine.step(model)

    def over_ranks(values: list[Any], op: Any) -> list[float]:
        held = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(held, op)
        return held.tolist()

    for _ in range(WARM_UP):
        step()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    for _ in range(args.steps):
        dist.barrier()
        times.append(call_ms(step, device))
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0
    with Traffic() as traffic:
        step()
    times = over_ranks(times, dist.ReduceOp.MAX)
    ms = statistics.median(times)
    return {
        "step_ms": ms,
        "all_ms": [round(t, 3) for t in times],
        "tokens_per_s": math.prod(size) * world / ms * 1e3,
        "peak_gib": over_ranks([peak], dist.ReduceOp.MAX)[0] if cuda else None,
        "losses": over_ranks(losses[:WARM_UP], dist.ReduceOp.SUM),
        "traffic": traffic.ops,
    }


def work(name: str, variant: str, folder: str, args: argparse.Namespace) -> None:
    """A process: rank 0 leaves what it has found in the folder, and whoever fails says why."""
    try:
        found = measured(name, variant, args)
    except Exception as error:
        why = "" if isinstance(error, torch.OutOfMemoryError) else f": {error}"
        found = {"error": type(error).__name__ + why}
    if (rank := os.environ["RANK"]) == "0" or "error" in found:
        Path(folder, f"{rank}.json").write_text(json.dumps(found))
    os._exit("error" in found)  # others may be in a collective that never ends


def ran(name: str, variant: str, args: argparse.Namespace) -> dict[str, Any]:
    """What the processes of one engine and variant have found, or the first error among them."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["benchmarks.sharded", *sys.argv[1:], "--worker", name, variant, folder]
        ended = launch(Path("-m"), *command, world=args.processes, timeout=args.timeout)
        files = sorted(Path(folder).iterdir(), key=lambda file: file.stat().st_mtime_ns)
        found = [json.loads(file.read_text()) for file in files]
    said = "; ".join(f"status {code}, {said.strip()[-300:]!r}" for code, said in ended)
    return [*(f for f in found if "error" in f), *found, {"error": f"no result: {said}"}][0]


def line(found: dict[str, Any]) -> str:
    if "error" in found:
        return found["error"]
    sent = [f"{op} {n}x {size / 2**20:.2f} MiB" for op, (n, size) in found["traffic"].items()]
    peak = [f"{found['peak_gib']:.2f} GiB"] if found["peak_gib"] else []
    speed = f"{found['step_ms']:.1f} ms, {found['tokens_per_s']:.0f} tokens/s"
    return ", ".join([speed, *peak, *sent])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--shape", default="llama-1b", choices=SHAPES)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=4, help="sequences a process")
    parser.add_argument("--steps", type=int, default=8, help="that are timed")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--timeout", type=float, default=240, help="seconds of a variant")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)  # engine, variant, folder
    args = parser.parse_args()
    if args.worker:
        name, variant, folder = args.worker
        return work(name, variant, folder, args)
    setting = {k: v for k, v in vars(args).items() if k not in ("out", "worker")}
    report = {"setting": setting, **machine("cuda" if torch.cuda.is_available() else "cpu")}
    if find_spec("deepspeed"):
        report["versions"]["deepspeed"] = metadata.version("deepspeed")
    for name in args.engines:
        entry = report[name] = dict[str, Any]()
        for variant in ("plain", "patched"):
            entry[variant] = ran(name, variant, args)
            print(f"{name:10} {variant:7} {line(entry[variant])}", flush=True)
        losses = [entry[variant].get("losses", []) for variant in ("plain", "patched")]
        apart = [abs(b - a) / abs(a) for a, b in zip(*losses, strict=False)]
        entry["loss_difference"] = max(apart, default=None)
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
