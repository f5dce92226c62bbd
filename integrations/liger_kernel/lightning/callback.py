"""LigerCallback: models are patched when the strategy is about to wrap them."""

from typing import Any

from torch import nn

from liger_kernel.lightning.models import Config, Models, set_up_with, trained_within
from liger_kernel.lightning.namespaces import bases
from liger_kernel.measure import Meter

PREFIX = "liger_"  # of its figures among the loggers' metrics


class LigerCallback(*bases("callbacks", "Callback")):  # pyright: ignore
    """Patches the transformers models of a LightningModule for each run, and measures training.

        Trainer(callbacks=[LigerCallback({"rope": False})])
        Fabric(callbacks=[LigerCallback()])

    Wherever the models are made (`__init__`, `setup`, `configure_model`), the patch comes before
    the strategy moves or wraps them, and is gone when the strategy is done with the run. Under
    Fabric it comes right after `fabric.setup`, and stays; `fabric.setup_module` has no place for
    it: there, `liger_kernel.transformers.apply` the model.

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

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Before `configure_model`, and before the strategy's own set-up."""
        self._stop()
        set_up_with(trainer.strategy, self.models)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Count no more; what was patched is the strategy's teardown's to take back."""
        self._stop()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Count no more; the error goes on."""
        self._stop()

    def _stop(self) -> None:
        if self.meter is not None:
            self.meter.remove()
            self.meter = None

    def on_after_setup(self, fabric: Any, module: nn.Module) -> None:
        """Fabric's."""
        self.models.patch(module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to count, the tokens of the model that trains."""
        ours = [c for c in trainer.callbacks if isinstance(c, LigerCallback) and c.acts(trainer)]
        trained = trained_within(pl_module)
        if ours[0] is self and trained and trainer.loggers and trainer.log_every_n_steps:
            self.meter = Meter(trained[0], pl_module.device)
            self.meter.start()
            self._step = trainer.global_step

    def acts(self, trainer: Any) -> bool:
        """Whether this callback patches this Trainer's models."""
        return self.models in vars(trainer.strategy).get("_liger", [])

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
            logger.log_metrics(found, step=step - 1)  # as Lightning counts its own

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Validation is no training."""
        if self.meter is not None:
            self.meter.stop()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Training goes on."""
        if self.meter is not None:
            self.meter.start()
