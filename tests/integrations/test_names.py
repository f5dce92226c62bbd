"""Upstream's names, as users and frameworks type them."""

import copy
import importlib
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

import liger_kernel.transformers as lk
from liger_kernel.config import LigerConfig
from liger_kernel.transformers import functional
from liger_kernel.transformers.layers import ACTIVATIONS
from liger_kernel.transformers.rope import liger_rotary_pos_emb_vision
from tiny import V, assert_same, build, step


def test_every_name_in_all_exists() -> None:
    assert all(getattr(lk, name) is not None for name in lk.__all__)
    with pytest.raises(AttributeError, match="no attribute 'LigerNothing'"):
        lk.LigerNothing  # noqa: B018


def test_the_auto_class_takes_a_path(tmp_path: Any) -> None:
    plain = build()
    plain.save_pretrained(tmp_path)
    model = lk.AutoLigerKernelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert_same(step(model.train()), step(plain))
    lean = lk.AutoLigerKernelForCausalLM.from_pretrained(tmp_path, rope=False, swiglu=False)
    patch = lk.patch_of(lean)
    assert patch is not None and not patch.config.rope and not patch.config.mlp
    assert lk.patch_of(AutoModelForCausalLM.from_pretrained(tmp_path)) is None


def test_the_auto_class_loads_what_it_cannot_patch(caplog: Any) -> None:
    config = AutoConfig.for_model(
        "gpt2", vocab_size=V, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2
    )
    model = lk.AutoLigerKernelForCausalLM.from_config(config)
    assert lk.patch_of(model) is None
    assert "no recipe for model type 'gpt2'" in caplog.text


def test_the_fused_loss_as_users_type_it() -> None:
    linear = nn.Linear(128, 256)
    input, target = torch.randn(4, 128), torch.randint(256, (4,))
    lk.LigerFusedLinearCrossEntropyLoss()(linear.weight, input, target).backward()
    got, linear.weight.grad = linear.weight.grad, None
    F.cross_entropy(input @ linear.weight.T, target).backward()
    torch.testing.assert_close(got, linear.weight.grad)


def test_losses_equal_torchs() -> None:
    torch.manual_seed(0)
    z, y = torch.randn(5, V), torch.tensor([1, 2, -1, 4, 5])
    x, w, b = torch.randn(5, 8), torch.randn(V, 8), torch.randn(V)
    kw = dict(ignore_index=-1, label_smoothing=0.0, reduction="sum")
    want = F.cross_entropy(z, y, **kw)
    torch.testing.assert_close(lk.LigerCrossEntropyLoss(**kw)(z, y), want)
    torch.testing.assert_close(functional.liger_cross_entropy(z, y, **kw), want)
    want = F.cross_entropy(F.linear(x, w, b), y, **kw)
    fused = lk.LigerFusedLinearCrossEntropyLoss(**kw)(w, x, y, b)
    torch.testing.assert_close(fused, want)


def test_what_torch_deprecates_is_refused() -> None:
    z, y = torch.randn(2, 3), torch.zeros(2).long()
    for kw in (dict(size_average=True), dict(reduce=False)):
        with pytest.raises(ValueError, match="not supported; use reduction"):
            functional.liger_cross_entropy(z, y, **kw)


@pytest.mark.parametrize("fused", [True, False])
def test_the_losses_tell_what_is_asked_for(fused: bool) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(5, 8), torch.randn(7, 8)
    y, c = torch.tensor([1, -100, 6, 0, 2]), torch.rand(7)
    z = F.linear(x, w)
    best = z.argmax(-1).masked_fill(y == -100, -1)
    names = ("return_z_loss", "return_token_accuracy", "return_predicted_tokens")
    cls = lk.LigerFusedLinearCrossEntropyLoss if fused else lk.LigerCrossEntropyLoss
    inputs = (w, x, y) if fused else (z, y)
    out = cls(c, lse_square_scale=0.1, **dict.fromkeys(names, True))(*inputs)
    assert isinstance(out, functional.CrossEntropyOutput) and out.z_loss is not None
    z_loss = 0.1 * z[y >= 0].logsumexp(-1).square().sum() / c[y[y >= 0]].sum()
    torch.testing.assert_close(out.z_loss, z_loss)
    torch.testing.assert_close(out.loss, F.cross_entropy(z, y, c) + z_loss)
    torch.testing.assert_close(out.predicted_tokens, best)
    torch.testing.assert_close(out.token_accuracy, (best == y).sum() / 4)
    for name, field in zip(names, ("z_loss", "token_accuracy", "predicted_tokens"), strict=True):
        one = cls(reduction="none", **{name: True})(*inputs)
        assert [f for f, t in vars(one).items() if t is not None] == ["loss", field]
        torch.testing.assert_close(one.loss, F.cross_entropy(z, y, reduction="none"))
    accuracy = cls(reduction="none", return_token_accuracy=True)(*inputs).token_accuracy
    torch.testing.assert_close(accuracy, ((best == y) & (y >= 0)).float())


def test_the_fused_loss_scales_by_token() -> None:
    torch.manual_seed(0)
    x, w, y = torch.randn(5, 8), torch.randn(7, 8), torch.tensor([1, -100, 6, 0, 2])
    scaled = functional.liger_fused_linear_cross_entropy(
        x, w, y, use_token_scaling=True, reduction="none"
    )
    plain = F.cross_entropy(F.linear(x, w), y, reduction="none")
    torch.testing.assert_close(scaled, plain * plain.neg().exp())


def test_norms() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 16)
    for affine in (True, False):
        norm = lk.LigerRMSNorm(16, eps=0.1, elementwise_affine=affine)
        torch.testing.assert_close(norm(x), F.rms_norm(x, (16,), eps=0.1))
        assert bool(list(norm.parameters())) == affine
    gemma = lk.LigerRMSNorm(16, 0.1, 1.0, "gemma", "zeros")
    torch.testing.assert_close(gemma(x), F.rms_norm(x, (16,), eps=0.1))
    fused = lk.LigerFusedAddRMSNorm(16, 0.1)
    y, total = fused(x, x.flip(0))
    torch.testing.assert_close((y, total), (F.rms_norm(total, (16,), eps=0.1), x + x.flip(0)))
    layer = lk.LigerLayerNorm(16, eps=0.1, bias=True)
    nn.init.normal_(layer.bias)
    torch.testing.assert_close(layer(x), F.layer_norm(x, (16,), layer.weight, layer.bias, 0.1))
    with pytest.raises(ValueError, match="casting_mode must be"):
        lk.LigerRMSNorm(16, casting_mode="fp8")
    for cls in (lk.LigerRMSNorm, lk.LigerLayerNorm):
        with pytest.raises(ValueError, match="init_fn must be"):
            cls(16, init_fn="normal")


@pytest.mark.parametrize("family", ["llama", "phi3", "glm4"])
@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
def test_rotary(unsqueeze_dim: int, family: str) -> None:
    torch.manual_seed(0)
    shape = (2, 4, 5, 8) if unsqueeze_dim == 1 else (2, 5, 4, 8)
    R = 8 if family == "llama" else 6
    q, k, cos, sin = torch.randn(shape), torch.randn(shape), *torch.randn(2, 2, 5, R)
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    want = modeling.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
    call = partial(lk.liger_rotary_pos_emb, q, k, cos, sin, interleaved=family == "glm4")
    torch.testing.assert_close(call(unsqueeze_dim=unsqueeze_dim, rotary_dim=R), want)
    with pytest.raises(ValueError, match="unsqueeze_dim must be 1 or 2"):
        call(unsqueeze_dim=3)
    with pytest.raises(ValueError, match=f"must hold rotary_dim = 4, got {R}"):
        call(rotary_dim=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_of_images(dtype: torch.dtype) -> None:
    from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

    q, k, (cos, sin) = *torch.randn(2, 5, 4, 8).to(dtype), torch.randn(2, 5, 8)
    got = liger_rotary_pos_emb_vision(q, k, cos, sin)
    torch.testing.assert_close(got, apply_rotary_pos_emb_vision(q, k, cos, sin))
    assert got[0].stride() == q.stride()
    with pytest.raises(ValueError, match="cos and sin must both be"):
        liger_rotary_pos_emb_vision(q, k, cos[:4], sin[:4])


def mlp_config(act: str) -> SimpleNamespace:
    return SimpleNamespace(hidden_size=8, intermediate_size=12, hidden_act=act, mlp_bias=False)


@pytest.mark.parametrize(
    "cls, act",
    [
        (lk.LigerSwiGLUMLP, "silu"), (lk.LigerTiledSwiGLUMLP, "silu"),
        (lk.LigerPhi3SwiGLUMLP, "silu"), (lk.LigerGEGLUMLP, "gelu_pytorch_tanh"),
        (lk.LigerTiledGEGLUMLP, "gelu_pytorch_tanh"),
    ],
)  # fmt: skip
def test_mlps_take_the_models_weights(cls: Any, act: str) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP
    from transformers.models.phi3.modeling_phi3 import Phi3MLP

    model = Phi3MLP if "Phi3" in cls.__name__ else LlamaMLP
    theirs, ours = model(mlp_config(act)), cls(mlp_config(act))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 9, 8, requires_grad=True)
    results = []
    for mlp in (ours, theirs):
        y = mlp(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *mlp.parameters()])])
    torch.testing.assert_close(*results)
    assert set(cls.names) <= {*ACTIVATIONS, "gelu_new"}
    with pytest.raises(ValueError, match="names 'relu'"):
        cls(mlp_config("relu"))


@pytest.mark.parametrize("cls", [lk.LigerTiledSwiGLUMLP, lk.LigerTiledGEGLUMLP])
def test_tiled_mlps(cls: Any) -> None:
    mlp, sizes = cls(mlp_config(cls.names[0]), num_shards=3), []
    mlp.down_proj.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    x = torch.randn(2, 5, 8)
    y = mlp(x)
    assert sizes == [4, 3, 3] and torch.equal(copy.deepcopy(mlp)(x), y)
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    mlp.down_proj._forward_hooks.clear()
    torch.testing.assert_close(compiled(x), y)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("hooked", ["forward", "hook", "global"])
@pytest.mark.parametrize("cls", [lk.LigerSwiGLUMLP, lk.LigerPhi3SwiGLUMLP])
def test_who_else_sees_a_projection(cls: Any, hooked: str, checkpointed: bool) -> None:
    """Another loss of it, and what is kept of it, are right: backward leaves it alone then."""
    mlp, x, seen = cls(mlp_config("silu")), torch.randn(2, 8), []

    def run(x: torch.Tensor) -> torch.Tensor:
        seen.clear()
        y = mlp(x).sum()
        return y + seen[0].square().mean() if seen else y

    first = next(mlp.children())
    if hooked == "forward":
        plain = first.forward
        first.forward = lambda x: seen.append(plain(x)) or seen[0]
    elif hooked == "hook":
        first.register_forward_hook(lambda _, __, out: seen.append(out))
    else:
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, _, out: seen.append(out) if module is first else None
        )
    y = checkpoint(run, x, use_reentrant=False) if checkpointed else run(x)
    kept = seen[0].detach().clone()
    got = torch.autograd.grad(y, list(mlp.parameters()))
    torch.testing.assert_close(seen[0], kept)
    if hooked == "global":
        handle.remove()
    first._forward_hooks.clear()
    vars(first).pop("forward", None)
    g = F.linear(x, first.weight)
    penalty = g.square().mean()
    want = torch.autograd.grad(mlp(x).sum() + penalty, list(mlp.parameters()))
    torch.testing.assert_close(got, want)


def test_a_patched_mlp_that_keeps_its_buffers_goes_backward_twice() -> None:
    model = build()
    loss = {}
    for inplace in (True, False):
        with lk.apply(model, LigerConfig(mlp_inplace=inplace)):
            out = model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None])
            first = torch.autograd.grad(out.loss, list(model.parameters()), retain_graph=True)
            loss[inplace] = first
            if inplace:
                with pytest.raises(RuntimeError, match="mlp_inplace=False"):
                    out.loss.backward()
            else:
                second = torch.autograd.grad(out.loss, list(model.parameters()))
                torch.testing.assert_close(first, second)
    torch.testing.assert_close(loss[True], loss[False])
