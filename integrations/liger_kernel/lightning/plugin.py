"""LigerPlugin: what `Trainer(plugins=[...])` takes, and a callback that it brings along."""

import importlib
from collections.abc import Callable
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
        if WITHOUT:
            raise RuntimeError(
                f"{WITHOUT[0]} has no {LOAD} any more, by which LigerPlugin reached Trainer; take "
                f"callbacks=[LigerCallback()] or strategy='liger_ddp' instead"
            )

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
    """In every Trainer; it does nothing in those without a LigerPlugin."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        plugin = trainer._accelerator_connector._layer_sync
        if isinstance(plugin, LigerPlugin):
            if self.models.config != plugin.config or self.models.frozen != plugin.frozen:
                self.__init__(plugin.config, frozen=plugin.frozen)
            super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.acts(trainer):
            super().on_train_start(trainer, pl_module)


class _WithOurs:
    """In place of what loads the callbacks of entry points: those, and one of ours."""

    def __init__(self, load: Callable[[str], list[Any]]) -> None:
        self.load = load

    def __call__(self, group: str) -> list[Any]:
        return [*self.load(group), _OfPlugin()]


def _bring_along(name: str) -> bool:
    """Have this namespace's Trainers look for a LigerPlugin; False where that cannot be."""
    module = importlib.import_module(f"{name}.trainer.connectors.callback_connector")
    load = getattr(module, LOAD, None)
    if load is not None and not isinstance(load, _WithOurs):
        setattr(module, LOAD, _WithOurs(load))
    return load is not None


# Now, and not when a plugin is made: those that come by pickle are not.
WITHOUT = [pl.__name__ for pl in installed() if not _bring_along(pl.__name__)]
