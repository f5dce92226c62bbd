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

from liger_kernel.config import FLAGS, NAMES, UPSTREAM, LigerConfig, whole
from liger_kernel.transformers.patch import Patch, apply, patch_of
from liger_kernel.transformers.recipes import FAMILIES, RECIPES, Glu, LayerNorm, Recipe

logger = logging.getLogger(__name__)
_building = threading.local()  # depth of constructors: only the outermost model is patched


@dataclass(slots=True)
class ClassPatch:
    """Models of one family are patched when they are built. A context manager, as `Patch` is."""

    config: LigerConfig
    _originals: dict[str, dict[type, Callable[..., None]]] = field(
        default_factory=dict[str, dict[type, Callable[..., None]]]
    )  # by folder of transformers.models

    def install(self, folder: str) -> None:
        """In place of the folder's patch, if there is one."""
        if (there := CLASS_PATCHES.get(folder)) is not None:
            there.remove(folder)
        CLASS_PATCHES[folder], originals = self, self._originals.setdefault(folder, {})
        module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
        for cls in vars(module).values():
            if (
                isinstance(cls, type)
                and issubclass(cls, PreTrainedModel)
                and cls.__module__ == module.__name__
                and "__init__" in vars(cls)
            ):
                originals[cls] = cls.__init__
                cls.__init__ = _patching(cls.__init__, self, folder)

    def remove(self, folder: str) -> None:
        """Take it out of one folder; what others have put around it stays, and does nothing."""
        for cls, original in self._originals.pop(folder, {}).items():
            if getattr(cls.__init__, "__wrapped__", None) is original:
                cls.__init__ = original
        if CLASS_PATCHES.get(folder) is self:
            del CLASS_PATCHES[folder]

    def revert(self) -> None:
        """Models built from now on are left alone; those built before keep their patch."""
        for folder in list(self._originals):
            self.remove(folder)

    def __enter__(self) -> "ClassPatch":
        return self

    def __exit__(self, *_: object) -> None:
        self.revert()


CLASS_PATCHES: dict[str, ClassPatch] = {}


def _patching(init: Callable[..., None], patch: ClassPatch, folder: str) -> Callable[..., None]:
    @functools.wraps(init)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        depth = getattr(_building, "depth", 0)
        _building.depth = depth + 1
        try:
            init(self, *args, **kwargs)
        finally:
            _building.depth = depth
        known = getattr(self.config, "model_type", None) in RECIPES
        if depth == 0 and known and folder in patch._originals:
            _keep_first(self, patch.config)

    return wrapper


def _keep_first(model: nn.Module, config: LigerConfig) -> Patch:
    if (there := patch_of(model)) is not None:
        if there.config.label_smoothing != config.label_smoothing:
            raise ValueError(f"the model is already patched with {there.config}, another loss")
        if there.config != config:
            logger.warning("the model is already patched with %s, which stays", there.config)
        return there
    patch = apply(model, config)
    logger.info("%s", patch)
    return patch


ALSO = {"glm4": ("glm",)}
"""Families that one's function serves too: LLaMA-Factory calls that of glm4 for both."""


def _flags(recipe: Recipe) -> list[str]:
    """Upstream's names of what a family's function can be asked for, in upstream's order."""
    parts = recipe.parts.values()
    glu = next((part.name for part in parts if isinstance(part, Glu)), None)
    layer_norm = ["layer_norm"] if any(isinstance(part, LayerNorm) for part in parts) else []
    known = ["rope", "cross_entropy", "fused_linear_cross_entropy", *layer_norm, "rms_norm"]
    return known if glu is None else [*known, glu]


class ApplyFunction:
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
        folders = [RECIPES[name].folder for name in (self.family, *ALSO.get(self.family, ()))]
        there = [CLASS_PATCHES.get(folder) for folder in folders]
        if there[0] is not None and all(p is there[0] for p in there) and there[0].config == config:
            return there[0]
        patch = ClassPatch(config)
        for folder in folders:
            patch.install(folder)
        return patch


APPLY_FUNCTIONS = {family: ApplyFunction(family) for family in FAMILIES}
globals().update({fn.__name__: fn for fn in APPLY_FUNCTIONS.values()})

MODEL_TYPE_TO_APPLY_LIGER_FN: dict[str, ApplyFunction] = {
    name: APPLY_FUNCTIONS.get(name) or APPLY_FUNCTIONS[recipe.folder]
    for name, recipe in RECIPES.items()
}


def _apply_liger_kernel(model_type: str, **kwargs: Any) -> None:
    """Patch models of this type: those that are there and those that are built after this call.

    A type without a recipe is logged and left alone.
    """
    if (fn := MODEL_TYPE_TO_APPLY_LIGER_FN.get(model_type)) is None:
        known = ", ".join(MODEL_TYPE_TO_APPLY_LIGER_FN)
        logger.info("no recipe for model type %r, nothing is patched; known: %s", model_type, known)
        return
    fn(**kwargs)
    objects = [o for o in gc.get_objects() if issubclass(type(o), PreTrainedModel)]
    models = [model for model in objects if "_modules" in vars(model)]  # others are being built
    inner = {id(part) for model in models for part in model.modules() if part is not model}
    for model in models:
        if id(model) not in inner and model.config.model_type == model_type:
            fn(**kwargs, model=model)


def _apply_liger_kernel_to_instance(model: nn.Module, **kwargs: Any) -> None:
    """What `transformers.TrainingArguments(use_liger_kernel=True)` calls, with liger_kernel_config.

    Options are LigerConfig's fields or those of the family's `apply_liger_kernel_to_*`, None for
    False; others are logged and ignored. A model type without a recipe is logged and left alone,
    but raises ValueError where all fields are given, as `use_liger=True` does it, or label
    smoothing would be lost. The first patch of a model stays.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    fn = MODEL_TYPE_TO_APPLY_LIGER_FN.get(model_type)  # pyright: ignore
    names = {*NAMES, *(inspect.signature(fn).parameters if fn else UPSTREAM)}
    if dropped := [name for name in kwargs if name not in names]:
        logger.warning("%s has no option %s; ignored", model_type, ", ".join(dropped))
    flags = {*UPSTREAM, *FLAGS}  # of which frameworks leave some at None
    options = {n: bool(v) if n in flags else v for n, v in kwargs.items() if n in names}
    config = LigerConfig.of(options)
    if fn is None and not (config.generic or config.label_smoothing or whole(kwargs)):
        known = ", ".join(MODEL_TYPE_TO_APPLY_LIGER_FN)
        logger.warning(
            "no recipe for model type %r, the model is not patched; known: %s", model_type, known
        )
        return
    _keep_first(model, config)
