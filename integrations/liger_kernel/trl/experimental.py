"""Ready classes for trainers of `trl.experimental`, which says of itself that it may change."""

from dataclasses import dataclass, field

from trl.experimental import cpo, orpo

from liger_kernel.trl.arguments import LigerLossArguments
from liger_kernel.trl.trainers import LigerLoss


@dataclass
class ORPOConfig(LigerLossArguments, orpo.ORPOConfig):
    """TRL's own, with `use_liger_loss`."""


class ORPOTrainer(LigerLoss, orpo.ORPOTrainer):
    """TRL's own; see `LigerLoss`."""


@dataclass
class CPOConfig(LigerLossArguments, cpo.CPOConfig):
    """TRL's own, with `use_liger_loss`."""


class CPOTrainer(LigerLoss, cpo.CPOTrainer):
    """TRL's own; see `LigerLoss`."""


@dataclass
class SimPOConfig(CPOConfig):
    """CPOConfig with SimPO's loss and no NLL term: Meng et al. 2024."""

    loss_type: str = field(default="simpo", metadata={"help": "simpo, or alphapo."})
    cpo_alpha: float = field(default=0.0, metadata={"help": "Weight of the NLL of the chosen."})


class SimPOTrainer(CPOTrainer):
    """TRL's CPOTrainer, whose losses SimPO's is one of."""


LigerORPOTrainer, LigerCPOTrainer, LigerSimPOTrainer = ORPOTrainer, CPOTrainer, SimPOTrainer
