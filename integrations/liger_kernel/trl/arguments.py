"""TRL's configurations with `use_liger_loss`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from liger_kernel.config import LigerConfig, named, whole
from liger_kernel.transformers.training_args import LigerArguments

BUDGETS = ("liger_memory_budget", "liger_saved_logits_budget")


@dataclass
class LigerLossArguments(LigerArguments):
    """A mixin: `use_liger_loss` for a configuration of TRL's; `use_liger` patches the layers.

        @dataclass
        class MyConfig(LigerLossArguments, trl.DPOConfig): ...

    It is for the trainers of `liger_kernel.trl`, or any after `liger_kernel.install("trl")`.
    Without either, TRL's own do not know the flag and train by their own loss.

    Raises:
        ValueError: `use_liger_loss` for a trainer that has no such loss, or that is neither True
            nor False; budgets that are no positive numbers of bytes, or without `use_liger_loss`;
            `fused_head=True` in liger_config, whose loss is not a TRL trainer's.
    """

    use_liger_loss: bool = field(
        default=False,
        metadata={
            "help": "Compute log-probabilities and their gradients by this project's engine, in "
            "the trainer's own losses."
        },
    )
    liger_memory_budget: int | None = field(
        default=None,
        metadata={
            "help": "Bytes of logits that the loss holds at once; None for a quarter of them, "
            "within 32 MiB and 1 GiB."
        },
    )
    liger_saved_logits_budget: int | None = field(
        default=None,
        metadata={
            "help": "Bytes of logits that may be kept from forward to backward, and need not be "
            "computed again then; None for those of the last chunk."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        configure_loss(self)


def configure_loss(args: Any) -> None:
    """Check the options; have `use_liger` leave the head to TRL. Again, it changes nothing."""
    if not isinstance(args.use_liger_loss, bool):
        raise ValueError(f"use_liger_loss must be true or false, got {args.use_liger_loss!r}")
    for name in BUDGETS:
        value = getattr(args, name)
        if value is None:
            continue
        if type(value) is not int or value <= 0:
            raise ValueError(f"{name} must be a positive number of bytes, got {value!r}")
        if not args.use_liger_loss:
            raise ValueError(f"{name} is given but use_liger_loss is not; pass use_liger_loss=True")
    if args.use_liger_loss and supported(type(args)) is None:
        raise ValueError(
            f"{type(args).__name__} has no liger loss; use_liger_loss is for {', '.join(NAMES)}"
        )
    if not getattr(args, "use_liger", False):
        return
    given = LigerConfig.of(args.liger_kernel_config)
    asked = args.liger_config
    if isinstance(asked, Mapping) and not whole(asked) and named(asked).get("fused_head"):
        raise ValueError(
            "a TRL trainer has a fused head of its own: leave fused_head out of liger_config, and "
            "pass use_liger_loss=True for the loss"
        )
    if given.label_smoothing:
        raise ValueError(
            "liger_config's label_smoothing is for the model's own loss, which TRL's trainers do "
            "not use; leave it out"
        )
    args.liger_kernel_config = given.to_dict() | {"fused_head": False}


NAMES = ("DPO", "KTO", "ORPO", "CPO", "SFT", "GRPO", "RLOO")


def supported(cls: type) -> str | None:
    """Which of NAMES a configuration's or trainer's class of TRL's, or one made from it, is of.

    None for what TRL itself makes from these, such as GKD, whose losses are of full logits.
    """
    theirs = next((c.__name__ for c in cls.__mro__ if c.__module__.startswith("trl.")), "")
    name = theirs.removesuffix("Config").removesuffix("Trainer")
    return name if name in NAMES else None
