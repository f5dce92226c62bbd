"""TrainingArguments with `use_liger`: the one flag of HF Trainer."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import transformers

from liger_kernel.config import LigerConfig, whole
from liger_kernel.stock import add_fields

DICT_FIELDS = "_VALID_DICT_FIELDS"  # what transformers' command line takes as JSON


@dataclass
class LigerArguments:
    """A mixin: `use_liger` and `liger_config` for a dataclass made from TrainingArguments.

        @dataclass
        class MyArguments(LigerArguments, transformers.TrainingArguments): ...

    `use_liger` becomes transformers' `use_liger_kernel`, with the configuration checked at once:
    `Trainer.train()` then patches the model it trains, and from then on evaluation that asks for
    the loss alone makes no logits. What is evaluated before is not patched.

    Raises:
        ValueError: options that are not known, that contradict, or without `use_liger`; in
            `train()`, a model of a family without a recipe.
        TypeError: a class that is not made from TrainingArguments, or with the mixin behind it.
    """

    use_liger: bool = field(
        default=False,
        metadata={"help": "Patch the model with this project's kernels and fused loss."},
    )
    liger_config: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Options of LigerConfig, as a dictionary or JSON; None for the defaults."
        },
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stock = transformers.TrainingArguments
        if stock in cls.__mro__ and cls.__mro__.index(stock) < cls.__mro__.index(LigerArguments):
            raise TypeError(f"LigerArguments must come first among the bases of {cls.__name__}")
        known = getattr(cls, DICT_FIELDS, [])
        if "liger_config" not in known:
            setattr(cls, DICT_FIELDS, [*known, "liger_config"])

    def __post_init__(self) -> None:
        if not isinstance(self, transformers.TrainingArguments):
            raise TypeError(f"{type(self).__name__} must be made from TrainingArguments too")
        super().__post_init__()  # pyright: ignore
        configure(self)


def configure(args: Any) -> None:
    """Set transformers' own flag from ours; again, it changes nothing.

    A whole `liger_kernel_config` is one that this has set, and comes back by `replace`.
    """
    derived = whole(args.liger_kernel_config)
    if not args.use_liger:
        if args.liger_config is not None:
            raise ValueError("liger_config is given but use_liger is not; pass use_liger=True")
        if derived and args.use_liger_kernel:
            raise ValueError("use_liger is off, but use_liger_kernel is on; turn both off")
        return
    if isinstance(args.liger_config, LigerConfig):
        args.liger_config = args.liger_config.to_dict()
    if args.liger_kernel_config and args.liger_config is not None and not derived:
        raise ValueError("give liger_config or liger_kernel_config, not both")
    given = args.liger_kernel_config if args.liger_config is None else args.liger_config
    config = LigerConfig.of(given)
    args.use_liger_kernel, args.liger_kernel_config = True, config.to_dict()
    if not args.label_smoothing_factor:
        return
    if config.label_smoothing:
        raise ValueError("give label_smoothing_factor or liger_config's label_smoothing, not both")
    if config.fused_head:
        warnings.warn(
            f"with label_smoothing_factor Trainer computes the loss itself, from full logits; "
            f"keep it fused with liger_config={{'label_smoothing': {args.label_smoothing_factor}}}",
            stacklevel=4,
        )


@dataclass
class TrainingArguments(LigerArguments, transformers.TrainingArguments):
    """transformers' own, with `use_liger` and `liger_config`."""


@dataclass
class Seq2SeqTrainingArguments(LigerArguments, transformers.Seq2SeqTrainingArguments):
    """transformers' own, with `use_liger` and `liger_config`."""


def install() -> Callable[[], None]:
    """Have transformers' TrainingArguments, and all made from it, take LigerArguments' fields.

    As keywords, on HfArgumentParser's command line, and in classes that are made from it later.
    Returns what takes it back, but for those classes, which keep the fields that they have.
    """
    return add_fields(
        transformers.TrainingArguments, LigerArguments, configure, {DICT_FIELDS: ["liger_config"]}
    )
