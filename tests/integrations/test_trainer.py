"""HF Trainer by one flag: the numbers stay those of the plain run."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import HfArgumentParser, Trainer

from liger_kernel.check import allowed
from liger_kernel.transformers import TrainingArguments, patch_of
from tiny import V, build


class Rows(torch.utils.data.Dataset):
    """Uneven numbers of scored labels, so that a wrong normaliser shows."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, V, (16,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids.where(torch.arange(16) > i, -100)}


def train(tmp_path: Path, cls: Any = TrainingArguments, **kwargs: Any) -> tuple[list[float], Any]:
    options = dict(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, logging_steps=1,
        gradient_accumulation_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", seed=0,
    )  # fmt: skip
    trainer = Trainer(build(), cls(**options | kwargs), train_dataset=Rows(), eval_dataset=Rows())
    trainer.train()
    return [h["loss"] for h in trainer.state.log_history if "loss" in h], trainer


def same_parameters(a: Any, b: Any) -> None:
    for (name, p), q in zip(a.model.named_parameters(), b.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("extra", [{}, dict(gradient_checkpointing=True)], ids=str)
def test_the_flag_changes_no_number(tmp_path: Path, extra: dict[str, Any]) -> None:
    want, plain = train(tmp_path, **extra)
    got, patched = train(tmp_path, use_liger=True, **extra)
    assert patch_of(plain.model) is None and patch_of(patched.model) is not None
    assert got == pytest.approx(want, rel=1e-5)
    same_parameters(patched, plain)


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


def test_a_loss_on_logits_is_evaluated_too(tmp_path: Path) -> None:
    """With label smoothing Trainer takes the labels out and asks for no logits all the same."""
    _, plain = train(tmp_path, label_smoothing_factor=0.1)
    _, patched = train(tmp_path, label_smoothing_factor=0.1, use_liger=True)
    assert patched.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-4)


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
