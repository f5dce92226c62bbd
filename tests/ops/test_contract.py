"""What every op promises whatever its options: purity, layouts, gradients, compilation."""

import itertools

import pytest
import torch
from torch import Tensor

import liger_core
from cases import BRIEF, CASES, Case
from numerics import DEVICE, GPU

both = pytest.mark.parametrize("impl", ["torch", "triton"])
brief = pytest.mark.parametrize("case", BRIEF, ids=repr)


def outputs(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def grads_of(case: Case, inputs: dict[str, Tensor], impl: str, dy: list[Tensor] | None = None):
    leaves = {n: t.detach().requires_grad_() for n, t in inputs.items()}
    out = outputs(case.op(**leaves, impl=impl))
    dy = [torch.ones_like(o) for o in out] if dy is None else dy
    return torch.autograd.grad(out, list(leaves.values()), dy)


@both
@brief
def test_callers_tensors_are_left_alone(case: Case, impl: str) -> None:
    inputs = {n: t.requires_grad_() for n, t in case.make().items()}
    out = outputs(case.op(**inputs, impl=impl))
    dy = [torch.randn_like(o) for o in out]
    everything = [*inputs.values(), *out, *dy]
    before = [t.detach().clone() for t in everything]
    torch.autograd.backward(out, dy)
    assert all(torch.equal(t, b) for t, b in zip(everything, before, strict=True))


@both
@brief
def test_a_second_backward_gives_the_same(case: Case, impl: str) -> None:
    named = {n: t.requires_grad_() for n, t in case.make().items()}
    inputs, out = list(named.values()), outputs(case.op(**named, impl=impl))
    dy = [torch.randn_like(o) for o in out]
    first = torch.autograd.grad(out, inputs, dy, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(out, inputs, dy)
    assert all(torch.equal(a, b) for a, b in zip(kept, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(kept, first, strict=True))


@both
@brief
def test_every_subset_of_gradients(case: Case, impl: str) -> None:
    inputs = case.make()
    want = dict(zip(inputs, grads_of(case, inputs, impl), strict=True))
    for wanted in itertools.product([True, False], repeat=len(inputs)):
        asked = {
            n: t.detach().requires_grad_(on)
            for (n, t), on in zip(inputs.items(), wanted, strict=True)
        }
        out = outputs(case.op(**asked, impl=impl))
        assert all(o.requires_grad == any(wanted) for o in out)
        if any(wanted):
            torch.autograd.backward(out, [torch.ones_like(o) for o in out])
        # Where the loss comes later, a frozen head makes dx in forward, for an upstream gradient of
        # 1, and scales it in backward: no longer bitwise the same.
        later = not case.name.startswith("linear_cross_entropy-plain-sum") and "linear" in case.name
        scaled = later and [n for n, t in asked.items() if t.requires_grad] == ["x"]
        for name, t in asked.items():
            assert (t.grad is not None) == t.requires_grad
            if t.grad is not None and scaled:
                torch.testing.assert_close(t.grad, want[name])
            elif t.grad is not None:
                assert torch.equal(t.grad, want[name])


@both
@brief
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_layouts(case: Case, impl: str, layout: str) -> None:
    def laid_out(t: Tensor) -> Tensor:
        if layout == "transposed":
            return t.transpose(0, -1).contiguous().transpose(0, -1)
        if layout == "sliced":
            return torch.stack((t, -t), -1).flatten(-2)[..., ::2]
        return t[:1].expand(t.shape)

    strange = {n: laid_out(t) for n, t in case.make().items()}
    plain = {n: t.contiguous() for n, t in strange.items()}
    dy = [torch.randn_like(o) for o in outputs(case.op(**plain, impl=impl))]
    for got, want in zip(
        [*outputs(case.op(**strange, impl=impl)), *grads_of(case, strange, impl, dy)],
        [*outputs(case.op(**plain, impl=impl)), *grads_of(case, plain, impl, dy)],
        strict=True,
    ):
        # products may sum in another order
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@both
@brief
def test_upstream_gradients_with_strange_strides(case: Case, impl: str) -> None:
    inputs = case.make()
    out = outputs(case.op(**inputs, impl=impl))
    flat = [o.new_tensor(0.5).expand(o.shape) for o in out]
    parts = [torch.randn(*o.shape, 3, device=o.device).flatten(-2) if o.dim() else o for o in out]
    rows = [t[..., 1 : 1 + o.shape[-1]] if o.dim() else t for t, o in zip(parts, out, strict=True)]
    for dys in (flat, rows):
        got = grads_of(case, inputs, impl, dys)
        want = grads_of(case, inputs, impl, [dy.contiguous() for dy in dys])
        torch.testing.assert_close(got, want)  # torch sums in another order


@both
@brief
def test_a_second_derivative_is_refused(case: Case, impl: str) -> None:
    named = {n: t.requires_grad_() for n, t in case.make().items()}
    inputs, out = list(named.values()), outputs(case.op(**named, impl=impl))
    dy = [torch.ones_like(o).requires_grad_() for o in out]
    first = torch.autograd.grad(out, inputs, dy, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first[0].square().sum().backward()


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@brief
def test_compiles_whole(case: Case) -> None:
    """On a CPU the torch path with no backend; on a GPU the kernels through Inductor."""
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda **t: case.op(**t), fullgraph=True, backend="inductor" if GPU else "aot_eager"
    )
    inputs = {n: t.requires_grad_() for n, t in case.make().items()}
    out, want = outputs(compiled(**inputs)), outputs(case.op(**inputs))
    torch.testing.assert_close(out, want)
    dy = [torch.randn_like(o) for o in out]
    got_grads = torch.autograd.grad(out, list(inputs.values()), dy)
    torch.testing.assert_close(got_grads, torch.autograd.grad(want, list(inputs.values()), dy))


@both
@pytest.mark.parametrize(
    "name", ["rms_norm", "add_rms_norm", "layer_norm", "rope", "glu", "glu_packed"]
)
def test_empty_batches(name: str, impl: str) -> None:
    case = next(c for c in CASES if c.name.startswith(name) and "1x1" not in c.name)
    keep = ("w", "b")
    inputs = {n: t if n in keep else t[:0] for n, t in case.make().items()}
    for grad, t in zip(grads_of(case, inputs, impl), inputs.values(), strict=True):
        assert grad.shape == t.shape and not grad.any()


@both
@brief
def test_integers_are_refused(case: Case, impl: str) -> None:
    if case.name.startswith("tiled"):
        pytest.skip("what fn takes is its own affair")
    with pytest.raises(ValueError, match=r"floating numbers, got torch\.int64"):
        case.op(**{n: t.long() for n, t in case.make().items()}, impl=impl)


@both
@pytest.mark.parametrize("op", [liger_core.rms_norm, liger_core.layer_norm, liger_core.glu])
def test_a_tensor_without_dimensions_is_refused(op, impl: str) -> None:
    x = torch.ones((), device=DEVICE)
    with pytest.raises(ValueError, match="must be"):
        op(x, impl=impl) if op is not liger_core.glu else op(x, x, impl=impl)


@pytest.mark.gpu
@pytest.mark.parametrize("case", BRIEF, ids=repr)
def test_backward_is_deterministic(case: Case) -> None:
    inputs = {n: t.repeat_interleave(64, 0) if n in "xr" else t for n, t in case.make().items()}
    inputs = inputs if "linear" not in case.name else case.make()
    first = grads_of(case, inputs, "triton")
    for _ in range(250):
        assert all(
            torch.equal(a, b) for a, b in zip(first, grads_of(case, inputs, "triton"), strict=True)
        )


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements() -> None:
    """Forward and backward of the last rows; one op after the other, for there is one memory."""
    M, N = 2**19 + 3, 4096
    x = torch.empty(M, N, device=DEVICE, dtype=torch.bfloat16).normal_().requires_grad_()
    y, w = torch.arange(M, device=DEVICE) % N, torch.ones(N, device=DEVICE, dtype=x.dtype)

    def run(op: str, x: Tensor) -> tuple[Tensor, ...]:
        if op == "cross_entropy":
            return (liger_core.cross_entropy(x, y[-len(x) :], reduction="sum"),)
        more = (w.to(x.dtype),) if "norm" in op else () if op == "glu_packed" else (x,)
        more = (x, *more) if op == "add_rms_norm" else more
        return outputs(getattr(liger_core, op)(x, *more))

    for op in ("rms_norm", "add_rms_norm", "layer_norm", "glu", "glu_packed", "cross_entropy"):
        results = []
        for part in (x, x[-3:].detach().float().requires_grad_()):
            out = run(op, part)
            (dx,) = torch.autograd.grad(out, part, [torch.ones_like(o) for o in out])
            last = [o.detach()[-3:].float() for o in out if o.dim()]
            results.append([*last, dx[-3:].float()])
            del out, dx
        torch.testing.assert_close(
            *results, rtol=3e-2, atol=3e-2, msg=lambda text, op=op: f"{op}: {text}"
        )


@pytest.mark.gpu
def test_a_launch_that_is_looked_up_fits_its_arguments() -> None:
    """Aligned or not, widths that are multiples of 16 or not, in every order, are kept apart."""
    from liger_core import glu
    from liger_core.ops.glu import glu_ref

    storage = torch.randn(3, 4096, device=DEVICE)
    for offset, N in itertools.product((0, 1, 4, 0), (48, 33, 1, 48)):
        g, u = (storage[i, offset : offset + 4 * N].view(4, N) for i in (0, 1))
        torch.testing.assert_close(glu(g, u), glu_ref(g, u))
