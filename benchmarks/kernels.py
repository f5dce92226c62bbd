"""How each provider computes a kernel's op: functions of its tensors, by the op's name.

`eager(op)`, `liger(op)`, ... give the function, or None where the provider has none. Packages are
imported only then, see `providers.py`.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Op = Callable[..., Any]  # of the tensors in `KernelInputs.args`; a tensor or several

EPS = 1e-6


def rms_norm(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, w.shape, w, EPS)


def add_rms_norm(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    s = x + r
    return rms_norm(s, w), s


def layer_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, w.shape, w, b, EPS)


def swiglu(g: Tensor, u: Tensor) -> Tensor:
    return F.silu(g) * u


def geglu(g: Tensor, u: Tensor) -> Tensor:
    return F.gelu(g, approximate="tanh") * u


def unpacked(f: Op) -> Op:
    return lambda gu: f(*gu.chunk(2, -1))


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """As transformers has it, in the inputs' dtype."""
    cos, sin = cos[:, None], sin[:, None]

    def turn(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    return turn(q), turn(k)


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.float(), y)


def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(swiglu(F.linear(x, gate), F.linear(x, up)), down)


EAGER: dict[str, Op] = {
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "layer_norm": layer_norm,
    "swiglu": swiglu,
    "swiglu_packed": unpacked(swiglu),
    "geglu": geglu,
    "rope": rope,
    "cross_entropy": cross_entropy,
    "mlp_in_tiles": mlp,
}


def eager(op: str) -> Op | None:
    return EAGER.get(op)


def compiled(op: str) -> Op | None:
    return torch.compile(EAGER[op], dynamic=False) if op in EAGER else None


def liger(op: str) -> Op | None:
    """Liger-Kernel. It overwrites dy (norms), g and u (GLUs), q, k and their dys, the logits."""
    f = importlib.import_module("liger_kernel.transformers.functional")
    ops: dict[str, Op] = {
        "rms_norm": lambda x, w: f.liger_rms_norm(x, w, EPS),
        "add_rms_norm": lambda x, r, w: f.liger_fused_add_rms_norm(x, r, w, EPS),
        "layer_norm": lambda x, w, b: f.liger_layer_norm(x, w, b, EPS),
        "swiglu": f.liger_swiglu,
        "swiglu_inplace": f.liger_swiglu,
        "swiglu_packed": unpacked(f.liger_swiglu),
        "geglu": f.liger_geglu,
        "rope": f.liger_rope,
        "cross_entropy": f.liger_cross_entropy,
    }
    return ops.get(op)


def quack(op: str) -> Op | None:
    """QuACK. It has no backward of LayerNorm, and GLUs only inside a matrix product."""
    f = importlib.import_module("quack")

    def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        rotary = importlib.import_module("quack.rotary").apply_rotary_emb
        angles = [t[0, :, : t.shape[-1] // 2] for t in (cos, sin)]
        return tuple(rotary(x.transpose(1, 2), *angles).transpose(1, 2) for x in (q, k))

    ops: dict[str, Op] = {
        "rms_norm": lambda x, w: f.rmsnorm(x, w, eps=EPS),
        "add_rms_norm": lambda x, r, w: f.rmsnorm(x, w, residual=r, eps=EPS, prenorm=True),
        "rope": turn,
        "cross_entropy": f.cross_entropy,
    }
    return ops.get(op)


class Alias(torch.autograd.Function):
    """The leaf's memory as a tensor that is neither leaf nor view, like a projection's output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy


def ours(op: str) -> Op | None:
    """This repository."""
    core = importlib.import_module("liger_core")

    def mlp_in_tiles(x: Tensor, *weights: Tensor) -> Tensor:
        gate, up, down = weights

        def one(t: Tensor) -> Tensor:
            return F.linear(core.glu(F.linear(t, gate), F.linear(t, up), inplace=True), down)

        return core.tiled(one, x, weights)

    ops: dict[str, Op] = {
        "rms_norm": lambda x, w: core.rms_norm(x, w, EPS),
        "add_rms_norm": lambda x, r, w: core.add_rms_norm(x, r, w, EPS),
        "layer_norm": lambda x, w, b: core.layer_norm(x, w, b, EPS),
        "swiglu": lambda g, u: core.glu(g, u, "silu"),
        "swiglu_inplace": lambda g, u: core.glu(
            Alias.apply(g), Alias.apply(u), "silu", inplace=True
        ),
        "swiglu_packed": lambda gu: core.glu_packed(gu, "silu"),
        "geglu": lambda g, u: core.glu(g, u, "gelu_tanh"),
        "rope": core.rope,
        "cross_entropy": core.cross_entropy,
        "mlp_in_tiles": mlp_in_tiles,
    }
    return ops.get(op)
