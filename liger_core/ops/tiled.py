"""A function of single tokens, computed over tiles of them: only its input is kept for backward.

    y = fn(x) tile by tile        backward runs fn on a tile again, for its dx and part of dparams

For long contexts, where what an MLP keeps of every token is the largest thing in memory.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states

from liger_core.dispatch import sum_dtype

Fn = Callable[[Tensor], Tensor]


class _Then:
    """Random numbers and autocast as forward found them."""

    def __init__(self, x: Tensor) -> None:
        self.device = device = x.device.type
        self.rng, (self.devices, self.states) = torch.get_rng_state(), get_device_states(x)
        self.known = torch.amp.is_autocast_available(device)
        self.enabled = self.known and torch.is_autocast_enabled(device)
        self.dtype = torch.get_autocast_dtype(device) if self.known else None

    def autocast(self, enabled: bool) -> AbstractContextManager[Any]:
        return torch.autocast(self.device, self.dtype, enabled) if self.known else nullcontext()

    @contextmanager
    def random_numbers(self) -> Generator[None, None, None]:
        """Those of forward; afterwards the caller's go on as if none had been drawn."""
        device = "cuda" if self.device == "cpu" else self.device  # of no devices, then
        with torch.random.fork_rng(self.devices, device_type=device):
            torch.set_rng_state(self.rng)
            set_device_states(self.devices, self.states, device_type=device)
            yield


def _grads(y: Tensor, inputs: list[Tensor], dy: Tensor) -> tuple[Tensor | None, ...]:
    if not y.requires_grad:
        return (None,) * len(inputs)
    return torch.autograd.grad(y, inputs, dy, allow_unused=True)


def _add(
    sums: dict[Tensor, Tensor], params: list[Tensor], grads: Sequence[Tensor | None], tiles: int
) -> None:
    """Add one tile's gradients. The first are copied: they may be another's memory, such as dy."""
    for p, dp in zip(params, grads, strict=True):
        if dp is not None:
            dtype = sum_dtype(p.dtype, tiles)
            sums[p] = sums[p].add_(dp) if p in sums else dp.to(dtype, copy=tiles > 1)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fn: Fn, tiles: int, x: Tensor, *params: Tensor) -> Tensor:
        # fn knows the parameters themselves, while saved tensors may come back as copies. They are
        # saved so that writing to one before backward is an error, as it is in torch.
        ctx.save_for_backward(x, *params)
        ctx.fn, ctx.tiles, ctx.params, ctx.then = fn, tiles, params, _Then(x)
        y, start = x, 0
        for x_t in x.reshape(-1, x.shape[-1]).tensor_split(tiles):
            y_t = fn(x_t)
            if y_t.shape[:1] != x_t.shape[:1]:
                raise ValueError(
                    f"fn must return a row for each token; {len(x_t)} gave {tuple(y_t.shape)}"
                )
            if start == 0:
                y = y_t.new_empty((*x.shape[:-1], *y_t.shape[1:]))
            y.view(-1, *y_t.shape[1:])[start : start + len(y_t)] = y_t
            start += len(y_t)
        if ctx.then.enabled:  # older torch keeps the casts of weights made here, without a history
            torch.clear_autocast_cache()
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, then, (_, _, need_dx, *need) = ctx.saved_tensors[0], ctx.then, ctx.needs_input_grad
        wanted = [p for p, on in zip(ctx.params, need, strict=True) if on]
        dx = torch.zeros(x.shape, dtype=x.dtype, device=x.device) if need_dx else x
        sums: dict[Tensor, Tensor] = {}
        flat = (t.flatten(0, x.dim() - 2).tensor_split(ctx.tiles) for t in (x, dx, dy))
        # Within a context of autocast, if a disabled one, casts of weights last for all tiles.
        with then.random_numbers(), then.autocast(False):
            for x_t, dx_t, dy_t in zip(*flat, strict=True):
                x_t = x_t.detach().requires_grad_(need_dx)
                with torch.enable_grad(), then.autocast(then.enabled):
                    y_t = ctx.fn(x_t)
                grads = _grads(y_t, [x_t, *wanted] if need_dx else wanted, dy_t)
                if need_dx and (g := grads[0]) is not None:
                    dx_t.copy_(g)
                _add(sums, wanted, grads[need_dx:], ctx.tiles)
                del y_t, grads  # before the next tile's are made
        if wanted and not sums:
            raise RuntimeError(
                "fn used none of the parameters that tiled was given; were they replaced since "
                "its forward?"
            )
        dparams = (sums[p].to(p.dtype) if p in sums else None for p in ctx.params)
        return None, None, dx if need_dx else None, *dparams


def tiled(fn: Fn, x: Tensor, params: Iterable[Tensor], *, tiles: int | None = None) -> Tensor:
    """fn(x) without what fn keeps for backward: peak memory is that of one tile, at most.

    Args:
        fn: acts on each token alone, (m, H) to (m, ...), as often as asked with the same result; it
            runs twice for each tile. Random numbers and autocast are restored for the second time.
        x: (..., T, H), any float dtype.
        params: the tensors, besides what it is given, that fn takes gradients to: a module's
            `parameters()`. No other tensor gets one. Frozen and unused ones may be among them.
        tiles: how many, of equal rows; None for T / H, rounded up, so that what an MLP of a few
            times H keeps of a tile is about as large as its weights.

    Returns:
        (..., T, ...) as fn gives it. Saved for backward: x and params. Each parameter gets its
        gradient once, summed over tiles in its own dtype (bf16: in fp32 if there are more than
        four; fp16: always) and rounded to it. Under torch.compile each tile is a checkpoint, and
        autograd sums.

    Raises:
        ValueError: x of fewer than two dimensions, tiles below 1, or rows that fn adds or drops.
        RuntimeError: in backward, where fn uses other parameters than in forward.
    """
    if x.dim() < 2:
        raise ValueError(f"x must be (..., T, H), got {tuple(x.shape)}")
    T, H = x.shape[-2:]
    if tiles is not None and tiles < 1:
        raise ValueError(f"tiles must be at least 1, got {tiles}")
    tiles = max(min(tiles or -(-T // max(H, 1)), x.shape[:-1].numel()), 1)
    if not torch.compiler.is_compiling():
        return _Tiled.apply(fn, tiles, x, *dict.fromkeys(params))  # pyright: ignore
    rows = x.flatten(0, -2).tensor_split(tiles)
    y = torch.cat([checkpoint(fn, x_t, use_reentrant=False) for x_t in rows])
    return y.view(*x.shape[:-1], *y.shape[1:])
