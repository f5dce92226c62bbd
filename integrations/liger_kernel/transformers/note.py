"""What one call of a model and its lm_head tell each other."""

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from liger_core import LabelScan
from liger_core.ops.labels import IGNORE_INDEX

Answer = tuple[Tensor, ...]
Request = Callable[[Tensor, Tensor, dict[str, Any]], Answer]


@dataclass(slots=True)
class Note:
    """Empty between calls. Numbers that change are tensors: torch.compile would specialise on
    others, and recompile every step.
    """

    labels: Tensor | None = None  # as the model was given them
    shifted: bool = False  # whether as shift_labels
    y: Tensor | None = None  # shifted in any case
    fuse: bool = False
    request: Request | None = None  # what to return instead, of x, w, and `b` and `low_rank`
    ignore_index: int = IGNORE_INDEX
    total: Tensor | None = None
    scan: LabelScan | None = None
    softcap: float | None = None
    divisor: float = 1.0
    token_scaling: bool = False
    accum_dtype: torch.dtype | None = None
    wanted: tuple[str, ...] = ()  # names of outputs
    logits: Tensor | None = None  # what lm_head has returned,
    version: int = 0  # and its version then
    loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None
    checked: bool = False  # whether what becomes of the logits is known
    unfused: bool = False  # whether full logits with a gradient were ever made

    def clear(self) -> None:
        self.__init__(checked=self.checked, unfused=self.unfused)


class Ticket:
    """What lm_head holds in place of its note; a copy of the module gets a ticket of its own.

    The notes themselves are kept here: torch.compile takes a tensor that hangs on a module to have
    one shape for ever, and would recompile for every length of the labels.
    """

    def __init__(self, checked: bool = False) -> None:
        self.number = next(_numbers)
        _notes[self.number] = Note(checked=checked)
        weakref.finalize(self, _notes.pop, self.number, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Ticket":
        return Ticket(_notes[self.number].checked)

    def __reduce__(self) -> tuple[type["Ticket"], tuple[bool]]:
        return Ticket, (_notes[self.number].checked,)


_notes: dict[int, Note] = {}
_numbers = itertools.count()


def note_of(head: nn.Module) -> Note | None:
    """Of a module that has a ticket."""
    ticket = head.__dict__.get("_liger_ticket")
    return None if ticket is None else _notes[ticket.number]
