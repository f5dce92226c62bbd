"""LigerCallback: models are patched when the strategy is about to wrap them."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from liger_kernel.lightning.models import Config, Models, trained_within
from liger_kernel.lightning.namespaces import bases
from liger_kernel.measure import Meter

PREFIX = "liger_"  # of its figures among the loggers' metrics


class LigerCallback(*bases("callbacks", "Callback")):  # pyright: ignore
    """Patches the transformers models of a LightningModule for each run, and measures training.

        Trainer(callbacks=[LigerCallback({"rope": False})])
        Fabric(callbacks=[LigerCallback()])

    Wherever the models are made (`__init__`, `setup`, `configure_model`), the patch comes before
    the strategy moves, wraps or shards them: every strategy asks its precision plugin to convert
    the module then, of which this takes notice. It is gone when the run is over. Under Fabric it
    comes right after `fabric.setup`, and stays.

    Loggers get `liger_tokens_per_second`, of this process since they were last given it, and
    `liger_peak_memory_mib`, see `liger_kernel.measure.Meter`, every `log_every_n_steps`.

    Args:
        config: what `LigerConfig.of` takes.
        frozen: patch models without anything to train too, a teacher or a reference.

    Raises:
        ValueError: when a run begins: no transformers model and no layer of ours is there, or as
            `liger_kernel.transformers.apply` does.
    """

    def __init__(self, config: Config = None, *, frozen: bool = True) -> None:
        self.models = Models(config, frozen)
        self.meter: Meter | None = None
        self._undo: list[Callable[[], object]] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Before `configure_model`, and before the strategy's own set-up."""
        self._let_go()
        precision = trainer.strategy.precision_plugin
        own = vars(precision)
        before = own.get("convert_module")
        own["convert_module"] = partial(_converting, self.models, precision.convert_module)
        self._undo.append(partial(_restore, own, before))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take everything back."""
        self._let_go()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Take everything back here too; the error goes on."""
        self._let_go()

    def _let_go(self) -> None:
        if self.meter is not None:
            self.meter.close()
            self.meter = None
        while self._undo:
            self._undo.pop()()
        self.models.revert()

    def on_after_setup(self, fabric: Any, module: nn.Module) -> None:
        """Fabric's."""
        self.models.patch(module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to count, the tokens of the model that trains."""
        trained = trained_within(pl_module)
        if trained and trainer.loggers:
            self.meter = Meter(trained[0], pl_module.device)
            self.meter.start()
            self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Every `log_every_n_steps`: log, and begin anew."""
        step = trainer.global_step
        if self.meter is None or step == self._step or step % trainer.log_every_n_steps:
            return
        self._step = step
        found = {PREFIX + name: value for name, value in self.meter.read().items()}
        for logger in trainer.loggers:
            logger.log_metrics(found, step=step)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Validation is no training."""
        if self.meter is not None:
            self.meter.stop()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Training goes on."""
        if self.meter is not None:
            self.meter.start()


def _converting(models: Models, original: Callable[..., nn.Module], module: nn.Module) -> nn.Module:
    """Replaces a precision plugin's `convert_module`."""
    models.patch(module)
    return original(module)


def _restore(own: dict[str, Any], before: object) -> None:
    if before is None:
        own.pop("convert_module", None)
    else:
        own["convert_module"] = before
