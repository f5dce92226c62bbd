"""LoRA on any linear, the head among them: the unpatched model's numbers, fused where it can be."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from liger_kernel.transformers import apply, patch_of
from numerics import assert_errs_no_more
from tiny import V, assert_same, batch, build, step

LORA: dict[str, dict[str, Any]] = {
    "attention": dict(target_modules=["q_proj", "v_proj"]),
    "every linear": dict(target_modules="all-linear"),
    "head": dict(target_modules=["lm_head"]),
    "head and embedding": dict(target_modules=["lm_head", "embed_tokens"]),
    "head, ranks and scales": dict(
        target_modules=["q_proj", "lm_head"], use_rslora=True, rank_pattern={"lm_head": 7}
    ),
    "saved head": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "saved norm": dict(target_modules=["gate_proj"], modules_to_save=["norm"]),
    "DoRA on the head": dict(target_modules=["lm_head"], use_dora=True),
}
UNFUSED = {"DoRA on the head"}


def wrap(model: nn.Module, name: str = "default", **lora: Any) -> Any:
    torch.manual_seed(1)
    config = LoraConfig(
        **dict(r=4, init_lora_weights=False, task_type="CAUSAL_LM") | lora  # pyright: ignore
    )
    return get_peft_model(model, config, adapter_name=name).train()


@pytest.mark.parametrize("first", ["peft", "patch"])
@pytest.mark.parametrize("case", LORA)
def test_each_target(case: str, first: str) -> None:
    want = step(wrap(build(), "foo", **LORA[case]))
    model = build()
    if first == "patch":
        apply(model)
    model = wrap(model, "foo", **LORA[case])
    patch = apply(model)
    assert patch_of(model) is patch
    width = V if case in UNFUSED else 0
    assert_same(step(model), want, width)
    assert_same(step(model), want, width)
    patch.revert()
    assert_same(step(model), want, V)


def test_the_head_of_another_model_type_keeps_its_scale() -> None:
    granite = dict(model_type="granite", logits_scaling=0.3)
    want = step(wrap(build(**granite), **LORA["head"]))
    model = wrap(build(**granite), **LORA["head"])
    apply(model)
    assert_same(step(model), want)


def test_dropout_draws_as_the_models_own() -> None:
    models = [wrap(build(), lora_dropout=0.5, target_modules=["lm_head"]) for _ in range(2)]
    apply(models[0])
    got, want = (seeded(model) for model in models)
    assert_same(got, want)


def seeded(model: nn.Module) -> Any:
    torch.manual_seed(2)
    return step(model)


def test_a_bias_in_the_adapter() -> None:
    def biased() -> Any:
        model = build()
        model.lm_head.bias = nn.Parameter(torch.arange(V) / V)
        return wrap(model, target_modules=["lm_head"], lora_bias=True)

    want, model = step(biased()), biased()
    apply(model)
    assert_same(step(model), want)


def test_two_adapters_on_the_head() -> None:
    def two() -> Any:
        model = wrap(build(), **LORA["head"])
        config = LoraConfig(r=3, init_lora_weights=False, lora_alpha=5, **LORA["head"])
        model.add_adapter("second", config)
        model.base_model.set_adapter(["default", "second"])
        return model

    want, model = step(two()), two()
    apply(model)
    assert_same(step(model), want)


def test_merged_disabled_and_back() -> None:
    lora = LORA["head and embedding"] | dict(modules_to_save=["norm"])
    model, plain = (wrap(build(), **lora) for _ in range(2))
    apply(model)
    for change in ("merge_adapter", "unmerge_adapter"):
        for m in (model, plain):
            getattr(m, change)()
        assert_same(step(model), step(plain))
    with model.disable_adapter(), plain.disable_adapter():
        got, want = (m(input_ids=batch()[0], labels=batch()[1]) for m in (model, plain))
        assert got.logits.shape[-1] == 0
        torch.testing.assert_close(got.loss, want.loss)
    assert_same(step(model), step(plain))


def test_merged_for_good() -> None:
    model, plain = (wrap(build(), **LORA["head"]) for _ in range(2))
    apply(model)
    got, want = (step(m.merge_and_unload().train().requires_grad_()) for m in (model, plain))
    assert_same(got, want)


def test_half_a_model_with_adapters_in_fp32() -> None:
    """PEFT keeps adapters of a bf16 model in fp32; the error against fp64 is torch's own."""
    plain = wrap(build().bfloat16(), target_modules=["lm_head", "q_proj"])
    exact = wrap(build().bfloat16().double(), target_modules=["lm_head", "q_proj"])
    model = copy.deepcopy(plain)
    apply(model)
    assert_errs_no_more(step(model)[1], step(plain)[1], step(exact)[1], torch.bfloat16)


def test_saved_and_loaded(tmp_path: Any) -> None:
    model = wrap(build(), **LORA["head"])
    apply(model)
    want = step(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    again = PeftModel.from_pretrained(build(), tmp_path, is_trainable=True).train()
    got = step(again)
    torch.testing.assert_close(got[0].loss, want[0].loss)
    apply(again)
    assert_same(step(again), want)


def test_a_resized_vocabulary_and_tied_weights() -> None:
    for tied in (False, True):
        model, plain = (build(tie_word_embeddings=tied) for _ in range(2))
        apply(model)
        for m in (model, plain):
            torch.manual_seed(3)
            m.resize_token_embeddings(V + 7, mean_resizing=False)
        assert_same(step(model), step(plain))
        patch_of(model).revert()  # pyright: ignore
        assert_same(step(model), step(plain), V + 7)


@pytest.mark.gpu
@pytest.mark.parametrize("double", [False, True])
def test_qlora(double: bool, tmp_path: Any) -> None:
    """4-bit linears: what they return is not the MLP's own, and the head is left in 16 bits."""
    pytest.importorskip("bitsandbytes")
    build(hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(tmp_path)

    def load(dtype: torch.dtype) -> Any:
        four = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=double,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=four, dtype=dtype, device_map={"": 0}
        )
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        return wrap(model, target_modules="all-linear")

    inputs = dict(zip(("input_ids", "labels"), (t.cuda() for t in batch()), strict=True))
    exact, theirs = (step(load(d), **inputs)[1] for d in (torch.float32, torch.bfloat16))
    model = load(torch.bfloat16)
    patch = apply(model)
    out, ours = step(model, **inputs)
    kinds = {c.before for c in patch.changes}
    assert kinds == {"LlamaAttention", "LlamaMLP", "LlamaRMSNorm", "Linear"} and not patch.left
    assert out.logits.shape[-1] == 0
    assert_errs_no_more(ours, theirs, exact, torch.bfloat16)


def test_adapters_of_stacked_experts() -> None:
    moe = dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2)
    lora = dict(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
    want = step(wrap(build(**moe), **lora))
    model = wrap(build(**moe), **lora)
    apply(model)
    assert_same(step(model), want)


@pytest.mark.parametrize("where", ["lora_B.default", "base_layer"])
def test_a_hook_within_an_adapter_is_not_passed_over(where: str) -> None:
    def hooked() -> Any:
        model = wrap(build(), **LORA["head"])
        model.base_model.model.lm_head.get_submodule(where).register_forward_hook(
            lambda module, args, out: out * 3
        )
        return model

    want, model = step(hooked()), hooked()
    apply(model)
    assert_same(step(model), want, V)
