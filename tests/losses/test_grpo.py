"""GRPO's loss under upstream's name, against full logits; test_trl_old.py has every type's."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cases import full_logits
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
from numerics import DEVICE, assert_no_worse_than_torch

B, T, H, V = 4, 6, 16, 13


def drawn() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What is trained, and what is given."""
    torch.manual_seed(0)
    trained = dict(x=torch.randn(B, T, H), w=torch.randn(V, H) / 8, b=torch.randn(V) / 4)
    given = dict(
        y=torch.randint(V, (B, T)),
        mask=(torch.arange(T) < torch.tensor([[6], [3], [1], [0]])).long(),
        a=torch.tensor([1.0, -0.5, 2.0, -1.0]),
        old=-2 - torch.rand(B, T),
        ref=-2 - torch.rand(B, T),
        sampler=torch.rand(B, T) + 0.5,
    )
    return tuple({n: t.to(DEVICE) for n, t in some.items()} for some in (trained, given))  # pyright: ignore


def dense(
    x: Tensor, w: Tensor, b: Tensor, given: dict[str, Tensor], module: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """DAPO's and GRPO's loss, KL and clipped share, token by token."""
    logps = (full_logits(x, w, b) / module.temperature).log_softmax(-1)
    total, kl_sum, clipped = x.new_zeros(()), x.new_zeros(()), 0
    count = int(given["mask"].sum())
    for s in range(B):
        n = int(given["mask"][s].sum())
        for t in range(n):
            logp, a = logps[s, t, given["y"][s, t]], given["a"][s]
            ratio = (logp - given["old"][s, t]).exp()
            most = ratio if module.delta is None else ratio.clamp(max=module.delta)
            within = ratio.clamp(1 - module.epsilon_low, 1 + module.epsilon_high)
            clipped += int(within != ratio and (ratio - within) * a > 0)
            log_ref = given["ref"][s, t] - logp
            kl = log_ref.exp() - log_ref - 1
            loss = -torch.minimum(most * a, within * a) * given["sampler"][s, t] + module.beta * kl
            total = total + loss / (n * B if module.loss_type == "grpo" else count)
            kl_sum = kl_sum + kl.detach() / count
    return total, kl_sum, x.new_tensor(clipped / count)


@pytest.mark.parametrize("budget", [None, 2 * V * 4])
@pytest.mark.parametrize(
    "options",
    [dict(), dict(loss_type="grpo", delta=1.5), dict(epsilon_high=0.5, beta=0.3, temperature=0.7)],
    ids=str,
)
def test_is_that_of_full_logits(options: dict[str, Any], budget: int | None) -> None:
    trained, given = drawn()
    module = LigerFusedLinearGRPOLoss(**options, memory_budget=budget)

    def fused(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Any]:
        return module(
            x, w, given["y"], given["mask"], given["a"], b, given["ref"], given["old"],
            vllm_is_ratio=given["sampler"],
        )  # fmt: skip

    def full(**t: Tensor) -> Tensor:
        known = {n: v.to(t["x"].dtype) if v.is_floating_point() else v for n, v in given.items()}
        return dense(**t, given=known, module=module)[0]

    assert_no_worse_than_torch(lambda **t: fused(**t)[0], full, trained, torch.float32)
    loss, metrics = fused(**{n: t.requires_grad_() for n, t in trained.items()})
    assert not any(m.requires_grad for m in metrics)
    torch.testing.assert_close([loss, *metrics], [*dense(**trained, given=given, module=module)])


def test_what_does_not_fit_is_refused() -> None:
    trained, given = drawn()
    for options, match in (
        (dict(loss_type="ppo"), "loss_type must be one of grpo, .*; got 'ppo'"),
        (dict(importance_sampling_level="batch"), "must be one of token, sequence"),
        (dict(delta=0.0), "delta must be positive, got 0.0"),
        (dict(loss_type="dr_grpo"), "max_completion_length"),
    ):
        with pytest.raises(ValueError, match=match):
            LigerFusedLinearGRPOLoss(**options)  # pyright: ignore
    with pytest.raises(ValueError, match="beta needs ref_per_token_logps"):
        LigerFusedLinearGRPOLoss()(
            trained["x"], trained["w"], given["y"], given["mask"], given["a"]
        )
