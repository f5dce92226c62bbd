"""What is measured, as data.

A case names an operation (`op`, which `providers.py` computes), a shape, which makes the inputs and
says the floor, and what differs between cases. A new kind of operation brings its own shape class,
see `shapes.py`.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.shapes import Glu, Head, Logits, Mlp, Norm, Rope, Shape


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
    shape: Shape
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


def _kernel(op: str, size: str, shape: Shape, group: str = "kernels", **more: Any) -> Case:
    return Case(f"{op}-{size}", group, op, shape, **more)


def _rms_norm(rows: int, width: int) -> Case:
    return _kernel("rms_norm", f"{rows}x{width}", Norm((rows,), width))


FULL_LOGITS = {"memory_budget": 8192 * 128256 * 2}  # beside dw and dx, 3070 MiB in all
IN_PLACE = {"only": ("liger", "ours"), "like": "swiglu-16384x14336"}

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
    _rms_norm(65536, 4096),
    _rms_norm(131072, 2048),
    _rms_norm(32768, 8192),
    _rms_norm(16384, 16384),
    _rms_norm(16384, 4096),
    _kernel("rms_norm", "heads-2097152x128", Norm((16, 4096, 32), 128)),  # of queries, per head
    _kernel("add_rms_norm", "65536x4096", Norm((65536,), 4096, residual=True)),
    _kernel("layer_norm", "65536x4096", Norm((65536,), 4096, bias=True)),
    _kernel("swiglu", "16384x14336", Glu(16384, 14336)),
    _kernel("swiglu_inplace", "16384x14336", Glu(16384, 14336), **IN_PLACE),
    _kernel("swiglu_packed", "16384x14336", Glu(16384, 14336, packed=True)),
    _kernel("geglu", "16384x14336", Glu(16384, 14336, act="gelu_tanh")),
    _kernel("rope", "16x4096", Rope(16, 4096, heads=32, kv_heads=8, dim=128)),
    _kernel("cross_entropy", "8192x128256", Logits(8192, 128256)),
    _kernel("cross_entropy", "8192x151936", Logits(8192, 151936)),
    _kernel("cross_entropy", "8192x32000", Logits(8192, 32000)),
    Case("mlp_in_tiles-65536x4096x14336", "mlp", "mlp_in_tiles", Mlp(65536, 4096, 14336)),
    # A model of 135M parameters at 1 x 512 tokens: what a launch costs the host.
    _kernel("rms_norm", "512x576", Norm((512,), 576), group="launch"),
    _kernel("swiglu", "512x1536", Glu(512, 1536), group="launch"),
    _kernel("rope", "1x512", Rope(1, 512, heads=9, kv_heads=3, dim=64), group="launch"),
]
