"""TrainingArguments with `use_liger`: the one flag of HF Trainer."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import transformers

from liger_kernel.config import LigerConfig


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers' own, and two more fields.

    `use_liger` becomes transformers' `use_liger_kernel`, with the configuration checked at once:
    `Trainer.train()` then patches the model it trains.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [  # what the command line takes as JSON
        *transformers.TrainingArguments._VALID_DICT_FIELDS,
        "liger_config",
    ]

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

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.use_liger:
            if self.liger_config is not None:
                raise ValueError("liger_config is given but use_liger is not; pass use_liger=True")
            return
        given = self.liger_kernel_config if self.liger_config is None else self.liger_config
        config = LigerConfig.of(given).to_dict()
        if self.liger_kernel_config not in (None, given, config):  # equal in a dataclasses.replace
            raise ValueError("give liger_config or liger_kernel_config, not both")
        self.use_liger_kernel, self.liger_kernel_config = True, config
