"""HF Trainer by one flag: the numbers stay those of the plain run."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, GPT2Config, GPT2LMHeadModel, HfArgumentParser, Trainer

import liger_kernel
from liger_kernel import LigerConfig
from liger_kernel.check import allowed
from liger_kernel.transformers import (
    LigerArguments,
    LigerCallback,
    TrainingArguments,
    _apply_liger_kernel_to_instance,
    apply,
    patch_of,
)
from tiny import Rows, V, build, fused


def train(
    tmp_path: Path, cls: Any = TrainingArguments, trainer_cls: Any = Trainer,
    parts: dict[str, Any] | None = None, resume: Any = None, **kwargs: Any,
) -> tuple[list[float], Any]:  # fmt: skip
    options = dict(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, logging_steps=1,
        gradient_accumulation_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", seed=0,
    )  # fmt: skip
    given = dict(train_dataset=Rows(), eval_dataset=Rows()) | (parts or {})
    if "model_init" not in given:
        given.setdefault("model", build())
    trainer = trainer_cls(args=cls(**options | kwargs), **given)
    trainer.train(resume_from_checkpoint=resume)
    return [h["loss"] for h in trainer.state.log_history if "loss" in h], trainer


def same_parameters(a: Any, b: Any) -> None:
    for (name, p), q in zip(a.model.named_parameters(), b.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)


def lora() -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj", "lm_head"])
    model = peft.get_peft_model(build(), config)
    for name, p in model.named_parameters():
        if "lora_B" in name:  # zero, so that A would have no gradient at first
            torch.nn.init.normal_(p, std=0.1)
    return model


def squared(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A loss of the user's own, of the logits."""
    logp = outputs.logits[:, :-1].log_softmax(-1)
    y = labels[:, 1:]
    chosen = logp.gather(-1, y.clamp_min(0)[..., None])[..., 0]
    return (chosen.square() * (y != -100)).sum() / num_items_in_batch


@dataclasses.dataclass
class Mixed(LigerArguments, transformers.TrainingArguments):
    mine: int = 3


LOGITS = "ignore:lm_head makes full logits:UserWarning"
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": dict(gradient_checkpointing=True),
    "compiled": dict(torch_compile=True, torch_compile_backend="aot_eager"),
    "neftune": dict(neftune_noise_alpha=5.0),
    "label smoothing": dict(label_smoothing_factor=0.1),
    "own loss": dict(parts=lambda: dict(compute_loss_func=squared)),
    "model_init": dict(parts=lambda: dict(model_init=lambda: build())),
    "LoRA": dict(parts=lambda: dict(model=lora())),
    "per micro-batch": dict(average_tokens_across_devices=False),
    "Seq2SeqTrainer": dict(
        trainer_cls=transformers.Seq2SeqTrainer,
        cls="Seq2Seq",
        predict_with_generate=True,
    ),
}
UNFUSED = ("label smoothing", "own loss")  # Trainer keeps the labels from the model


@pytest.mark.filterwarnings(LOGITS, "ignore:with label_smoothing_factor:UserWarning")
@pytest.mark.parametrize("way", ["use_liger", "use_liger_kernel", "callback"])
@pytest.mark.parametrize("feature", FEATURES)
def test_no_number_changes(tmp_path: Path, feature: str, way: str) -> None:
    def run(ours: bool) -> Any:
        extra = dict(FEATURES[feature])
        parts = extra.pop("parts", dict)()
        module = liger_kernel.transformers if ours and way == "use_liger" else transformers
        extra["cls"] = getattr(module, extra.pop("cls", "") + "TrainingArguments")
        if ours and way == "callback":
            parts["callbacks"] = [LigerCallback()]
        elif ours:
            extra[way] = True
        return train(tmp_path, parts=parts, **extra)

    (want, plain), (got, patched) = run(False), run(True)
    assert patch_of(plain.model) is None and patch_of(patched.model) is not None
    assert fused(patched.model) == (feature not in UNFUSED)
    assert got == pytest.approx(want, rel=1e-5)
    same_parameters(patched, plain)
    assert patched.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-4)


def test_a_dataclass_of_the_users_own(tmp_path: Path) -> None:
    want, _ = train(tmp_path)
    got, trainer = train(tmp_path, Mixed, use_liger=True, liger_config='{"rope": false}')
    patch = patch_of(trainer.model)
    assert patch is not None and not patch.config.rope and trainer.args.mine == 3
    assert got == pytest.approx(want, rel=1e-5)
    words = ["--output_dir", "x", "--use_liger", "--liger_config", '{"norm": false}']
    args = HfArgumentParser(Mixed).parse_args_into_dataclasses(words)[0]  # pyright: ignore
    assert args.liger_kernel_config["norm"] is False


def test_label_smoothing_that_is_fused(tmp_path: Path) -> None:
    want, plain = train(tmp_path, label_smoothing_factor=0.1)
    got, ours = train(tmp_path, use_liger=True, liger_config={"label_smoothing": 0.1})
    assert fused(ours.model) and got == pytest.approx(want, rel=1e-5)
    same_parameters(ours, plain)
    unsmoothed, _ = train(tmp_path)
    assert got != pytest.approx(unsmoothed, rel=1e-3)
    want = plain.evaluate()["eval_loss"]
    for loss_only in (True, False):  # of the head, and of logits that are there
        ours.args.prediction_loss_only = loss_only
        assert ours.evaluate()["eval_loss"] == pytest.approx(want, rel=1e-4)


def test_label_smoothing_is_never_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smoothed = {"label_smoothing": 0.1}
    with pytest.raises(ValueError, match="no language-model head"):
        apply(build(AutoModel), smoothed)
    with pytest.raises(ValueError, match="no recipe for model type 'gpt2'"):
        _apply_liger_kernel_to_instance(GPT2LMHeadModel(GPT2Config(n_layer=1)), **smoothed)
    with pytest.raises(ValueError, match="not both"):
        TrainingArguments(
            output_dir="x", use_liger=True, liger_config=smoothed, label_smoothing_factor=0.1
        )
    with pytest.warns(UserWarning, match="keep it fused with liger_config="):
        TrainingArguments(output_dir="x", use_liger=True, label_smoothing_factor=0.1)
    monkeypatch.setenv("LIGER_DISABLE", "1")
    with pytest.raises(ValueError, match="LIGER_DISABLE is set"):
        apply(build(), smoothed)


@pytest.mark.parametrize("ours", ["plain", "patched"])
def test_resuming_gives_the_unbroken_run(tmp_path: Path, ours: str) -> None:
    def run(folder: str, **kwargs: Any) -> Any:
        options = dict(use_liger=ours == "patched", max_steps=4, save_strategy="steps")
        return train(tmp_path / folder, **options | dict(save_steps=2) | kwargs)

    want, whole = run("whole")
    run("part")
    got, resumed = run("part", resume=str(tmp_path / "part" / "checkpoint-2"))
    assert got == want
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)
    saved = load_file(tmp_path / "part" / "checkpoint-4" / "model.safetensors")
    build().load_state_dict(saved, strict=True)  # a checkpoint knows nothing of a patch


def test_the_callback_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, trainer = train(tmp_path, parts=dict(callbacks=[LigerCallback()]), eval_strategy="epoch")
    said = capsys.readouterr().out
    assert said.count("modules of LlamaForCausalLM patched") == 1
    assert "liger: liger_peak_memory_mib=" in said
    end = trainer.state.log_history[-1]
    assert end["liger_peak_memory_mib"] > 10 and end["liger_tokens_per_second"] > 0
    assert len(trainer.model._forward_pre_hooks) == 1  # the patch's own


@pytest.mark.parametrize("kwargs", [dict(use_liger=True), dict(use_liger_kernel=True)], ids=str)
def test_logits_in_training_are_not_silent(tmp_path: Path, kwargs: dict[str, bool]) -> None:
    with pytest.warns(UserWarning, match="lm_head makes full logits, with a gradient") as said:
        train(tmp_path, parts=dict(compute_loss_func=squared), **kwargs)
    assert len(said) == 1
    smoothed = dict(use_liger=True, liger_config={"label_smoothing": 0.1})
    with pytest.raises(ValueError, match="a model that is given its labels"):
        train(tmp_path, parts=dict(compute_loss_func=squared), **smoothed)


def test_two_configurations_are_an_error(tmp_path: Path) -> None:
    callbacks = [LigerCallback({"rope": False})]
    with pytest.raises(ValueError, match="LigerCallback LigerConfig"):
        train(tmp_path, parts=dict(callbacks=callbacks), use_liger=True)
    _, trainer = train(tmp_path, parts=dict(callbacks=callbacks))
    with pytest.raises(ValueError, match="another loss"):
        _apply_liger_kernel_to_instance(trainer.model, label_smoothing=0.1)


def test_a_model_without_a_recipe_is_an_error_of_the_flag(tmp_path: Path) -> None:
    def gpt2() -> Any:
        config = GPT2Config(vocab_size=V, n_embd=8, n_layer=1, n_head=2, n_positions=16)
        return GPT2LMHeadModel(config)

    with pytest.raises(ValueError, match="no recipe for model type 'gpt2'"):
        train(tmp_path, parts=dict(model=gpt2()), use_liger=True)
    train(tmp_path, parts=dict(model=gpt2()), use_liger_kernel=True)  # upstream's contract
    _, trainer = train(
        tmp_path, parts=dict(model=gpt2()), use_liger=True, liger_config=dict(generic=True)
    )
    assert fused(trainer.model)


def test_the_mixin_says_where_it_does_not_belong() -> None:
    with pytest.raises(TypeError, match="LigerArguments must come first among the bases of Behind"):

        class Behind(transformers.TrainingArguments, LigerArguments): ...

    @dataclasses.dataclass
    class Alone(LigerArguments):
        lr: float = 1.0

    with pytest.raises(TypeError, match="Alone must be made from TrainingArguments too"):
        Alone(use_liger=True)


def test_replace_changes_the_configuration() -> None:
    args = TrainingArguments(output_dir="x", use_liger=True, liger_config=LigerConfig(rope=False))
    json.loads(args.to_json_string())
    again = dataclasses.replace(args, liger_config={"norm": False})
    assert again.liger_kernel_config == LigerConfig(norm=False).to_dict()
    assert dataclasses.replace(args, use_liger=False, liger_config=None, use_liger_kernel=False)
    with pytest.raises(ValueError, match="turn both off"):
        dataclasses.replace(args, use_liger=False, liger_config=None)
    stock = TrainingArguments(output_dir="x", use_liger=True, liger_kernel_config={"rope": False})
    assert dataclasses.replace(stock, seed=1).liger_kernel_config["rope"] is False


def test_mixed_precision_errs_no_more_than_the_plain_run(tmp_path: Path) -> None:
    exact, _ = train(tmp_path)
    theirs, _ = train(tmp_path, bf16=True)
    ours, _ = train(tmp_path, bf16=True, use_liger=True)
    for o, t, e in zip(ours, theirs, exact, strict=True):
        assert abs(o - e) <= allowed(abs(t - e), e, torch.bfloat16)


def test_stock_arguments_patch_too(tmp_path: Path) -> None:
    config = {"rope": False, "swiglu": False}
    _, trainer = train(
        tmp_path, transformers.TrainingArguments, use_liger_kernel=True, liger_kernel_config=config
    )
    patch = patch_of(trainer.model)
    assert patch is not None and not patch.config.rope and not patch.config.mlp


def test_evaluation_and_prediction(tmp_path: Path) -> None:
    _, plain = train(tmp_path)
    _, patched = train(tmp_path, use_liger=True, prediction_loss_only=True)
    assert patched.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-4)
    patched.args.prediction_loss_only = False
    assert patched.predict(Rows()).predictions.shape == (12, 16, V)


def test_metrics_of_logits(tmp_path: Path) -> None:
    def accuracy(out: Any) -> dict[str, float]:
        best, labels = out.predictions[:, :-1].argmax(-1), out.label_ids[:, 1:]
        return {"accuracy": float((best == labels)[labels != -100].mean())}

    found = []
    for use_liger in (False, True):
        _, trainer = train(tmp_path, use_liger=use_liger)
        trainer.compute_metrics = accuracy
        found.append(trainer.evaluate())
    assert found[1]["eval_accuracy"] == found[0]["eval_accuracy"] > 0
    assert found[1]["eval_loss"] == pytest.approx(found[0]["eval_loss"], rel=1e-4)


def test_a_second_train_keeps_the_patch(tmp_path: Path) -> None:
    _, trainer = train(tmp_path, use_liger=True)
    first = patch_of(trainer.model)
    trainer.train()
    assert patch_of(trainer.model) is first


def parse(*words: str) -> TrainingArguments:
    parser = HfArgumentParser(TrainingArguments)  # pyright: ignore
    return parser.parse_args_into_dataclasses(["--output_dir", "x", *words])[0]


def test_the_command_line() -> None:
    assert not parse().use_liger and parse("--use_liger").use_liger
    args = parse("--use_liger", "True", "--liger_config", '{"rope": false}')
    assert args.use_liger_kernel and args.liger_kernel_config["rope"] is False
    assert dataclasses.replace(args, seed=1).liger_kernel_config == args.liger_kernel_config
    assert json.loads(args.to_json_string())["liger_config"] == {"rope": False}


@pytest.mark.parametrize(
    "kwargs, match",
    [
        (
            dict(use_liger=True, liger_config={"ropes": True}),
            "'ropes' is not a liger_config option",
        ),
        (dict(liger_config={"rope": True}), "use_liger is not; pass use_liger=True"),
        (
            dict(use_liger=True, liger_config={}, liger_kernel_config={"rope": True}),
            "not both",
        ),
    ],
)
def test_what_is_wrong_is_said_at_once(kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        TrainingArguments(output_dir="x", **kwargs)
