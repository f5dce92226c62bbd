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
BF16_SUMS = 4  # roundings of a bf16 sum that are as exact as torch's one, by test
OWN = (Tensor, torch.nn.Parameter)
HIP = torch.version.hip is not None


def use_triton(impl: Impl, x: Tensor, *others: Tensor | None) -> bool:
    """True if the kernels run, False if the torch path does.

    "auto" is Triton for GPU tensors of fp32, bf16 or fp16, and torch for all else. "triton"
    insists; on a CPU that needs TRITON_INTERPRET=1 before the first import.

    Raises:
        ValueError: x is not floating, tensors on different devices, an unknown `impl`, or "triton"
            where it cannot be.
    """
    if not x.is_floating_point():
        raise ValueError(f"expected a tensor of floating numbers, got {x.dtype}; use .float()")
    device, fits = x.device, x.dtype in TRITON_DTYPES
    for t in others:
        if t is None:
            continue
        fits = fits and t.dtype != torch.float64
        if t.device != device:
            names = ", ".join(str(t.device) for t in (x, *others) if t is not None)
            raise ValueError(f"all tensors must be on one device, got {names}; move them together")
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f"impl must be 'auto', 'triton' or 'torch', got {impl!r}")
    if impl == "triton":
        if not HAS_TRITON:
            raise ValueError("impl='triton' needs the triton package: pip install triton")
        if not (x.is_cuda or triton.knobs.runtime.interpret):
            raise ValueError(
                f"impl='triton' needs a GPU tensor (or TRITON_INTERPRET=1 set before import), "
                f"got one on {x.device}; use impl='auto'"
            )
        if not fits:
            raise ValueError("impl='triton' takes fp32, bf16 and fp16, not fp64; use 'auto'")
        return True
    return impl == "auto" and HAS_TRITON and x.is_cuda and fits


@triton.jit
def fp32(number):
    """A float argument of a kernel in fp32: Inductor would hand it over in fp64."""
    return tl.cast(number, tl.float32)


@triton.jit
def repacked(x, PACK: tl.constexpr):
    """x, which a kernel uses again: as it was loaded, since the compiler would rather keep the fp32
    numbers that it made of 16-bit ones, in twice the registers.
    """
    if PACK and x.dtype.primitive_bitwidth == 16:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], x.dtype, False, 2)
    return x


def can_repack() -> bool:
    """Whether `repacked` does anything: it is PTX."""
    return not HIP and not triton.knobs.runtime.interpret


_compiled: dict[tuple[Any, ...], Any] = {}  # kernels by all that Triton specialises them on


def arrived(a: Any) -> Any:
    """A kernel's argument as it can be read: a tensor that a collective is still to fill, which
    DTensors are made of, waits for it. TypeError for one that holds others in place of memory."""
    if not isinstance(a, Tensor) or type(a) in OWN:
        return a
    if hasattr(a, "trigger_wait"):
        return a.trigger_wait()  # pyright: ignore
    if hasattr(a, "__tensor_flatten__"):
        kind = type(a).__name__
        raise TypeError(f"kernels cannot read a {kind}; give them its local, plain tensor")
    return a


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
    if torch.compiler.is_compiling():  # Inductor launches itself
        kernel[grid](*args, *constants, num_warps=num_warps)
        return
    if not x.is_cuda or HIP:  # the interpreter; Triton looks at sizes too on AMD
        args = tuple(map(arrived, args))
        kernel[grid](*args, *constants, num_warps=num_warps)
        return
    device = x.get_device()
    if device != torch.cuda.current_device():  # Triton launches on the current one
        with torch.cuda.device(device):
            launch(kernel, grid, num_warps, args, *constants)
        return
    kinds: list[Any] = [id(kernel), device, num_warps, constants]
    for a in args:
        kind = type(a)
        if kind is int:
            kinds.append(a if a < 2 else (a & 15 == 0, a >> 31 == 0))
        elif kind is float:
            kinds.append(kind)
        elif isinstance(a, Tensor):
            if kind not in OWN and arrived(a) is not a:
                launch(kernel, grid, num_warps, tuple(map(arrived, args)), *constants)
                return
            kinds += (a.dtype, a.data_ptr() & 15 == 0)
        else:  # a bool, or a number of numpy's
            kinds += (kind, a)
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


def sm_count(x: Tensor) -> int:
    """Programs that fill the device once; 4 in the interpreter, so that its loops stay short."""
    return _properties(x).multi_processor_count if x.is_cuda else 4


def shared_memory(x: Tensor) -> int:
    """Bytes that a multiprocessor can lend to loads ahead; none where Triton does not load so."""
    return 0 if HIP or not x.is_cuda else _properties(x).shared_memory_per_multiprocessor


_devices: dict[int, Any] = {}  # asking torch takes as long as a small kernel runs


def _properties(x: Tensor) -> Any:
    if torch.compiler.is_compiling():
        return torch.cuda.get_device_properties(x.device)
    device = x.get_device()
    if device not in _devices:
        _devices[device] = torch.cuda.get_device_properties(device)
    return _devices[device]


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for all that is narrower, fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def no_autocast(device: str) -> AbstractContextManager[Any]:
    """Ops in the dtypes that they are given; autocast is left alone where it is off, or traced."""
    if torch.compiler.is_compiling() or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def sum_dtype(dtype: torch.dtype, parts: int) -> torch.dtype:
    """In which so many parts of a gradient are summed; fp16 could overflow, however few."""
    return dtype if dtype == torch.bfloat16 and parts <= BF16_SUMS else accumulate_dtype(dtype)


def overwritable(t: Tensor) -> bool:
    """Whether a gradient may take the place of t, as far as autograd can tell."""
    base = t if t._base is None else t._base  # pyright: ignore[reportPrivateUsage]
    return type(t) is Tensor and t.is_contiguous() and not (t.is_leaf or base.is_leaf)


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
