"""The one tolerance policy, that of `liger_kernel.check`: twice the error of PyTorch in that dtype.

Errors are norm-wise and against fp64, for every output and every gradient. A result scaled by 1.05
fails in every dtype, by test.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from liger_kernel.check import allowed

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HALVES = [torch.float16, torch.bfloat16]
# Triton's interpreter truncates fp32 to bf16 instead of rounding: bf16 kernels are judged on a GPU.
IMPLS = [(impl, dtype) for impl in ("torch", "triton") for dtype in (torch.float32, *HALVES)
         if GPU or (impl, dtype) != ("triton", torch.bfloat16)]  # fmt: skip

Op = Callable[..., Tensor | tuple[Tensor, ...]]


def run(
    op: Op, inputs: Mapping[str, Tensor], dtype: torch.dtype, upstream: Sequence[Tensor] = ()
) -> dict[str, Tensor]:
    """Outputs and gradients of op, on the inputs cast to dtype."""
    leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in inputs.items()}
    out = op(**leaves)
    outs = out if isinstance(out, tuple) else (out,)
    dys = [dy.to(o.dtype) for dy, o in zip(upstream, outs, strict=True)] if upstream else None
    if dys is None:
        return {f"out{i}": o.detach() for i, o in enumerate(outs)}
    grads = torch.autograd.grad(outs, list(leaves.values()), dys)
    named = zip((f"d{n}" for n in leaves), grads, strict=True)
    return {f"out{i}": o.detach() for i, o in enumerate(outs)} | dict(named)


def assert_no_worse_than_torch(
    op: Op, ref: Op, inputs: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """Compare `op` and `ref`, both in dtype, with `ref` in fp64: outputs and gradients."""
    inputs = {name: t.to(dtype) for name, t in inputs.items()}  # what all three start from
    shapes = run(ref, inputs, torch.float64).values()
    upstream = [torch.randn(o.shape, device=o.device).to(dtype) for o in shapes]
    exact = run(ref, inputs, torch.float64, upstream)
    ours, theirs = run(op, inputs, dtype, upstream), run(ref, inputs, dtype, upstream)
    assert_errs_no_more(ours, theirs, exact, dtype)


def assert_errs_no_more(
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> None:
    """The policy for named results, both computed in dtype."""
    assert ours.keys() == theirs.keys() == exact.keys()
    for name, e in exact.items():
        err, theirs_err = (ours[name] - e).norm(), (theirs[name] - e).norm()
        budget = allowed(theirs_err, e.norm(), dtype)
        assert err <= budget, (
            f"{name}: error {err:.2e} > {budget:.2e}; torch's own in {dtype}: {theirs_err:.2e}"
        )
