"""A function over tiles of tokens: the same numbers, nothing kept but x."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cases import CASES, mlp, mlp_in_tiles
from liger_core import glu, tiled
from numerics import DEVICE, assert_no_worse_than_torch

T, H = 11, 8
inputs = next(case.make for case in CASES if case.name == "tiled-3")


def test_many_tiles_do_not_wear_gradients_out() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(2048, 4, device=DEVICE), torch.randn(3, 4, device=DEVICE)
    assert_no_worse_than_torch(
        lambda x, w: tiled(lambda t: F.linear(t, w), x, [w], tiles=1024),
        lambda x, w: F.linear(x, w),
        {"x": x, "w": w},
        torch.bfloat16,
    )


def test_a_gradient_that_is_part_of_dy_is_not_added_to() -> None:
    x, p = torch.randn(4, H, device=DEVICE), torch.randn(1, H, device=DEVICE, requires_grad=True)
    dy = torch.randn(4, H, device=DEVICE)
    before = dy.clone()
    (dp,) = torch.autograd.grad(tiled(lambda t: t + p, x, [p], tiles=4), p, dy)
    assert torch.equal(dy, before)
    torch.testing.assert_close(dp, dy.sum(0, keepdim=True))


def test_a_parameter_gets_its_gradient_once() -> None:
    leaves = {n: t.requires_grad_() for n, t in inputs().items()}
    calls: list[str] = []
    for n, t in leaves.items():
        t.register_post_accumulate_grad_hook(lambda _, n=n: calls.append(n))
    mlp_in_tiles(**leaves, tiles=4).sum().backward()
    assert sorted(calls) == sorted(leaves)


def test_only_x_is_kept() -> None:
    """Not what fn makes of it; parameters are there anyway."""
    leaves = {n: t.requires_grad_() for n, t in inputs().items()}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mlp_in_tiles(**leaves, tiles=3)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in leaves.values()}


@pytest.mark.parametrize("backward_too", [False, True])
def test_autocast_is_that_of_forward(backward_too: bool) -> None:
    """And weights that fn's forward cast are cast anew for who needs their gradients."""
    leaves, dtypes = {n: t.requires_grad_() for n, t in inputs().items()}, list[torch.dtype]()

    def noted(x: Tensor, w1: Tensor, w2: Tensor, b: Tensor) -> Tensor:
        def fn(t: Tensor) -> Tensor:
            y = mlp(t, w1, w2, b)
            dtypes.append(y.dtype)
            return y

        return tiled(fn, x, (w1, w2, b), tiles=3)

    def grads(fn: Any) -> list[Tensor]:
        with torch.autocast(DEVICE, torch.bfloat16):
            y = fn(**leaves)
            loss = y.float().square().mean() + mlp(**leaves).float().mean()
            if backward_too:
                return [y, *torch.autograd.grad(loss, list(leaves.values()))]
        return [y, *torch.autograd.grad(loss, list(leaves.values()))]

    for got, want in zip(grads(noted), grads(mlp), strict=True):
        assert got.dtype == want.dtype
        assert (got - want).norm() <= 4 * torch.finfo(torch.bfloat16).eps * want.norm()
    assert dtypes == [torch.bfloat16] * 6


def test_autocast_of_backward_is_not_fns() -> None:
    leaves = {n: t.requires_grad_() for n, t in inputs().items()}
    wanted, loss = list(leaves.values()), mlp_in_tiles(**leaves).square().sum()
    want = torch.autograd.grad(loss, wanted, retain_graph=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = torch.autograd.grad(loss, wanted)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_dropout_drops_the_same_again() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(64, 16, device=DEVICE), torch.randn(16, 16, device=DEVICE)
    x, w = x.requires_grad_(), w.requires_grad_()
    dropped: list[Tensor] = []

    def fn(t: Tensor) -> Tensor:
        y = F.dropout(F.linear(t, w), 0.5, training=True)
        dropped.append(y == 0)
        return y

    y = tiled(fn, x, [w], tiles=4)
    torch.manual_seed(1)
    torch.autograd.grad(y.sum(), (x, w))
    got = torch.randn(3, device=DEVICE)
    torch.manual_seed(1)
    assert torch.equal(got, torch.randn(3, device=DEVICE))
    assert all(torch.equal(dropped[i], dropped[i + 4]) for i in range(4))
    assert not torch.equal(dropped[0], dropped[1])


def test_parameters_that_fn_does_not_use() -> None:
    x = torch.randn(5, H, device=DEVICE, requires_grad=True)
    used, unused = (torch.randn(H, device=DEVICE, requires_grad=True) for _ in range(2))
    tiled(lambda t: t * used, x, [used, unused, used], tiles=2).sum().backward()
    assert unused.grad is None
    torch.testing.assert_close(used.grad, x.detach().sum(0))
    y = tiled(lambda t: t * used.detach(), x, [used], tiles=2)  # as if it were another by then
    with pytest.raises(RuntimeError, match="none of the parameters"):
        y.sum().backward()
    used.data.zero_()
    y = tiled(lambda t: t * used, x, [used], tiles=2)
    with torch.no_grad():
        used.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_constant_has_no_gradient() -> None:
    x = torch.randn(5, H, device=DEVICE, requires_grad=True)
    (dx,) = torch.autograd.grad(tiled(torch.ones_like, x, [], tiles=2).sum(), x)
    assert not dx.any()


def test_a_module_whose_backward_spends_what_it_made() -> None:
    torch.manual_seed(0)
    gate, up, down = (nn.Linear(8, 8, device=DEVICE) for _ in range(3))
    every = nn.ModuleList([gate, up, down])
    x = torch.randn(2, 5, 8, device=DEVICE, requires_grad=True)

    def fn(t: Tensor, inplace: bool = True) -> Tensor:
        return down(glu(gate(t), up(t), inplace=inplace))

    inputs = [x, *every.parameters()]
    want = torch.autograd.grad(fn(x, False).square().sum(), inputs)
    got = torch.autograd.grad(tiled(fn, x, every.parameters(), tiles=3).square().sum(), inputs)
    torch.testing.assert_close(got, want)
    y = checkpoint(lambda t: tiled(fn, t, every.parameters(), tiles=3), x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), inputs), want)


def test_layouts_and_empty_batches() -> None:
    given = inputs()
    x, rest = given.pop("x"), given
    for strange in (x.transpose(0, 1), x[:, ::2], x[:1].expand(3, T, H), x[0], x[None], x[:0]):
        strange = strange.detach().requires_grad_()
        y, want = mlp_in_tiles(strange, **rest, tiles=3), mlp(strange, **rest)
        torch.testing.assert_close(y, want)
        flat = y.new_tensor(0.5).expand(y.shape)
        torch.testing.assert_close(
            torch.autograd.grad(y, strange, flat), torch.autograd.grad(want, strange, flat)
        )


def test_as_many_tiles_as_the_sequence_has_widths() -> None:
    sizes: list[int] = []
    x = torch.randn(2, 17, 8, device=DEVICE)
    tiled(lambda t: sizes.append(len(t)) or t, x, [])
    assert sizes == [12, 11, 11]
    sizes.clear()
    tiled(lambda t: sizes.append(len(t)) or t, x[:, :1], [], tiles=9)
    assert sizes == [1, 1]


def test_arguments_are_checked() -> None:
    x = torch.randn(4, 3, device=DEVICE)
    with pytest.raises(ValueError, match=r"x must be \(\.\.\., T, H\)"):
        tiled(torch.relu, x[0], [])
    with pytest.raises(ValueError, match="tiles must be at least 1"):
        tiled(torch.relu, x, [], tiles=0)
    with pytest.raises(ValueError, match="a row for each token; 2 gave"):
        tiled(lambda t: t[:1], x, [], tiles=2)
