"""What is measured: every case, its inputs, and the least work that it could be done with.

A case names an operation (`op`, which `providers.py` computes), a shape, which makes the inputs and
says the floor, and what differs between cases. A new kind of operation brings its own shape class
with the members of `Head`: `floor`, `tiny`, `inputs`, `leaves`.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Floor:
    """The least work of forward and backward, and by what rate of the machine it is judged.

    "flops" by the rate of a bf16 product (m, k) @ (k, n) of the shape `gemm`; "bytes", every tensor
    read or written once, by the rate of a copy.
    """

    kind: Literal["flops", "bytes"]
    amount: int
    gemm: tuple[int, int, int] | None = None


class HeadInputs(NamedTuple):
    """Hidden states (B, T, H), head (V, H), labels (B, T); for a reference model the first two."""

    x: Tensor
    w: Tensor
    y: Tensor
    ref_x: Tensor | None
    ref_w: Tensor | None
    preferred: Tensor  # (B,) bool: the first half of the sequences


@dataclass(frozen=True)
class Head:
    """A linear head under a loss. Of every sequence the last `scored` labels count, None for all.

    Products over scored rows only: logits, dx and dw of 2 N H V operations each, a reference
    model's logits one more, a frozen head's dw one less. With `fp32`, x and w are fp32 under bf16
    autocast, as in transformers' `bf16=True`: the last norm's fp32 weight makes its output fp32.
    """

    sequences: int
    length: int
    hidden: int = 4096
    vocab: int = 128256
    scored: int | None = None
    frozen: bool = False
    reference: bool = False
    fp32: bool = False

    @property
    def scored_rows(self) -> int:
        return self.sequences * (self.length if self.scored is None else self.scored)

    @property
    def floor(self) -> Floor:
        products = 3 + self.reference - self.frozen
        amount = products * 2 * self.scored_rows * self.hidden * self.vocab
        rows = min(self.sequences * self.length, 8192)
        return Floor("flops", amount, (rows, self.hidden, self.vocab))

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


@dataclass(frozen=True)
class Case:
    """One row of a table.

    Attributes:
        name: what `--cases` selects by.
        group: the table that it belongs to.
        op: what is computed, see `providers.py`.
        shape: makes the inputs, and says the floor.
        only: the providers it is meant for; None for all.
        options: arguments for our own function.
        like: the case with the same inputs whose results are the reference, where not this one.
        timed: False where only memory is of interest.
    """

    name: str
    group: str
    op: str
    shape: Head
    only: tuple[str, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    like: str | None = None
    timed: bool = True

    def tiny(self) -> "Case":
        return dataclasses.replace(self, shape=self.shape.tiny())


def _linear(name: str, shape: Head, **more: Any) -> Case:
    return Case(f"linear-{name}", "linear", "linear_ce", shape, **more)


def _preference(pairs: int) -> list[Case]:
    """16384 tokens as so many pairs, the first half of every sequence a masked prompt.

    The last ones compute log-probabilities first and a loss outside, which takes 4 products, or 3
    within a budget for saved logits; their floor is 3.
    """
    length = 16384 // (2 * pairs)
    shape = Head(2 * pairs, length, scored=length // 2)
    shapes = {"dpo": dataclasses.replace(shape, reference=True)}
    cases = [
        Case(f"{op}-{pairs}", "preference", op, shapes.get(op, shape))
        for op in ("dpo", "orpo", "cpo", "simpo", "kto", "logprob")
    ]
    saved = {"only": ("ours",), "options": {"saved_logits_budget": 2 << 30}}
    like = cases[-1].name
    return [*cases, dataclasses.replace(cases[-1], name=f"{like}-saved", like=like, **saved)]


def _over_length(op: str) -> list[Case]:
    """8 sequences of growing length, 4096 labels scored in all: memory alone."""
    shapes = [Head(8, 512 << i, scored=512, reference=op == "dpo") for i in range(7)]
    return [
        Case(f"memory-{op}-{s.length}", "memory", op, s, only=("eager", "ours"), timed=False)
        for s in shapes
    ]


FULL_LOGITS = {"memory_budget": 8192 * 128256 * 2}  # beside dw and dx, 3070 MiB in all

CASES: list[Case] = [
    _linear("8k", Head(4, 2048)),
    _linear("8k-budget", Head(4, 2048), only=("ours",), options=FULL_LOGITS, like="linear-8k"),
    _linear("16k", Head(8, 2048)),
    _linear("16k-half", Head(8, 2048, scored=1024)),
    _linear("8k-gemma2", Head(4, 2048, hidden=2304, vocab=256000)),
    _linear("16k-frozen", Head(8, 2048, frozen=True)),
    _linear("8k-fp32", Head(4, 2048, fp32=True)),
    *_over_length("linear_ce"),
    *_over_length("dpo"),
    *_preference(4),
    *_preference(16),
]
