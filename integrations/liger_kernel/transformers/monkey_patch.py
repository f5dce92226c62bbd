"""Upstream's `apply_liger_kernel_to_*`, over `patch.apply`.

With a model, the instance is patched. Without one, models of the family that are built afterwards
are, each as an instance, by a wrapper around their classes' constructors that `revert` takes away.
"""

import functools
import importlib
import inspect
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from liger_kernel.config import NAMES, UPSTREAM, LigerConfig
from liger_kernel.transformers.patch import Patch, apply, patch_of

logger = logging.getLogger(__name__)
_building = threading.local()  # depth of constructors: only the outermost model is patched


@dataclass(slots=True)
class ClassPatch:
    """Models of one family are patched when they are built. A context manager, as `Patch` is."""

    model_type: str
    config: LigerConfig
    _originals: dict[type, Callable[..., None]] = field(
        default_factory=dict[type, Callable[..., None]]
    )

    def install(self) -> "ClassPatch":
        module = importlib.import_module(
            f"transformers.models.{self.model_type}.modeling_{self.model_type}"
        )
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
        CLASS_PATCHES.pop(self.model_type, None)

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
        if depth == 0:
            logger.info("%s", apply(self, config))

    return wrapper


def _apply_to_family(
    model_type: str, model: nn.Module | None, flags: dict[str, bool | None]
) -> Patch | ClassPatch:
    if flags["cross_entropy"] and flags["fused_linear_cross_entropy"]:
        raise ValueError(
            "cross_entropy and fused_linear_cross_entropy cannot both be true: with the head fused "
            "there are no logits; pass fused_linear_cross_entropy=False"
        )
    config = LigerConfig.of({name: bool(on) for name, on in flags.items()})
    if model is not None:
        return _keep_first(model, config)
    if (there := CLASS_PATCHES.get(model_type)) is not None:
        if there.config == config:
            return there
        there.revert()
    CLASS_PATCHES[model_type] = ClassPatch(model_type, config).install()
    return CLASS_PATCHES[model_type]


def _keep_first(model: nn.Module, config: LigerConfig) -> Patch:
    if (there := patch_of(model)) is not None:
        if there.config != config:
            logger.warning("the model is already patched with %s, which stays", there.config)
        return there
    patch = apply(model, config)
    logger.info("%s", patch)
    return patch


def apply_liger_kernel_to_llama(
    rope: bool = True,
    cross_entropy: bool = False,
    fused_linear_cross_entropy: bool = True,
    rms_norm: bool = True,
    swiglu: bool = True,
    model: nn.Module | None = None,
) -> Patch | ClassPatch:
    """Patch `model`, a Llama; without one, every Llama that is built after this call.

    Args:
        rope, rms_norm, swiglu: the layers to replace; None counts as False.
        cross_entropy: replace the loss of full logits.
        fused_linear_cross_entropy: lm_head computes the loss itself, without logits.
        model: a model instance, or None.

    Returns:
        What was done; its `revert()` undoes it. A second call without a model and with other flags
        replaces the first.

    Raises:
        ValueError: both kinds of cross entropy at once.
    """
    flags = {
        "rope": rope, "cross_entropy": cross_entropy, "rms_norm": rms_norm, "swiglu": swiglu,
        "fused_linear_cross_entropy": fused_linear_cross_entropy,
    }  # fmt: skip
    return _apply_to_family("llama", model, dict(flags))


MODEL_TYPE_TO_APPLY_LIGER_FN: dict[str, Callable[..., Patch | ClassPatch]] = {
    "llama": apply_liger_kernel_to_llama
}


def _apply_liger_kernel(model_type: str, **kwargs: Any) -> None:
    """Patch models of this type that are built after this call; log and return if unknown."""
    if (fn := MODEL_TYPE_TO_APPLY_LIGER_FN.get(model_type)) is None:
        known = ", ".join(MODEL_TYPE_TO_APPLY_LIGER_FN)
        logger.info("no recipe for model type %r, nothing is patched; known: %s", model_type, known)
        return
    fn(**kwargs)


def _apply_liger_kernel_to_instance(model: nn.Module, **kwargs: Any) -> None:
    """What `transformers.TrainingArguments(use_liger_kernel=True)` calls, with liger_kernel_config.

    Options are LigerConfig's fields or those of the family's `apply_liger_kernel_to_*`, None for
    False; others are logged and ignored. A model type without a recipe is logged and left alone;
    the first patch of a model stays.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if (fn := MODEL_TYPE_TO_APPLY_LIGER_FN.get(model_type)) is None:  # pyright: ignore
        known = ", ".join(MODEL_TYPE_TO_APPLY_LIGER_FN)
        logger.warning(
            "no recipe for model type %r, the model is not patched; known: %s", model_type, known
        )
        return
    names = (*inspect.signature(fn).parameters, *NAMES)
    if dropped := [name for name in kwargs if name not in names]:
        logger.warning("%s has no option %s; ignored", model_type, ", ".join(dropped))
    flags = set(UPSTREAM) | {"rope", "cross_entropy"}  # of which frameworks leave some at None
    options = {n: bool(v) if n in flags else v for n, v in kwargs.items() if n in names}
    _keep_first(model, LigerConfig.of(options))
