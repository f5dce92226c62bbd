"""Which labels count: read once, early, so that no later step has to wait for the device.

A GEMM cannot take its row count from the device. `LabelScan` starts the copy of that count to the
host when the labels are first seen; by the time a head needs it, it has usually arrived.
"""

import torch
from torch import Tensor

IGNORE_INDEX = -100


def as_labels(y: Tensor) -> Tensor:
    """Labels as contiguous (M,) int64; ValueError if they are not integers."""
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise ValueError(f"labels must be integers, got {y.dtype}; use labels.long()")
    if y.dtype == torch.int64 and y.dim() == 1 and y.is_contiguous():
        return y
    return y.flatten().to(torch.int64).contiguous()


class LabelScan:
    """The number of scored labels in each sequence of `y`, of impossible ones, and the scored rows.

    Args:
        y: integer labels (..., T); row m is element m of `y.flatten()`.
        V: labels must lie in [0, V) or equal `ignore_index`.
        ignore_index: the label that is not scored.

    Raises:
        ValueError: `y` is not an integer tensor; from `rows` and `counts`, a label out of range.
    """

    def __init__(self, y: Tensor, V: int, ignore_index: int = IGNORE_INDEX) -> None:
        self.y, self.V, self.ignore_index = as_labels(y), V, ignore_index
        self.scored = self.y != ignore_index
        bad = self.scored & ((self.y < 0) | (self.y >= V))
        length = y.shape[-1] if y.dim() and y.numel() else 1
        sequences = self.scored.view(-1, length).sum(-1)
        counts = torch.cat((sequences, bad.sum()[None]))
        self._counts = counts.to("cpu", non_blocking=y.is_cuda)  # elsewhere it would be a race
        self._copied = None
        if y.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(y.device))

    def counts(self) -> list[int]:
        """Scored labels of each sequence. Waits for the copy that the constructor started."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None
        *counts, bad = self._counts.tolist()
        if bad:
            where = (self.scored & ((self.y < 0) | (self.y >= self.V))).nonzero()[0, 0]
            raise ValueError(
                f"labels must lie in [0, {self.V}) or be ignore_index={self.ignore_index}, "
                f"got {int(self.y[where])} at position {int(where)} ({bad} such labels); "
                f"check that the tokenizer and the head have one vocabulary"
            )
        return counts

    def count(self) -> int:
        """How many labels are scored."""
        return sum(self.counts())

    def rows(self) -> Tensor | None:
        """(n,) int64 rows of the scored labels in order; None where all are scored."""
        n = self.count()
        return None if n == self.y.numel() else torch.nonzero_static(self.scored, size=n)[:, 0]
