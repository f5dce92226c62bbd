"""What goes wrong in one process or in all, for `test_faults.py`: faults.py FAULT ENGINE PATCHED.

poison: a label of the last process is out of range in its second step: all are to stop.
forward, backward: memory runs out there in the second step of all processes, who let go of it and
    go on with a smaller batch: process 0 prints how far gradients then are from one process's own.
"""

import contextlib
import os
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import engines
import job
from engines import ENGINES
from job import Run
from liger_core.ops import linear_head

SMALL = slice(0, 1)  # of the rows of a batch


def out_of_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("no memory, says the test")


@contextlib.contextmanager
def starved(model: Any, where: str, patched: bool) -> Any:
    """Memory runs out in the head's product, or once backward has come to the first layer."""
    inner = engines.hf(model)
    if where == "backward":
        hook = inner.model.layers[0].register_full_backward_pre_hook(out_of_memory)
    else:
        hook = inner.lm_head.register_forward_pre_hook(out_of_memory)
    buffer = linear_head.Walk.buffer
    if where == "forward" and patched:
        hook.remove()
        linear_head.Walk.buffer = out_of_memory
    try:
        yield
    finally:
        hook.remove()
        linear_head.Walk.buffer = buffer


def step(
    run: Run, engine: Any, model: Any, patched: bool, rows: slice, poison: bool = False
) -> Any:
    data = [[t[rows] for t in job.batch(run, r)] for r in range(dist.get_world_size())]
    ids, labels = (torch.cat(t) for t in zip(*(data[r] for r in engine.share()), strict=True))
    every = [y for _, y in data]
    total = sum(int((job.shift(y) != -100).sum()) for y in every)
    if poison and dist.get_rank() == dist.get_world_size() - 1:
        labels = labels.index_fill(1, torch.tensor([11]), 12345)
    loss = job.one_loss(run, engine, model, patched, ids, labels, total)
    engine.backward(model, loss * engine.world)
    return loss


def main(fault: str, name: str, patched: bool) -> None:
    device = job.start(timedelta(minutes=10))
    run, engines.LR = Run(name), 0.0
    engine = ENGINES[name](device, torch.float32, 1)
    model = job.prepared(run, engine, patched)
    everything = slice(None)
    step(run, engine, model, patched, everything)
    engine.step(model)
    if fault == "poison":
        loss = step(run, engine, model, patched, everything, poison=True)
        print("went on to", loss.item(), file=sys.stderr)
    else:
        try:
            with starved(model, fault, patched):
                step(run, engine, model, patched, everything)
            raise AssertionError("there was memory")
        except torch.OutOfMemoryError:
            model = engine.recovered(model)
        loss = step(run, engine, model, patched, SMALL)
        got = engine.gradients(model)
        alone = job.Alone(device)
        plain = job.prepared(run, alone, False)
        step(run, alone, plain, False, SMALL)
        far, where = job.farthest(got, alone.gradients(plain))
        print(f"far {far} {where} {loss.item()}", file=sys.stderr)
        assert far < 1e-5, (far, where)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3] == "patched")
