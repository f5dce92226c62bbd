"""The transformers models in modules that are none themselves: what adapters patch."""

from collections.abc import Iterator
from weakref import WeakSet

from torch import nn
from transformers import PreTrainedModel

from liger_kernel.config import LigerConfig
from liger_kernel.transformers.patch import NoRecipe, Patch, apply, patch_of


def models_within(module: nn.Module) -> Iterator[nn.Module]:
    """The transformers models in a module, itself or within it, none of which is in another."""
    if isinstance(module, PreTrainedModel):
        yield module
    else:
        for child in module.children():
            yield from models_within(child)


class ModelsWithin:
    """Patches of the models in modules, of which it keeps none alive."""

    def __init__(self, config: LigerConfig) -> None:
        self.config = config
        self.found = False  # whether there was ever a model to patch
        self._models = WeakSet[nn.Module]()

    @property
    def patches(self) -> list[Patch]:
        """Of the models that are still there, without those that were patched before."""
        return [patch for model in self._models if (patch := patch_of(model)) is not None]

    def apply(self, module: nn.Module, frozen: bool = True) -> list[str]:
        """Patch the models in a module; without `frozen`, those that have something to train.

        Returns:
            Why others are left.

        Raises:
            ValueError: as `liger_kernel.transformers.apply`, but for models without a recipe.
        """
        why: list[str] = []
        for model in models_within(module):
            if not frozen and not any(p.requires_grad for p in model.parameters()):
                why.append(f"{type(model).__name__} is frozen")
                continue
            theirs = patch_of(model) is not None
            try:
                apply(model, self.config)
            except NoRecipe as error:
                why.append(str(error))
                continue
            self.found = True
            if not theirs:
                self._models.add(model)
        return why

    def revert(self) -> None:
        """Take back every patch that is not somebody else's."""
        for patch in self.patches:
            patch.revert()
        self._models.clear()
