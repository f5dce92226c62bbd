"""Labels and logits that trip up losses, and the memory that they were made to save."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from cases import assert_stats, labels
from liger_core import (
    LabelScan,
    cross_entropy,
    linear_cross_entropy,
    linear_cross_entropy_stats,
    linear_logprob,
)
from liger_core.ops.linear_head import chunk_count, chunk_rows
from liger_kernel.check import allowed
from numerics import DEVICE, GPU

both = pytest.mark.parametrize("impl", ["torch", "triton"])
M, H, V = 9, 16, 37


def operands() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x, w = torch.randn(M, H, device=DEVICE), torch.randn(V, H, device=DEVICE)
    return x.requires_grad_(), w.requires_grad_()


@pytest.mark.parametrize("bad", [V, -1, 2**31, -101])
@both
def test_a_label_out_of_range_is_named(bad: int, impl: str) -> None:
    x, w = operands()
    y = labels(M, V)
    y[4] = bad
    for loss in (linear_cross_entropy, linear_logprob):
        with pytest.raises(ValueError, match=rf"in \[0, 37\).*got {bad} at position 4"):
            loss(x, w, y, impl=impl)  # pyright: ignore
    if not GPU:
        with pytest.raises(ValueError, match=rf"got {bad} at position 4"):
            cross_entropy(x @ w.T, y, impl=impl)  # pyright: ignore


@pytest.mark.parametrize("bad", [V, -1, 2**31])
@both
def test_unchecked_it_costs_its_own_row_a_nan(bad: int, impl: str) -> None:
    x, w = operands()
    y = labels(M, V)
    y[4] = bad
    rows = linear_cross_entropy(x, w, y, reduction="none", compact=False, impl=impl)  # pyright: ignore
    rows.sum().backward()
    assert x.grad is not None
    nan_rows = torch.arange(M, device=DEVICE) == 4
    assert torch.equal(rows.isnan(), nan_rows)
    assert torch.equal(x.grad.isnan().any(-1), nan_rows)


@both
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, M])
def test_nothing_to_learn_from(rows: int, reduction: str, impl: str) -> None:
    """All labels ignored, or no rows at all: 0 and not NaN, in the loss and in the gradients."""
    x, w = operands()
    y = torch.full((rows,), -100, device=DEVICE)
    z = (x[:rows] @ w.T).detach().requires_grad_()
    kw = dict(reduction=reduction, impl=impl)
    linear = linear_cross_entropy(x[:rows], w, y, **kw)  # pyright: ignore
    for loss in (linear, cross_entropy(z, y, **kw)):  # pyright: ignore
        assert loss.shape == (y.shape if reduction == "none" else ()) and not loss.any()
        loss.sum().backward()
    for grad in (x.grad, w.grad, z.grad):
        assert grad is not None and not grad.any()


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("named", ["weights", "class_weight", "all weights 0"])
def test_nothing_to_learn_from_with_weights(
    named: str, reduction: str, dtype: torch.dtype, impl: str
) -> None:
    x, w = (t.detach().to(dtype).requires_grad_() for t in operands())
    ignored = named != "all weights 0"
    y = torch.full((M,), -100, device=DEVICE) if ignored else labels(M, V)
    weights, c = torch.full((M,), float(ignored), device=DEVICE), torch.ones(V, device=DEVICE)
    kw = dict(class_weight=c) if named == "class_weight" else dict(weights=weights)
    loss = linear_cross_entropy(x, w, y, reduction=reduction, impl=impl, **kw)  # pyright: ignore
    loss.sum().backward()
    assert all(not t.any() for t in (loss, x.grad, w.grad) if t is not None)


@both
@pytest.mark.parametrize("size", [1e-6, 1e6])
@pytest.mark.parametrize(
    "reduction, named",
    [
        *itertools.product(
            ["mean", "sum"], ["weights", "class_weight", "both", "class_weight+z_loss"]
        ),
        *itertools.product(["none"], ["weights", "class_weight", "both"]),
    ],
)
def test_fp16_takes_weights_of_any_size(reduction: str, named: str, size: float, impl: str) -> None:
    x, w = (t.detach().half().requires_grad_() for t in operands())
    y, each = labels(M, V), torch.linspace(1, 3, M, device=DEVICE)
    c = torch.linspace(3, 1, V, device=DEVICE)
    kw: dict = dict(weights=size * each, class_weight=size * c)
    kw = {n: t for n, t in kw.items() if n in named or named == "both"}
    kw |= dict(z_loss=0.1 if "z_loss" in named else 0.0, reduction=reduction)
    loss = linear_cross_entropy(x, w, y, impl=impl, **kw).sum()  # pyright: ignore
    ours = [loss, *torch.autograd.grad(loss / loss.detach(), (x, w))]
    exact = [t.detach().double().requires_grad_() for t in (x, w)]
    kw = {n: t.double() if isinstance(t, Tensor) else t for n, t in kw.items()}
    want = linear_cross_entropy(*exact, y, **kw).sum()
    for got, e in zip(ours, (want, *torch.autograd.grad(want / want.detach(), exact)), strict=True):
        assert (got - e).norm() <= allowed(0.0, e.norm(), torch.float16)


@both
@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [True, False])
def test_what_the_same_pass_tells(weighted: bool, reduction: str, compact: bool, impl: str) -> None:
    x, w = operands()
    z, y = x @ w.T, labels(M, V)
    y = torch.where((torch.arange(M, device=DEVICE) % 2 == 0) & (y != -100), z.argmax(-1), y)
    each = torch.linspace(0.5, 2, M, device=DEVICE) if weighted else torch.ones(M, device=DEVICE)
    kw = dict(z_loss=0.1, reduction=reduction, weights=each if weighted else None, impl=impl)
    got = linear_cross_entropy_stats(x, w, y, compact=compact, **kw)  # pyright: ignore
    scored = y != -100
    z_rows = 0.1 * z.logsumexp(-1).square() * scored * each
    total = each[scored].sum() if reduction == "mean" else 1.0
    torch.testing.assert_close(got.loss, linear_cross_entropy(x, w, y, **kw))  # pyright: ignore
    assert_stats(got, z, y, z_rows if reduction == "none" else z_rows.sum() / total)


@both
@pytest.mark.parametrize("ignore_index", [-100, 0, V - 1, -1])
def test_every_ignore_index(ignore_index: int, impl: str) -> None:
    x, w = operands()
    y = torch.arange(M, device=DEVICE) * 5 % V
    y[::3] = ignore_index
    want = F.cross_entropy(x @ w.T, y, ignore_index=ignore_index)
    kw = dict(ignore_index=ignore_index, impl=impl)
    torch.testing.assert_close(linear_cross_entropy(x, w, y, **kw), want)  # pyright: ignore
    torch.testing.assert_close(cross_entropy(x @ w.T, y, **kw), want)  # pyright: ignore


@both
def test_the_caller_may_go_on_using_the_logits(impl: str) -> None:
    x, w = operands()
    y = labels(M, V)
    z = x @ w.T
    (cross_entropy(z, y, impl=impl) + z.square().mean()).backward()  # pyright: ignore
    got = x.grad
    x.grad = None
    z = x @ w.T
    (F.cross_entropy(z, y) + z.square().mean()).backward()
    torch.testing.assert_close(got, x.grad)


@both
@pytest.mark.parametrize(
    "name",
    ["first block -inf", "all but one -inf", "1e4", "-1e4", "all equal", "sure", "one NaN"],
)
@pytest.mark.parametrize("reduction", ["none", "mean"])  # gradients of backward and of forward
def test_extreme_logits(reduction: str, name: str, impl: str) -> None:
    torch.manual_seed(0)
    wide = 9000  # more than two blocks of the kernel
    z = torch.randn(4, wide, device=DEVICE)
    y = torch.tensor([8999, 8998, 5000, 8000], device=DEVICE)
    if name == "first block -inf":
        z[:, :4500] = -torch.inf
    elif name == "all but one -inf":
        z = torch.full_like(z, -torch.inf).scatter_(1, y[:, None], 3.0)
    elif name in ("1e4", "-1e4"):
        z += float(name)
    elif name == "all equal":
        z.fill_(7.0)
    elif name == "sure":
        z.scatter_(1, y[:, None], 16.0)
    else:
        z[1, 17] = torch.nan
    z.requires_grad_()
    got = cross_entropy(z, y, reduction=reduction, impl=impl)  # pyright: ignore
    (dz,) = torch.autograd.grad(got.sum(), z)
    exact = z.detach().double().requires_grad_()
    want = F.cross_entropy(exact, y, reduction=reduction)
    (dz_exact,) = torch.autograd.grad(want.sum(), exact)
    torch.testing.assert_close(got.double(), want, equal_nan=True, rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(dz.double(), dz_exact, equal_nan=True, rtol=2e-3, atol=1e-6)


@both
def test_the_loss_does_not_depend_on_the_budget_or_on_the_order(impl: str) -> None:
    x, w = operands()
    y = labels(M, V)
    want = linear_cross_entropy(x, w, y, impl=impl)  # pyright: ignore
    for budget in (1, 5 * V * 4, 1 << 30):
        got = linear_cross_entropy(x, w, y, memory_budget=budget, impl=impl)  # pyright: ignore
        torch.testing.assert_close(got, want)
    flip = linear_cross_entropy(x.flip(0), w, y.flip(0), impl=impl)  # pyright: ignore
    torch.testing.assert_close(flip, want)


@both
def test_a_row_loss_may_be_written_to(impl: str) -> None:
    x, w = operands()
    y, mask = labels(M, V), torch.arange(M, device=DEVICE) % 2
    rows = linear_cross_entropy(x, w, y, reduction="none", impl=impl)  # pyright: ignore
    got = torch.autograd.grad(rows.mul_(mask).sum(), w)
    want = torch.autograd.grad((F.cross_entropy(x @ w.T, y, reduction="none") * mask).sum(), w)
    torch.testing.assert_close(got, want)


@both
def test_a_total_divides_the_sum(impl: str) -> None:
    x, w = operands()
    y = labels(M, V)
    total = torch.tensor(13.5, device=DEVICE)
    got = linear_cross_entropy(x, w, y, total=total, impl=impl)  # pyright: ignore
    want = F.cross_entropy(x @ w.T, y, reduction="sum") / 13.5
    torch.testing.assert_close(got, want)
    got_dw, want_dw = (torch.autograd.grad(loss.square(), w)[0] for loss in (got, want))
    torch.testing.assert_close(got_dw, want_dw)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # past the end
@both
def test_a_bad_upstream_row_stays_its_own(impl: str) -> None:
    x, w = operands()
    g = torch.ones(M, device=DEVICE)
    g[2], g[3] = torch.nan, torch.inf
    linear_logprob(x, w, torch.arange(M, device=DEVICE), impl=impl).backward(g)  # pyright: ignore
    assert x.grad is not None
    assert x.grad.isfinite().all(-1).tolist() == [i not in (2, 3) for i in range(M)]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
@both
def test_every_integer_dtype_of_labels(dtype: torch.dtype, impl: str) -> None:
    x, w = operands()
    y = torch.arange(M, device=DEVICE)
    for loss in (linear_cross_entropy(x, w, y.to(dtype), impl=impl),  # pyright: ignore
                 cross_entropy(x @ w.T, y.to(dtype), impl=impl)):  # fmt: skip # pyright: ignore
        torch.testing.assert_close(loss, F.cross_entropy(x @ w.T, y))


@both
def test_leading_dimensions_and_an_earlier_scan(impl: str) -> None:
    x, w = operands()
    y = labels(M, V).view(3, 3)
    scan = LabelScan(y, V)
    got = linear_logprob(x.view(3, 3, H), w, y, labels=scan, impl=impl)  # pyright: ignore
    assert got.shape == (3, 3) and scan.count() == int((y != -100).sum())
    want = -F.cross_entropy(x @ w.T, y.flatten(), reduction="none").view(3, 3)
    torch.testing.assert_close(got, want)


def test_a_scan_counts_by_sequence() -> None:
    y = torch.full((4, 5), -100, device=DEVICE)
    y[0], y[1, 2], y[3, :2] = 3, 0, 6
    scan = LabelScan(y, 7)
    assert scan.counts() == [5, 1, 0, 2] and scan.count() == 8
    rows = scan.rows()
    assert rows is not None and rows.tolist() == [0, 1, 2, 3, 4, 7, 15, 16]
    assert LabelScan(y[0], 7).counts() == [5] and LabelScan(y[:0], 7).counts() == []
    assert LabelScan(y[0], 7).rows() is None
    y[3, 4] = 7
    with pytest.raises(ValueError, match=r"in \[0, 7\).*got 7 at position 19 \(1 such labels\)"):
        LabelScan(y, 7).counts()


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.parametrize("op", [linear_cross_entropy, linear_logprob], ids=lambda op: op.__name__)
def test_compiles_once_for_all_lengths(op: Callable[..., Tensor]) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor" if GPU else "aot_eager")
    compiled = torch.compile(op, fullgraph=True, backend=counter)
    _, w = operands()
    for length in range(20, 40):
        x, y = torch.randn(length, H, device=DEVICE, requires_grad=True), labels(length, V)
        got, want = compiled(x, w, y), op(x, w, y)
        torch.testing.assert_close(got, want)
        for a, b in zip(*(torch.autograd.grad(o.sum(), (x, w)) for o in (got, want)), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 3


def test_no_gradient_is_computed_under_no_grad() -> None:
    x, w = operands()
    with torch.no_grad():
        loss = linear_cross_entropy(x, w, labels(M, V))
    assert not loss.requires_grad


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_errs_no_more_than_torch(dtype: torch.dtype, compiled: bool) -> None:
    """fp32 master weights under autocast: products in half precision, gradients in fp32."""
    op = linear_cross_entropy
    if compiled:
        op = torch.compile(op, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "eager")
    x, w = operands()
    y = labels(M, V)
    exact = torch.autograd.grad(F.cross_entropy((x.double() @ w.double().T), y), (x, w))
    with torch.autocast(DEVICE, dtype):
        ours = torch.autograd.grad(op(x, w, y, memory_budget=4 * V), (x, w))
        theirs = torch.autograd.grad(F.cross_entropy(F.linear(x, w).float(), y), (x, w))
    for o, t, e in zip(ours, theirs, exact, strict=True):
        assert o.dtype == torch.float32
        assert (o - e).norm() <= 2 * (t - e).norm() + 2 * torch.finfo(dtype).eps * e.norm()


@pytest.mark.parametrize(
    "kw, match",
    [
        (dict(x=torch.randn(3, 5)), r"w must be \(V, 5\)"),
        (dict(w=torch.randn(7, 4).double()), "must have one dtype.*float64"),
        (dict(y=torch.zeros(2, dtype=torch.long)), r"labels must have shape \(3,\).*got \(2,\)"),
        (dict(y=torch.zeros(3)), "labels must be integers, got torch.float32"),
        (dict(b=torch.zeros(3)), r"b must be \(7,\)"),
        (dict(y=torch.zeros(3, dtype=torch.long, device="meta")), "labels must be on x's device"),
        (dict(w=torch.randn(7, 4, device="meta")), "one device, got cpu, meta"),
        (dict(softcap=0.0), "softcap must be positive"),
        (dict(scale=0.0), "scale must be positive"),
        (dict(label_smoothing=1.5), r"label_smoothing must lie in \[0, 1\]"),
        (dict(reduction="avg"), "reduction must be"),
        (dict(impl="cuda"), "impl must be"),
        (dict(reduction="none", total=torch.ones(())), "total divides the sum"),
        (dict(total=torch.ones(1)), r"total must be 0-d.*got \(1,\)"),
        (dict(labels=LabelScan(torch.zeros(2, dtype=torch.long), 7)), "got one of 2 labels"),
        (dict(labels=LabelScan(torch.zeros(3, dtype=torch.long), 9)), "V=7.*V=9"),
        (dict(weights=torch.ones(2)), r"weights must have y's shape \(3,\)"),
        (dict(weights=torch.ones(3, requires_grad=True)), "requires_grad=True; detach"),
        (dict(class_weight=torch.ones(3)), r"class_weight must be \(7,\)"),
        (dict(token_scaling=True, z_loss=0.1), "leave label_smoothing and z_loss out"),
        (dict(token_scaling=True, class_weight=torch.ones(7)), "leave class_weight out"),
        (dict(temperature=-1.0), "temperature must be positive"),
        (dict(low_rank=(torch.ones(3, 2), torch.ones(7, 3))), "low_rank must be u"),
    ],
)
def test_what_does_not_fit_is_said(kw: dict, match: str) -> None:
    fitting = dict(x=torch.randn(3, 4), w=torch.randn(7, 4), y=torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=match):
        linear_cross_entropy(**fitting | kw)


@pytest.mark.parametrize(
    "n, V, budget",
    [(1, 50257, None), (16384, 128256, None), (300, 7, 1), (1000, 1000, 10**6), (520, 99, 40000)],
)
def test_chunks_fit_the_budget(n: int, V: int, budget: int | None) -> None:
    chunks = chunk_count(n, V, 2, budget)
    rows = chunk_rows(n, chunks)
    assert rows >= 1 and (rows == 1 or rows * V * 2 <= (budget or max(32 << 20, n * V // 2)))
    assert (chunks - 1) * rows < n <= chunks * rows, "a chunk is empty, or one is missing"


@pytest.mark.parametrize("n", [2048, 5000, 8000, 8191, 8193, 12001])
@pytest.mark.parametrize("share", [3, 4, 8])
def test_by_default_there_are_as_many_chunks_as_meant(n: int, share: int) -> None:
    """One chunk more than four would sum dw in fp32, which takes twice the memory."""
    chunks = chunk_count(n, 128256, 2, None, share)
    assert chunks == share and chunk_rows(n, chunks) < n / share + 128


@pytest.mark.skipif(GPU, reason="the allocator's own figures: see benchmarks/NOTES.md")
def test_full_logits_are_never_held() -> None:
    from liger_kernel.measure import PeakMemory

    tokens, hidden, vocabulary = 4096, 32, 16384
    x, w = torch.randn(tokens, hidden, requires_grad=True), torch.randn(vocabulary, hidden)
    y = torch.randint(vocabulary, (tokens,))
    w.requires_grad_()
    with PeakMemory() as peak:
        linear_cross_entropy(x, w, y).backward()
    logits = tokens * vocabulary * 4
    gradients = (x.numel() + w.numel()) * 4
    assert (
        peak.bytes <= 0.55 * logits + gradients
    )  # a quarter, and a quarter that torch computes in
    with PeakMemory() as peak:
        linear_logprob(x, w, y, memory_budget=logits // 16).sum().backward()
    assert peak.bytes <= 0.15 * logits + 2 * gradients
