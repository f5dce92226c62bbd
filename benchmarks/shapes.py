"""The inputs of a case, and the least work that it could be done with.

Every shape class has the members of `Head`: `floor`, `outputs`, `tiny`, `inputs`, `leaves`, `fp32`.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Floor:
    """The least work of forward and backward, and by what rate of the machine it is judged.

    Attributes:
        kind: "flops" by the rate of a bf16 product (m, k) @ (k, n) of the shape `gemm`; "bytes",
            every tensor read or written once, by the rate of a copy.
        flops, bytes: both for either kind, so that a roofline can show it.
        forward: of `amount`, what forward alone needs.
    """

    kind: Literal["flops", "bytes"]
    flops: int
    bytes: int
    forward: int
    gemm: tuple[int, int, int] | None = None

    @property
    def amount(self) -> int:
        return self.flops if self.kind == "flops" else self.bytes


def random(device: str, *shape: int, mean: float = 0.0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=device).mul_(scale).add_(mean)


class HeadInputs(NamedTuple):
    """Hidden states (B, T, H), head (V, H), labels (B, T); for a reference model the first two."""

    x: Tensor
    w: Tensor
    y: Tensor
    ref_x: Tensor | None
    ref_w: Tensor | None
    preferred: Tensor  # (B,) bool: the first half of the sequences
    dys: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Head:
    """A linear head under a loss. Of every sequence the last `scored` labels count, None for all.

    Products over scored rows only: logits, dx and dw of 2 N H V operations each, a reference
    model's logits one more, a frozen head's dw one less; forward needs the logits alone. Bytes:
    scored hidden states and the head read, their gradients written, the reference's two read.
    With `fp32`, x and w are fp32 under bf16 autocast, as in transformers' `bf16=True`: the last
    norm's fp32 weight makes its output fp32.
    """

    sequences: int
    length: int
    hidden: int = 4096
    vocab: int = 128256
    scored: int | None = None
    frozen: bool = False
    reference: bool = False
    fp32: bool = False
    outputs: ClassVar = ("loss",)

    @property
    def scored_rows(self) -> int:
        return self.sequences * (self.length if self.scored is None else self.scored)

    @property
    def floor(self) -> Floor:
        product = 2 * self.scored_rows * self.hidden * self.vocab
        x, w = self.scored_rows * self.hidden, self.vocab * self.hidden
        elements = (2 + self.reference) * x + (2 - self.frozen + self.reference) * w
        rows = min(self.sequences * self.length, 8192)
        return Floor(
            "flops",
            flops=(3 + self.reference - self.frozen) * product,
            bytes=elements * (4 if self.fp32 else 2),
            forward=(1 + self.reference) * product,
            gemm=(rows, self.hidden, self.vocab),
        )

    def tiny(self) -> "Head":
        """The same case at a size for any machine."""
        scored = None if self.scored is None else max(self.scored // 64, 1)
        length = max(self.length // 64, scored or 1)
        return dataclasses.replace(self, length=length, hidden=32, vocab=512, scored=scored)

    def inputs(self, device: str) -> HeadInputs:
        """Random ones, of a trained model's scale; the same in every process."""
        torch.manual_seed(0)
        dtype = torch.float32 if self.fp32 else torch.bfloat16
        x = torch.randn(
            self.sequences, self.length, self.hidden, dtype=dtype, device=device, requires_grad=True
        )
        w = torch.randn(self.vocab, self.hidden, dtype=dtype, device=device).mul_(0.02)
        y = torch.randint(self.vocab, (self.sequences, self.length), device=device)
        if self.scored is not None:
            y[:, : self.length - self.scored] = IGNORE_INDEX
        ref_x = ref_w = None
        if self.reference:
            ref_x = torch.randn_like(x, requires_grad=False).mul_(0.1).add_(x.detach())
            ref_w = w.clone()
        preferred = torch.arange(self.sequences, device=device) < self.sequences // 2
        return HeadInputs(x, w.requires_grad_(not self.frozen), y, ref_x, ref_w, preferred)

    def leaves(self, inputs: HeadInputs) -> dict[str, Tensor]:
        """What gradients are taken of."""
        return {"dx": inputs.x} if self.frozen else {"dx": inputs.x, "dw": inputs.w}


class KernelInputs(NamedTuple):
    """An op's arguments by name, in their order; a gradient for each output, none for a loss."""

    args: dict[str, Tensor]
    dys: tuple[Tensor, ...] = ()


class Kernel:
    """An op on bf16 tensors, memory-bound but for `Mlp`. All floating arguments but angles have
    gradients.

    Bytes: the large tensors, each read or written once; weights, statistics, angles and labels do
    not count. Operations an element: + - * / max and every elementary function count as one.
    """

    fp32: ClassVar = False

    def leaves(self, inputs: KernelInputs) -> dict[str, Tensor]:
        return {f"d{name}": t for name, t in inputs.args.items() if t.requires_grad}


def traffic(elements: int, forward: int, both: int, operations: int) -> Floor:
    """So many bf16 tensors of `elements` in forward, and in forward and backward together."""
    return Floor("bytes", operations * elements, 2 * both * elements, 2 * forward * elements)


@dataclass(frozen=True)
class Norm(Kernel):
    """RMSNorm, or LayerNorm if there is a bias, of x or of s = x + r, which is an output then.

    Forward x -> y, with r: x, r -> y, s. Backward x, dy -> dx, with r: s, dy, ds -> one dx.
    RMSNorm's operations: 4 (square, sum, times rstd, times w) and 9 (w dy, xhat, their product and
    its sum, xhat times the mean, minus, times rstd; dw's product and sum). A residual adds 1 and 1.
    LayerNorm adds 3 (mean, minus, bias) and 4 (minus mean; mean of w dy, minus; db).
    """

    rows: tuple[int, ...]
    width: int
    residual: bool = False
    bias: bool = False

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("y", "s") if self.residual else ("y",)

    @property
    def floor(self) -> Floor:
        forward, both = (4, 8) if self.residual else (2, 5)
        operations = 13 + 2 * self.residual + 7 * self.bias
        return traffic(math.prod(self.rows) * self.width, forward, both, operations)

    def tiny(self) -> "Norm":
        rows = tuple(min(n, 16) for n in self.rows)
        return dataclasses.replace(self, rows=rows, width=min(self.width, 256))

    def inputs(self, device: str) -> KernelInputs:
        torch.manual_seed(0)
        wide = (*self.rows, self.width)
        args = {"x": random(device, *wide)}
        args |= {"r": random(device, *wide)} if self.residual else {}
        args["w"] = random(device, self.width, mean=1.0, scale=0.1)
        args |= {"b": random(device, self.width, scale=0.1)} if self.bias else {}
        args = {name: t.requires_grad_() for name, t in args.items()}
        return KernelInputs(args, tuple(random(device, *wide) for _ in self.outputs))


@dataclass(frozen=True)
class Glu(Kernel):
    """act(g) * u; `packed`: gu = [g, u] is one tensor. Forward g, u -> y; backward + dy -> dg, du.

    Operations of silu: 6 (sigmoid 4, times g, times u) and 12 (sigmoid 4, silu, du, slope 4, dg 2);
    of gelu_tanh = g sigmoid(polynomial): 11 (polynomial 5 more) and 20 (5 and slope 3 more).
    """

    rows: int
    width: int
    act: Literal["silu", "gelu_tanh"] = "silu"
    packed: bool = False
    outputs: ClassVar = ("y",)

    @property
    def floor(self) -> Floor:
        return traffic(self.rows * self.width, 3, 8, 18 if self.act == "silu" else 31)

    def tiny(self) -> "Glu":
        return dataclasses.replace(self, rows=min(self.rows, 16), width=min(self.width, 256))

    def inputs(self, device: str) -> KernelInputs:
        torch.manual_seed(0)
        names = {"gu": 2 * self.width} if self.packed else {"g": self.width, "u": self.width}
        args = {k: random(device, self.rows, n).requires_grad_() for k, n in names.items()}
        return KernelInputs(args, (random(device, self.rows, self.width),))


@dataclass(frozen=True)
class Rope(Kernel):
    """q and k (B, heads, T, D) turned by angles; they and their gradients lie as (B, T, heads, D).

    Forward q, k -> q, k; backward likewise. Operations: 3 (two products, a sum), twice.
    """

    sequences: int
    length: int
    heads: int
    kv_heads: int
    dim: int
    outputs: ClassVar = ("q", "k")

    @property
    def floor(self) -> Floor:
        tokens = self.sequences * self.length
        return traffic(tokens * (self.heads + self.kv_heads) * self.dim, 2, 4, 6)

    def tiny(self) -> "Rope":
        return dataclasses.replace(
            self, sequences=min(self.sequences, 2), length=min(self.length, 16)
        )

    def inputs(self, device: str) -> KernelInputs:
        torch.manual_seed(0)
        q, k, dq, dk = (
            random(device, self.sequences, self.length, heads, self.dim).transpose(1, 2)
            for heads in 2 * (self.heads, self.kv_heads)
        )
        rates = 1e4 ** -(torch.arange(0, self.dim, 2, device=device) / self.dim)
        angles = torch.outer(torch.arange(self.length, device=device), rates).repeat(1, 2)[None]
        cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
        args = {"q": q.requires_grad_(), "k": k.requires_grad_(), "cos": cos, "sin": sin}
        return KernelInputs(args, (dq, dk))


@dataclass(frozen=True)
class Logits(Kernel):
    """Cross entropy of given logits, mean over all labels. Forward z -> loss; and a write of dz.

    One read serves both where the second hits the cache. Operations: 4 (max, minus, exp, sum) and 3
    (minus, exp, times).
    """

    rows: int
    vocab: int
    outputs: ClassVar = ("loss",)

    @property
    def floor(self) -> Floor:
        return traffic(self.rows * self.vocab, 1, 2, 7)

    def tiny(self) -> "Logits":
        return dataclasses.replace(self, rows=min(self.rows, 16), vocab=min(self.vocab, 1000))

    def inputs(self, device: str) -> KernelInputs:
        torch.manual_seed(0)
        z = random(device, self.rows, self.vocab).requires_grad_()
        return KernelInputs({"z": z, "y": torch.randint(self.vocab, (self.rows,), device=device)})


@dataclass(frozen=True)
class Mlp(Kernel):
    """down(silu(gate(x)) * up(x)), an MLP of a long context: what it keeps of every token matters.

    Operations: its nine products of 2 M H N, three of them forward's; what is computed again is the
    provider's own affair. Bytes: x and dy read, y and dx written, weights and their gradients.
    """

    rows: int
    hidden: int
    width: int
    outputs: ClassVar = ("y",)

    @property
    def floor(self) -> Floor:
        product = 2 * self.rows * self.hidden * self.width
        elements = 4 * self.rows * self.hidden + 6 * self.hidden * self.width
        gemm = min(self.rows, 8192), self.hidden, self.width
        return Floor("flops", 9 * product, 2 * elements, 3 * product, gemm)

    def tiny(self) -> "Mlp":
        return dataclasses.replace(self, rows=min(self.rows, 64), hidden=32, width=112)

    def inputs(self, device: str) -> KernelInputs:
        torch.manual_seed(0)
        H, N = self.hidden, self.width
        args = {"x": random(device, 1, self.rows, H)}
        for name, out, into in (("gate", N, H), ("up", N, H), ("down", H, N)):
            args[name] = random(device, out, into, scale=into**-0.5)
        args = {name: t.requires_grad_() for name, t in args.items()}
        return KernelInputs(args, (random(device, 1, self.rows, H),))


Shape = Head | Norm | Glu | Rope | Logits | Mlp
