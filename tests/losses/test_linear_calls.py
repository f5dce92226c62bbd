"""Preference losses under a head: what callers of any loss rely on, and the pieces on their own."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from cases import full_logits, labels, uneven_labels
from liger_core import LabelScan
from liger_core.losses import (
    CPO,
    DPO,
    KTO,
    ORPO,
    PairLoss,
    PreferenceStats,
    SimPO,
    linear_kto_loss,
    linear_preference_loss,
    linear_sequence_logprob,
    mean_logits,
    token_weights,
)
from liger_kernel.measure import PeakMemory
from numerics import DEVICE, GPU, assert_no_worse_than_torch

S, T, H, V = 8, 7, 16, 13
MIXED = DPO(["aot", "ipo", "sft"], nll_weight=0.5)
WEIGHTED = DPO("robust", average=True, ld_alpha=0.3, use_weighting=True, nll_weight=2.0)
LOSSES = [DPO(), MIXED, WEIGHTED, SimPO(), ORPO(), KTO(beta=0.3, desirable_weight=1.5)]
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda o: f"{o.__class__.__name__}-")
Call = Callable[..., tuple[Tensor, PreferenceStats]]


def operands() -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = dict(x=(S, T, H), w=(V, H), b=(V,))
    return {n: torch.randn(s, device=DEVICE) / (4 if n == "w" else 1) for n, s in shapes.items()}


def reference(loss: PairLoss | KTO) -> Tensor | None:
    free = isinstance(loss, CPO | SimPO | ORPO)
    return None if free else (3.0 * torch.arange(S, device=DEVICE)) % 8 - 12


def calls(loss: PairLoss | KTO, order: Tensor | None = None) -> tuple[Call, dict[str, Tensor]]:
    """A call under `loss`, with its sequences in some order, and its tensors."""
    order = torch.arange(S, device=DEVICE) if order is None else order
    ref, inputs = reference(loss), operands()
    kw: Any = dict(y=uneven_labels(S, T, V)[order], loss=loss)
    kw["ref_logps"] = None if ref is None else ref[order]
    if isinstance(loss, KTO):
        kw["desirable"] = (torch.arange(S, device=DEVICE) % 3 == 0)[order]
        kw["kl"] = torch.linspace(0, 1, S, device=DEVICE)[order]
    op: Any = linear_kto_loss if isinstance(loss, KTO) else linear_preference_loss
    return partial(op, **kw), inputs | {"x": inputs["x"][order]}


def everything(
    call: Call, inputs: dict[str, Tensor], rows: int = 99, asked: str = "xwb"
) -> dict[str, Tensor]:
    """The loss, the gradients asked for, and all statistics, which carry none."""
    leaves = {n: t.detach().requires_grad_(n in asked) for n, t in inputs.items()}
    outputs = ("entropy", "mean_logit", "log_sum_sq_probs", "is_top1")
    value, stats = call(**leaves, outputs=outputs, memory_budget=rows * V * 4)
    of_tokens = stats.tokens._asdict()
    metrics = {"logps": stats.logps, "rewards": stats.rewards, "nll": stats.nll, **of_tokens}
    assert not any(t.requires_grad for t in metrics.values())
    grads = torch.autograd.grad(value, [leaves[n] for n in asked])
    named = zip((f"d{n}" for n in asked), grads, strict=True)
    return {"loss": value.detach(), **metrics, **dict(named)}


@every_loss
def test_statistics(loss: PairLoss | KTO) -> None:
    call, inputs = calls(loss)
    y, log_p = uneven_labels(S, T, V), full_logits(**inputs).log_softmax(-1)
    scored = y != -100
    logp = torch.where(scored, log_p.gather(-1, y.clamp_min(0)[..., None])[..., 0], 0.0)
    n = scored.sum(-1)
    logps = torch.zeros(S, device=DEVICE)
    for s in range(S):
        mine, other = logp[s, scored[s]], int(n[(s + S // 2) % S])
        beyond = getattr(loss, "ld_alpha", None)
        logps[s] = mine[:other].sum() + (1.0 if beyond is None else beyond) * mine[other:].sum()
        logps[s] /= n[s] if loss.average else 1
    got, ref = everything(call, inputs), reference(loss)
    torch.testing.assert_close(got["logp"], logp)
    torch.testing.assert_close(got["logps"], logps)
    torch.testing.assert_close(got["rewards"], loss.beta * (logps if ref is None else logps - ref))
    nll = -logp[: S // 2].sum() / n[: S // 2].sum() * bool(getattr(loss, "nll", 0))
    torch.testing.assert_close(got["nll"], nll)
    torch.testing.assert_close(got["entropy"], -(log_p.exp() * log_p).sum(-1) * scored)
    assert torch.equal(got["is_top1"], (log_p.argmax(-1) == y) & scored)


@every_loss
@pytest.mark.parametrize("rows", [1, 4, 15, 20])
def test_the_budget_does_not_matter(loss: PairLoss | KTO, rows: int) -> None:
    torch.testing.assert_close(everything(*calls(loss), rows), everything(*calls(loss)))


@every_loss
def test_the_order_of_pairs_does_not_matter(loss: PairLoss | KTO) -> None:
    half = torch.tensor([2, 0, 3, 1], device=DEVICE)
    order, want = torch.cat((half, half + S // 2)), everything(*calls(loss))
    moved = {n: t[order] if t.shape[:1] == (S,) else t for n, t in want.items()}
    torch.testing.assert_close(everything(*calls(loss, order), rows=15), moved)


@every_loss
@pytest.mark.parametrize("asked", ["x", "w", "b", "xw", "wb"])
def test_subsets_of_gradients(loss: PairLoss | KTO, asked: str) -> None:
    """A frozen head, a frozen input, and the rest: the same as where all are asked for."""
    call, inputs = calls(loss)
    want, got = everything(call, inputs), everything(call, inputs, 15, asked)
    assert len(got) == len(want) - 3 + len(asked)
    torch.testing.assert_close(got, {n: want[n] for n in got})


@every_loss
def test_nothing_scored(loss: PairLoss | KTO) -> None:
    call, inputs = calls(loss)
    got = everything(partial(call, y=torch.full((S, T), -100, device=DEVICE)), inputs)
    assert all(t.isfinite().all() for t in got.values())
    assert not any(got[n].any() for n in ("dx", "dw", "db", "logps", "nll", "logp"))


@every_loss
def test_no_sequences(loss: PairLoss | KTO) -> None:
    call, inputs = calls(loss, torch.arange(0, device=DEVICE))
    got = everything(call, inputs)
    assert got["loss"] == 0 and got["dx"].shape == (0, T, H) and got["logps"].shape == (0,)
    assert not got["dw"].any() and not got["db"].any()


@every_loss
def test_no_gradient_is_taken_under_no_grad(loss: PairLoss | KTO) -> None:
    call, inputs = calls(loss)
    with torch.no_grad():
        value, stats = call(**{n: t.requires_grad_() for n, t in inputs.items()})
    want = everything(call, inputs)
    assert not value.requires_grad
    torch.testing.assert_close((value, stats.logps), (want["loss"], want["logps"]))


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.parametrize("loss", [WEIGHTED, KTO()], ids=["pairs", "kto"])
def test_compiles_whole_for_all_sizes(loss: PairLoss | KTO) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor" if GPU else "aot_eager")

    def step(x: Tensor, w: Tensor, y: Tensor, good: Tensor, ref: Tensor) -> Tensor:
        if isinstance(loss, KTO):
            return linear_kto_loss(x, w, y, good, loss, ref_logps=ref, kl=ref.mean())[0]
        nll_y = torch.where(y == -100, 1, y)
        return linear_preference_loss(x, w, y, loss, ref_logps=ref, nll_y=nll_y)[0]

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    w = operands()["w"].requires_grad_()
    for s, t in ((4, 6), (8, 12), (2, 33)):
        x, each = torch.randn(s, t, H, device=DEVICE, requires_grad=True), torch.arange(s)
        y, each = uneven_labels(s, t, V), each.to(DEVICE)
        got, want = (f(x, w, y, each % 3 == 0, -1.0 * each) for f in (compiled, step))
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(o, (x, w)) for o in (got, want)))
    assert counter.frame_count <= 3


# The pieces


def test_token_weights() -> None:
    y = torch.tensor(
        [
            [-100, 1, 2, -100, 3],
            [4, -100, -100, -100, -100],  # chosen: 3 and 1
            [5, -100, -100, -100, -100],
            [-100] * 5,
        ]
    ).to(DEVICE)  # rejected: 1 and 0
    ones = torch.tensor([[0.0, 1, 1, 0, 1], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0] * 5]).to(DEVICE)
    third = torch.tensor([3.0, 1, 1, 1]).to(DEVICE)[:, None]
    ld = ones.clone()
    ld[0, [2, 4]] = ld[1, 0] = 0.25
    assert torch.equal(token_weights(y), ones)
    assert torch.equal(token_weights(y, average=True), ones / third)
    assert torch.equal(token_weights(y, ld_alpha=0.25), ld)
    assert torch.equal(token_weights(y, average=True, ld_alpha=0.25), ld / third)
    assert torch.equal(token_weights(y, ld_alpha=1.0), ones)
    at_3 = token_weights(y.masked_fill(y == -100, 3), ignore_index=3, dtype=torch.float64)
    ones[0, 4] = 0
    assert torch.equal(at_3, ones.double())


@pytest.mark.parametrize("ignore_index", [-100, 4])
@pytest.mark.parametrize("kw", [{}, dict(average=True), dict(average=True, ld_alpha=0.3)], ids=str)
def test_log_probabilities_of_sequences(kw: dict[str, Any], ignore_index: int) -> None:
    y = uneven_labels(S, T, V)
    y = y.masked_fill(y == -100, ignore_index)
    weights = token_weights(y, ignore_index=ignore_index, **kw)

    def ref(**tensors: Tensor) -> Tensor:
        log_p = full_logits(**tensors).log_softmax(-1)
        return (log_p.gather(-1, y.clamp_min(0)[..., None])[..., 0] * weights).sum(-1)

    op = partial(linear_sequence_logprob, y=y, ignore_index=ignore_index, memory_budget=300, **kw)
    assert_no_worse_than_torch(op, ref, operands(), torch.float32)
    with torch.no_grad():
        assert op(**operands()).shape == (S,)


@pytest.mark.parametrize("shape", [(3, H), (3, 5, H), (2, 3, 5, H)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_means_of_logits(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, w, b = (torch.randn(s, device=DEVICE).to(dtype) for s in (shape, (V, H), (V,)))
    for bias in (None, b):
        got = mean_logits(x.requires_grad_(), w, bias)
        z = F.linear(x.double(), w.double(), None if bias is None else bias.double())
        want = z.flatten(1).mean(1).to(got.dtype).detach()
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert not got.requires_grad
        torch.testing.assert_close(got, want)
        with torch.autocast(DEVICE, torch.bfloat16):
            assert torch.equal(mean_logits(x, w, bias), got)


# What does not fit


def bad_call(**kw: Any) -> Call:
    call = linear_kto_loss if "desirable" in kw else linear_preference_loss
    ones, x, w = torch.ones(4, 3).long(), torch.zeros(4, 3, 5), torch.zeros(7, 5)
    fitting = dict(x=x, w=w, y=ones, loss=DPO(), ref_logps=torch.zeros(4))
    return partial(call, **fitting | kw)


Y, GOOD = torch.ones(4, 3).long(), torch.ones(4).bool()
OUTSIDE = r"labels must lie in \[0, 7\) or be ignore_index=-100, got 7 at position 0"
REFUSED = [
    (dict(ref_logps=None), "give a reference in Pairs, or set reference_free"),
    (dict(loss=ORPO()), "is reference-free: give none"),
    (dict(ref_logps=torch.zeros(3)), r"ref_logps must be \(4,\)"),
    (dict(ref_logps=torch.zeros(4, requires_grad=True)), "need no gradient, got .*=True"),
    (dict(nll_y=Y), "the loss an NLL term, got .* nll=0.0; leave it out or set nll_weight"),
    (dict(nll_y=Y[:2], loss=ORPO(), ref_logps=None), r"nll_y must have y's shape \(4, 3\), .*2, 3"),
    (dict(nll_y=Y * 7, loss=ORPO(), ref_logps=None), OUTSIDE),
    (dict(nll_y=Y + 1, y=Y * 7, loss=ORPO(), ref_logps=None), OUTSIDE),
    (dict(nll_y=Y * 7, y=-100 * Y, loss=ORPO(), ref_logps=None), OUTSIDE),
    (dict(y=Y * 7), OUTSIDE),
    (dict(y=Y[:, :2]), r"labels must have shape \(4, 3\)"),
    (dict(y=Y[:3], x=torch.zeros(3, 3, 5), ref_logps=torch.zeros(3)), "S even for pairs"),
    (dict(y=Y[:, 0], x=torch.zeros(4, 5)), r"y must be \(S, T\)"),
    (dict(y=Y.float()), "labels must be integers"),
    (dict(b=torch.zeros(6)), r"b must be \(7,\)"),
    (dict(outputs=("entropie",)), "outputs may be"),
    (dict(x=torch.ones(3, 2, 4), y=torch.zeros(3, 2).long()), r"S even for pairs, got \(3, 2\)"),
    (dict(x=torch.ones(2, 4), y=torch.zeros(2).long()), r"y must be \(S, T\).*got \(2,\)"),
    (dict(labels=LabelScan(Y[:, :2], 7)), "labels must be a LabelScan of y"),
    (dict(desirable=GOOD[:3], loss=KTO()), r"desirable must be \(4,\), got \(3,\)"),
    (dict(desirable=GOOD.long(), loss=KTO()), "desirable must be bool"),
    (dict(desirable=GOOD, loss=KTO(), ref_logps=torch.zeros(4, 1)), r"ref_logps must be \(4,\)"),
    (dict(desirable=GOOD, loss=KTO(), ref_logps=torch.zeros(4, requires_grad=True)), "no gradient"),
    (dict(desirable=GOOD, loss=KTO(), kl=torch.zeros(3)), "kl must be a scalar"),
    (dict(desirable=GOOD, loss=KTO("apo_zero_unpaired"), kl=0.1), "has no kl"),
]  # fmt: skip


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(("kw", "match"), REFUSED, ids=[f"{i}" for i in range(len(REFUSED))])
def test_what_does_not_fit_is_refused(kw: dict[str, Any], match: str, grad: bool) -> None:
    kw["w"] = torch.zeros(7, 5, requires_grad=grad)
    with pytest.raises(ValueError, match=match):
        bad_call(**kw)()


def test_labels_that_differ_are_nan_without_a_count() -> None:
    y = labels(S * T, V).view(S, T)
    call = partial(linear_preference_loss, **operands(), loss=ORPO(), nll_y=(y + 1) % V, y=y)
    assert call()[0].isfinite() and call(compact=False)[0].isnan()


# Memory, where torch's profiler sees every byte


def peak(loss: PairLoss | KTO, x: Tensor, w: Tensor, y: Tensor, budget: int) -> int:
    kw: Any = dict(ref_logps=None if isinstance(loss, ORPO) else torch.zeros(len(y)))
    op: Any = linear_preference_loss
    if isinstance(loss, KTO):
        op = partial(linear_kto_loss, desirable=torch.arange(len(y)) % 2 == 0)
    with PeakMemory() as memory:
        op(x=x, w=w, y=y, loss=loss, memory_budget=budget, **kw)[0].backward()
    return memory.bytes


@pytest.mark.skipif(GPU, reason="the allocator's own figures: see benchmarks/NOTES.md")
@pytest.mark.parametrize(
    "loss", [DPO(), WEIGHTED, ORPO(), KTO()], ids=["dpo", "wpo", "orpo", "kto"]
)
def test_a_tenth_of_eager_and_that_of_scored_tokens(loss: PairLoss | KTO) -> None:
    S, T, H, V, scored = 4, 128, 16, 8192, 32
    torch.manual_seed(0)
    w, y = torch.randn(V, H, requires_grad=True), torch.randint(V, (S, T))
    x = torch.randn(S, T, H, requires_grad=True)
    budget = S * T * V * 4 // 32
    with PeakMemory() as eager:
        logp = (x @ w.T).log_softmax(-1).gather(-1, y[..., None])[..., 0].sum(-1)
        chosen, rejected = logp.chunk(2)
        (-F.logsigmoid(0.1 * (chosen - rejected)).mean()).backward()
    assert peak(loss, x, w, y, budget) <= eager.bytes / 10
    peaks = []
    for T in (scored, 16 * scored):
        x, y = torch.randn(S, T, H, requires_grad=True), torch.full((S, T), -100)
        y[:, -scored:] = torch.randint(V, (S, scored))
        peaks.append(peak(loss, x, w, y, budget))
    dx = S * 15 * scored * H * 4
    assert peaks[1] - peaks[0] <= 1.5 * dx, "more than dx and a few numbers a token"
