"""Patching one model: equal numbers, nothing left behind, nothing shared with its copies."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import transformers.models.llama.modeling_llama as modeling
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification

from liger_core import rope
from liger_kernel.transformers import apply, layers, patch_of, swiglu
from tiny import V, assert_same, build, state, step

KINDS = {"LlamaAttention", "LlamaMLP", "LlamaRMSNorm", "Linear"}
OFF = dict(rope=False, norm=False, mlp=False, fused_head=False)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh", "gelu"])
def test_loss_and_gradients_are_the_models_own(tied: bool, act: str) -> None:
    model = build(tie_word_embeddings=tied, hidden_act=act, mlp_bias=True)
    want = step(model)
    patch = apply(model)
    assert {c.before for c in patch.changes} == KINDS and not patch.left
    assert_same(step(model), want)


@pytest.mark.parametrize("part", OFF)
def test_each_replaced_op_is_called(part: str, monkeypatch: Any) -> None:
    """With the op broken, so is the step."""
    model = build()
    apply(model, OFF | {part: True})
    step(model)

    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(layers, "rms_norm", broken)
    monkeypatch.setattr(swiglu, "glu", broken)
    monkeypatch.setattr("liger_kernel.transformers.rope.rope", broken)
    monkeypatch.setattr("liger_kernel.transformers.head.linear_cross_entropy", broken)
    with pytest.raises(ZeroDivisionError):
        step(model)


@pytest.mark.parametrize("name", ["norm eps", "activation", "rope sign", "rope of q", "rope"])
def test_a_wrong_replacement_shows(name: str, monkeypatch: Any) -> None:
    """The comparison bites: each fault of a replaced op makes it fail."""
    model = build(hidden_act="gelu")
    want = step(model)
    rotary = "liger_kernel.transformers.rope.rope"
    if name == "norm eps":
        right = layers.rms_norm
        monkeypatch.setattr(
            layers, "rms_norm", lambda x, w, eps, **kw: right(x, w, eps * 1.01, **kw)
        )
    elif name == "activation":
        right = swiglu.glu
        monkeypatch.setattr(swiglu, "glu", lambda g, u, act, **kw: right(g, u, "gelu_tanh", **kw))
    elif name == "rope sign":
        monkeypatch.setattr(rotary, lambda q, k, c, s, **kw: rope(q, k, c, -s))
    elif name == "rope of q":
        monkeypatch.setattr(rotary, lambda q, k, c, s, **kw: (rope(q, k, c, s)[0], k))
    else:
        monkeypatch.setattr(rotary, lambda q, k, c, s, **kw: (q, k))
    apply(model)
    with pytest.raises(AssertionError):
        assert_same(step(model), want)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_whole_and_apart(clone: Callable[[nn.Module], Any]) -> None:
    model = build()
    want = step(model)
    apply(model)
    twin = clone(model)
    assert_same(step(twin), want)
    twin.lm_head.weight.data.zero_()
    assert step(twin)[0].loss.item() == pytest.approx(math.log(V))
    assert_same(step(model), want)
    twin_patch = patch_of(twin)
    assert twin_patch is not None and twin_patch.model is twin
    twin_patch.revert()
    assert step(twin)[0].logits.shape[-1] == V
    assert_same(step(model), want)


def test_applying_twice() -> None:
    model = build()
    patch = apply(model, dict(rope=False))
    assert apply(model, dict(rope=False)) is patch
    with pytest.raises(ValueError, match=r"already patched with LigerConfig.*revert"):
        apply(model)
    patch.revert()
    assert apply(model) is not patch


@pytest.mark.parametrize(
    "auto, head", [(AutoModel, "no language-model head"), (AutoModelForSequenceClassification, "")]
)
def test_models_without_a_language_model_head(auto: Any, head: str) -> None:
    model = build(auto)
    patch = apply(model)
    assert head in patch.left["fused_head"] and "left as it is" in str(patch)
    assert not apply(build(auto), dict(fused_head=False, strict=True)).left
    assert {c.before for c in patch.changes} == KINDS - {"Linear"}
    with pytest.raises(ValueError, match="fused_head cannot be patched"):
        apply(build(auto), dict(strict=True))


def test_the_report_says_what_changed() -> None:
    text = str(apply(build()))
    assert "LlamaRMSNorm x5 -> rms_norm" in text and "Linear x1 -> fused linear" in text


def test_an_unknown_activation_is_left_and_said(monkeypatch: Any) -> None:
    model = build(hidden_act="relu")
    want = step(model)
    patch = apply(model)
    assert "activation is ReLU" in patch.left["mlp"]
    assert_same(step(model), want)


def test_a_model_type_without_a_recipe() -> None:
    model = build()
    model.config.model_type = "mamba"
    with pytest.raises(
        ValueError, match=r"no recipe for model type 'mamba' .*known: gemma, .*generic=True"
    ):
        apply(model)
    with pytest.raises(ValueError, match="no recipe for model type None"):
        apply(nn.Linear(2, 2))


def test_a_recipe_that_matches_nothing_is_an_error() -> None:
    model = build()
    model.model.layers, model.model.norm = nn.ModuleList(), nn.Identity()
    with pytest.raises(ValueError, match="'llama' recipe matches nothing in LlamaForCausalLM"):
        apply(model)
    assert patch_of(model) is None


def test_a_forward_that_is_replaced_already_is_refused_whole() -> None:
    model = build()
    model.model.norm.forward = lambda x: x
    before = state(model)
    with pytest.raises(RuntimeError, match=r"model.norm \(LlamaRMSNorm\) has had its forward"):
        apply(model)
    assert state(model) == before


def test_kill_switches(monkeypatch: Any) -> None:
    model = build()
    monkeypatch.setenv("LIGER_DISABLE", "1")
    before = state(model)
    assert "LIGER_DISABLE is set" in str(apply(model)) and state(model) == before
    monkeypatch.delenv("LIGER_DISABLE")
    monkeypatch.setenv("LIGER_IMPL", "torch")
    assert apply(model).config.impl == "torch"


def test_triton_without_a_gpu_is_refused_at_once(monkeypatch: Any) -> None:
    import triton

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match=r"impl='triton' needs a GPU.*use impl='auto'"):
        apply(build(), dict(impl="triton"))


def test_compiles_whole_and_once_for_all_lengths() -> None:
    model, ids = build(), torch.randint(3, V, (2, 40))
    apply(model)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for length in range(20, 40, 4):
        step(compiled, input_ids=ids[:, :length], labels=ids[:, :length])
    assert counter.frame_count <= 4


def test_compiles_whole_and_once() -> None:
    model = build()
    want = step(model, num_items_in_batch=torch.tensor(9))
    apply(model)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for total in range(9, 16):
        got = step(compiled, num_items_in_batch=torch.tensor(total))
        if total == 9:
            assert_same(got, want)
    assert counter.frame_count <= 2


def test_save_and_load(tmp_path: Any) -> None:
    model = build()
    names = set(model.state_dict())
    apply(model)
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="eager").train()
    assert_same(step(again), step(build()), width=V)


def test_a_patched_part_is_taken_over() -> None:
    model = build()
    want, before = step(model), state(model)
    apply(model.model)
    patch = apply(model)
    assert_same(step(model), want)
    patch.revert()
    assert state(model) == before
    apply(model.model, dict(rope=False))
    kept = patch_of(model.model)
    with pytest.raises(ValueError, match=r"model is already patched with .*rope=False"):
        apply(model)
    assert patch_of(model.model) is kept


def test_a_compiled_model_is_patched_inside() -> None:
    model = build()
    want = step(model)
    compiled = torch.compile(model, backend="eager")
    patch = apply(compiled)
    assert patch_of(model) is patch
    assert_same(step(compiled), want)


def test_accelerates_hooks_stay_in_place() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    calls: list[str] = []

    class Count(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls.append(type(module).__name__)
            return args, kwargs

    model = build()
    want = step(model)
    for module in (model.lm_head, model.model.norm, model.model.layers[0].mlp):
        add_hook_to_module(module, Count())
    patch = apply(model)
    assert_same(step(model), want)
    assert sorted(calls) == ["Linear", "LlamaMLP", "LlamaRMSNorm"]
    patch.revert()
    assert_same(step(model), want, width=V)


def test_a_replica_of_data_parallel_is_refused() -> None:
    model = build()
    apply(model)
    with pytest.raises(RuntimeError, match=r"nn.DataParallel.*torchrun"):
        model._replicate_for_data_parallel()


def test_another_attention_forward_is_followed(monkeypatch: Any) -> None:
    model = build()
    with apply(model):
        step(model)
    right = modeling.LlamaAttention.forward

    def forward(self: Any, hidden_states: Any, position_embeddings: Any = None, **kwargs: Any):
        apply_rotary_pos_emb  # noqa: B018, F821
        return right(self, hidden_states * 2, position_embeddings, **kwargs)

    monkeypatch.setattr(modeling.LlamaAttention, "forward", forward)
    forward.__globals__["apply_rotary_pos_emb"] = None
    want = step(model)
    apply(model, dict(norm=False, mlp=False, fused_head=False))
    assert_same(step(model), want, width=V)


def wrapped(fn: Any, log: list[str]) -> Any:
    """A common counting wrapper: it holds what it calls, itself and a cell that is not set."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        wrapper.calls += 1
        log.append("wrapper")
        return fn(*args, **kwargs) if wrapper.calls else unset

    wrapper.calls = 0
    if log is None:
        unset = None
    return wrapper


def test_a_wrapper_around_a_forward_is_kept() -> None:
    """As transformers' tensor parallelism puts them: closures over the bound forward."""
    model, log = build(), list[str]()
    want = step(model)
    for module in (model.model.norm, model.model.layers[0].mlp):
        module.forward = wrapped(wrapped(module.forward, log), log)
    before = [module.forward for module in (model.model.norm, model.model.layers[0].mlp)]
    with apply(model):
        twin = copy.deepcopy(model)
        assert_same(step(model), want)
        assert len(log) == 4 and model.model.norm.forward.calls == 1
    patch_of(twin).revert()  # pyright: ignore
    assert [model.model.norm.forward, model.model.layers[0].mlp.forward] == before
    assert_same(step(model), want, V)
    assert len(log) == 8


def test_a_wrapper_that_comes_later_outlives_the_patch() -> None:
    model, log = build(), list[str]()
    want = step(model)
    patch = apply(model)
    model.model.norm.forward = wrapped(model.model.norm.forward, log)
    assert_same(step(model), want)
    patch.revert()
    assert_same(step(model), want, V)
    assert len(log) == 2
    model.model.norm.weight.data.zero_()
    assert step(model)[0].loss.item() == pytest.approx(math.log(V))


@pytest.mark.parametrize("order", ["hook, patch, unhook", "patch, hook", "patch, hook, unhook"])
def test_accelerates_hooks_come_and_go(order: str) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Double(ModelHook):
        def post_forward(self, module: nn.Module, output: Any) -> Any:
            return 2 * output

    model = build()
    plain = step(model)
    add_hook_to_module(model.model.norm, Double())
    hooked = step(model)
    remove_hook_from_module(model.model.norm)
    modules = (model.model.norm, model.lm_head)
    patch = None
    for action in order.split(", "):
        if action == "patch":
            patch = apply(model)
        for module in modules if action == "hook" else ():
            add_hook_to_module(module, Double() if module is modules[0] else ModelHook())
        for module in modules if action == "unhook" else ():
            remove_hook_from_module(module)
    want = hooked if order.endswith(" hook") else plain
    assert_same(step(model), want)
    assert patch is not None
    patch.revert()
    assert_same(step(model), want, V)
    ours = [m for m in model.modules() for f in vars(m).values() if "liger" in repr(f)]
    assert not ours


def test_what_is_not_transformers_own_is_left(monkeypatch: Any) -> None:
    def forward(self: Any, x: Any) -> Any:
        return self.down_proj(self.gate_proj(x))

    with monkeypatch.context() as patching:
        patching.setattr(modeling.LlamaMLP, "forward", forward)
        model = build()
        want = step(model)
        patch = apply(model)
        assert "its forward is " in patch.left["mlp"]
        assert_same(step(model), want)
    model = build()
    for layer in model.model.layers:
        layer.mlp.act_fn.register_forward_hook(lambda module, args, out: out * 2)
    want = step(model)
    assert "hooks" in apply(model).left["mlp"]
    assert_same(step(model), want)


def test_a_train_of_the_models_own() -> None:
    class Own(type(build())):
        def train(self, mode: bool = True, *, freeze: bool = False) -> Any:
            return super().train(mode).requires_grad_(not freeze)

    model = build()
    model.__class__ = Own
    apply(model)
    assert not any(p.requires_grad for p in model.train(True, freeze=True).parameters())
    twin = copy.copy(model)
    assert not twin.eval().training and model.training
