"""What is patched in a LightningModule, or in what Fabric is given."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from liger_kernel.config import LigerConfig, disabled
from liger_kernel.transformers.within import ModelsWithin, models_within, trains

Config = LigerConfig | Mapping[str, Any] | str | None


class Models(ModelsWithin):
    """The patches of one run.

    Args:
        config: what `LigerConfig.of` takes.
        frozen: patch models without anything to train too, a teacher or a reference.
    """

    def __init__(self, config: Config, frozen: bool = True) -> None:
        super().__init__(LigerConfig.of(config))
        self.frozen = frozen

    def patch(self, module: nn.Module) -> None:
        """Patch every transformers model within a module.

        Raises:
            ValueError: there is none, nor a layer of ours; or as
                `liger_kernel.transformers.apply` does.
        """
        why = self.apply(module, self.frozen)
        ours = any(type(m).__module__.startswith("liger_kernel.") for m in module.modules())
        if not (self.found or ours or disabled()):
            raise ValueError(
                f"liger has nothing to patch in {type(module).__name__}: "
                f"{'; '.join(why) or 'there is no transformers model'}"
            )


def trained_within(module: nn.Module) -> list[nn.Module]:
    """The transformers models in a module that have something to train."""
    return [model for model in models_within(module) if trains(model)]


def set_up_with(strategy: Any, models: Models) -> None:
    """Have a strategy patch before it does anything else, and take that back with its teardown."""
    own = vars(strategy)
    if "_liger" in own:
        if models not in own["_liger"]:
            own["_liger"].append(models)
        return
    own["_liger"] = [models]
    own["setup"] = partial(_setup, strategy, strategy.setup)
    own["teardown"] = partial(_teardown, strategy, strategy.teardown)


def _setup(strategy: Any, original: Callable[[Any], None], trainer: Any) -> None:
    for models in vars(strategy)["_liger"]:
        models.patch(strategy.model)
    original(trainer)


def _teardown(strategy: Any, original: Callable[[], None]) -> None:
    own = vars(strategy)
    try:
        original()
    finally:
        for models in own.pop("_liger"):
            models.revert()
        del own["setup"], own["teardown"]
