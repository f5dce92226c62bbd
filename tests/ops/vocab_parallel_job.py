"""One of several processes that hold some rows of a head each, for `test_vocab_parallel.py`.

vocab_parallel_job.py RANK FOLDER: saves what every case gives in FOLDER, as NAME.RANK.pt.
"""

import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cases import group_loss, uneven_labels
from liger_core import (
    VocabShard,
    linear_cross_entropy,
    linear_cross_entropy_stats,
    linear_logprob,
    linear_loss,
    linear_token_stats,
)

ROWS = [0, 23, 37]  # process r holds classes ROWS[r] ... ROWS[r + 1]
S, T, H, V, R = 4, 5, 16, 37, 3
STATS = ("entropy", "log_sum_sq_probs", "mean_logit", "is_top1")
Y = uneven_labels(S, T, V).cpu()
BUDGET = 4 * 19 * 4  # 4 rows of 19 classes: the first process's are more, the second's fewer


def _loss(together: Any, **options: Any) -> tuple[Any, ...]:
    loss_fn = group_loss(together, S, T)
    loss, stats = linear_loss(
        y=Y, loss_fn=loss_fn, together=together, outputs=STATS, **options
    )  # fmt: skip
    return loss, *stats


def _ce(**options: Any) -> tuple[Any, ...]:
    return (linear_cross_entropy(y=Y, **options),)


CASES: dict[str, Callable[..., tuple[Any, ...]]] = {
    "plain": _ce,
    "smoothing+z_loss": partial(_ce, label_smoothing=0.2, z_loss=0.1),
    "softcap": partial(_ce, softcap=0.7, scale=1.3, temperature=1.7),
    "token_scaling": partial(_ce, token_scaling=True),
    "token_scaling-none": partial(_ce, token_scaling=True, reduction="none"),
    "weights-none": partial(_ce, weights=torch.linspace(0.1, 2.0, S * T).view(S, T),
                            reduction="none", label_smoothing=0.2),
    "whole": partial(_ce, compact=False, label_smoothing=0.2),
    "ce_stats": lambda **kw: tuple(linear_cross_entropy_stats(y=Y, z_loss=0.1, **kw)),
    "logprob": lambda **kw: (linear_logprob(y=Y, **kw),),
    "token_stats": lambda **kw: tuple(linear_token_stats(y=Y, outputs=STATS, **kw)),
    "pair": partial(_loss, "pair"),
    "batch-softcap": partial(_loss, "batch", softcap=0.7),
    # What no process may decide by its own number of rows: into how many chunks all of them go.
    "plain-budget": partial(_ce, memory_budget=BUDGET),
    "logprob-kept": lambda **kw: (
        linear_logprob(y=Y, memory_budget=BUDGET, saved_logits_budget=2 * BUDGET, **kw),
    ),
    "pair-budget": partial(_loss, "pair", memory_budget=BUDGET),
}  # fmt: skip


def results(name: str, impl: str, rank: int | None, group: Any = None) -> dict[str, Tensor]:
    """What a case gives to one process, or with a whole head: values, and gradients by name.

    An impl of "frozen" is torch's, with a gradient for x alone.
    """
    g = torch.Generator().manual_seed(0)
    shapes = dict(x=(S, T, H), w=(V, H), b=(V,), u=(S, T, R), v=(V, R))
    head = {n: torch.randn(s, generator=g) for n, s in shapes.items()}
    shard = None
    if rank is not None:
        start, stop = ROWS[rank], ROWS[rank + 1]
        head |= {n: head[n][start:stop].clone() for n in "wbv"}
        shard = VocabShard(start, V, group)
    leaves = {n: t for n, t in head.items() if n == "x" or impl != "frozen"}
    for t in leaves.values():
        t.requires_grad_()
    low_rank = head.pop("u"), head.pop("v")
    impl = "torch" if impl == "frozen" else impl
    out = [
        t for t in CASES[name](**head, low_rank=low_rank, shard=shard, impl=impl) if t is not None
    ]
    given = [t for t in out if t.requires_grad]
    dy = [torch.randn(t.shape, generator=g).to(t.dtype) for t in given]
    grads = torch.autograd.grad(given, list(leaves.values()), dy)
    values = {f"out{i}": t.detach() for i, t in enumerate(out)}
    return values | {f"d{n}": t for n, t in zip(leaves, grads, strict=True)}


RUNS = [
    *((name, "torch") for name in CASES if "budget" not in name and "kept" not in name),
    *((name, "frozen") for name in ("plain", "logprob", "token_stats", "pair")),
    *((name, "triton") for name in ("smoothing+z_loss", "token_scaling", "token_stats", "pair")),
    *((name, "torch") for name in CASES if "budget" in name or "kept" in name),
]


def main(rank: int, folder: Path, runs: list[tuple[str, str]]) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(ROWS) - 1,
        timeout=timedelta(seconds=20),
    )  # fmt: skip
    for name, impl in runs:
        got = results(name, impl, rank, dist.group.WORLD)
        torch.save(got, folder / f"{name}-{impl}.{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    interpreted = RUNS if sys.argv[3] == "1" else [r for r in RUNS if r[1] != "triton"]
    main(int(sys.argv[1]), Path(sys.argv[2]), interpreted)
