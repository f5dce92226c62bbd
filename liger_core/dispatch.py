"""Which implementation an op runs, and what its kernels are launched with.

Triton is optional: without it every op takes its torch path, and `triton`, `tl` here are stand-ins
that let kernel definitions be read but not launched.
"""

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
HIP = torch.version.hip is not None
MAX_ROW = 65536  # elements that one program may hold in registers


def use_triton(impl: Impl, x: Tensor, *others: Tensor | None, row: int = 1) -> bool:
    """True if the kernels run, False if the torch path does.

    "auto" is Triton for GPU tensors of fp32, bf16 or fp16 whose `row` (the elements that one
    program must hold) is at most 65,536, and torch for all else. "triton" insists; on a CPU that
    needs TRITON_INTERPRET=1 before the first import.

    Raises:
        ValueError: tensors on different devices, an unknown `impl`, or "triton" where it cannot be.
    """
    device = x.device
    for t in others:
        if t is not None and t.device != device:
            names = ", ".join(str(t.device) for t in (x, *others) if t is not None)
            raise ValueError(f"all tensors must be on one device, got {names}; move them together")
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


_compiled: dict[tuple[Any, ...], Any] = {}  # kernels by all that Triton specialises them on


def launch(
    kernel: Any, grid: tuple[int, int, int], num_warps: int, args: tuple[Any, ...], *constants: Any
) -> None:
    """`kernel[grid](*args, *constants, num_warps=num_warps)` on the device of args[0], a tensor.

    Triton works out anew at every call which compiled variant serves. That takes longer than many
    a kernel runs, and depends on little: dtypes, 16-byte alignment, and which integers are 1,
    multiples of 16 or wide. Here that is looked up, and the variant launched directly.

    Args:
        kernel: a `triton.jit` function whose constexpr parameters come last.
        grid: programs in x, y, z.
        args: its other arguments. constants: its constexpr ones.
    """
    x = args[0]
    # The interpreter; Inductor, which launches itself; AMD, where Triton looks at sizes too.
    if not x.is_cuda or torch.compiler.is_compiling() or HIP:
        kernel[grid](*args, *constants, num_warps=num_warps)
        return
    device = x.get_device()
    if device != torch.cuda.current_device():  # Triton launches on the current one
        with torch.cuda.device(device):
            launch(kernel, grid, num_warps, args, *constants)
        return
    kinds: list[Any] = [id(kernel), device, num_warps, constants]
    for a in args:
        if isinstance(a, Tensor):
            kinds += (a.dtype, a.data_ptr() & 15 == 0)
        elif isinstance(a, int):
            kinds.append(a if a < 2 else (a & 15 == 0, a >> 31 == 0))
        else:
            kinds.append(float)
    key = tuple(kinds)
    if (compiled := _compiled.get(key)) is None:
        _compiled[key] = kernel[grid](*args, *constants, num_warps=num_warps)
        return
    stream = triton.runtime.driver.active.get_current_stream(device)
    compiled.run(
        *grid, stream, compiled.function, compiled.packed_metadata, None, None, None,
        *args, *constants,
    )  # fmt: skip


def block(n: int) -> int:
    """The power of two that holds n."""
    return 1 << (n - 1).bit_length()


def row_warps(BLOCK_N: int) -> int:
    """Warps for a program that holds a row; 16 waves of 64 are all that AMD allows."""
    return min(max(BLOCK_N // 512, 1), 16)


def sm_count(x: Tensor) -> int:
    """Programs that fill the device once; 4 in the interpreter, so that its loops stay short."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for all that is narrower, fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def rounded(y: Tensor, dtype: torch.dtype) -> Tensor:
    """A forward's result in dtype. torch 2.11's Dynamo loses the gradient of a `.to` that does not
    convert, where an autograd.Function returns it.
    """
    return y if y.dtype == dtype else y.to(dtype)


def as_rows(x: Tensor) -> tuple[Tensor, int]:
    """x as kernels walk it: rows of the last dimension, and the elements between them.

    A copy only where there is no such walk. Host time counts: each view costs as much as a kernel.
    """
    if x.is_contiguous():
        return x, x.shape[-1]
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    return rows, rows.stride(0)
