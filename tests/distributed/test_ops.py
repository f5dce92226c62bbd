"""Ops on DTensors: values and gradients are the whole tensors'; what cannot be is refused."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from launch import launch, too_few
from liger_core import linear_cross_entropy, rms_norm
from liger_core.dispatch import arrived
from numerics import GPU

JOB = Path(__file__).with_name("ops_job.py")
IMPLS = ("auto",) if GPU else ("torch", "triton")


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_shards_give_what_the_whole_gives(world: int) -> None:
    if too_few(world):
        pytest.skip(f"needs {world} GPUs")
    for code, said in launch(JOB, *IMPLS, world=world, timeout=120):
        assert code == 0, said[-3000:]


@pytest.fixture(scope="module")
def mesh() -> Iterator[object]:
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


Y = torch.tensor([[1, 2]])


def test_what_cannot_be_is_refused(mesh: object) -> None:
    def at(t: torch.Tensor, place: object) -> DTensor:
        return DTensor.from_local(t, mesh, [place])

    x, w, b = torch.ones(1, 2, 4), torch.ones(5, 4), torch.ones(5)
    with pytest.raises(ValueError, match="must all be DTensors or none, got Tensor, DTensor"):
        rms_norm(x, at(torch.ones(4), Replicate()))
    with pytest.raises(TypeError, match="kernels cannot read a DTensor"):
        arrived(at(x, Replicate()))
    with pytest.raises(ValueError, match="x is a DTensor and w is not"):
        linear_cross_entropy(at(x, Replicate()), w, Y)
    with pytest.raises(ValueError, match="must be split by its classes"):
        linear_cross_entropy(x, at(w, Shard(1)), Y)
    with pytest.raises(ValueError, match="must be split by its classes"):
        linear_cross_entropy(x, at(w, Partial()), Y)
    with pytest.raises(ValueError, match="split and its bias is not"):
        linear_cross_entropy(x, at(w, Shard(0)), Y, b)
    with pytest.raises(ValueError, match="leave shard and low_rank out"):
        low_rank = torch.ones(1, 2, 1), torch.ones(5, 1)
        linear_cross_entropy(x, at(w, Shard(0)), Y, low_rank=low_rank)


class Named(torch.Tensor):
    """A subclass with memory of its own."""


def test_a_subclass_that_holds_its_own_memory_passes() -> None:
    x, w = torch.randn(2, 4), torch.ones(4)
    torch.testing.assert_close(
        rms_norm(x.as_subclass(Named), w, impl=IMPLS[-1]).as_subclass(torch.Tensor),
        rms_norm(x, w, impl=IMPLS[-1]),
    )
