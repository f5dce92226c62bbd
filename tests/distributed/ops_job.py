"""Ops on DTensors in one of several processes, against the whole tensors: for `test_ops.py`.

Raises at the first value or gradient that differs. Shapes are odd, so that shards are uneven.
"""

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from job import start
from liger_core import (
    add_rms_norm,
    glu,
    glu_packed,
    layer_norm,
    linear_cross_entropy,
    linear_logprob,
    rms_norm,
    rope,
)

B, T, N, V, HEADS = 2, 5, 6, 7, 3
WHOLE = Replicate()
Placed = dict[str, Any]  # where each input is, None for a plain tensor that all processes hold

SHAPES = dict(
    x=(B, T, N), r=(B, T, N), w=(N,), b=(N,), g=(B, T, N), u=(B, T, N), gu=(B, T, 2 * N),
    q=(B, HEADS, T, 4), k=(B, HEADS, T, 4), head=(V, N), head_bias=(V,),
)  # fmt: skip


def rotate(impl: Any, q: Tensor, k: Tensor) -> Any:
    angles = torch.linspace(0, 3, T * 4, device=q.device).view(1, T, 4)
    return rope(q, k, angles.cos(), angles.sin(), impl=impl)


def loss(op: Any, impl: Any, x: Tensor, head: Tensor, head_bias: Tensor | None = None) -> Any:
    y = (torch.arange(B * T, device=x.device).view(B, T) * 3) % V
    return op(x, head, y.masked_fill(y == 1, -100), head_bias, impl=impl)


OPS: dict[str, Callable[..., Any]] = {
    "rms_norm": lambda impl, x, w=None: rms_norm(x, w, 0.1, impl=impl),
    "add_rms_norm": lambda impl, x, r, w: add_rms_norm(x, r, w, 0.1, impl=impl),
    "layer_norm": lambda impl, x, w, b: layer_norm(x, w, b, 0.1, impl=impl),
    "glu": lambda impl, g, u: glu(g, u, impl=impl),
    "glu_packed": lambda impl, gu: glu_packed(gu, impl=impl),
    "rope": rotate,
    "linear_cross_entropy": partial(loss, linear_cross_entropy),
    "linear_logprob": partial(loss, linear_logprob),
}
ROWS = [Shard(0), Shard(1), Shard(2), Partial(), WHOLE]
CASES: list[tuple[str, Placed]] = [
    *(("rms_norm", dict(x=at, w=WHOLE)) for at in ROWS),
    ("rms_norm", dict(x=Shard(1), w=None)),
    ("rms_norm", dict(x=Shard(-2), w=Shard(0))),
    ("rms_norm", dict(x=Shard(1))),
    *(("add_rms_norm", dict(x=at, r=Shard(1), w=WHOLE)) for at in (Shard(1), Partial())),
    ("layer_norm", dict(x=Shard(1), w=WHOLE, b=WHOLE)),
    *(("glu", dict(g=at, u=at)) for at in ROWS),
    ("glu", dict(g=Shard(2), u=Shard(1))),
    *(("glu_packed", dict(gu=at)) for at in (Shard(1), Shard(2))),
    *(("rope", dict(q=at, k=at)) for at in (Shard(1), Shard(2), WHOLE)),
    *(("linear_cross_entropy", dict(x=at, head=Shard(0), head_bias=Shard(0))) for at in ROWS),
    ("linear_cross_entropy", dict(x=None, head=Shard(0))),
    ("linear_cross_entropy", dict(x=Shard(1), head=WHOLE, head_bias=None)),
    ("linear_logprob", dict(x=Shard(1), head=Shard(0), head_bias=Shard(0))),
]  # fmt: skip


def inputs(names: Any, device: torch.device) -> dict[str, Tensor]:
    torch.manual_seed(0)
    every = {n: torch.randn(shape) for n, shape in SHAPES.items()}
    return {n: every[n].to(device).requires_grad_() for n in names}


def placed(t: Tensor, at: Any, mesh: Any) -> Tensor:
    t = t.detach()
    if at is None:
        return t.clone().requires_grad_()
    if isinstance(at, Partial):  # parts that are not alike
        share = 0.25 if dist.get_rank() == 0 else 0.75 / (dist.get_world_size() - 1)
        return DTensor.from_local(t * share, mesh, [at]).requires_grad_()
    return distribute_tensor(t, mesh, [at]).requires_grad_()


def values(op: Callable[..., Any], given: dict[str, Tensor]) -> list[Tensor]:
    """Outputs and gradients, whole."""
    out = op(**given)
    outs = list(out) if isinstance(out, tuple) else [out]
    rng = torch.Generator().manual_seed(1)
    whole = [t.full_tensor() if isinstance(t, DTensor) else t for t in outs]
    dys = [torch.randn(t.shape, generator=rng).to(t) for t in whole]
    grads = torch.autograd.grad(whole, [*given.values()], dys)
    return [t.full_tensor() if isinstance(t, DTensor) else t for t in (*whole, *grads)]


def waits(device: torch.device, impl: Any) -> None:
    """What a collective is still to fill is waited for, in forward and in backward."""
    x, w = inputs("xw", device).values()
    part = x.detach() / dist.get_world_size()
    late = funcol.all_reduce(part, "sum", dist.group.WORLD)
    assert isinstance(late, funcol.AsyncCollectiveTensor)
    torch.testing.assert_close(rms_norm(late, w, impl=impl), rms_norm(x, w, impl=impl))
    y = rms_norm(x, w, impl=impl)
    late = funcol.all_reduce(part, "sum", dist.group.WORLD)
    got = torch.autograd.grad(y, [x, w], late, retain_graph=True)
    torch.testing.assert_close(got, torch.autograd.grad(y, [x, w], x.detach()))


def main(impls: list[str]) -> None:
    device = start(timedelta(seconds=60))
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    for impl in impls:
        waits(device, impl)
        for name, places in CASES:
            op, whole = partial(OPS[name], impl), inputs(places, device)
            given = {n: placed(t, places[n], mesh) for n, t in whole.items()}
            got, want = values(op, given), values(op, whole)
            try:
                torch.testing.assert_close(got, want)
            except AssertionError as e:
                raise AssertionError(f"{name} {impl} {places}") from e
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
