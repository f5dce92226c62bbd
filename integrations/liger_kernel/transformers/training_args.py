"""TrainingArguments with `use_liger`: the one flag of HF Trainer."""

import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import transformers

from liger_kernel.config import LigerConfig
from liger_kernel.stock import ClassEdits

DICT_FIELDS = "_VALID_DICT_FIELDS"  # what transformers' command line takes as JSON


@dataclass
class LigerArguments:
    """A mixin: `use_liger` and `liger_config` for any dataclass of training arguments.

        @dataclass
        class MyArguments(LigerArguments, transformers.TrainingArguments): ...

    `use_liger` becomes transformers' `use_liger_kernel`, with the configuration checked at once:
    `Trainer.train()` then patches the model it trains, and evaluation that asks for the loss alone
    makes no logits.

    Raises:
        ValueError: options that are not known, that contradict, or without `use_liger`.
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

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        setattr(cls, DICT_FIELDS, [*getattr(cls, DICT_FIELDS, ()), "liger_config"])

    def __post_init__(self) -> None:
        super().__post_init__()  # pyright: ignore
        configure(self)


def configure(args: Any) -> None:
    """Set transformers' own flag from ours; again, it changes nothing."""
    if not args.use_liger:
        if args.liger_config is not None:
            raise ValueError("liger_config is given but use_liger is not; pass use_liger=True")
        return
    given = args.liger_kernel_config if args.liger_config is None else args.liger_config
    config = LigerConfig.of(given)
    if args.liger_kernel_config not in (None, given, config.to_dict()):  # equal in a replace()
        raise ValueError("give liger_config or liger_kernel_config, not both")
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


FIELDS: dict[str, Any] = LigerArguments.__dataclass_fields__  # pyright: ignore


def _taking_ours(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in FIELDS.keys() & kwargs.keys():
            setattr(self, name, kwargs.pop(name))
        init(self, *args, **kwargs)

    return __init__


def _configuring(post_init: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(post_init)
    def __post_init__(self: Any) -> None:
        post_init(self)
        configure(self)

    return __post_init__


def _family(cls: type) -> Iterator[type]:
    """The class and all made from it, those left out that have the mixin."""
    if not issubclass(cls, LigerArguments):
        yield cls
        for child in cls.__subclasses__():
            yield from _family(child)


def install() -> Callable[[], None]:
    """Have transformers' TrainingArguments, and all made from it, take LigerArguments' fields.

    As keywords, on HfArgumentParser's command line, and in classes that are made from it later.
    Returns what takes it back.
    """
    stock, undo = transformers.TrainingArguments, ClassEdits()
    for cls in _family(stock):
        own = vars(cls)
        if "__dataclass_fields__" in own:
            undo.put(cls, "__dataclass_fields__", own["__dataclass_fields__"] | FIELDS)
        if DICT_FIELDS in own:
            undo.put(cls, DICT_FIELDS, [*own[DICT_FIELDS], "liger_config"])
        if "__init__" in own:
            undo.put(cls, "__init__", _taking_ours(own["__init__"]))
    undo.put(stock, "__annotations__", stock.__annotations__ | LigerArguments.__annotations__)
    undo.put(stock, "__post_init__", _configuring(vars(stock)["__post_init__"]))
    for name, ours in FIELDS.items():
        undo.put(stock, name, ours.default)
    return undo.revert
