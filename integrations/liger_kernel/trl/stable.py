"""Ready classes for the trainers of `trl` itself."""

# What trl's own __init__ names, it loads lazily.
# pyright: reportPrivateImportUsage=false

from dataclasses import dataclass

import trl

from liger_kernel.trl.arguments import LigerLossArguments
from liger_kernel.trl.trainers import LigerLoss


@dataclass
class DPOConfig(LigerLossArguments, trl.DPOConfig):
    """TRL's own, with `use_liger_loss`."""


class DPOTrainer(LigerLoss, trl.DPOTrainer):
    """TRL's own; see `LigerLoss`."""


@dataclass
class KTOConfig(LigerLossArguments, trl.KTOConfig):
    """TRL's own, with `use_liger_loss`."""


class KTOTrainer(LigerLoss, trl.KTOTrainer):
    """TRL's own; see `LigerLoss`."""


@dataclass
class SFTConfig(LigerLossArguments, trl.SFTConfig):
    """TRL's own, with `use_liger_loss`."""


class SFTTrainer(LigerLoss, trl.SFTTrainer):
    """TRL's own; see `LigerLoss`."""


@dataclass
class GRPOConfig(LigerLossArguments, trl.GRPOConfig):
    """TRL's own, with `use_liger_loss`."""


class GRPOTrainer(LigerLoss, trl.GRPOTrainer):
    """TRL's own; see `LigerLoss`."""


@dataclass
class RLOOConfig(LigerLossArguments, trl.RLOOConfig):
    """TRL's own, with `use_liger_loss`."""


class RLOOTrainer(LigerLoss, trl.RLOOTrainer):
    """TRL's own; see `LigerLoss`."""


LigerDPOTrainer, LigerKTOTrainer, LigerSFTTrainer = DPOTrainer, KTOTrainer, SFTTrainer
LigerGRPOTrainer, LigerRLOOTrainer = GRPOTrainer, RLOOTrainer
