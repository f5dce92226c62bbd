"""Losses of whole sequences under a head: how these are grouped, what loss_fn gets, the cost."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from cases import CASES, full_logits, group_loss, labels, token_stats_ref, uneven_labels
from liger_core import (
    LabelScan,
    linear_cross_entropy,
    linear_logprob,
    linear_loss,
    linear_token_stats,
)
from liger_core.ops.linear_head import CHUNKS, MAX_BUDGET, MIN_BUDGET, Options, prepare
from liger_core.ops.linear_loss import (
    LossFn,
    TokenStats,
    _bins,  # pyright: ignore[reportPrivateUsage]
    _capacity,  # pyright: ignore[reportPrivateUsage]
    _pack,  # pyright: ignore[reportPrivateUsage]
)
from liger_core.ops.row_loss import RowLoss, Want, row_loss
from liger_kernel.check import allowed
from numerics import DEVICE, GPU, assert_errs_no_more, run

both = pytest.mark.parametrize("impl", ["torch", "triton"])
groupings = pytest.mark.parametrize("together", ["sequence", "pair", "batch"])
OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logit", "is_top1")
S, T, H, V = 6, 5, 16, 37


def operands(S: int = S, T: int = T) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, w = torch.randn(S, T, H, device=DEVICE), torch.randn(V, H, device=DEVICE) / 4
    return x.requires_grad_(), w.requires_grad_(), uneven_labels(S, T, V)


def total(stats: TokenStats, take: Callable[[Tensor], Tensor]) -> Tensor:
    return -stats.logp.sum()


# How sequences are grouped


@pytest.mark.parametrize(
    "sizes", [[], [3], [0, 0, 0], [5, 1, 1, 9, 2, 2], [1] * 20, [7, 7, 7], [20, 1, 20]], ids=str
)
@pytest.mark.parametrize("most", [1, 7, 10, 100])
def test_groups_are_packed_whole_and_tight(sizes: list[int], most: int) -> None:
    packed = _pack(sizes, most)
    assert [i for first, last in packed for i in range(first, last)] == list(range(len(sizes)))
    assert all(last - first <= 1 or sum(sizes[first:last]) <= most for first, last in packed)
    assert all(sum(sizes[a:b]) > most for (a, _), (_, b) in itertools.pairwise(packed))


@pytest.mark.parametrize("budget", [None, 1, 10**6])
@pytest.mark.parametrize("row_bytes", [2 * 37, 2 * 128256])
@pytest.mark.parametrize(
    "sizes", [[3], [0, 0], [4096] * 8, [900, 1, 1, 4000, 7], [9000, 10] * 9, [123] * 1001], ids=str
)
def test_a_bin_is_no_larger_than_four_of_them_need(
    sizes: list[int], row_bytes: int, budget: int | None
) -> None:
    most, limit = _capacity(sizes, row_bytes, budget), max(MAX_BUDGET // row_bytes, 1)
    if budget is not None:
        assert most == max(budget // row_bytes, 1)
    elif max(sizes) > limit or len(_pack(sizes, limit)) > CHUNKS:
        assert most == limit
    else:
        assert max(sizes) <= most <= limit and len(_pack(sizes, most)) <= CHUNKS
        tight = len(_pack(sizes, most - 1)) > CHUNKS or max(sizes) == most
        assert tight or most <= max(MIN_BUDGET // row_bytes, -(-sum(sizes) // CHUNKS), 1)


@groupings
@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize(
    "S, T, most", [(6, 5, 1), (6, 5, 4), (6, 5, 9), (6, 5, 99), (2, 300, 200), (2, 300, 7)]
)
def test_bins_hold_every_row_once(S: int, T: int, most: int, compact: bool, together: Any) -> None:
    x, w, _ = operands(S, T)
    y, half = uneven_labels(S, T, V), S // 2
    opt = Options(memory_budget=most * V * 4, compact=compact)
    call = prepare(x, w, y, None, RowLoss(), opt)
    order, bins = _bins(call, y, together, opt.memory_budget)
    everything = torch.arange(S * T, device=DEVICE)
    scored = everything[y.flatten() != -100] if compact else everything
    order = scored if order is None else order
    assert torch.equal(order.sort()[0], scored)
    assert [i for one in bins for i in range(one.rows.start, one.rows.stop)] == list(
        range(scored.numel())
    )
    members = [one.take(torch.arange(S, device=DEVICE)) for one in bins]
    assert torch.equal(torch.cat(members).sort()[0], torch.arange(S, device=DEVICE))
    for one, inside in zip(bins, members, strict=True):
        if together == "pair":
            chosen, rejected = inside.chunk(2)
            assert torch.equal(chosen + half, rejected) and (chosen < half).all()
        assert set((order[one.rows] // T).tolist()) <= set(inside.tolist())
        in_parts = [i for part in one.parts for i in range(part.start, part.stop)]
        assert in_parts == list(range(one.rows.start, one.rows.stop))
        assert all(part.stop - part.start <= most for part in one.parts)
        groups = 1 if together == "batch" else len(inside) // (1 + (together == "pair"))
        assert len(one.parts) == 1 or groups == 1


def results(x: Tensor, w: Tensor, y: Tensor, loss_fn: LossFn, **kw: Any) -> list[Tensor]:
    """Loss, all statistics, dx and dw."""
    loss, stats = linear_loss(x, w, y, loss_fn, outputs=OUTPUTS, **kw)
    return [loss.detach(), *(t for t in stats if t is not None), *torch.autograd.grad(loss, (x, w))]


@both
@groupings
def test_results_do_not_depend_on_the_budget(together: Any, impl: Any) -> None:
    x, w, y = operands()
    kw = dict(loss_fn=group_loss(together, S, T), together=together, impl=impl)
    want = results(x, w, y, **kw)
    for rows, compact in itertools.product((1, 4, 9), (True, False)):
        got = results(x, w, y, memory_budget=rows * V * 4, compact=compact, **kw)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("rows", [1, 9, 99])
def test_the_order_of_pairs_does_not_matter(rows: int) -> None:
    x, w, y = operands()
    moved = torch.tensor([2, 0, 1, 5, 3, 4], device=DEVICE)
    each = torch.arange(S, device=DEVICE)

    def weighted(stats: TokenStats, take: Callable[[Tensor], Tensor]) -> Tensor:
        chosen, rejected = (stats.logp.sum(-1) * (1 + take(each))).chunk(2)
        return -F.logsigmoid(0.1 * (chosen - rejected)).sum()

    kw = dict(together="pair", memory_budget=rows * V * 4)
    loss, *stats, dx, dw = results(x, w, y, weighted, **kw)
    each = moved
    there = x.detach()[moved].requires_grad_()
    got = results(there, w, y[moved], weighted, **kw)
    torch.testing.assert_close(got, [loss, *(t[moved] for t in (*stats, dx)), dw])


# What loss_fn gets


@groupings
@pytest.mark.parametrize("rows", [1, 6, 99])
@pytest.mark.parametrize("frozen", [True, False])
def test_take_cuts_to_the_sequences_at_hand(rows: int, together: Any, frozen: bool) -> None:
    x, w, y = operands()
    w.requires_grad_(not frozen)
    seen: list[Tensor] = []
    logp = linear_logprob(x, w, y).detach()

    def check(stats: TokenStats, take: Callable[[Tensor], Tensor]) -> Tensor:
        mine = take(torch.arange(S, device=DEVICE))
        seen.append(mine)
        torch.testing.assert_close(stats.logp.detach(), logp[mine])
        assert torch.equal(take(y), y[mine])
        return -stats.logp.sum()

    loss, stats = linear_loss(x, w, y, check, together=together, memory_budget=rows * V * 4)
    torch.testing.assert_close(loss.detach(), -logp.sum())
    assert torch.equal(torch.cat(seen).sort()[0], torch.arange(S, device=DEVICE))
    assert stats.entropy is None and not stats.logp.requires_grad


@both
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("S", [0, 4])
def test_nothing_to_learn_from(S: int, frozen: bool, impl: Any) -> None:
    """All labels ignored, or no sequences at all: loss_fn still says what the loss is."""
    x, w, y = operands(S) if S else (torch.empty(0, T, H, device=DEVICE, requires_grad=True),
                                     operands()[1], uneven_labels(6, T, V)[:0])  # fmt: skip
    w.requires_grad_(not frozen)
    calls: list[torch.Size] = []

    def loss_fn(stats: TokenStats, take: Callable[[Tensor], Tensor]) -> Tensor:
        calls.append(stats.logp.shape)
        assert stats.entropy is not None and not stats.logp.any() and not stats.entropy.any()
        return 3.0 - stats.logp.sum() + stats.entropy.sum()

    loss, _ = linear_loss(
        x, w, torch.full_like(y, -100), loss_fn, together="pair", outputs=("entropy",), impl=impl
    )
    assert calls == [(S, T)] and loss == 3.0
    for grad in torch.autograd.grad(loss, (x,) if frozen else (x, w)):
        assert not grad.any()


@both
def test_sequences_of_one_token(impl: Any) -> None:
    x, w, y = operands(4, 1)
    y[:] = torch.arange(4, device=DEVICE)[:, None]
    loss_fn = group_loss("pair", 4, 1)
    got, *_, dx, dw = results(x, w, y, loss_fn, together="pair", impl=impl, memory_budget=1)
    want = loss_fn(token_stats_ref(full_logits(x, w), y), lambda t: t)
    torch.testing.assert_close((got, dx, dw), (want, *torch.autograd.grad(want, (x, w))))


@both
def test_the_first_of_several_largest_logits_is_the_top(impl: str) -> None:
    z = torch.zeros(4, 9000, device=DEVICE)  # more than one block of the kernel
    z[0, [17, 40, 8999]], z[1, [8500, 8999]] = 5.0, 1.0
    y = torch.tensor([17, 8999, 0, -100], device=DEVICE)
    rows = row_loss(z, y, RowLoss(), want=Want(top=True), kernels=impl == "triton")
    assert rows.top is not None and rows.top.tolist() == [17, 8500, 0, -1]


@both
@pytest.mark.parametrize("ignore_index", [-100, -1, 36])
@pytest.mark.parametrize("compact", [True, False])
def test_is_top1(compact: bool, ignore_index: int, impl: Any) -> None:
    x, w, y = operands()
    scored = y != -100
    best = (x @ w.T).argmax(-1)
    y = torch.where(torch.arange(T, device=DEVICE) % 2 == 0, best, y)  # some are right
    scored &= y != ignore_index
    y = y.masked_fill(~scored, ignore_index)
    kw: Any = dict(outputs=("is_top1",), compact=compact, ignore_index=ignore_index, impl=impl)
    want = (best == y) & scored
    assert want.any() and not want.all()
    for stats in (linear_token_stats(x, w, y, **kw), linear_loss(x, w, y, total, **kw)[1]):
        assert stats.is_top1 is not None and torch.equal(stats.is_top1, want)


@both
def test_a_class_that_is_ruled_out(impl: Any) -> None:
    """A bias of -inf, as padded vocabularies have it, is the same as a head without these rows."""
    x, w, y = operands()
    y = torch.where(y == -100, y, y % 30)
    b = torch.zeros(V, device=DEVICE)
    b[30:] = -torch.inf
    b.requires_grad_()
    kw: Any = dict(outputs=("entropy", "log_sum_sq_probs", "is_top1"), impl=impl)
    got = linear_token_stats(x, w, y, b, **kw)
    want = linear_token_stats(x, w[:30], y, b[:30], **kw)
    torch.testing.assert_close([*got[:3], got.is_top1], [*want[:3], want.is_top1])
    grads = [
        torch.autograd.grad((o.logp + o.entropy.square()).sum(), (x, w, b))  # pyright: ignore
        for o in (got, want)
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    "kw, match",
    [
        (dict(outputs=("entropie",)), "outputs may be mean_logit, .*got entropie"),
        (dict(together="pair", x=torch.zeros(3, 2, 4), y=torch.zeros(3, 2).long()),
         r"S even for pairs, got \(3, 2\)"),
        (dict(x=torch.zeros(6, 4), y=torch.zeros(6).long()), r"y must be \(S, T\), got \(6,\)"),
        (dict(together="group"), "together must be"),
        (dict(labels=LabelScan(torch.zeros(8).long(), 7)), r"a LabelScan of y \(4, 2\)"),
        (dict(temperature=0.0), "temperature must be positive"),
        (dict(low_rank=(torch.zeros(4, 2, 3), torch.zeros(7, 2))), "low_rank must be u"),
        (dict(low_rank=(torch.zeros(4, 3), torch.zeros(7, 3))), "low_rank must be u"),
        (dict(low_rank=(torch.zeros(4, 2, 3).double(), torch.zeros(7, 3))),
         "one dtype.*u torch.float64"),
        (dict(w=torch.zeros(7, 4).bfloat16()), "must have one dtype outside of autocast"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(kw: dict[str, Any], match: str) -> None:
    w = torch.zeros(7, 4, requires_grad=True)
    fitting = dict(x=torch.zeros(4, 2, 4), w=w, y=torch.zeros(4, 2).long(), loss_fn=total)
    with pytest.raises(ValueError, match=match):
        linear_loss(**fitting | kw)


# What it costs


class Products(TorchDispatchMode):
    """Counts the matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        self.count += func.overloadpacket in (aten.mm, aten.addmm, aten.addmm_)
        return func(*args, **kwargs or {})


CE, LOGPROB, ROWS = linear_cross_entropy, linear_logprob, 4


def paired(x: Tensor, w: Tensor, y: Tensor, together: Any = "pair", **kw: Any) -> Tensor:
    return linear_loss(x, w, y, total, together=together, **kw)[0]


@pytest.mark.parametrize(
    "op, asked, chunks, kw, products",
    [
        (CE, "xw", 2, {}, 3), (CE, "x", 2, {}, 2), (CE, "w", 2, {}, 2), (CE, "", 2, {}, 1),
        (LOGPROB, "xw", 2, {}, 3.5), (LOGPROB, "x", 2, {}, 2), (LOGPROB, "", 2, {}, 1),
        (LOGPROB, "xw", 4, {}, 3.75), (LOGPROB, "xw", 2, dict(saved_logits_budget=0), 4),
        (LOGPROB, "xw", 2, dict(saved_logits_budget=2 * ROWS * V * 4), 3),
        (LOGPROB, "xw", 2, dict(saved_logits_budget=ROWS * V * 4), 3.5),
        (paired, "xw", 1, {}, 3), (paired, "xw", 2, {}, 3), (paired, "x", 2, {}, 2),
        (paired, "", 2, {}, 1),
        # a group in parts: all but the last are computed again
        (paired, "xw", 4, dict(together="batch"), (4 + 3 + 2 * 4) / 4),
        (paired, "xw", 4, dict(together="pair"), (2 + 1 + 2 * 2) / 2),
    ],
)  # fmt: skip
def test_products(op: Any, asked: str, chunks: int, kw: dict[str, Any], products: float) -> None:
    x, w = torch.randn(4, 2, H, device=DEVICE), torch.randn(V, H, device=DEVICE)
    y = torch.arange(8, device=DEVICE).view(4, 2)  # 8 rows, two pairs of 4
    x.requires_grad_("x" in asked), w.requires_grad_("w" in asked)
    with Products() as counter:
        loss = op(x, w, y, memory_budget=8 // chunks * V * 4, **kw)
        if asked:
            loss.sum().backward()
    assert counter.count == chunks * products


@pytest.mark.parametrize("op", [CE, LOGPROB, paired])
def test_no_gradient_is_taken_under_no_grad(op: Any) -> None:
    x, w, y = operands()
    with torch.no_grad(), Products() as counter:
        loss = op(x, w, y, memory_budget=1 << 30)
    assert counter.count == 1 and not loss.requires_grad
    torch.testing.assert_close(loss, op(x, w, y).detach())


@pytest.mark.parametrize("case", [c for c in CASES if "frozen" in c.name], ids=repr)
def test_a_frozen_head_may_go_back_twice(case: Any) -> None:
    x = case.make()["x"].requires_grad_()
    out = case.op(x)
    out = out if isinstance(out, tuple) else (out,)
    dy = [torch.randn_like(o) for o in out]
    (first,) = torch.autograd.grad(out, x, dy, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(out, x, dy)
    assert torch.equal(first, kept)
    torch.testing.assert_close(second, kept)  # computed again, not scaled again


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
def test_compiles_once_for_all_shapes() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor" if GPU else "aot_eager")

    def step(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return linear_loss(x, w, y, pair_loss, together="pair", outputs=("entropy",))[0]

    def pair_loss(stats: TokenStats, take: Callable[[Tensor], Tensor]) -> Tensor:
        chosen, rejected = stats.logp.sum(-1).chunk(2)
        assert stats.entropy is not None
        return -F.logsigmoid(0.1 * (chosen - rejected)).sum() - 0.1 * stats.entropy.sum()

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    w = operands()[1]
    for s, t in itertools.product((2, 4, 8), (5, 6, 7, 12, 33)):
        x, y = torch.randn(s, t, H, device=DEVICE, requires_grad=True), labels(s * t, V).view(s, t)
        got, want = compiled(x, w, y), step(x, w, y)
        torch.testing.assert_close(got, want)
        grads = [torch.autograd.grad(o, (x, w)) for o in (got, want)]
        torch.testing.assert_close(*grads)
    assert counter.frame_count <= 3


# Dtypes


@both
@groupings
def test_fp16_survives_a_loss_scale(together: Any, impl: Any) -> None:
    """Gradients far below fp16's smallest number, times GradScaler's 65,536."""
    torch.manual_seed(0)
    S, T, V = 4, 16, 256
    x, w = torch.randn(S, T, H, device=DEVICE).half(), torch.randn(V, H, device=DEVICE).half() / 4
    y = torch.randint(V // 2, (S, T), device=DEVICE)  # the other half is never a target
    weighed = group_loss(together, S, T)

    def tiny(stats: TokenStats, take: Callable[[Tensor], Tensor]) -> Tensor:
        return weighed(stats, take) * 1e-6

    leaves = x.requires_grad_(), w.requires_grad_()
    loss = linear_loss(
        *leaves, y, tiny, together=together, outputs=("entropy",), impl=impl,
        memory_budget=24 * V * 2,
    )[0]  # fmt: skip
    ours = torch.autograd.grad(loss * 65536.0, leaves)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    want = tiny(token_stats_ref(full_logits(*exact), y), lambda t: t) * 65536.0
    theirs = torch.autograd.grad(want, exact)
    pairs = [*zip(ours, theirs, strict=True), (ours[1][V // 2 :], theirs[1][V // 2 :])]
    for got, e in pairs:
        assert (got - e).norm() <= allowed(0.0, e.norm(), torch.float16)


@contextmanager
def autocast(x: Tensor, dtype: torch.dtype) -> Iterator[None]:
    with torch.autocast(DEVICE, dtype, enabled=x.dtype == torch.float32):
        yield


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name",
    ["linear_logprob-4 rows", "linear_token_stats-whole", "linear_loss-pair-6-compact",
     "linear_loss-sequence-2", "linear_loss-batch-6-compact", "frozen linear_loss"],
)  # fmt: skip
def test_autocast_errs_no_more_than_torch(name: str, dtype: torch.dtype, compiled: bool) -> None:
    """fp32 weights under autocast: products in half precision, gradients in fp32."""
    if compiled and DEVICE != "cuda":
        pytest.skip("on a GPU sums are fused with products, which is what compiles otherwise")
    torch.manual_seed(0)
    torch._dynamo.reset()  # or shapes of the tests before are symbols here: 2.11 asserts at that
    case = next(c for c in CASES if c.name.startswith(name))
    inputs = {n: t.to(dtype).float() for n, t in case.make().items()}

    def under(op: Any) -> Any:
        def cast(**tensors: Tensor) -> Any:
            with autocast(tensors["x"], dtype):
                return op(**tensors)

        return torch.compile(cast) if compiled and op is case.op else cast

    shapes = run(case.ref, inputs, torch.float64).values()
    dy = [torch.randn(o.shape, device=DEVICE) for o in shapes]
    exact = run(case.ref, inputs, torch.float64, dy)
    theirs = run(under(case.ref), inputs, torch.float32, dy)
    ours = run(under(case.op), inputs, torch.float32, dy)
    assert {t.dtype for t in ours.values()} == {torch.float32}
    assert_errs_no_more(ours, theirs, exact, dtype)


# Memory


def peak_bytes(step: Callable[[], Any]) -> int:
    from liger_kernel.measure import PeakMemory

    with PeakMemory() as peak:
        step()
    return peak.bytes


@pytest.mark.skipif(GPU, reason="the allocator's own figures: see benchmarks/NOTES.md")
def test_memory_is_that_of_the_scored_tokens() -> None:
    S, scored, H, V = 32, 64, 32, 4096
    torch.manual_seed(0)
    peaks, logits = {}, S * scored * V * 4
    w = torch.randn(V, H, requires_grad=True)
    for T in (scored, 1024):
        x, y = torch.randn(S, T, H, requires_grad=True), torch.full((S, T), -100)
        y[:, -scored:] = torch.randint(V, (S, scored))
        peaks[T] = peak_bytes(
            lambda x=x, y=y: paired(x, w, y, memory_budget=logits // 16).backward()
        )
    assert peaks[scored] <= 0.25 * logits
    x_bytes = S * (1024 - scored) * H * 4
    assert peaks[1024] - peaks[scored] <= 1.5 * x_bytes, "more than dx and a few numbers a token"


@pytest.mark.skipif(GPU, reason="the allocator's own figures: see benchmarks/NOTES.md")
def test_logits_are_kept_for_a_backward_only() -> None:
    x, w = torch.randn(512, H), torch.randn(4096, H)
    y, logits = torch.randint(4096, (512,)), 512 * 4096 * 4

    def step() -> None:
        linear_logprob(x, w, y, memory_budget=logits // 16, saved_logits_budget=logits)

    assert peak_bytes(step) <= 0.3 * logits
