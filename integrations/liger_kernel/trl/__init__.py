"""TRL's trainers with one flag, `use_liger_loss=True`.

    from liger_kernel.trl import DPOConfig, DPOTrainer

The names are TRL's own, and LigerDPOTrainer and its kin. DPO, KTO, SFT, GRPO and RLOO run our
engine behind TRL's fused head; ORPO, CPO and SimPO, which have none, get one.
`liger_kernel.install()` gives the stock classes the same.
"""

import importlib
from typing import TYPE_CHECKING, Any

from liger_kernel.trl.arguments import LigerLossArguments
from liger_kernel.trl.trainers import LigerLoss

if TYPE_CHECKING:
    from liger_kernel.trl.experimental import (
        CPOConfig,
        CPOTrainer,
        LigerCPOTrainer,
        LigerORPOTrainer,
        LigerSimPOTrainer,
        ORPOConfig,
        ORPOTrainer,
        SimPOConfig,
        SimPOTrainer,
    )
    from liger_kernel.trl.stable import (
        DPOConfig,
        DPOTrainer,
        GRPOConfig,
        GRPOTrainer,
        KTOConfig,
        KTOTrainer,
        LigerDPOTrainer,
        LigerGRPOTrainer,
        LigerKTOTrainer,
        LigerRLOOTrainer,
        LigerSFTTrainer,
        RLOOConfig,
        RLOOTrainer,
        SFTConfig,
        SFTTrainer,
    )

__all__ = [
    "CPOConfig",
    "CPOTrainer",
    "DPOConfig",
    "DPOTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "LigerCPOTrainer",
    "LigerDPOTrainer",
    "LigerGRPOTrainer",
    "LigerKTOTrainer",
    "LigerLoss",
    "LigerLossArguments",
    "LigerORPOTrainer",
    "LigerRLOOTrainer",
    "LigerSFTTrainer",
    "LigerSimPOTrainer",
    "ORPOConfig",
    "ORPOTrainer",
    "RLOOConfig",
    "RLOOTrainer",
    "SFTConfig",
    "SFTTrainer",
    "SimPOConfig",
    "SimPOTrainer",
]
EXPERIMENTAL = ("ORPO", "CPO", "SimPO")


def __getattr__(name: str) -> Any:
    """TRL's trainers take long to import, and its experimental ones warn that they are."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    trainer = name.removeprefix("Liger").removesuffix("Config").removesuffix("Trainer")
    room = "experimental" if trainer in EXPERIMENTAL else "stable"
    return getattr(importlib.import_module(f"{__name__}.{room}"), name)
