"""Lightning's strategies with a patch: `strategy="liger_ddp"` and its kin."""

import importlib
from typing import Any

from liger_kernel.lightning.models import Config, Models
from liger_kernel.lightning.namespaces import NAMES, installed

CLASSES = {  # Lightning's class, what it is given
    "liger_single": ("SingleDeviceStrategy", {}),
    "liger_ddp": ("DDPStrategy", {}),
    "liger_fsdp": ("FSDPStrategy", {}),
    "liger_model_parallel": ("ModelParallelStrategy", {}),
    "liger_deepspeed_stage_3": ("DeepSpeedStrategy", {"stage": 3}),
}


class LigerStrategy:
    """A mixin: the strategy patches the transformers models that it is about to set up.

        class MyStrategy(LigerStrategy, FSDPStrategy): ...
        Trainer(strategy=MyStrategy(liger_config={"rope": False}, sharding_strategy=...))

    Ready under the names of `CLASSES`, and `liger_auto`: DDP, or a single device where there is but
    one. The patch is gone when the run is over.

    Args:
        liger_config: what `LigerConfig.of` takes.
        frozen: patch models without anything to train too, a teacher or a reference.

    Raises:
        ValueError: as LigerCallback.
    """

    def __init__(
        self, *args: Any, liger_config: Config = None, frozen: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.liger = Models(liger_config, frozen)

    def setup(self, trainer: Any) -> None:
        """Patch, then what the strategy does."""
        self.liger.patch(self.model)  # pyright: ignore
        super().setup(trainer)  # pyright: ignore

    def teardown(self) -> None:
        """What the strategy does, then take the patch back."""
        try:
            super().teardown()  # pyright: ignore
        finally:
            self.liger.revert()


class _Auto(LigerStrategy):
    """DDP that becomes a single device's strategy once it knows of one device only."""

    single: type

    def _configure_launcher(self) -> None:
        devices: Any = self.parallel_devices  # pyright: ignore
        if len(devices) * self.num_nodes > 1:  # pyright: ignore
            super()._configure_launcher()  # pyright: ignore
            return
        kept: Any = self.accelerator, self.checkpoint_io, self.precision_plugin  # pyright: ignore
        single, liger = self.single, self.liger
        vars(self).clear()
        self.__class__ = single
        single.__init__(self, devices[0], *kept)  # pyright: ignore
        self.liger = liger
        self._configure_launcher()


def register() -> None:
    """Make the names known to each namespace's Trainer, and the classes to this module."""
    for pl in installed():
        strategies = importlib.import_module(f"{pl.__name__}.strategies")
        prefix = "Liger" if pl.__name__ == NAMES[0] else "LigerPL"
        made: dict[str, Any] = {}
        for name, (base, options) in CLASSES.items():
            made[name] = _made(prefix + base, LigerStrategy, getattr(strategies, base))
            _add(strategies.StrategyRegistry, name, made[name], options)
        auto = _made(prefix + "AutoStrategy", _Auto, strategies.DDPStrategy)
        auto.single = made["liger_single"]
        _add(strategies.StrategyRegistry, "liger_auto", auto, {})


def _made(name: str, *parents: type) -> Any:
    cls = globals()[name] = type(name, parents, {"__module__": __name__})  # found by pickle, too
    return cls


def _add(registry: Any, name: str, cls: type, options: dict[str, Any]) -> None:
    registry.register(
        name, cls, description=f"{cls.__name__}, see liger_kernel", override=True, **options
    )


register()
