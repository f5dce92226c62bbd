"""One training step of a causal model, plain against patched: time and memory, side by side.

    python benchmarks/training_step.py MODEL --batch 8 --length 2048 --out benchmarks/results/X.json

MODEL is a local folder. One instance is patched and reverted in turns of two steps, of which the
last one counts, so that both variants meet the same machine. A step is forward, backward, AdamW's
step and zeroing; memory is the peak of forward and backward beyond weights, gradients and optimizer
state, and on a GPU also the peak of everything. With and without gradient checkpointing.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
from contextlib import nullcontext
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from liger_kernel.measure import PeakMemory, step_times
from liger_kernel.transformers import apply


def machine(device: str) -> dict[str, Any]:
    """Where and with what the figures were made."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    return {
        "device": name or platform.machine(),
        "threads": torch.get_num_threads(),
        "commit": os.environ.get("COMMIT") or git.stdout.strip() or "not a git checkout",
        "python": platform.python_version(),
        "versions": {p: metadata.version(p) for p in ("torch", "triton", "transformers")},
    }


class Step:
    """Training steps of one model on one batch of random tokens; labels mask a tenth of them."""

    def __init__(self, model: torch.nn.Module, batch: int, length: int) -> None:
        torch.manual_seed(0)
        self.model, self.device = model, next(model.parameters()).device
        vocabulary = model.config.vocab_size  # pyright: ignore
        self.ids = torch.randint(vocabulary, (batch, length), device=self.device)
        self.labels = self.ids.masked_fill(torch.rand_like(self.ids, dtype=torch.float) < 0.1, -100)
        # A learning rate of 0 costs the same time and leaves both variants the same model.
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
        self.loss = 0.0

    def forward_backward(self) -> None:
        out = self.model(input_ids=self.ids, labels=self.labels, use_cache=False)
        out.loss.backward()
        self.loss = out.loss.detach()

    def __call__(self) -> None:
        self.forward_backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def compare(step: Step, repeats: int, warm_up: int) -> dict[str, Any]:
    """Both variants: median and all step times in ms, peak MiB, loss."""
    patched = {"patched": partial(apply, step.model)}
    result: dict[str, Any] = {}
    for name in ("plain", "patched"):
        with patched.get(name, nullcontext)():
            step()
            result[name] = memory(step) | {"first_loss": float(step.loss)}
    times = step_times(dict.fromkeys(result, step), repeats, step.device, warm_up, patched)
    for name, ms in times.items():
        result[name] |= {
            "step_ms": statistics.median(ms),
            "all_ms": [round(t, 3) for t in ms],
        }
    result["ratio"] = {
        key: result["patched"][key] / result["plain"][key]
        for key in ("step_ms", "activations_mib", "peak_mib")
        if key in result["plain"]
    }
    return result


def memory(step: Step) -> dict[str, float]:
    """Peak MiB of forward and backward beyond what is there before; on a GPU, of everything."""
    step.forward_backward()  # allocates the gradients
    with PeakMemory(step.device) as peak:
        step.forward_backward()
    result = {"activations_mib": peak.mib}
    if step.device.type == "cuda":
        result["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    step.optimizer.zero_grad()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a causal language model")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--warm-up", type=int, default=3, help="rounds that are not counted")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    step = Step(model.to(device).train(), args.batch, args.length)
    report = {"setting": {k: v for k, v in vars(args).items() if k != "out"}, **machine(device)}
    report["no_checkpointing"] = compare(step, args.repeats, args.warm_up)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    report["checkpointing"] = compare(step, args.repeats, args.warm_up)
    for name in ("no_checkpointing", "checkpointing"):
        print(name, json.dumps(report[name]["ratio"]), report[name]["plain"]["first_loss"])
        for variant in ("plain", "patched"):
            row = report[name][variant]
            print(f"  {variant:8}", {k: v for k, v in row.items() if k != "all_ms"})
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
