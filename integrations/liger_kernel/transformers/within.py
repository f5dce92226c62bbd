"""The transformers models in modules that are none themselves: what adapters patch."""

from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

from torch import nn
from transformers import PreTrainedModel

from liger_kernel.config import LigerConfig
from liger_kernel.transformers.patch import NoRecipe, Patch, apply, patch_of


def models_within(module: nn.Module) -> Iterator[nn.Module]:
    """The transformers models in a module, itself or within it, none of which is in another."""
    seen = set[nn.Module]()

    def walk(module: nn.Module) -> Iterator[nn.Module]:
        if module in seen:
            return
        seen.add(module)
        if isinstance(module, PreTrainedModel):
            yield module
        else:
            for child in module.children():
                yield from walk(child)

    return walk(module)


def trains(model: nn.Module) -> bool:
    """Whether any parameter requires a gradient."""
    return any(p.requires_grad for p in model.parameters())


class ModelsWithin:
    """Patches of the models in modules, of which it keeps none alive."""

    def __init__(self, config: LigerConfig) -> None:
        self.config = config
        self.found = False  # whether there was a model to patch
        self._models = WeakSet[nn.Module]()

    def __getstate__(self) -> dict[str, Any]:  # in another process nothing is patched yet
        return {**vars(self), "found": False, "_models": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _models=WeakSet[nn.Module]())

    @property
    def patches(self) -> list[Patch]:
        """Of the models that are still there, without those that were patched before."""
        return [patch for model in self._models if (patch := patch_of(model)) is not None]

    def apply(self, module: nn.Module, frozen: bool = True) -> list[str]:
        """Patch the models in a module; without `frozen`, those that have something to train.

        What is in a model without a recipe is looked through, too.

        Returns:
            Why others are left.

        Raises:
            ValueError: as `liger_kernel.transformers.apply`, but for models without a recipe.
        """
        why: list[str] = []
        for model in models_within(module):
            if not frozen and not trains(model):
                why.append(f"{type(model).__name__} is frozen")
                continue
            theirs = patch_of(model) is not None
            try:
                apply(model, self.config)
            except NoRecipe as error:
                why.append(str(error))
                for child in model.children():
                    why += self.apply(child, frozen)
                continue
            self.found = True
            if not theirs:
                self._models.add(model)
        return why

    def revert(self) -> None:
        """Take back every patch that is not somebody else's, and begin anew."""
        for patch in self.patches:
            patch.revert()
        self._models.clear()
        self.found = False
