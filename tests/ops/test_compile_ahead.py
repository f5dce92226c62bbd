"""Every kernel, as its op launches it, compiles for every GPU that is named, without that GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from numerics import GPU

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}

# Ops run on CPU tensors with launches recorded instead of made; the dispatch believes itself in
# the interpreter, while the kernels, defined before, are real ones.
RECORD_AND_COMPILE = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
import cases
from liger_core.ops import row_norm, scaled
from liger_core.ops.row_loss import NOTHING, RowLoss, Want, row_grad, row_loss

target = GPUTarget(*eval(sys.argv[1]))
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
         torch.int64: "*i64", torch.int32: "*i32"}
launches = {}

def record(kernel, *args, grid, warmup, num_warps, **constants):
    names = [p.name for p in kernel.params]
    values = dict(zip(names, args)) | constants
    fixed = {p.name for p in kernel.params if p.is_constexpr}
    types = {n: "constexpr" if n in fixed else TYPES[v.dtype] if isinstance(v, torch.Tensor)
             else "i32" if isinstance(v, int) else "fp32" for n, v in values.items()}
    constexprs = {n: v for n, v in values.items() if n in fixed}
    key = kernel.__name__, tuple(types.items()), tuple(constexprs.items()), num_warps
    launches[key] = kernel, {n: types[n] for n in names}, constexprs, num_warps

JITFunction.run = record
triton.knobs.runtime.interpret = True
if target.backend == "cuda":  # as on a GPU
    row_norm.can_repack, row_norm.shared_memory = lambda: True, lambda x: 1 << 20
more = "16424", "-all-", "token_scaling-mean-c", "class-mean", "class+z_loss-mean-c"
for case in cases.BRIEF + [c for c in cases.CASES if any(m in c.name for m in more)]:
    inputs = {n: t.bfloat16().requires_grad_() for n, t in case.make().items()}
    out = case.op(**inputs, impl="triton")
    outs = out if isinstance(out, tuple) else (out,)
    torch.autograd.backward(outs, [torch.ones_like(o) for o in outs])
z, y, g = torch.empty(3, 40, dtype=torch.bfloat16), torch.empty(3, dtype=torch.int64), torch.ones(3)
for o, want in ((RowLoss(), NOTHING), (RowLoss(softcap=0.7), Want(*[True] * 4))):
    rows = row_loss(z, y, o, cols=(40, 99), want=want, kernels=True)  # of a head that is split
    dh = g if want.entropy else None
    row_grad(z, y, o, rows, cols=(40, 99), g=g, dh=dh, dz=z, kernels=True)
t, s = torch.empty(8, dtype=torch.bfloat16), torch.empty(())  # launched on GPU tensors only
scaled._scale_kernel[(1, 1, 1)](t, s, 1, 0, 8, 16, 4096, num_warps=4)
for kernel, types, constants, num_warps in launches.values():
    compiled = triton.compile(ASTSource(kernel, types, constants), target=target,
                              options={"num_warps": num_warps})
    assert compiled.asm["cubin" if target.backend == "cuda" else "hsaco"]
print(*sorted({key[0] for key in launches}))
rows = [key for key in launches if key[0] == "_row_loss_kernel"]
print(*sorted({name for key in rows for name, on in key[2] if on is True}))
"""

KERNELS = {
    "_glu_bwd_kernel", "_glu_fwd_kernel", "_norm_bwd_kernel", "_norm_fwd_kernel",
    "_norm_sum_kernel", "_rope_kernel", "_row_loss_kernel", "_scale_kernel", "_share_kernel",
}  # fmt: skip
SWITCHES = {
    "ENTROPY", "HAS_C", "HAS_DH", "HAS_G", "HAS_LSE", "HAS_SMOOTHING", "HAS_SOFTCAP", "MEAN",
    "NEED_DZ", "PARTIAL", "SQ", "TOKEN_SCALING", "TOP",
}  # fmt: skip


@pytest.mark.skipif(GPU, reason="the kernels run")
@pytest.mark.parametrize("name", TARGETS)
def test_every_kernel_compiles(name: str) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", RECORD_AND_COMPILE, repr(TARGETS[name])],
        env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    kernels, switches = done.stdout.splitlines()
    assert set(kernels.split()) == KERNELS
    assert set(switches.split()) == SWITCHES, "a variant of the row kernel that no case launches"


def test_the_list_of_kernels_is_whole() -> None:
    """A kernel that no case launches would not be compiled."""
    ops = Path(__file__).parents[2] / "liger_core" / "ops"
    source = "".join(path.read_text() for path in ops.glob("*.py"))
    defined = {line.split("(")[0][4:] for line in source.splitlines() if line.startswith("def _")}
    assert {name for name in defined if name.endswith("_kernel")} == KERNELS
