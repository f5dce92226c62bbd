"""`liger_kernel.check`: it finds what differs, and leaves the model as it was."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from liger_kernel.check import FACTOR, FLOOR, Row, allowed, check
from liger_kernel.exact import SameRoutes, wider
from liger_kernel.transformers import apply, layers, patch_of
from tiny import batch, build, state


def inputs() -> dict[str, Tensor]:
    ids, labels = batch()
    return {"input_ids": ids, "labels": labels}


def tensors(model: Any) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in (*model.named_parameters(), *model.named_buffers())}


def test_the_model_comes_back_as_it_was() -> None:
    model = build(attention_dropout=0.5, tie_word_embeddings=True).bfloat16().eval()
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.float() / 3
    model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)
    for p in model.model.layers[0].parameters():
        p.requires_grad_(False)
    before = tensors(model)
    report = check(model, inputs(), steps=1)
    assert report.ok, report
    after = tensors(model)
    assert after.keys() == before.keys() and patch_of(model) is None and not model.training
    for name, t in after.items():
        assert t.dtype == before[name].dtype and torch.equal(t, before[name])
    assert model.model.norm.weight.grad.sum() == 32 and model.lm_head.weight.grad is None
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.layers[0].self_attn.attention_dropout == 0.5
    assert {row.name for row in report.rows} == {
        "loss",
        *(n for n, p in model.named_parameters() if p.requires_grad),
    }


def test_a_gradient_that_only_one_has_is_a_problem(monkeypatch: Any) -> None:
    right = layers.rms_norm

    def broken(x: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
        return right(x, weight.detach(), *args, **kwargs)

    monkeypatch.setattr(layers, "rms_norm", broken)
    report = check(build(), inputs(), steps=0)
    assert not report.ok and "model.norm.weight: the patched model has no gradient" in str(report)


def test_a_loss_that_is_not_a_number_is_said() -> None:
    model = build()
    model.model.norm.weight.data.fill_(float("nan"))
    report = check(model, inputs(), steps=0)
    assert report.problems == ("the plain model's own loss is nan: there is nothing to compare",)


def test_what_cannot_be_checked_raises() -> None:
    model = build()
    with pytest.raises(ValueError, match="no loss: the batch must hold labels"):
        check(model, {"input_ids": batch()[0]}, steps=0)
    with apply(model), pytest.raises(ValueError, match=r"is patched; revert\(\) that"):
        check(model, inputs())
    with pytest.raises(ValueError, match=r"fp32, bf16 or fp16, got \['torch.float64'\]"):
        check(build().double(), inputs())
    with pytest.raises(ValueError, match=r"no parameter .* requires a gradient"):
        check(model.requires_grad_(False), inputs())


def test_the_exact_model_computes_nothing_in_fp32() -> None:
    model = build()
    with wider(model, torch.float64):
        loss = model(**inputs()).loss
        hidden = model.model.norm(torch.full((1, 32), 1 / 3, dtype=torch.float64))
    assert loss.dtype == torch.float64
    want = (1 / 3) / (1 / 9 + 0.1) ** 0.5  # TINY's eps
    assert (hidden - want).abs().max() < 1e-15 and model.dtype == torch.float32


def test_routers_choose_the_same_again() -> None:
    routes, scores = SameRoutes(), torch.tensor([[3.0, 2.0, 1.0]], requires_grad=True)
    with routes:
        first = scores.topk(2)
    with routes:
        values, indices = torch.topk(-scores, k=2, dim=-1)
    assert torch.equal(indices, first.indices) and values.tolist() == [[-3.0, -2.0]]
    values.sum().backward()
    assert scores.grad is not None and scores.grad.tolist() == [[-1.0, -1.0, 0.0]]


def test_experts_are_checked_too() -> None:
    model = build(model_type="mixtral", num_local_experts=4)
    report = check(model, inputs(), steps=0)
    assert report.ok and "MixtralExperts x2 -> glu[silu]" in report.patch, report


def test_the_policy() -> None:
    eps = torch.finfo(torch.float32).eps
    assert allowed(3.0, 10.0, torch.float32) == FACTOR * 3.0 + FLOOR * eps * 10.0
    assert Row("w", 1.0, 0.1, 0.2, 0.2).ok and not Row("w", 1.0, 0.1, 0.21, 0.2).ok
    nan, inf = float("nan"), float("inf")
    for lost in (Row("w", 1.0, 0.1, nan, 0.2), Row("w", 1.0, inf, inf, inf)):
        assert not lost.ok and lost.used == inf


def test_what_a_rotation_has_met_is_forgotten(monkeypatch: Any) -> None:
    dynamic = dict(rope_type="dynamic", rope_theta=100.0, factor=8.0)
    model = build(max_position_embeddings=4, rope_parameters=dynamic)
    want = build(max_position_embeddings=4, rope_parameters=dynamic)(**inputs()).loss
    report = check(model, inputs(), steps=1)
    assert report.ok, report
    assert report.plain is not None and report.exact_loss == pytest.approx(want.item(), rel=1e-6)
    assert torch.equal(model(**inputs()).loss, want)
    right = layers.ROTARY["half"]["apply_rotary_pos_emb"]
    model = build(max_position_embeddings=4, rope_parameters=dynamic)
    monkeypatch.setitem(
        layers.ROTARY["half"],
        "apply_rotary_pos_emb",
        lambda q, k, cos, sin, **kw: right(q, k, cos * 1.02, sin * 1.02, **kw),
    )
    assert not check(model, inputs(), steps=0).ok


def left_behind(model: nn.Module) -> dict[str, Any]:
    """Every number, name and tensor that modules hold besides parameters, as plain values."""
    return {
        f"{path}.{key}": (value.dtype, value.tolist()) if isinstance(value, Tensor) else value
        for path, m in model.named_modules()
        for key, value in (*vars(m).items(), *m._buffers.items())
        if value is None or isinstance(value, Tensor | int | float | str)
    }


@pytest.mark.parametrize("seen", [9, 40])
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_rotation_is_left_as_it_was(kind: str, seen: int) -> None:
    """Whether it has met long texts before, in which case its attributes are tensors, or not."""
    rope = dict(rope_type=kind, rope_theta=100.0, factor=8.0)
    if kind == "longrope":
        rope |= dict(short_factor=[1.0] * 4, long_factor=[3.0] * 4)
    at = 16 if seen > 9 else 4  # positions beyond which it changes
    rope |= dict(original_max_position_embeddings=at) if kind == "longrope" else {}
    model = build(
        max_position_embeddings=at if kind == "dynamic" else 64,
        rope_parameters=rope,
        original_max_position_embeddings=at,
    )
    if seen > 9:
        model(input_ids=torch.arange(seen)[None] + 3)
    before = left_behind(model)
    report = check(model, inputs(), steps=1)
    assert report.ok, report
    assert left_behind(model) == before


def test_what_a_forward_writes_in_place_is_put_back() -> None:
    model = build()
    model.register_buffer("calls", torch.zeros((), dtype=torch.long))
    model.lengths = []

    def count(module: Any, _: Any) -> None:
        module.calls += 1
        module.lengths.append(9)

    model.register_forward_pre_hook(count)
    before, calls = state(model), model.calls
    assert check(model, inputs(), steps=1).ok
    assert model.calls is calls and calls == 0 and model.lengths == []
    assert state(model) == before  # hooks that count what is reached are gone


def test_peft_is_checked_as_it_is_trained() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(build(), config)
    report = check(model, inputs(), steps=0)
    assert report.ok and not report.idle and len(report.rows) == 7, report


def test_a_plain_model_that_overflows_proves_nothing() -> None:
    model = build().half()
    with torch.no_grad():
        model.model.norm.weight *= 3000
        model.lm_head.weight /= 3000
    report = check(model, inputs(), steps=0)
    assert any("not finite: nothing to compare" in problem for problem in report.problems)


def test_checkpointing_is_off_meanwhile() -> None:
    model = build()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert check(model, inputs(), steps=0).ok
    assert model.is_gradient_checkpointing


def test_shared_storage_stays_shared() -> None:
    model = build()
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.data)
    assert check(model, inputs(), steps=0).ok
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_what_the_batch_does_not_reach_is_said() -> None:
    model = build(
        model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    )
    model.spare = type(model.model.norm)(32)
    report = check(model, inputs(), steps=0)
    assert report.ok and report.idle == ("Qwen3MoeRMSNorm x1",)
    assert "not reached by this batch: Qwen3MoeRMSNorm x1" in str(report)
    assert json.dumps(report.to_dict())
