"""Cross entropy of given logits: when its gradient is taken, where it goes, what else it tells."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cases import assert_stats, labels
from liger_core import cross_entropy, cross_entropy_stats
from liger_core.ops import cross_entropy as module
from liger_core.ops.row_loss import RowLoss, row_loss_ref
from numerics import DEVICE, GPU, IMPLS

both = pytest.mark.parametrize("impl", ["torch", "triton"])
implementations = pytest.mark.parametrize("impl, dtype", IMPLS, ids=str)
M, V = 7, 37
WEIGHT = torch.linspace(3.0, 0.2, V, device=DEVICE)
REDUCTIONS: list[dict[str, Any]] = [
    dict(reduction="mean"), dict(reduction="sum"), dict(reduction="none"),
    dict(class_weight=WEIGHT, label_smoothing=0.2), dict(total=torch.tensor(13.5, device=DEVICE)),
]  # fmt: skip
reductions = pytest.mark.parametrize("kw", REDUCTIONS, ids=lambda kw: "+".join(map(str, kw)))


def logits(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits that were computed from a leaf, and labels; some of the largest logits are hit."""
    torch.manual_seed(0)
    leaf = torch.randn(M, V, device=DEVICE).to(dtype).requires_grad_()
    y = labels(M, V)
    y = torch.where((y != -100) & (torch.arange(M, device=DEVICE) % 4 == 0), leaf.argmax(-1), y)
    return leaf * 1, y


@both
def test_labels_by_strides_and_many_of_them(impl: str) -> None:
    M = 5000  # more than one block of the kernel that counts them
    z = torch.randn(M, 2, device=DEVICE)
    y = torch.arange(2 * M, device=DEVICE).view(M, 2) % 7 % 2
    y[::3] = -100
    got = cross_entropy(z, y[:, 0], impl=impl)  # pyright: ignore
    torch.testing.assert_close(got, F.cross_entropy(z, y[:, 0]))


@both
def test_gradients_add_up_over_micro_batches(impl: str) -> None:
    z, y = logits()
    leaf, whole = (z.detach().requires_grad_() for _ in range(2))
    for _ in range(4):
        (cross_entropy(leaf * 1, y, impl=impl) / 4).backward()  # pyright: ignore
        (cross_entropy(leaf, y, impl=impl) / 4).backward()  # pyright: ignore
    (2 * F.cross_entropy(whole, y)).backward()
    torch.testing.assert_close(leaf.grad, whole.grad)


@implementations
@reductions
def test_a_second_backward_is_the_first(kw: dict[str, Any], impl: str, dtype: torch.dtype) -> None:
    z, y = logits(dtype)
    before = z.detach().clone()
    out = cross_entropy_stats(z, y, impl=impl, **kw)  # pyright: ignore
    g = torch.randn_like(out.loss)
    (first,) = torch.autograd.grad(out.loss, z, g, retain_graph=True)
    kept = first.clone()
    for _ in range(2):
        (again,) = torch.autograd.grad(out.loss, z, g, retain_graph=True)
        assert torch.equal(again, kept) and torch.equal(first, kept)
    assert torch.equal(z, before)


@both
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_logits_are_read_once(
    monkeypatch: Any, grad: bool, dtype: torch.dtype, impl: str
) -> None:
    """And no gradient is made where none is wanted, nor early in fp16."""
    made: list[bool] = []

    def spy(*args: Any, dz: Tensor | None, **kw: Any) -> Any:
        made.append(dz is not None)
        return row_loss(*args, dz=dz, **kw)

    row_loss = module.row_loss
    monkeypatch.setattr(module, "row_loss", spy)
    z, y = logits(dtype)
    before = z.detach().clone()
    with torch.set_grad_enabled(grad):
        loss = cross_entropy(z, y, inplace=not grad, impl=impl)  # pyright: ignore
    assert made == [grad and dtype == torch.float32] and torch.equal(z, before)
    assert loss.requires_grad == grad
    if grad:
        loss.backward()
        assert len(made) == 1


@implementations
@reductions
def test_inplace_is_the_same(kw: dict[str, Any], impl: str, dtype: torch.dtype) -> None:
    z, y = logits(dtype)
    want = cross_entropy(z, y, impl=impl, **kw)  # pyright: ignore
    g = torch.randn_like(want)
    (dz,) = torch.autograd.grad(want, z, g, retain_graph=True)
    got = cross_entropy(z, y, inplace=True, impl=impl, **kw)  # pyright: ignore
    assert torch.equal(got, want)
    (grad,) = torch.autograd.grad(got, z, g, retain_graph=True)
    assert torch.equal(grad, dz) and grad.data_ptr() == z.data_ptr() and not grad.requires_grad
    with pytest.raises(RuntimeError, match=r"inplace=True.*leave inplace out"):
        torch.autograd.grad(got, z, g)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inplace_is_seen_by_who_saved_the_logits(
    reduction: str, dtype: torch.dtype, impl: str
) -> None:
    z, y = logits(dtype)
    square = z.square().sum()
    loss = cross_entropy(z, y, reduction=reduction, inplace=True, impl=impl)  # pyright: ignore
    later = reduction == "none" or dtype == torch.float16
    assert (z._version == 0) == later
    if later:
        torch.autograd.grad(loss.sum(), z)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


@both
@reductions
def test_inplace_sees_who_writes_to_the_logits(kw: dict[str, Any], impl: str) -> None:
    z, y = logits()
    loss = cross_entropy(z, y, inplace=True, impl=impl, **kw).sum()  # pyright: ignore
    with torch.no_grad():
        z.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inplace_through_a_model() -> None:
    """The gradient goes on to what made the logits."""
    torch.manual_seed(0)
    x, w = torch.randn(2, M, 5, device=DEVICE), torch.randn(V, 5, device=DEVICE).requires_grad_()
    y = labels(2 * M, V).view(2, M)
    (want,) = torch.autograd.grad(F.cross_entropy((x @ w.T).flatten(0, 1), y.flatten()), w)
    (got,) = torch.autograd.grad(cross_entropy(x @ w.T, y, inplace=True), w)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda z: z.detach().requires_grad_(), "a leaf that requires"),
        (lambda z: z.detach().requires_grad_().view(M, V), "or a view of one"),
        (lambda z: z.T.contiguous().T, "must be contiguous"),
        (lambda z: (z[:1] * 1).expand(M, V), "must be contiguous"),
    ],
)
def test_where_inplace_cannot_be(make: Any, match: str) -> None:
    z, y = logits()
    z = make(z)
    with pytest.raises(ValueError, match=match):
        cross_entropy(z, y, inplace=True)
    with torch.no_grad():
        cross_entropy(z, y, inplace=True)
    cross_entropy(z.detach(), y, inplace=True)


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.parametrize("inplace", [True, False])
@reductions
def test_compiles_whole_with_its_statistics(kw: dict[str, Any], inplace: bool) -> None:
    torch._dynamo.reset()
    backend = "inductor" if GPU else "aot_eager"
    compiled = torch.compile(cross_entropy_stats, fullgraph=True, backend=backend)
    z, y = logits()
    z = z.detach().requires_grad_()
    before = z.detach().clone()
    got = compiled(z, y, z_loss=0.1, inplace=inplace, **kw)
    want = cross_entropy_stats(z, y, z_loss=0.1, **kw)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    g = torch.randn_like(want.loss)
    dz, exact = (torch.autograd.grad(out.loss, z, g)[0] for out in (got, want))
    torch.testing.assert_close(dz, exact)
    assert torch.equal(z, before)


@both
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_fp16_survives_a_loss_scale(reduction: str, impl: str) -> None:
    """GradScaler's 65,536 on a loss whose own gradient is far below fp16's smallest number."""
    torch.manual_seed(0)
    rows, classes = 128, 1024
    y = torch.randint(classes, (rows,), device=DEVICE)
    z = torch.randn(rows, classes, device=DEVICE).half().requires_grad_()
    scale = 65536.0 / (1 if reduction == "mean" else rows)
    loss = cross_entropy(z, y, reduction=reduction, impl=impl).sum() * scale  # pyright: ignore
    (dz,) = torch.autograd.grad(loss, z)
    exact = z.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(F.cross_entropy(exact, y) * 65536.0, exact)
    assert (dz - want).norm() <= 5e-4 * want.norm() and dz.count_nonzero() == dz.numel()


@both
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("given", [True, False])
def test_what_the_same_pass_tells(given: bool, reduction: str, impl: str) -> None:
    z, y = logits()
    kw: dict[str, Any] = dict(z_loss=0.1, softcap=2.0, reduction=reduction)
    kw |= dict(class_weight=WEIGHT) if given else {}
    got = cross_entropy_stats(z, y, impl=impl, **kw)  # pyright: ignore
    assert torch.equal(got.loss, cross_entropy(z, y, impl=impl, **kw))  # pyright: ignore
    scored, capped = y != -100, 2 * torch.tanh(z.detach() / 2)
    z_rows = 0.1 * capped.logsumexp(-1).square() * scored
    by = (WEIGHT[y[scored]].sum() if given else scored.sum()) if reduction == "mean" else 1
    assert_stats(got, z, y, z_rows if reduction == "none" else z_rows.sum() / by)


@both
@reductions
@pytest.mark.parametrize("shape", [(0,), (2, 0), (3,), (2, 3), ()])
def test_nothing_to_learn_from(shape: tuple[int, ...], kw: dict[str, Any], impl: str) -> None:
    """No rows, or none that is scored: 0 and not NaN, in the loss, its gradient and statistics."""
    z = torch.randn(*shape, V, device=DEVICE, requires_grad=True)
    y = torch.full(shape, -100, device=DEVICE)
    out = cross_entropy_stats(z, y, z_loss=0.1, impl=impl, **kw)  # pyright: ignore
    row_wise = shape if kw.get("reduction") == "none" else ()
    assert [t.shape for t in out] == [row_wise, row_wise, (), shape]
    assert not any(t.any() for t in out[:3]) and bool((out.predicted == -1).all())
    out.loss.sum().backward()
    assert z.grad is not None and z.grad.shape == z.shape and not z.grad.any()


@both
@reductions
def test_weights_that_sum_to_nothing(kw: dict[str, Any], impl: str) -> None:
    z, y = logits()
    kw = kw | dict(class_weight=torch.zeros(V, device=DEVICE))
    loss = cross_entropy(z, y, impl=impl, **kw)  # pyright: ignore
    assert not loss.any() and not torch.autograd.grad(loss.sum(), z)[0].any()


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")  # numpy's maximum
@both
@pytest.mark.parametrize("classes", [1, 2, 8193, 262145])
@pytest.mark.parametrize("name", ["random", "NaN"])
def test_narrow_and_wide_rows(name: str, classes: int, impl: str) -> None:
    """The gradient that forward takes, against torch's in fp64."""
    torch.manual_seed(0)
    z = 3 * torch.randn(3, classes, device=DEVICE)
    y = torch.tensor([classes - 1, -100, 0], device=DEVICE)
    if name == "NaN":
        z[0, classes // 2] = torch.nan
    z.requires_grad_()
    loss = cross_entropy(z, y, impl=impl)  # pyright: ignore
    (dz,) = torch.autograd.grad(loss, z)
    exact = z.detach().double().requires_grad_()
    want = F.cross_entropy(exact, y)
    (dz_exact,) = torch.autograd.grad(want, exact)
    torch.testing.assert_close(loss.double(), want, equal_nan=True, rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(dz.double(), dz_exact, equal_nan=True, rtol=2e-3, atol=1e-6)
    assert name != "NaN" or (dz[1:].isfinite().all() and loss.isnan())


@both
@pytest.mark.parametrize("bad", [V, -1, 2**31])
@reductions
def test_unchecked_a_bad_label_costs_its_row(
    kw: dict[str, Any], bad: int, impl: str, monkeypatch: Any
) -> None:
    """As on a GPU, which is not waited for."""
    monkeypatch.setattr(module.LabelScan, "count", lambda self: 0)
    z, y = logits()
    y[2] = bad
    loss = cross_entropy(z, y, impl=impl, **kw)  # pyright: ignore
    (dz,) = torch.autograd.grad(loss.sum(), z)
    here = torch.arange(M, device=DEVICE) == 2
    assert torch.equal(loss.isnan(), here if loss.dim() else loss.new_ones((), dtype=torch.bool))
    assert torch.equal(dz.isnan().any(-1), here)


@both
@reductions
def test_autocast_has_nothing_to_say(kw: dict[str, Any], impl: str) -> None:
    z, y = logits()
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = cross_entropy(z, y, impl=impl, **kw)  # pyright: ignore
        (dz,) = torch.autograd.grad(loss.sum(), z)
    want = cross_entropy(z, y, impl=impl, **kw)  # pyright: ignore
    assert torch.equal(loss, want) and torch.equal(dz, torch.autograd.grad(want.sum(), z)[0])


@pytest.mark.skipif(GPU, reason="chunks are the torch path's")
def test_chunks_of_rows_are_one(monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "TORCH_CHUNK", 2 * V * 4)
    z, y = logits()
    o = RowLoss(label_smoothing=0.2, z_loss=0.1)
    out = cross_entropy_stats(z, y, label_smoothing=0.2, z_loss=0.1)
    want = row_loss_ref(z, y, o).sum() / (y != -100).sum()
    torch.testing.assert_close(out.loss, want)
    got, exact = (torch.autograd.grad(loss, z)[0] for loss in (out.loss, want))
    torch.testing.assert_close(got, exact)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@reductions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_device_is_not_waited_for(dtype: torch.dtype, kw: dict[str, Any]) -> None:
    z, y = logits(dtype)
    torch.cuda.set_sync_debug_mode("error")
    try:
        cross_entropy_stats(z, y, z_loss=0.1, **kw).loss.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "grad, inplace, buffers", [(True, False, 1), (True, True, 0), (False, False, 0)]
)
def test_peak_memory(grad: bool, inplace: bool, buffers: int) -> None:
    """In tensors of the logits' size."""
    z = torch.randn(1024, 32768, device=DEVICE, dtype=torch.bfloat16).requires_grad_() * 1
    y, size = labels(1024, 32768), z.numel() * z.element_size()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.set_grad_enabled(grad):
        loss = cross_entropy(z, y, inplace=inplace)
        _ = torch.autograd.grad(loss, z) if grad else None
    assert torch.cuda.max_memory_allocated() - before <= (buffers + 0.01) * size


@pytest.mark.parametrize(
    "kw, match",
    [
        (dict(y=torch.zeros(2, dtype=torch.long)), r"labels must have shape \(3,\).*got \(2,\)"),
        (dict(y=torch.zeros(3)), "labels must be integers, got torch.float32"),
        (dict(y=torch.full((3,), 7)), r"in \[0, 7\).*got 7 at position 0"),
        (dict(y=torch.zeros(3, dtype=torch.long, device="meta")), "one device, got cpu, meta"),
        (dict(reduction="avg"), "reduction must be"),
        (dict(reduction="none", total=torch.ones(())), "total divides the sum"),
        (dict(total=torch.ones(1)), r"total must be 0-d.*got \(1,\)"),
        (dict(total=torch.ones((), requires_grad=True)), "requires_grad=True"),
        (dict(class_weight=torch.ones(3)), r"class_weight must be \(7,\), got \(3,\)"),
        (dict(softcap=0.0), "softcap must be positive"),
        (dict(label_smoothing=1.5), r"label_smoothing must lie in \[0, 1\]"),
        (dict(impl="cuda"), "impl must be"),
    ],
)
def test_what_does_not_fit_is_said(kw: dict[str, Any], match: str) -> None:
    fitting = dict(z=torch.randn(3, 7), y=torch.zeros(3, dtype=torch.long))
    for op in (cross_entropy, cross_entropy_stats):
        with pytest.raises(ValueError, match=match):
            op(**fitting | kw)
