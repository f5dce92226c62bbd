"""Values and gradients of every op, against fp64, by the tolerance policy."""

import pytest
import torch

from cases import BRIEF, CASES, Case
from liger_core import layer_norm, linear_cross_entropy, rms_norm
from liger_core.ops import row_norm
from liger_core.ops.layer_norm import layer_norm_ref
from liger_core.ops.linear_logprob import linear_logprob_ref
from liger_core.ops.rms_norm import rms_norm_ref
from numerics import DEVICE, IMPLS, assert_no_worse_than_torch


@pytest.mark.parametrize("impl, dtype", IMPLS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_no_worse_than_torch(case: Case, impl: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assert_no_worse_than_torch(lambda **t: case.op(**t, impl=impl), case.ref, case.make(), dtype)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_fp64_is_computed_in_fp64(case: Case) -> None:
    torch.manual_seed(0)
    inputs = {name: t.double() for name, t in case.make().items()}
    got, want = case.op(**inputs), case.ref(**inputs)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", BRIEF, ids=repr)
def test_the_policy_rejects_five_percent(case: Case, dtype: torch.dtype) -> None:
    torch.manual_seed(0)

    def off(**inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        out = case.ref(**inputs)
        return tuple(o * 1.05 for o in out) if isinstance(out, tuple) else out * 1.05

    with pytest.raises(AssertionError, match="out0: error"):
        assert_no_worse_than_torch(off, case.ref, case.make(), dtype)


@pytest.mark.parametrize("impl, dtype", [i for i in IMPLS if i[1] != torch.float32], ids=str)
def test_a_promoted_norm_is_the_models_own(impl: str, dtype: torch.dtype) -> None:
    torch.manual_seed(
        0
    )  # fp32 weight, half activations: what q_norm and k_norm see in mixed models
    x, w = torch.randn(5, 48, device=DEVICE, dtype=dtype), torch.randn(48, device=DEVICE)
    y = rms_norm(x, w, 0.1, impl=impl)  # pyright: ignore
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, rms_norm_ref(x, w, 0.1))
    assert rms_norm(x, w, 0.1, casting="gemma", impl=impl).dtype == dtype  # pyright: ignore


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_many_partial_sums(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than one block of the kernel that adds them up."""
    monkeypatch.setattr(row_norm, "sm_count", lambda x: 200)
    torch.manual_seed(0)
    x, w, b = (torch.randn(s, device=DEVICE) for s in ((300, 1030), (1030,), (1030,)))
    assert_no_worse_than_torch(
        lambda **t: layer_norm(**t, impl=impl),  # pyright: ignore
        lambda **t: layer_norm_ref(**t),
        {"x": x, "w": w, "b": b},
        torch.float32,
    )


@pytest.mark.parametrize("chunks", [1, 4, 5, 64])
@pytest.mark.parametrize("impl, dtype", IMPLS, ids=str)
def test_dw_does_not_wear_out_over_chunks(impl: str, dtype: torch.dtype, chunks: int) -> None:
    torch.manual_seed(0)
    M, H, V = 64, 8, 16
    y = torch.randint(V, (M,), device=DEVICE)
    assert_no_worse_than_torch(
        lambda x, w: linear_cross_entropy(
            x,
            w,
            y,
            memory_budget=M // chunks * V * x.element_size(),
            impl=impl,  # pyright: ignore
        ),
        lambda x, w: -linear_logprob_ref(x, w, y).mean(),
        {"x": torch.randn(M, H, device=DEVICE), "w": torch.randn(V, H, device=DEVICE)},
        dtype,
    )


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_fp16_survives_a_loss_scale(impl: str, reduction: str) -> None:
    """GradScaler's 65,536 on a loss whose own gradient is far below fp16's smallest number."""
    torch.manual_seed(0)
    M, H, V = 512, 16, 1024
    y = torch.randint(V // 2, (M,), device=DEVICE)  # the other half is never a target
    x = torch.randn(M, H, device=DEVICE).half()
    w = (torch.randn(V, H, device=DEVICE) / 4).half()
    scale = 65536.0 if reduction == "mean" else 65536.0 / M

    def loss(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        rows = linear_cross_entropy(x, w, y, reduction=reduction, impl=impl)  # pyright: ignore
        return rows.sum() * scale

    def exact(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        rows = -linear_logprob_ref(x, w, y)
        return (rows.mean() if reduction == "mean" else rows.sum()) * scale

    grads = {}
    for name, fn, dtype in (("ours", loss, x.dtype), ("fp64", exact, torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in (x, w)]
        grads[name] = torch.autograd.grad(fn(*leaves), leaves)
    for ours, want in zip(grads["ours"], grads["fp64"], strict=True):
        assert (ours - want).norm() <= 2e-3 * want.norm()
    dw, want = grads["ours"][1][V // 2 :], grads["fp64"][1][V // 2 :]
    assert (dw - want).norm() <= 2e-3 * want.norm(), "rows that are never a target"
