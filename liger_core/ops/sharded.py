"""DTensors: each process runs an op on its own shard of the rows, and a loss on its own classes.

    y = op(x, w)    x split by any dimension that the op does not need whole, w the same everywhere

What is split otherwise, or is a sum that is not taken yet, is gathered first, as torch's ops do.
The gradient of w is then a part of a sum over the processes, and leaves as `Partial`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from liger_core.ops.vocab_parallel import VocabShard


def is_dtensor(*tensors: Tensor | None) -> bool:
    """Whether one of them is a DTensor. Cheap for what is not, and without the import of them."""
    for t in tensors:
        if t is None or type(t) is Tensor or type(t) is nn.Parameter:
            continue
        if torch.distributed.is_available():
            from torch.distributed.tensor import DTensor

            if isinstance(t, DTensor):
                return True
    return False


def by_rows(
    op: Callable[..., Any],
    rows: Sequence[Tensor | None],
    params: Sequence[Tensor | None] = (),
    *,
    split: Callable[[int], bool] = lambda _: True,
) -> Any:
    """op(*rows, *params) where some are DTensors of one mesh.

    Args:
        rows: tensors to be placed as the first of them.
        params: what every process needs whole; one that is not a DTensor is the same everywhere.
        split: whether rows may stay split by this dimension, counted from the front.

    Returns:
        What op returns, one tensor or one for each of `rows`, as DTensors placed as these.

    Raises:
        ValueError: `rows` of which some are DTensors and some are not.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    x = rows[0]
    if not isinstance(x, DTensor) or any(not isinstance(t, DTensor) for t in rows if t is not None):
        kinds = ", ".join(type(t).__name__ for t in (*rows, *params) if t is not None)
        raise ValueError(f"the op's inputs must all be DTensors or none, got {kinds}")
    mesh = x.device_mesh
    whole: list[Any] = [Replicate()] * mesh.ndim
    places: list[Any] = [
        p if type(p) is Shard and split(p.dim % x.dim()) else Replicate() for p in x.placements
    ]
    sums: list[Any] = [Partial() if p.is_shard() else p for p in places]

    def local(t: Tensor | None, places: list[Any], grads: list[Any]) -> Tensor | None:
        if t is None:
            return None
        if not isinstance(t, DTensor):
            t = DTensor.from_local(t, mesh, whole, run_check=False)
        if list(t.placements) != places:
            t = t.redistribute(placements=places)
        return t.to_local(grad_placements=grads)

    mine = [local(t, places, places) for t in rows]
    out = op(*mine, *(local(t, whole, sums) for t in params))

    def spread(y: Tensor, like: Tensor, part: Tensor) -> DTensor:
        size = like.shape if y.shape == part.shape else (*like.shape[:-1], y.shape[-1])
        strides = torch.empty(size, device="meta").stride()
        return DTensor.from_local(
            y.contiguous(), mesh, places, run_check=False, shape=torch.Size(size), stride=strides
        )

    pairs = [(t, part) for t, part in zip(rows, mine, strict=True) if t is not None]
    if isinstance(out, Tensor):
        return spread(out, *pairs[0])  # pyright: ignore
    return tuple(spread(y, *pair) for y, pair in zip(out, pairs, strict=True))  # pyright: ignore


def by_classes(
    x: Tensor, w: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, VocabShard | None]:
    """This process's part of a head whose weight is a DTensor: x whole, its rows of w and b.

    Args:
        x: (..., H), whole or split in any way; what is not a DTensor is the same everywhere.
        w: (V, H), split by its rows over one dimension of its mesh, or not at all.
        b: (V,), split likewise, or None.

    Raises:
        ValueError: w is split in another way, or a process would have no class.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    if not isinstance(w, DTensor):
        raise ValueError("x is a DTensor and w is not; make w one, or x.full_tensor()")
    mesh, places, V = w.device_mesh, w.placements, w.shape[0]
    over = [i for i, p in enumerate(places) if not p.is_replicate()]
    if len(over) > 1 or any(type(places[i]) is not Shard or places[i] != Shard(0) for i in over):
        raise ValueError(
            f"the head's weight must be split by its classes, (Shard(0),), got {places}; "
            f"ColwiseParallel and transformers' 'colwise' plans split it so"
        )
    whole: list[Any] = [Replicate()] * mesh.ndim
    sums: list[Any] = [Partial() if i in over else Replicate() for i in range(mesh.ndim)]
    if not isinstance(x, DTensor):
        x = DTensor.from_local(x, mesh, whole, run_check=False)
    x = x.redistribute(placements=whole).to_local(grad_placements=sums)
    if isinstance(b, DTensor):
        b = b.redistribute(placements=places).to_local()
    elif b is not None and over:
        raise ValueError("the head's weight is split and its bias is not; split both by classes")
    shard = None
    if over:
        size, rank = mesh.size(over[0]), mesh.get_local_rank(over[0])
        step = -(-V // size)  # DTensors are split as torch.chunk does it
        if step * (size - 1) >= V:
            raise ValueError(f"{V} classes are too few for {size} processes to have some each")
        shard = VocabShard(step * rank, V, mesh.get_group(over[0]))
    return x, w.to_local(), b, shard
