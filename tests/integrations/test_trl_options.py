"""`use_liger_loss` with what all trainers have: accumulation, precision, families, adapters."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from trl.trainer.utils import use_adapter

import families
from preferences import (
    assert_logged,
    assert_parity,
    both,
    data_of,
    foreseen,
    needed,
    pairs,
    reference,
    run,
    trainer_of,
)
from tiny import build

FEATURES: dict[str, tuple[int, dict[str, Any]]] = {
    "accumulation": (6, dict(gradient_accumulation_steps=2, per_device_train_batch_size=2)),
    "checkpoints": (3, dict(gradient_checkpointing=True)),
    "reentrant": (
        3,
        dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}),
    ),
    "clipped": (3, dict(max_grad_norm=0.1)),
}
"""How many backwards the options make of three steps, and they."""


@pytest.mark.parametrize("case", FEATURES)
@pytest.mark.parametrize("name", ["DPO", "KTO", "ORPO"])
def test_features(name: str, case: str, tmp_path: Path) -> None:
    backwards, options = FEATURES[case]
    plain, ours = both(name, tmp_path, **options)
    assert_parity(plain, ours)
    assert foreseen(ours) == backwards


@pytest.mark.parametrize("name", ["DPO", "KTO", "ORPO", "CPO", "SFT"])
def test_evaluation(name: str, tmp_path: Path) -> None:
    given = needed(name, build()) | {"eval_dataset": data_of(name)}
    plain, ours = both(name, tmp_path, given=given, eval_strategy="steps", eval_steps=1)
    assert_parity(plain, ours)
    got, want = ([h for h in r[0].state.log_history if "eval_loss" in h] for r in (ours, plain))
    assert len(got) == 3
    assert_logged(got, want)


def distance(a: Any, b: Any) -> float:
    """Of the gradients of the first step, by the norm of the latter."""
    error = sum(float((a[2][0][n] - g).norm() ** 2) for n, g in b[2][0].items())
    return (error / sum(float(g.norm() ** 2) for g in b[2][0].values())) ** 0.5


@pytest.mark.parametrize("name", ["DPO", "KTO", "ORPO"])
def test_autocast(name: str, tmp_path: Path) -> None:
    exact, _ = both(name, tmp_path)
    plain, ours = both(name, tmp_path, bf16=True)
    rounding = distance(plain, exact)
    assert rounding > 1e-4
    assert distance(ours, exact) < 1.5 * rounding
    assert ours[1][0]["loss"] == pytest.approx(exact[1][0]["loss"], rel=0.05)
    assert foreseen(ours) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DPO", "ORPO"])
def test_compiled(name: str, tmp_path: Path) -> None:
    plain, ours = both(
        name, tmp_path, torch_compile=True, torch_compile_backend="aot_eager", max_steps=2
    )
    assert_parity(plain, ours)


@pytest.mark.parametrize("name", ["DPO", "ORPO"])
def test_resume(name: str, tmp_path: Path) -> None:
    plain, ours = both(name, tmp_path, save_strategy="steps", save_steps=2)
    last = str(tmp_path / "True" / "checkpoint-2")
    again = both(name, tmp_path / "again", resume=last)
    assert foreseen(ours) == 3 and foreseen(again[1]) == 1
    assert_parity(*again)
    assert_parity((None, plain[1], plain[2][2:]), (None, ours[1], again[1][2]))


def with_bias() -> Any:
    model = build()
    head = nn.Linear(32, model.config.vocab_size)
    head.weight = model.lm_head.weight
    model.lm_head = head
    return model


FAMILIES: dict[str, Any] = {
    "softcap": lambda: families.build("gemma2", final_logit_softcapping=1.0),
    "divisor": lambda: families.build("granite"),
    "router": lambda: families.build("mixtral"),
    "bias": with_bias,
    "tied": lambda: build(tie_word_embeddings=True),
}


@pytest.mark.parametrize("name", ["DPO", "KTO", "ORPO", "CPO", "SFT", "GRPO"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(name: str, family: str, tmp_path: Path) -> None:
    if (name, family) == ("GRPO", "router"):
        pytest.skip("Mixtral in training does not generate: transformers' own router loss fails")
    sampled = dict(num_generations=4, max_completion_length=6, learning_rate=1e-3)
    options: dict[str, Any] = sampled if name == "GRPO" else {}
    plain, ours = both(name, tmp_path, make=FAMILIES[family], **options)
    assert_parity(plain, ours)
    assert foreseen(ours) == (3 if name in ("DPO", "KTO", "ORPO", "CPO") else 0)


@pytest.mark.parametrize("name", ["DPO", "KTO", "ORPO", "CPO"])
@pytest.mark.parametrize("trained", [True, False])
def test_a_head_alone_and_all_but_the_head(name: str, trained: bool, tmp_path: Path) -> None:
    def make() -> Any:
        model = build()
        for p in model.parameters():
            p.requires_grad_((p is model.lm_head.weight) == trained)
        return model

    plain, ours = both(name, tmp_path, make=make)
    assert_parity(plain, ours)
    assert foreseen(ours) == (3 if trained else 0)


@pytest.mark.parametrize("name", ["DPO", "KTO"])
def test_weight_of_the_routers_loss(name: str, tmp_path: Path) -> None:
    plain, ours = both(name, tmp_path, make=FAMILIES["router"], router_aux_loss_coef=0.3)
    assert "aux_loss" in plain[1][0]
    assert_parity(plain, ours)


def lora(*targets: str, **options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(
        r=4, target_modules=list(targets), init_lora_weights=False, task_type="CAUSAL_LM",
        **options,
    )  # fmt: skip


ADAPTERS: dict[str, tuple[bool, Any]] = {
    "LoRA": (False, lora("q_proj", "v_proj")),
    "saved head": (True, lora("q_proj", modules_to_save=["lm_head"])),
    "prompt": (False, peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
    "prefix": (False, peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
}
"""Whether the head is trained, and the adapter."""


@pytest.mark.parametrize("name", ["DPO", "KTO", "ORPO", "CPO", "SFT"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters(name: str, adapter: str, tmp_path: Path) -> None:
    if name in ("ORPO", "CPO") and adapter == "prompt":
        pytest.skip("TRL's own fails: its labels are shorter than its logits")
    trained, config = ADAPTERS[adapter]
    plain, ours = both(name, tmp_path, given={"peft_config": config})
    assert_parity(plain, ours)
    assert foreseen(ours) == (3 if trained and name != "SFT" else 0)


@pytest.mark.parametrize("name", ["ORPO", "CPO"])
def test_lora_on_the_head(name: str, tmp_path: Path) -> None:
    plain, ours = both(name, tmp_path, given={"peft_config": lora("q_proj", "lm_head")})
    assert_parity(plain, ours)
    assert foreseen(ours) == 3


def by_hand(model: Any, ref: Any, batch: dict[str, Tensor], beta: float) -> Tensor:
    """DPO's loss from full logits."""
    labels, keep = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:]

    def logp(m: Any) -> Tensor:
        logits = m(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        found = logits[:, :-1].log_softmax(-1).gather(-1, labels[..., None])[..., 0]
        return (found * keep).sum(-1)

    with torch.no_grad(), ref():
        want = logp(model)
    chosen, rejected = (logp(model) - want).chunk(2)
    return -logsigmoid(beta * (chosen - rejected)).mean()


RANKS: dict[str, dict[str, Any]] = {
    "one": {},
    "its own": dict(use_rslora=True, rank_pattern={"lm_head": 7}),
}


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("first", ["trainer", "peft"])
def test_lora_on_the_head_that_trl_refuses(rank: str, first: str, tmp_path: Path) -> None:
    """The reference has no adapter or, where the model came with one, a copy of it."""
    config = lora("q_proj", "lm_head", **RANKS[rank])

    def trained(ours: bool) -> Any:
        torch.manual_seed(1)
        model: Any = build()
        return run(
            *trainer_of("DPO", ours), tmp_path, pairs(), learning_rate=0.01,
            model=model if first == "trainer" else peft.get_peft_model(model, config),
            given={"peft_config": copy.deepcopy(config)} if first == "trainer" else {},
            **({"use_liger_loss": True} if ours else {}),
        )[0]  # fmt: skip

    with pytest.raises(ValueError, match="adapter to `lm_head`"):
        trained(ours=False)
    it = trained(ours=True)
    model, (fused,) = it.model, it._liger.fused
    batch = it._prepare_inputs(next(iter(it.get_train_dataloader())))
    ref = partial(use_adapter, model, adapter_name=None if first == "trainer" else "ref")
    losses, found = [], []
    for loss in (
        lambda: it.compute_loss(model, dict(batch)),
        lambda: by_hand(model, ref, batch, it.beta),
    ):
        model.zero_grad()
        losses.append(value := loss())
        value.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*losses)
    assert found[0].keys() == found[1].keys() and any("lm_head" in n for n in found[0])
    for name, gradient in found[1].items():
        assert (found[0][name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    assert (fused.foreseen, fused.mistaken) == (4, 0)


@pytest.mark.parametrize("name", ["DPO", "KTO", "SFT"])
def test_dora_on_the_head(name: str, tmp_path: Path) -> None:
    given = {"peft_config": lora("lm_head", use_dora=True)}
    with pytest.raises(ValueError, match="adapter to `lm_head`"):
        run(
            *trainer_of(name, ours=True), tmp_path, data_of(name), given=given,
            use_liger_loss=True,
        )  # fmt: skip


def test_dora_on_the_head_of_one_that_has_no_fused_head(tmp_path: Path) -> None:
    given = {"peft_config": lora("lm_head", use_dora=True)}
    with pytest.raises(ValueError, match="cannot fuse this model's head: its adapter"):
        run(*trainer_of("ORPO", ours=True), tmp_path, pairs(), given=given, use_liger_loss=True)


def test_a_second_adapter_is_the_reference(tmp_path: Path) -> None:
    """A PEFT model without a reference: TRL copies its adapter to one called "ref"."""

    def make() -> Any:
        torch.manual_seed(1)
        return peft.get_peft_model(build(), lora("q_proj", modules_to_save=None))

    plain, ours = both("DPO", tmp_path, make=make, given={})
    assert_parity(plain, ours)
    plain, ours = both("DPO", tmp_path, make=make, given={"ref_model": reference(build())})
    assert_parity(plain, ours)
