"""Upstream's `apply_liger_kernel_to_*` on a model, and before one is built, as frameworks do."""

import functools
import importlib
import inspect
from typing import Any

import pytest
from torch import nn
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

import liger_kernel.transformers as lk
from liger_kernel.transformers import monkey_patch
from liger_kernel.transformers.recipes import FAMILIES, RECIPES
from tiny import V, assert_same, build, step

llama = lk.apply_liger_kernel_to_llama


@pytest.fixture(autouse=True)
def nothing_global_is_left():
    before = vars(LlamaForCausalLM)["__init__"]
    yield
    for patch in list(monkey_patch.CLASS_PATCHES.values()):
        patch.revert()
    assert vars(LlamaForCausalLM)["__init__"] is before


@pytest.mark.parametrize(
    "flags, width",
    [
        ({}, 0),
        (
            dict(rope=True, swiglu=True, cross_entropy=True, fused_linear_cross_entropy=False,
                 rms_norm=True),
            V,
        ),
        (dict(rope=None, rms_norm=None, swiglu=None), 0),
    ],
)  # fmt: skip
def test_apply_before_building_a_model(flags: dict[str, Any], width: int) -> None:
    want = step(build())
    patch = llama(**flags)
    model = build()
    assert_same(step(model), want, width)
    patch.revert()
    assert lk.patch_of(build()) is None and lk.patch_of(model) is not None


def test_apply_before_from_pretrained(tmp_path: Any) -> None:
    build().save_pretrained(tmp_path)
    with llama():
        model = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert_same(step(model.train()), step(build()))


def test_apply_to_one_model() -> None:
    model, other = build(), build()
    llama(model=model, swiglu=False)
    assert "glu[silu]" not in str(lk.patch_of(model)) and lk.patch_of(other) is None


def test_a_second_call_replaces_the_first() -> None:
    first = llama()
    assert llama() is first
    llama(rope=False)
    patch = lk.patch_of(build())
    assert patch is not None and not patch.config.rope


def test_both_cross_entropies_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot both be true"):
        llama(cross_entropy=True, fused_linear_cross_entropy=True)


def test_the_first_patch_of_an_instance_stays(caplog: Any) -> None:
    model = build()
    first = lk.apply(model, dict(rope=False))
    lk._apply_liger_kernel_to_instance(model=model)
    assert lk.patch_of(model) is first and "already patched" in caplog.text


def test_what_frameworks_pass_besides(caplog: Any) -> None:
    """Options of other families and None for what is unset, as Axolotl and others hand them on."""
    model = build()
    lk._apply_liger_kernel_to_instance(model=model, layer_norm=False, geglu=True, rope=None)
    patch = lk.patch_of(model)
    assert patch is not None and patch.config.norm and patch.config.mlp and not patch.config.rope
    assert "llama has no option geglu; ignored" in caplog.text


def test_unknown_model_types_are_logged(caplog: Any) -> None:
    caplog.set_level("INFO")
    lk._apply_liger_kernel("mamba")
    lk._apply_liger_kernel_to_instance(model=nn.Linear(2, 2))
    assert "'mamba', nothing is patched" in caplog.text and "type None" in caplog.text


FLAGS = ["rope", "cross_entropy", "fused_linear_cross_entropy"]
GATE = {"gemma": "geglu", "gemma2": "geglu", "gemma3": "geglu", "gemma3_text": "geglu"}
TOWER = ("gemma3", "mllama", "qwen2_vl")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_function(family: str) -> None:
    """Explicit flags, none hidden: LLaMA-Factory passes every name that the signature has."""
    fn = getattr(lk, f"apply_liger_kernel_to_{family}")
    names = list(inspect.signature(fn).parameters)
    tower = ["layer_norm"] if family in TOWER else []
    assert names == [*FLAGS, *tower, "rms_norm", GATE.get(family, "swiglu"), "model"]
    assert fn.__doc__ and fn.__name__ in dir(lk)
    folder = RECIPES[family].folder
    modeling = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    classes = [cls for cls in vars(modeling).values() if type(cls) is type]
    before = {cls: vars(cls).get("__init__") for cls in classes}
    with fn(**dict.fromkeys(names[:-1], False)):
        assert {cls: vars(cls).get("__init__") for cls in before} != before
    assert {cls: vars(cls).get("__init__") for cls in before} == before


def test_every_model_type_has_a_function() -> None:
    table = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN
    assert (
        set(table) == set(RECIPES) and table["gemma3_text"] is lk.apply_liger_kernel_to_gemma3_text
    )
    assert table["qwen2_5_vl_text"] is lk.apply_liger_kernel_to_qwen2_5_vl
    with pytest.raises(TypeError, match="geglu"):
        llama(geglu=True)


def test_the_function_of_glm4_serves_glm() -> None:
    def rope(model_type: str) -> bool | None:
        patch = lk.patch_of(build(model_type=model_type))
        return None if patch is None else patch.config.rope

    first = lk.apply_liger_kernel_to_glm4(rope=False)
    assert (rope("glm"), rope("glm4")) == (False, False)
    second = lk.apply_liger_kernel_to_glm()
    assert (rope("glm"), rope("glm4")) == (True, False)
    first.revert()
    assert (rope("glm"), rope("glm4")) == (True, None)
    second.revert()
    assert rope("glm") is None and not monkey_patch.CLASS_PATCHES


def test_revert_undoes_its_own_alone() -> None:
    first = llama()
    first.revert()
    second = llama(rope=False)
    first.revert()
    third = llama()
    second.revert()
    assert lk.patch_of(build()) is not None
    third.revert()
    assert lk.patch_of(build()) is None


def test_a_constructor_that_is_wrapped_on_top_stays(monkeypatch: Any) -> None:
    patch, calls = llama(), []
    ours = LlamaForCausalLM.__init__

    @functools.wraps(ours)
    def wrapper(self: Any, *args: Any) -> None:
        calls.append(ours(self, *args))

    monkeypatch.setattr(LlamaForCausalLM, "__init__", wrapper)
    patch.revert()
    assert lk.patch_of(build()) is None and len(calls) == 1
    monkeypatch.undo()
    LlamaForCausalLM.__init__ = ours.__wrapped__  # pyright: ignore


def test_only_the_outermost_model_is_patched_and_others_are_not() -> None:
    with llama():
        model = build()
        assert lk.patch_of(model) is not None and lk.patch_of(model.model) is None
        scorer = LlamaForSequenceClassification(model.config)
        assert lk.patch_of(scorer.model) is not None
        assert lk.patch_of(build(model_type="qwen3")) is None


def test_models_that_are_there_already() -> None:
    """oumi calls this one after it has built the model, and hands nothing over."""
    model, other = build(), build(model_type="qwen3")
    lk._apply_liger_kernel("llama")
    assert lk.patch_of(model) is not None and lk.patch_of(model.model) is None
    assert lk.patch_of(other) is None and lk.patch_of(build()) is not None
