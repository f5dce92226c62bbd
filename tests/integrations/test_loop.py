"""What a training loop does to a model besides a plain step: packing, scaling, other attention."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DataCollatorWithFlattening
from transformers.utils import is_flash_attn_2_available

from liger_kernel.transformers import apply, head, layers, patch_of
from numerics import assert_errs_no_more
from tiny import V, assert_same, batch, build, step

TWO_GPUS = torch.cuda.device_count() > 1


def packed(padding_free: bool) -> dict[str, Any]:
    """Three sequences in one row, each with positions of its own."""
    rows = [torch.arange(n) * 7 % (V - 3) + 3 for n in (9, 4, 6)]
    features = [dict(input_ids=r.tolist(), labels=r.tolist()) for r in rows]
    return DataCollatorWithFlattening(return_flash_attn_kwargs=padding_free)(features)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("padding_free", [False, True])
def test_packed_sequences(padding_free: bool, attention: str) -> None:
    inputs = packed(padding_free) | dict(num_items_in_batch=torch.tensor(11))
    model = build()
    model.set_attn_implementation(attention)
    want = step(model, **inputs)
    apart = step(model, **inputs | dict(position_ids=None))
    assert (want[0].loss - apart[0].loss).abs() > 1e-3, "the positions do not matter"
    apply(model)
    assert_same(step(model, **inputs), want)


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # flex_attention compiles, and Dynamo meets old names
@pytest.mark.parametrize("attention", ["sdpa", "flex_attention", "flash_attention_2"])
def test_attention_on_a_gpu(attention: str) -> None:
    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        pytest.skip("flash_attn is not installed")
    dtype = torch.bfloat16 if attention == "flash_attention_2" else torch.float32
    inputs = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in packed(True).items()}
    exact = step(build(hidden_size=64, head_dim=16).to("cuda", torch.float64), **inputs)[1]
    model = build(hidden_size=64, head_dim=16).to("cuda", dtype)
    model.set_attn_implementation(attention)
    theirs = step(model, **inputs)[1]
    apply(model)
    out, ours = step(model, **inputs)
    assert out.logits.shape[-1] == 0
    assert_errs_no_more(ours, theirs, exact, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gradient_scaler(dtype: torch.dtype) -> None:
    """Scaled, unscaled and clipped, three steps of fp32 weights move as the plain model's do."""

    def run(patched: bool, cast: bool = True) -> dict[str, torch.Tensor]:
        model = build()
        if patched:
            apply(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=cast)  # pyright: ignore
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype, enabled=cast):
                loss = model(input_ids=batch()[0], labels=batch()[1]).loss
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == (2.0**12 if cast else 1.0), "a step was skipped"
        return {name: p.detach() - start[name] for name, p in model.named_parameters()}

    assert_errs_no_more(run(True), run(False), run(False, cast=False), dtype)


@pytest.mark.filterwarnings("ignore:lm_head makes full logits, with a gradient:UserWarning")
@pytest.mark.parametrize("training", [True, False])
def test_accuracy_and_predictions(training: bool) -> None:
    model = build().train(training)
    ids, labels = batch()
    best = model.eval()(input_ids=ids).logits.argmax(-1)[:, :-1]
    model.train(training)
    scored = labels[:, 1:] != -100
    apply(model)
    flags = dict(return_token_accuracy=True, return_predicted_tokens=True)
    out = model(input_ids=ids, labels=labels, **flags)
    assert out.logits.shape[-1] == (0 if training else V)
    torch.testing.assert_close(out.predicted_tokens[:, :-1], best.masked_fill(~scored, -1))
    want = (best == labels[:, 1:])[scored].float().mean()
    torch.testing.assert_close(out.token_accuracy, want)
    assert not hasattr(model(input_ids=ids, labels=labels), "token_accuracy")
    lean = model(input_ids=ids, labels=labels, skip_logits=True, return_token_accuracy=True)
    torch.testing.assert_close(lean.token_accuracy, want)
    assert lean.logits.shape[-1] == 0 and not hasattr(lean, "predicted_tokens")


def test_token_scaling() -> None:
    model = build()
    logits = model(input_ids=batch()[0]).logits[:, :-1]
    logp = logits.log_softmax(-1).gather(-1, batch()[0][:, 1:, None])[..., 0]
    keep = batch()[1][:, 1:] != -100
    want = -(logp * logp.exp())[keep].mean()
    apply(model)
    got, _ = step(model, use_token_scaling=True)
    torch.testing.assert_close(got.loss, want)
    with pytest.raises(ValueError, match="use_token_scaling needs the fused head"):
        step(model.eval(), use_token_scaling=True)


@pytest.mark.parametrize("given", [dict(), dict(accum_dtype=torch.float32)], ids=str)
def test_the_callers_accumulation_dtype_wins(given: Any, monkeypatch: Any) -> None:
    seen, right = [], head.linear_cross_entropy
    monkeypatch.setattr(
        head,
        "linear_cross_entropy",
        lambda *args, **kw: seen.append(kw["accum_dtype"]) or right(*args, **kw),
    )
    model = build()
    apply(model, dict(accum_dtype="bfloat16"))
    step(model, **given)
    assert seen == [given.get("accum_dtype", torch.bfloat16)]


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_layer_norm_under_autocast_has_torchs_dtype(dtype: torch.dtype, device: str) -> None:
    norm, x = nn.LayerNorm(8).to(device, dtype), torch.randn(3, 8).to(device, dtype)
    with torch.autocast(device, torch.bfloat16):
        want, got = norm(x), layers._layer_norm(norm, "auto", x)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
def test_device_map(device: str) -> None:
    """Over two GPUs, or with accelerate's hooks on one device."""
    from accelerate import dispatch_model

    devices = [0, 1] if TWO_GPUS and device == "cuda" else [device] * 2
    model = build().to(device)
    want = step(model, **on(device))
    parts = {"model.embed_tokens": 0, "model.layers.0": 0, "model.rotary_emb": 0,
             "model.layers.1": 1, "model.norm": 1, "lm_head": 1}  # fmt: skip
    model = dispatch_model(
        build(), {name: devices[i] for name, i in parts.items()}, force_hooks=True
    )
    patch = apply(model)
    assert len(patch.changes) == 10
    out, grads = step(model, **on(device))
    torch.testing.assert_close(out.loss.cpu(), want[0].loss.cpu())
    for name, gradient in want[1].items():
        assert (grads[name].cpu() - gradient.cpu()).norm() <= 1e-5 * gradient.norm().cpu(), name


def on(device: str) -> dict[str, Any]:
    return dict(zip(("input_ids", "labels"), (t.to(device) for t in batch()), strict=True))


def test_use_kernels_meets_a_patch() -> None:
    """train() and eval() of a model with use_kernels bind forwards anew; ours are put back."""
    kernels = pytest.importorskip("kernels")
    from transformers import KernelConfig
    from transformers.integrations import hub_kernels
    from transformers.utils import is_kernels_available

    if not is_kernels_available():
        pytest.skip("this transformers wants another version of kernels")
    model = build()
    want = step(model)
    repository = Repository()
    modes = {kernels.Mode.TRAINING: repository, kernels.Mode.INFERENCE: repository}
    model.kernel_config = KernelConfig()
    model.kernel_config.kernel_mapping = {"RMSNorm": {"cpu": modes}}
    with warnings.catch_warnings(action="ignore"):  # of layers for which there is no kernel
        hub_kernels.kernelize(model)

    def calls() -> int:
        CALLS.clear()
        assert_same(step(model), want, 0 if patch_of(model) else V)
        return len(CALLS)

    assert calls() == 5
    patch = apply(model)
    assert calls() == 0
    with warnings.catch_warnings(action="ignore"):
        model.eval().train()
    assert calls() == 0
    patch.revert()
    assert calls() == 5


CALLS: list[str] = []


class KernelNorm(nn.Module):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        CALLS.append("norm")
        scale = torch.rsqrt(hidden_states.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (hidden_states * scale)


class Repository:
    def load(self) -> type[nn.Module]:
        return KernelNorm


def test_a_family_without_a_recipe_on_request() -> None:
    model = build(model_type="stablelm", hidden_act="silu", layer_norm_eps=0.1)
    want = step(model)
    with pytest.raises(ValueError, match=r"no recipe for model type 'stablelm'.*generic=True"):
        apply(model)
    patch = apply(model, dict(generic=True))
    assert [c.before for c in patch.changes] == ["Linear"]
    assert_same(step(model), want)
    patch.revert()
    assert_same(step(model), want, V)


def test_a_loss_of_the_forwards_own_is_left_to_it() -> None:
    class Own(type(build())):
        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> Any:
            out = super().forward(input_ids)
            y = labels[:, 1:].flatten()
            out.loss = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), y)
            return out

    model = build()
    want = step(model)
    model.__class__ = Own
    patch = apply(model)
    assert "forward of Own computes its loss itself" in patch.left["fused_head"]
    assert_same(step(model), want, V)
