"""Which implementation an op runs, and what its kernels are launched with.

Triton is optional: without it every op takes its torch path, and `triton`, `tl` here are stand-ins
that let kernel definitions be read but not launched.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:  # triton's own types know nothing of launch options
    import triton.language as tl

    triton: Any = ...
else:
    try:
        import triton
        import triton.language as tl
    except ImportError:

        class _NoTriton:
            """Takes any attribute and decorates any function; kernels stay plain functions."""

            def __getattr__(self, name: str) -> "_NoTriton":
                return self

            def __call__(self, fn: Any, *_: Any, **__: Any) -> Any:
                return fn

        triton = tl = _NoTriton()

HAS_TRITON = isinstance(triton, type(torch))

Impl = Literal["auto", "triton", "torch"]
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_ROW = 65536  # elements that one program may hold in registers


def use_triton(impl: Impl, x: Tensor, *others: Tensor | None, row: int = 1) -> bool:
    """True if the kernels run, False if the torch path does.

    "auto" is Triton for GPU tensors of fp32, bf16 or fp16 whose `row` (the elements that one
    program must hold) is at most 65,536, and torch for all else. "triton" insists; on a CPU that
    needs TRITON_INTERPRET=1 before the first import.

    Raises:
        ValueError: tensors on different devices, an unknown `impl`, or "triton" where it cannot be.
    """
    if any(t is not None and t.device != x.device for t in others):
        devices = ", ".join(str(t.device) for t in (x, *others) if t is not None)
        raise ValueError(f"all tensors must be on one device, got {devices}; move them together")
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f"impl must be 'auto', 'triton' or 'torch', got {impl!r}")
    fits = x.dtype in TRITON_DTYPES and row <= MAX_ROW
    if impl == "triton":
        if not HAS_TRITON:
            raise ValueError("impl='triton' needs the triton package: pip install triton")
        if not (x.is_cuda or triton.knobs.runtime.interpret):
            raise ValueError(
                f"impl='triton' needs a GPU tensor (or TRITON_INTERPRET=1 set before import), "
                f"got one on {x.device}; use impl='auto'"
            )
        if not fits:
            raise ValueError(
                f"impl='triton' takes fp32, bf16 or fp16 and rows of at most {MAX_ROW} elements, "
                f"got {x.dtype} and {row}; use impl='auto'"
            )
        return True
    return impl == "auto" and HAS_TRITON and x.is_cuda and fits


@triton.jit
def fp32(number):
    """A float argument of a kernel in fp32: Inductor would hand it over in fp64."""
    return tl.cast(number, tl.float32)


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make that the tensor's own.

    A compiled graph guards its device itself, and cannot trace this.
    """
    if not x.is_cuda or torch.compiler.is_compiling():
        return nullcontext()
    return torch.cuda.device(x.device)


def row_launch(N: int) -> tuple[int, int]:
    """(BLOCK_N, num_warps) for a program that holds one row of N elements."""
    BLOCK_N = triton.next_power_of_2(N)
    return BLOCK_N, min(max(BLOCK_N // 512, 1), 16)  # 16 waves of 64 are all that AMD allows


def sm_count(x: Tensor) -> int:
    """Programs that fill the device once; 4 in the interpreter, so that its loops stay short."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for all that is narrower, fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def as_rows(x: Tensor) -> Tensor:
    """(..., N) as (M, N) with unit stride in N; a view where it can be."""
    x = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()
