"""Rotary embeddings and gated units: layouts, dtypes, and a backward that spends its inputs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from liger_core import glu, glu_packed, rope
from liger_core.ops.glu import glu_ref
from liger_core.ops.rope import rope_ref
from numerics import DEVICE, IMPLS, assert_no_worse_than_torch

both = pytest.mark.parametrize("impl", ["torch", "triton"])
B, T, D = 2, 3, 16
HALVES = [i for i in IMPLS if i[1] != torch.float32]


def heads(*H: int) -> tuple[Tensor, ...]:
    """(B, H, T, D) as the attention of a model has them."""
    return tuple(torch.randn(B, T, h, D, device=DEVICE).transpose(1, 2) for h in H)


def angles(R: int = D, batch: int = 1) -> tuple[Tensor, ...]:
    return torch.randn(2, batch, T, R, device=DEVICE).unbind()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("impl, dtype", HALVES, ids=str)
def test_angles_may_be_more_exact_than_heads(impl: str, dtype: torch.dtype, interleaved: bool):
    torch.manual_seed(0)
    q, k, (cos, sin) = *heads(4, 2), angles()
    kw: dict[str, Any] = dict(cos=cos, sin=sin, interleaved=interleaved)
    assert cos.dtype == torch.float32
    ours, ref = partial(rope, impl=impl, **kw), partial(rope_ref, **kw)
    assert_no_worse_than_torch(ours, ref, {"q": q, "k": k}, dtype)


@both
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_keeps_layouts_and_what_passes(impl: Any, interleaved: bool) -> None:
    """Also of heads that are slices of one projection, which are not copied to be walked."""
    qkv = torch.randn(B, T, 8, D, device=DEVICE).transpose(1, 2)
    q, k = qkv[:, :4], qkv[:, 4:6]
    before, (cos, sin) = qkv.clone(), angles(R=6)
    for x, y in zip((q, k), rope(q, k, cos, sin, interleaved=interleaved, impl=impl), strict=True):
        assert y.stride() == torch.empty_like(x).stride() and y.stride(1) == D
        assert torch.equal(y[..., 6:], x[..., 6:]) and not torch.equal(y, x)
    assert torch.equal(qkv, before)


def test_angles_that_do_not_fit_are_refused() -> None:
    q, k = heads(4, 2)
    for R, batch, match in (
        (7, 1, "even"), (18, 1, "up to D = 16"), (0, 1, "got 0"), (8, 3, "1 or 2"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            rope(q, k, *angles(R, batch))
    with pytest.raises(ValueError, match="must both be"):
        rope(q, k, angles(8)[0], angles(8, B)[0])
    with pytest.raises(ValueError, match="all but heads equal"):
        rope(q, k[..., :8], *angles(8))


def projected(packed: bool) -> tuple[list[Tensor], Callable[..., Tensor], Callable[..., Tensor]]:
    """Gate and up as an MLP makes them, glu of them, and its definition."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8, device=DEVICE)
    w = torch.randn(2, 12, 8, device=DEVICE, requires_grad=True)
    if packed:
        return [F.linear(x, w.flatten(0, 1))], glu_packed, lambda gu: glu_ref(*gu.chunk(2, -1))
    return [F.linear(x, w[0]), F.linear(x, w[1])], glu, glu_ref


parts = pytest.mark.parametrize("packed", [False, True])


@both
@parts
def test_backward_spends_its_inputs(packed: bool, impl: Any) -> None:
    inputs, op, ref = projected(packed)
    dy = torch.randn(2, 5, 12, device=DEVICE)
    want = torch.autograd.grad(ref(*inputs), inputs, dy, retain_graph=True)
    y = op(*inputs, inplace=True, impl=impl)
    got = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    torch.testing.assert_close(got, want)
    for t, grad in zip(inputs, got, strict=True):
        assert grad.data_ptr() == t.data_ptr() and not grad.requires_grad
    with pytest.raises(RuntimeError, match="inplace=True"):
        torch.autograd.grad(y, inputs, dy)


@both
@parts
def test_who_saved_them_too_gets_an_error(packed: bool, impl: Any) -> None:
    """Unless its backward comes first: then nothing has been written yet."""
    inputs, op, ref = projected(packed)
    other = sum(t.square().sum() for t in inputs)
    want = torch.autograd.grad(ref(*inputs).sum() + other, inputs, retain_graph=True)
    loss = op(*inputs, inplace=True, impl=impl).sum() + other
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, inputs)
    inputs, op, _ = projected(packed)
    loss = op(*inputs, inplace=True, impl=impl).sum() + sum(t.square().sum() for t in inputs)
    torch.testing.assert_close(torch.autograd.grad(loss, inputs), want)


def view_of_a_leaf() -> list[Tensor]:
    leaf = torch.randn(2, 6, 4, device=DEVICE, requires_grad=True)
    return [leaf[0], leaf[1]]


def computed(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, requires_grad=True) * 1


def overlapping() -> list[Tensor]:
    h = computed(7, 4)
    return [h[:-1], h[1:]]


class Wrapped(Tensor):
    pass


NOT_OURS: dict[str, Callable[[], list[Tensor]]] = {
    "leaves": lambda: [torch.randn(6, 4, device=DEVICE, requires_grad=True) for _ in "gu"],
    "one leaf": lambda: [computed(6, 4), torch.randn(6, 4, device=DEVICE, requires_grad=True)],
    "views of a leaf": view_of_a_leaf,
    "overlapping": overlapping,
    "the same": lambda: [computed(6, 4)] * 2,
    "strided": lambda: list(computed(6, 8).chunk(2, -1)),
    "expanded": lambda: [computed(1, 4).expand(6, 4), computed(6, 4)],
    "a subclass": lambda: [computed(6, 4).as_subclass(Wrapped), computed(6, 4)],
}


@both
@pytest.mark.parametrize("name", NOT_OURS)
def test_inputs_that_may_be_anothers_are_left_alone(name: str, impl: Any) -> None:
    torch.manual_seed(0)
    g, u = NOT_OURS[name]()
    before = g.detach().clone(), u.detach().clone()
    y = glu(g, u, inplace=True, impl=impl)
    got = [torch.autograd.grad(y.sum(), (g, u), retain_graph=True) for _ in range(2)]
    want = torch.autograd.grad(glu_ref(g, u).sum(), (g, u))
    for grads in got:
        torch.testing.assert_close(grads, want)
    assert torch.equal(g, before[0]) and torch.equal(u, before[1])


@both
@parts
@pytest.mark.parametrize("how", ["checkpoint", "save_on_cpu", "quantised"])
def test_what_hooks_hand_back_is_spent_instead(packed: bool, how: str, impl: Any) -> None:
    inputs, op, ref = projected(packed)
    want = torch.autograd.grad(ref(*inputs).sum(), inputs, retain_graph=True)
    call = partial(op, inplace=True, impl=impl)
    if how == "checkpoint":  # where they are not leaves of autograd a second time either
        y = checkpoint(lambda *ts: call(*(t * 1 for t in ts)), *inputs, use_reentrant=False)
    elif how == "save_on_cpu":
        with torch.autograd.graph.save_on_cpu():
            y = call(*inputs)
    else:  # comes back in another layout
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: t.double().transpose(0, 1).contiguous(), lambda t: t.transpose(0, 1).float()
        ):
            y = call(*inputs)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), inputs), want)


def test_arguments_of_glu_are_checked() -> None:
    g = torch.randn(2, 3, device=DEVICE)
    with pytest.raises(ValueError, match="halves of the last dimension"):
        glu_packed(g)
    for call in (lambda: glu(g, g, "relu"), lambda: glu_packed(g[:, :2], "relu")):  # pyright: ignore
        with pytest.raises(ValueError, match="act must be"):
            call()


@pytest.mark.gpu
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_of_more_than_two_to_the_31_elements(interleaved: bool) -> None:
    T, H, D = 2**18 + 3, 64, 128  # and more tokens than a grid is wide
    q = torch.empty(1, T, H, D, device=DEVICE, dtype=torch.bfloat16).normal_().transpose(1, 2)
    k, (cos, sin) = q[:, :1], torch.randn(2, 1, T, D, device=DEVICE).unbind()
    got = rope(q, k, cos, sin, interleaved=interleaved)
    at = (slice(None), slice(None), slice(-3, None))
    want = rope_ref(q[at], k[at], cos[:, -3:], sin[:, -3:], interleaved=interleaved)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a[at], b)


@pytest.mark.gpu
@parts
def test_all_the_memory_that_it_adds_is_its_output(packed: bool) -> None:
    N = 2**24
    x = torch.randn(2 * N, device=DEVICE, requires_grad=True)
    inputs = [x.view(1, -1) * 1] if packed else [t * 1 for t in x.chunk(2)]
    start, dy = torch.cuda.memory_allocated(), torch.randn(N, device=DEVICE)
    torch.cuda.reset_peak_memory_stats()
    y = (glu_packed if packed else glu)(*inputs, inplace=True)
    torch.autograd.grad(y, inputs, dy.view(y.shape))
    assert torch.cuda.max_memory_allocated() - start <= 4 * 2 * N + 2**20  # y, and dy
