"""Preference losses under upstream's names: signatures, what is returned, and what is refused."""

import inspect
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import full_logits
from liger_core.losses import CPO, DPO, KTO, ORPO, Pairs, SimPO
from liger_kernel import chunked_loss
from liger_kernel.chunked_loss import (
    LigerFusedLinearCPOLoss,
    LigerFusedLinearDPOLoss,
    LigerFusedLinearGRPOLoss,
    LigerFusedLinearKTOLoss,
    LigerFusedLinearORPOLoss,
    LigerFusedLinearSimPOLoss,
    functional,
)
from numerics import DEVICE, assert_no_worse_than_torch, run

B, T, H, V = 6, 5, 16, 13
HEAD = "lin_weight, _input, target, bias=None"
REFERENCE = "ref_input=None, ref_weight=None, ref_bias=None"
USUAL = "_input, weight, target, bias=None, ignore_index=-100, beta=0.1"
# By class, as Liger-Kernel 0.8.5 has them: of the constructor, of forward, and of the function.
SIGNATURES = {
    "DPO": (
        "ignore_index=-100, beta=0.1, alpha=1.0, compute_nll_loss=False, compiled=True, "
        "use_ref_model=True, average_log_prob=False, chunk_size=1, loss_type='sigmoid', "
        "label_smoothing=0.0, discopop_tau=0.05",
        f"{HEAD}, {REFERENCE}",
        f"_input, weight, target, bias=None, {REFERENCE}, ignore_index=-100, beta=0.1, "
        "compute_nll_loss=False, compiled=True, use_ref_model=True, average_log_prob=False, "
        "chunk_size=1, loss_type='sigmoid', label_smoothing=0.0, discopop_tau=0.05, alpha=1.0",
    ),
    "ORPO": (
        "ignore_index=-100, beta=0.1, compute_nll_loss=True, compiled=True, chunk_size=1",
        f"{HEAD}, nll_target=None",
        f"{USUAL}, compute_nll_loss=True, nll_target=None, compiled=True, chunk_size=1",
    ),
    "CPO": (
        "ignore_index=-100, beta=0.1, alpha=1.0, label_smoothing=0.0, compute_nll_loss=True, "
        "compiled=True, average_log_prob=False, chunk_size=1",
        HEAD,
        f"{USUAL}, alpha=1.0, label_smoothing=0.0, compute_nll_loss=True, compiled=True, "
        "average_log_prob=False, chunk_size=1",
    ),
    "SimPO": (
        "ignore_index=-100, beta=0.1, alpha=1.0, label_smoothing=0.0, compute_nll_loss=True, "
        "compiled=True, gamma=0.5, chunk_size=1",
        HEAD,
        f"{USUAL}, alpha=1.0, label_smoothing=0.0, compute_nll_loss=False, compiled=True, "
        "gamma=0.5, chunk_size=1",
    ),
    "KTO": (
        "ignore_index=-100, beta=0.1, compiled=True, use_ref_model=False, "
        "average_log_prob=False, chunk_size=1",
        f"_input, lin_weight, target, bias=None, preference_labels=None, {REFERENCE}, kl=None",
        f"_input, weight, target, preference_labels, bias=None, {REFERENCE}, kl=None, "
        "ignore_index=-100, beta=0.1, compiled=True, use_ref_model=True, "
        "average_log_prob=False, chunk_size=1",
    ),
}
GRPO = (
    "beta=0.04, compiled=True, use_ref_model=True, chunk_size=1, epsilon_low=0.2, "
    "epsilon_high=0.2, loss_type='dapo', max_completion_length=None, "
    "importance_sampling_level='token', sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, "
    "temperature=1.0, delta=None, use_bias_correction_kl=False, vespo_k_pos=2.0, "
    "vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0",
    "_input, lin_weight, selected_token_ids, attention_mask, advantages, bias=None, "
    "ref_per_token_logps=None, old_per_token_logps=None, ref_input=None, ref_weight=None, "
    "ref_bias=None, vllm_is_ratio=None, num_items_in_batch=None",
)


def signature(fn: Callable[..., Any]) -> tuple[str, list[str]]:
    """What may be given by position, with defaults, and the names of what may not."""
    parameters = [p for p in inspect.signature(fn).parameters.values() if p.name != "self"]
    bare = [p.replace(annotation=p.empty) for p in parameters]
    positional = ", ".join(str(p) for p in bare if p.kind is p.POSITIONAL_OR_KEYWORD)
    return positional, [p.name for p in bare if p.kind is not p.POSITIONAL_OR_KEYWORD]


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_upstreams(name: str) -> None:
    made, forward, function = SIGNATURES[name]
    module = getattr(chunked_loss, f"LigerFusedLinear{name}Loss")
    form = getattr(functional, f"liger_fused_linear_{name.lower()}")
    assert signature(module.__init__) == (made, ["memory_budget"])
    assert signature(module.forward) == (forward, [])
    assert signature(form) == (function, ["memory_budget"])
    assert issubclass(module, nn.Module) and module.__name__ in chunked_loss.__all__
    assert form.__name__ in functional.__all__ and len(functional.__all__) == len(SIGNATURES)


def test_signatures_of_grpo_are_upstreams() -> None:
    made, called = GRPO
    assert signature(LigerFusedLinearGRPOLoss.__init__) == (made, ["memory_budget"])
    assert signature(LigerFusedLinearGRPOLoss.forward) == (called, [])


def test_imports_need_neither_transformers_nor_trl() -> None:
    hidden = "import sys\nfor n in ('transformers', 'trl', 'accelerate', 'peft', 'datasets'):\n"
    hidden += "    sys.modules[n] = None\n"
    used = "import torch\nfrom liger_kernel.chunked_loss import LigerFusedLinearORPOLoss as Loss\n"
    used += "w, x = torch.ones(7, 4), torch.ones(2, 3, 4)\n"
    used += "print(Loss()(w, x, torch.ones(2, 3).long())[0].item())"
    path = f"import sys\nsys.path[:] = {sys.path!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", path + hidden + used], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 0


# Values and gradients, against full logits


def operands() -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = dict(x=(B, T, H), w=(V, H), b=(V,), ref_x=(B, T, H), ref_w=(V, H), ref_b=(V,))
    return {
        n: torch.randn(s, device=DEVICE) / (4 if n[-1] == "w" else 1) for n, s in shapes.items()
    }


def targets(lengths: tuple[int, ...] = (3, 1, 5, 2, 4, 2)) -> Tensor:
    y = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))
    return y.masked_fill(torch.arange(T) < T - torch.tensor(lengths)[:, None], -100).to(DEVICE)


def log_probs(z: Tensor, y: Tensor, average: bool) -> Tensor:
    """(B,) sums or means over the scored tokens."""
    log_p = z.log_softmax(-1)
    logps = list[Tensor]()
    for s in range(B):
        at = (y[s] != -100).nonzero()[:, 0]
        total = log_p[s, at, y[s, at]].sum()
        logps.append(total / max(len(at), 1) if average else total)
    return torch.stack(logps)


def dense_pairs(
    x: Tensor, w: Tensor, b: Tensor | None = None, ref_x: Tensor | None = None,
    ref_w: Tensor | None = None, ref_b: Tensor | None = None, *, y: Tensor, loss: Any,
    nll_y: Tensor | None = None, metrics: list[Tensor] | None = None,
) -> Tensor:  # fmt: skip
    z, half = full_logits(x, w, b), B // 2
    logps, ref = log_probs(z, y, loss.average), None
    if ref_x is not None and ref_w is not None:
        ref = log_probs(full_logits(ref_x, ref_w, ref_b).detach(), y, loss.average)
    lengths = (y != -100).sum(-1).chunk(2)
    both = Pairs(*logps.chunk(2), *((None, None) if ref is None else ref.chunk(2)), *lengths)
    nll_y = y if nll_y is None else nll_y
    chosen = [z[s, t].log_softmax(-1)[nll_y[s, t]]
              for s in range(half) for t in range(T) if nll_y[s, t] != -100]  # fmt: skip
    nll = -torch.stack(chosen).mean()
    if metrics is not None:
        rewards = loss.beta * (logps if ref is None else logps - ref)
        metrics += [*logps.chunk(2), z[:half].mean(), z[half:].mean(), nll * bool(loss.nll)]
        metrics += rewards.chunk(2)
        if isinstance(loss, ORPO):
            odds = (logps.exp() / (1 - logps.exp())).log()
            ratio = odds[:half] - odds[half:]
            metrics += [nn.functional.logsigmoid(ratio).mean(), ratio.mean()]
    return loss(both).mean() + loss.nll * nll


UPSTREAM_TYPES = ("sigmoid", "hinge", "nca_pair", "robust", "bco_pair", "apo_zero", "apo_down")
# What is built, and the definition; those of DPO have a reference unless they say otherwise.
MODULES: list[tuple[Any, Any]] = [
    *((LigerFusedLinearDPOLoss(loss_type=t), DPO(t)) for t in UPSTREAM_TYPES),
    (LigerFusedLinearDPOLoss(loss_type="sppo_hard", beta=0.02), DPO("sppo_hard", beta=0.02)),
    (LigerFusedLinearDPOLoss(loss_type="exo_pair", label_smoothing=0.1),
     DPO("exo_pair", label_smoothing=0.1)),
    (LigerFusedLinearDPOLoss(loss_type="robust", label_smoothing=0.2),
     DPO("robust", label_smoothing=0.2)),
    (LigerFusedLinearDPOLoss(loss_type="discopop", discopop_tau=0.5),
     DPO("discopop", discopop_tau=0.5)),
    (LigerFusedLinearDPOLoss(alpha=0.7, compute_nll_loss=True, average_log_prob=True, beta=0.3),
     DPO(average=True, beta=0.3, nll_weight=0.7)),
    (LigerFusedLinearDPOLoss(use_ref_model=False), DPO(reference_free=True)),
    (LigerFusedLinearDPOLoss(loss_type="ipo"), DPO("ipo")),  # upstream raises
    (LigerFusedLinearORPOLoss(), ORPO()),
    (LigerFusedLinearORPOLoss(beta=0.5, compute_nll_loss=False), ORPO(beta=0.5, nll_weight=0.0)),
    (LigerFusedLinearCPOLoss(), CPO()),
    (LigerFusedLinearCPOLoss(beta=0.3, alpha=0.5, label_smoothing=0.2, average_log_prob=True),
     CPO(beta=0.3, nll_weight=0.5, label_smoothing=0.2, average=True)),
    (LigerFusedLinearCPOLoss(compute_nll_loss=False), CPO(nll_weight=0.0)),
    (LigerFusedLinearSimPOLoss(), SimPO(nll_weight=1.0)),
    (LigerFusedLinearSimPOLoss(beta=0.8, gamma=1.0, label_smoothing=0.1, compute_nll_loss=False),
     SimPO(beta=0.8, gamma=1.0, label_smoothing=0.1)),
]  # fmt: skip


def positional(module: nn.Module, t: dict[str, Tensor], y: Tensor) -> tuple[Tensor, Any]:
    """The module, called as its forward orders its arguments."""
    args = [t["w"], t["x"], y, t["b"]]
    referenced = getattr(module, "use_ref_model", False)
    return module(*args, *((t["ref_x"], t["ref_w"], t["ref_b"]) if referenced else ()))


@pytest.mark.parametrize(("module", "loss"), MODULES, ids=[str(loss) for _, loss in MODULES])
def test_modules_are_those_of_full_logits(module: nn.Module, loss: Any) -> None:
    inputs, y = operands(), targets()
    frozen = {n: t for n, t in inputs.items() if n.startswith("ref")}
    trained = {n: t for n, t in inputs.items() if n not in frozen}
    given = frozen if getattr(module, "use_ref_model", False) else {}

    def dense(metrics: list[Tensor] | None = None, **t: Tensor) -> Tensor:
        refs = {n: r.to(t["x"].dtype) for n, r in given.items()}
        return dense_pairs(**t, **refs, y=y, loss=loss, metrics=metrics)

    assert_no_worse_than_torch(
        lambda **t: positional(module, t | frozen, y)[0], dense, trained, torch.float32
    )
    leaves = {n: t.requires_grad_() for n, t in trained.items()}
    value, metrics = positional(module, leaves | frozen, y)
    want = list[Tensor]()
    dense(want, **leaves)
    assert isinstance(metrics, tuple) and value.shape == () and value.requires_grad
    assert len(metrics) == (9 if isinstance(loss, ORPO) else 7)
    assert not any(m.requires_grad for m in metrics)
    torch.testing.assert_close([*metrics], [t.detach() for t in want])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["same", "prompts", "others"])
def test_orpo_as_users_type_it(kind: str, bias: bool) -> None:
    inputs, y = operands(), targets()
    lm_head = nn.Linear(H, V, bias=bias, device=DEVICE)
    x = inputs["x"].requires_grad_()
    every = torch.randint(V, y.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    nll_y = {"same": None, "prompts": torch.where(y == -100, every, y), "others": every}[kind]
    more = dict(bias=lm_head.bias) | ({} if nll_y is None else dict(nll_target=nll_y))
    loss, metrics = LigerFusedLinearORPOLoss()(lm_head.weight, x, y, **more)
    leaves, want_metrics = [x, *lm_head.parameters()], list[Tensor]()
    want = dense_pairs(*leaves, y=y, loss=ORPO(), nll_y=nll_y, metrics=want_metrics)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close([*metrics], [t.detach() for t in want_metrics])
    loss.backward()
    grads = [t.grad for t in leaves]
    torch.testing.assert_close(grads, [*torch.autograd.grad(want, leaves)])


def dense_kto(
    t: dict[str, Tensor], y: Tensor, good: Tensor, kl: Tensor | None, loss: KTO, referenced: bool
) -> tuple[Tensor, list[Tensor]]:
    z = full_logits(t["x"], t["w"], t["b"])
    logps, ref = log_probs(z, y, loss.average), None
    if referenced:
        ref = log_probs(full_logits(t["ref_x"], t["ref_w"], t["ref_b"]).detach(), y, loss.average)
    rewards = loss.beta * (logps if ref is None else logps - ref)
    kl = None if kl is None else kl.to(logps)
    sums = [m[side].sum() for m in (logps, z, rewards) for side in (good, ~good)]
    return loss(logps, ref, good, kl).mean(), sums


@pytest.mark.parametrize("kl", [None, torch.tensor(0.3), torch.linspace(0, 1, B)], ids=str)
@pytest.mark.parametrize("referenced", [True, False])
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("good", [(1, 0, 0, 1, 1, 0), (1,) * B, (0,) * B], ids=str)
def test_kto(good: tuple[int, ...], average: bool, referenced: bool, kl: Tensor | None) -> None:
    """Whatever chunk_size says: upstream's broadcasts, or raises, where that is not 1."""
    y, side = targets(), torch.tensor(good, device=DEVICE).bool()
    kl = None if kl is None else kl.to(DEVICE)
    frozen = {n: t for n, t in operands().items() if n.startswith("ref")}
    trained = {n: t for n, t in operands().items() if n not in frozen}
    refs = (frozen["ref_x"], frozen["ref_w"], frozen["ref_b"]) if referenced else (None,) * 3
    loss = KTO(beta=0.3, average=average)

    def dense(**t: Tensor) -> Tensor:
        given = t | {n: r.to(t["x"].dtype) for n, r in frozen.items()}
        return dense_kto(given, y, side, kl, loss, referenced)[0]

    results = list[dict[str, Tensor]]()
    _, want = dense_kto(operands(), y, side, kl, loss, referenced)
    for chunk_size in (1, 2, 3, B):
        module = LigerFusedLinearKTOLoss(
            beta=0.3, use_ref_model=referenced, average_log_prob=average, chunk_size=chunk_size
        )
        op = lambda x, w, b, m=module: m(x, w, y, b, side, *refs, kl)[0]  # noqa: E731
        assert_no_worse_than_torch(op, dense, trained, torch.float32)
        results.append(run(op, trained, torch.float32, [torch.ones((), device=DEVICE)]))
        x, w, b = (t.requires_grad_() for t in trained.values())
        _, metrics = module(x, w, y, b, side, *refs, kl)
        assert len(metrics) == 6 and not any(m.requires_grad or m.shape for m in metrics)
        torch.testing.assert_close([*metrics], want)
    assert all(torch.equal(r[n], results[0][n]) for r in results for n in r)


@pytest.mark.parametrize(("module", "loss"), MODULES, ids=[str(loss) for _, loss in MODULES])
def test_a_budget_and_the_functional_form_change_nothing(module: Any, loss: Any) -> None:
    inputs, y = operands(), targets()
    name = type(module).__name__.removeprefix("LigerFusedLinear").removesuffix("Loss").lower()
    form = getattr(functional, f"liger_fused_linear_{name}")
    refs = [inputs[n] for n in inputs if n.startswith("ref")] if name == "dpo" else []
    budgeted = type(module)(**module.options | dict(memory_budget=4 * V * 4))
    want = positional(module, inputs, y)
    kw = {**budgeted.options, "chunk_size": 3}
    got = form(inputs["x"], inputs["w"], y, inputs["b"], *refs, **kw)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(positional(budgeted, inputs, y), want)
    assert f"beta={loss.beta}" in repr(module)


# Edges


@pytest.mark.parametrize("module", [m for m, _ in MODULES], ids=repr)
@pytest.mark.parametrize("lengths", [(0, 1, 5, 2, 4, 0), (0, 0, 0, 3, 1, 2), (0,) * 6], ids=str)
def test_empty_completions_are_finite(lengths: tuple[int, ...], module: nn.Module) -> None:
    leaves = {n: t.requires_grad_() for n, t in operands().items()}
    value, metrics = positional(module, leaves, targets(lengths))
    grads = torch.autograd.grad(value, [leaves[n] for n in "xwb"])
    assert all(t.isfinite().all() for t in (value, *metrics, *grads))
    assert any(lengths) or not any(grad.any() for grad in grads)


def test_options_are_attributes_that_a_call_reads() -> None:
    inputs, y, module = operands(), targets(), LigerFusedLinearSimPOLoss()
    module.gamma, module.ignore_index = 2.0, -1
    want = LigerFusedLinearSimPOLoss(gamma=2.0)(inputs["w"], inputs["x"], y)
    got = module(inputs["w"], inputs["x"], y.masked_fill(y == -100, -1))
    torch.testing.assert_close(got, want)


DPO_, W, X, Y = LigerFusedLinearDPOLoss, torch.ones(7, 4), torch.ones(3, 2, 4), torch.ones(3, 2)
ODD = W, X, Y.long()
REFUSED = [
    (lambda: DPO_(loss_type="exo_pair"), "exo_pair needs a label_smoothing above 0"),
    (lambda: DPO_(loss_type="robust", label_smoothing=0.6), r"must lie in \[0, 0.5\), got 0.6"),
    (lambda: DPO_(loss_type="simpo"), "loss_type must be one of sigmoid, .*; got 'simpo'"),
    (lambda: DPO_(loss_type="hinge", label_smoothing=0.1), "label_smoothing=0.1 has no meaning"),
    (lambda: DPO_(loss_type="ipo", average_log_prob=True), "average=True has no meaning"),
    (lambda: DPO_(discopop_tau=0.1), "discopop_tau=0.1 has no meaning"),
    (lambda: LigerFusedLinearORPOLoss(beta=0.0), "beta must be positive and finite, got 0.0"),
    (lambda: LigerFusedLinearCPOLoss(alpha=-1.0), "nll_weight must be at least 0"),
    (lambda: LigerFusedLinearSimPOLoss(gamma=-0.5), "gamma must be at least 0"),
    (lambda: LigerFusedLinearKTOLoss(beta=-0.1), "beta must be positive"),
    (lambda: DPO_()(*ODD), "use_ref_model needs ref_input and ref_weight"),
    (lambda: LigerFusedLinearKTOLoss(use_ref_model=True)(X, W, Y.long(), None, Y[:, 0] > 0),
     "use_ref_model needs ref_input and ref_weight"),
    (lambda: LigerFusedLinearKTOLoss()(X, W, Y.long()), "preference_labels, .* says which"),
    (lambda: LigerFusedLinearKTOLoss()(X, W, Y.long(), None, Y[:2, 0] > 0), r"must be \(3,\)"),
    (lambda: DPO_()(*ODD, None, X, W), "S even for pairs"),
    (lambda: DPO_(use_ref_model=False)(*ODD), "S even for pairs"),
    (lambda: LigerFusedLinearORPOLoss()(*ODD), "S even for pairs"),
    (lambda: LigerFusedLinearORPOLoss()(*ODD, nll_target=Y.long()), "S even for pairs"),
    (lambda: LigerFusedLinearCPOLoss()(*ODD), "S even for pairs"),
    (lambda: LigerFusedLinearSimPOLoss()(*ODD), "S even for pairs"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "match"), REFUSED, ids=[f"{i}-{m[:30]}" for i, (_, m) in enumerate(REFUSED)]
)
def test_what_does_not_fit_is_refused(call: Callable[[], object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()
