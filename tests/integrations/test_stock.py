"""`install()`: transformers' own TrainingArguments take use_liger, and forget it again."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import HfArgumentParser

import liger_kernel
from liger_kernel import stock
from liger_kernel.transformers import TrainingArguments, patch_of
from test_trainer import train


@dataclasses.dataclass
class Before(transformers.TrainingArguments):
    """Somebody's, made before the install."""

    mine: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.mine += 1


class WithInit(transformers.Seq2SeqTrainingArguments):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(output_dir="x", **kwargs)


CLASSES = [transformers.TrainingArguments, transformers.Seq2SeqTrainingArguments, Before, WithInit]


def facts(cls: type) -> dict[str, Any]:
    return {name: value for name, value in vars(cls).items() if name != "__doc__"}


@pytest.fixture
def installed() -> Iterator[None]:
    before = [facts(cls) for cls in CLASSES]
    liger_kernel.install("transformers")
    liger_kernel.install("transformers")
    yield
    liger_kernel.uninstall("transformers")
    liger_kernel.uninstall("transformers")
    assert [facts(cls) for cls in CLASSES] == before
    with pytest.raises(TypeError, match="use_liger"):
        transformers.TrainingArguments(output_dir="x", use_liger=True)  # pyright: ignore


@pytest.mark.usefixtures("installed")
def test_stock_arguments_take_the_flag(tmp_path: Path) -> None:
    want, plain = train(tmp_path, transformers.TrainingArguments)
    got, trainer = train(
        tmp_path, transformers.TrainingArguments, use_liger=True, liger_config={"rope": False}
    )
    patch = patch_of(trainer.model)
    assert patch_of(plain.model) is None and patch is not None and not patch.config.rope
    assert got == pytest.approx(want, rel=1e-5)
    assert json.loads(trainer.args.to_json_string())["use_liger"] is True
    assert dataclasses.replace(trainer.args, seed=1).liger_kernel_config["rope"] is False


@pytest.mark.usefixtures("installed")
def test_what_is_made_from_them_does_too() -> None:
    @dataclasses.dataclass
    class After(Before):
        more: int = 1

    for cls in (Before, After, transformers.Seq2SeqTrainingArguments):
        args = cls(output_dir="x", use_liger=True, liger_config='{"norm": false}')
        assert args.use_liger_kernel and args.liger_kernel_config["norm"] is False
        assert not cls(output_dir="x").use_liger_kernel
        with pytest.raises(ValueError, match="use_liger is not"):
            cls(output_dir="x", liger_config={})
    assert Before(output_dir="x").mine == 4
    assert WithInit(use_liger=True).use_liger_kernel  # pyright: ignore
    assert TrainingArguments(output_dir="x", use_liger=True).use_liger_kernel  # ours, as before


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("cls", [transformers.TrainingArguments, Before])
def test_their_command_line(cls: Any) -> None:
    words = ["--output_dir", "x", "--use_liger", "--liger_config", '{"mlp": false}']
    args = HfArgumentParser(cls).parse_args_into_dataclasses(words)[0]
    assert args.use_liger_kernel and args.liger_kernel_config["mlp"] is False


def test_what_others_have_put_around_it_forgets_too() -> None:
    edited = transformers.TrainingArguments
    before = [vars(edited)[name] for name in ("__init__", "__post_init__")]
    liger_kernel.install("transformers")

    @dataclasses.dataclass
    class Between(transformers.TrainingArguments):
        """Made while it was installed: it keeps what it has."""

    for name in ("__init__", "__post_init__"):
        inner = vars(edited)[name]
        setattr(edited, name, lambda self, *a, inner=inner, **k: inner(self, *a, **k))
    liger_kernel.uninstall("transformers")
    try:
        assert not edited(output_dir="x").use_liger_kernel
        with pytest.raises(TypeError, match="use_liger"):
            edited(output_dir="x", use_liger=True)  # pyright: ignore
        assert Between(output_dir="x", use_liger=True).use_liger_kernel  # pyright: ignore
        with pytest.raises(ValueError, match="not a liger_config option"):
            Between(output_dir="x", use_liger=True, liger_config={"ropes": 1})  # pyright: ignore
    finally:
        for name, value in zip(("__init__", "__post_init__"), before, strict=True):
            setattr(edited, name, value)


def test_names() -> None:
    with pytest.raises(ValueError, match="'jax' has no stock classes here"):
        liger_kernel.install("jax")
    liger_kernel.install()
    assert stock._installed.keys() == {"transformers", "accelerate", "trl"}
    liger_kernel.uninstall()
    assert not stock._installed


def test_in_any_order_nothing_is_left() -> None:
    pytest.importorskip("trl")
    from trl.trainer.dpo_config import DPOConfig

    classes = (transformers.TrainingArguments, DPOConfig, DPOConfig.__mro__[1])
    before = [dict(vars(cls)) for cls in classes]
    for order in (("transformers", "trl"), ("trl", "transformers")):
        liger_kernel.install(*order)
        liger_kernel.uninstall(order[0])
        known = order[1] == "trl"
        assert hasattr(DPOConfig, "use_liger_loss") == known
        assert hasattr(DPOConfig, "use_liger") != known
        liger_kernel.uninstall()
        assert [dict(vars(cls)) for cls in classes] == before


def test_a_trl_without_a_fused_head_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    utils = pytest.importorskip("trl.trainer.utils")
    monkeypatch.delattr(utils, "add_fused_lm_head")
    with pytest.raises(ImportError, match="has no fused head; use_liger_loss knows TRL"):
        liger_kernel.install("trl")
    liger_kernel.install()
    assert stock._installed.keys() == {"transformers", "accelerate"}
    liger_kernel.uninstall()


def test_a_framework_that_is_broken_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(stock.REGISTRY, "transformers", "liger_kernel.not_there")
    with pytest.raises(ImportError, match="not_there"):
        liger_kernel.install()
    liger_kernel.uninstall()
