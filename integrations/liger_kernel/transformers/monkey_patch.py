"""Upstream's `apply_liger_kernel_to_*`, over `patch.apply`.

With a model, the instance is patched. Without one, models of the family that are built afterwards
are, each as an instance, by a wrapper around their classes' constructors that `revert` takes away.
"""

import functools
import gc
import importlib
import inspect
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from liger_kernel.config import FLAGS, NAMES, UPSTREAM, LigerConfig
from liger_kernel.transformers.patch import Patch, apply, patch_of
from liger_kernel.transformers.recipes import FAMILIES, RECIPES, Glu, LayerNorm, Recipe

logger = logging.getLogger(__name__)
_building = threading.local()  # depth of constructors: only the outermost model is patched


@dataclass(slots=True)
class ClassPatch:
    """Models of one family are patched when they are built. A context manager, as `Patch` is."""

    folders: tuple[str, ...]  # of transformers.models
    config: LigerConfig
    _originals: dict[type, Callable[..., None]] = field(
        default_factory=dict[type, Callable[..., None]]
    )

    def install(self) -> "ClassPatch":
        for folder in self.folders:
            CLASS_PATCHES[folder] = self
            module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
            for cls in vars(module).values():
                if (
                    isinstance(cls, type)
                    and issubclass(cls, PreTrainedModel)
                    and cls.__module__ == module.__name__
                    and "__init__" in vars(cls)
                ):
                    self._originals[cls] = cls.__init__
                    cls.__init__ = _patching(cls.__init__, self.config)
        return self

    def revert(self) -> None:
        """Models built from now on are left alone; those built before keep their patch."""
        for cls, original in self._originals.items():
            cls.__init__ = original  # pyright: ignore
        self._originals.clear()
        for folder in self.folders:
            CLASS_PATCHES.pop(folder, None)

    def __enter__(self) -> "ClassPatch":
        return self

    def __exit__(self, *_: object) -> None:
        self.revert()


CLASS_PATCHES: dict[str, ClassPatch] = {}


def _patching(init: Callable[..., None], config: LigerConfig) -> Callable[..., None]:
    @functools.wraps(init)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        depth = getattr(_building, "depth", 0)
        _building.depth = depth + 1
        try:
            init(self, *args, **kwargs)
        finally:
            _building.depth = depth
        if depth == 0 and getattr(self.config, "model_type", None) in RECIPES:
            _keep_first(self, config)

    return wrapper


def _keep_first(model: nn.Module, config: LigerConfig) -> Patch:
    if (there := patch_of(model)) is not None:
        if there.config != config:
            logger.warning("the model is already patched with %s, which stays", there.config)
        return there
    patch = apply(model, config)
    logger.info("%s", patch)
    return patch


ALSO = {"glm4": ("glm",)}
"""Families that upstream's function of this one serves too."""


def _folders(family: str) -> tuple[str, ...]:
    return tuple(RECIPES[name].module or name for name in (family, *ALSO.get(family, ())))


def _flags(recipe: Recipe) -> list[str]:
    """Upstream's names of what a family's function can be asked for, in upstream's order."""
    parts = recipe.parts.values()
    glu = next((part.name for part in parts if isinstance(part, Glu)), None)
    layer_norm = ["layer_norm"] if any(isinstance(part, LayerNorm) for part in parts) else []
    known = ["rope", "cross_entropy", "fused_linear_cross_entropy", *layer_norm, "rms_norm"]
    return known if glu is None else [*known, glu]


class Hook:
    """`apply_liger_kernel_to_<family>`: patch `model`, or every model of the family built later.

    Args:
        rope, layer_norm, rms_norm, swiglu, geglu: the layers to replace, of those that the family
            has; None counts as False.
        cross_entropy: replace the loss of full logits; False unless asked for.
        fused_linear_cross_entropy: lm_head computes the loss itself, without logits.
        model: a model instance, or None.

    Returns:
        What was done; its `revert()` undoes it. A second call without a model and with other flags
        replaces the first.

    Raises:
        TypeError: a flag that the family does not have. ValueError: both kinds of cross entropy.
    """

    def __init__(self, family: str) -> None:
        self.family, self.__name__ = family, f"apply_liger_kernel_to_{family}"
        self.__qualname__, self.__doc__ = self.__name__, type(self).__doc__
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        flags = [
            inspect.Parameter(flag, kind, default=flag != "cross_entropy", annotation=bool | None)
            for flag in _flags(RECIPES[family])
        ]
        model = inspect.Parameter("model", kind, default=None, annotation=nn.Module | None)
        self.__signature__ = inspect.Signature([*flags, model])

    def __call__(self, *args: Any, **kwargs: Any) -> Patch | ClassPatch:
        bound = self.__signature__.bind(*args, **kwargs)
        bound.apply_defaults()
        flags = dict(bound.arguments)
        model = flags.pop("model")
        if flags["cross_entropy"] and flags["fused_linear_cross_entropy"]:
            raise ValueError(
                "cross_entropy and fused_linear_cross_entropy cannot both be true: with the head "
                "fused there are no logits; pass fused_linear_cross_entropy=False"
            )
        config = LigerConfig.of({name: bool(on) for name, on in flags.items()})
        if model is not None:
            return _keep_first(model, config)
        there = [CLASS_PATCHES.get(folder) for folder in _folders(self.family)]
        if there[0] is not None and all(p is not None and p.config == config for p in there):
            return there[0]
        for patch in there:
            if patch is not None:
                patch.revert()
        return ClassPatch(_folders(self.family), config).install()


HOOKS = {family: Hook(family) for family in FAMILIES}
globals().update({hook.__name__: hook for hook in HOOKS.values()})

MODEL_TYPE_TO_APPLY_LIGER_FN: dict[str, Hook] = {
    name: HOOKS.get(name) or HOOKS[recipe.module or name] for name, recipe in RECIPES.items()
}


def _apply_liger_kernel(model_type: str, **kwargs: Any) -> None:
    """Patch models of this type: those that are there and those that are built after this call.

    A type without a recipe is logged and left alone.
    """
    if (hook := MODEL_TYPE_TO_APPLY_LIGER_FN.get(model_type)) is None:
        known = ", ".join(MODEL_TYPE_TO_APPLY_LIGER_FN)
        logger.info("no recipe for model type %r, nothing is patched; known: %s", model_type, known)
        return
    hook(**kwargs)
    models = [o for o in gc.get_objects() if issubclass(type(o), PreTrainedModel)]
    inner = {id(part) for model in models for part in model.modules() if part is not model}
    for model in models:
        if id(model) not in inner and model.config.model_type == model_type:
            hook(**kwargs, model=model)


def _apply_liger_kernel_to_instance(model: nn.Module, **kwargs: Any) -> None:
    """What `transformers.TrainingArguments(use_liger_kernel=True)` calls, with liger_kernel_config.

    Options are LigerConfig's fields or those of the family's `apply_liger_kernel_to_*`, None for
    False; others are logged and ignored. A model type without a recipe is logged and left alone;
    the first patch of a model stays.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    hook = MODEL_TYPE_TO_APPLY_LIGER_FN.get(model_type)  # pyright: ignore
    if hook is None and not kwargs.get("generic"):
        known = ", ".join(MODEL_TYPE_TO_APPLY_LIGER_FN)
        logger.warning(
            "no recipe for model type %r, the model is not patched; known: %s", model_type, known
        )
        return
    names = {*NAMES, *(inspect.signature(hook).parameters if hook else ())}
    if dropped := [name for name in kwargs if name not in names]:
        logger.warning("%s has no option %s; ignored", model_type, ", ".join(dropped))
    flags = {*UPSTREAM, *FLAGS}  # of which frameworks leave some at None
    options = {n: bool(v) if n in flags else v for n, v in kwargs.items() if n in names}
    _keep_first(model, LigerConfig.of(options))
