"""LigerPlugin: what `Trainer(plugins=[...])` takes, and a callback that it brings along."""

import importlib
from typing import Any

from torch import nn

from liger_kernel.config import LigerConfig
from liger_kernel.lightning.callback import LigerCallback
from liger_kernel.lightning.models import Config
from liger_kernel.lightning.namespaces import bases, installed

LOAD = "_load_external_callbacks"


class LigerPlugin(*bases("plugins.layer_sync", "TorchSyncBatchNorm")):  # pyright: ignore
    """Patches the transformers models of a LightningModule, as LigerCallback does.

        Trainer(plugins=[LigerPlugin(rope=False)], precision="bf16-mixed", strategy="ddp")

    Trainer takes four kinds of plugins and one of each. This is of the kind that leaves `precision`
    and `strategy` free, the one that synchronises BatchNorm.

    Args:
        config: what `LigerConfig.of` takes.
        frozen: patch models without anything to train too, a teacher or a reference.
        sync_batchnorm: what Trainer's argument of this name means, which this plugin takes the
            place of. None where no BatchNorm is there.
        options: fields of LigerConfig, in place of `config`.

    Raises:
        ValueError: as LigerCallback; or a BatchNorm under DDP or FSDP, and `sync_batchnorm` None.
        RuntimeError: a release of Lightning that has no place left for it.
    """

    def __init__(
        self,
        config: Config = None,
        *,
        frozen: bool = True,
        sync_batchnorm: bool | None = None,
        **options: Any,
    ) -> None:
        if config is not None and options:
            raise ValueError("give config or options of their own, not both")
        self.config, self.frozen = LigerConfig.of(options if config is None else config), frozen
        self.sync_batchnorm = sync_batchnorm
        for pl in installed():
            _bring_along(pl.__name__)

    def apply(self, model: nn.Module) -> nn.Module:
        """DDP and FSDP call this; what it does is said by `sync_batchnorm`."""
        if self.sync_batchnorm is None:
            for name, module in model.named_modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    raise ValueError(
                        f"{name} is a BatchNorm: say LigerPlugin(sync_batchnorm=True) to "
                        f"synchronise it among processes, or False; Trainer's argument is lost"
                    )
        return super().apply(model) if self.sync_batchnorm else model

    def revert(self, model: nn.Module) -> nn.Module:
        """The way back of `apply`."""
        return super().revert(model) if self.sync_batchnorm else model


class _OfPlugin(LigerCallback):
    """In every Trainer that is made after a LigerPlugin; it does nothing in those without one."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        plugin = trainer._accelerator_connector._layer_sync
        if isinstance(plugin, LigerPlugin):
            if self.models.config != plugin.config or self.models.frozen != plugin.frozen:
                self.__init__(plugin.config, frozen=plugin.frozen)
            super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        others = [c for c in trainer.callbacks if isinstance(c, LigerCallback) and c is not self]
        if self._undo and not others:
            super().on_train_start(trainer, pl_module)


def _bring_along(name: str) -> None:
    """Have this namespace's Trainers look for a LigerPlugin."""
    module = importlib.import_module(f"{name}.trainer.connectors.callback_connector")
    load = getattr(module, LOAD, None)
    if load is None:
        raise RuntimeError(
            f"{name} has no {LOAD} any more, by which LigerPlugin reached Trainer; take "
            f"callbacks=[LigerCallback()] or strategy='liger_ddp' instead"
        )
    if getattr(load, "liger", False):
        return

    def with_ours(group: str) -> list[Any]:
        return [*load(group), _OfPlugin()]

    with_ours.liger = True  # pyright: ignore
    setattr(module, LOAD, with_ours)
