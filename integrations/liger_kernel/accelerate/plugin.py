"""Models are patched when an Accelerator is about to prepare them, before any engine wraps them."""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import accelerate
from torch import nn

from liger_kernel.config import NAMES, LigerConfig, flag, from_environment
from liger_kernel.stock import ClassEdits
from liger_kernel.transformers.patch import NoRecipe, Patch, apply, models_within, patch_of

VARIABLE = "ACCELERATE_USE_LIGER"


@dataclass(frozen=True, kw_only=True)
class LigerPlugin(LigerConfig):
    """Turns the patch on for one Accelerator. Its other fields are those of `LigerConfig`.

        accelerator = LigerAccelerator(liger_plugin=LigerPlugin(rope=False))
        LigerPlugin().apply(trainer.accelerator)

    As in accelerate's own plugins, the environment has a say: ACCELERATE_USE_LIGER sets
    `use_liger`, LIGER_ROPE and so on the fields of their names, whatever is passed.

    Attributes:
        use_liger: False for a plugin that does nothing.
    """

    use_liger: bool = True

    def __post_init__(self) -> None:
        wanted = os.environ.get(VARIABLE)  # empty is unset
        given = from_environment() | ({"use_liger": flag(VARIABLE, wanted)} if wanted else {})
        for name, value in given.items():
            object.__setattr__(self, name, value)
        super().__post_init__()

    @property
    def config(self) -> LigerConfig:
        """What models are patched with."""
        return LigerConfig(**{name: getattr(self, name) for name in NAMES})

    def apply(self, accelerator: accelerate.Accelerator) -> "AcceleratorPatch":
        """Have this instance patch the models that it prepares from now on.

        Raises:
            ValueError: the accelerator has another configuration already.
        """
        there: AcceleratorPatch | None = vars(accelerator).get("_liger")
        if there is not None and there.config != self.config:
            raise ValueError(
                f"the accelerator already patches with {there.config}; revert() that before "
                f"applying {self.config}"
            )
        if there is None:
            there = AcceleratorPatch(accelerator, self.config)
            if self.use_liger:
                there._set()
        return there


@dataclass(slots=True)
class AcceleratorPatch:
    """What an Accelerator has patched so far. A context manager, as `Patch` is."""

    accelerator: accelerate.Accelerator
    config: LigerConfig
    patches: list[Patch] = field(default_factory=list[Patch])
    _theirs: list[Patch] = field(default_factory=list[Patch])  # that were there before
    _before: dict[str, Any] = field(default_factory=dict[str, Any])

    def _set(self) -> None:
        own = vars(self.accelerator)
        for name in ("prepare", "prepare_model"):
            self._before[name] = own.get(name)
            own[name] = partial(_preparing, self, getattr(self.accelerator, name))
        own["_liger"] = self

    def patch(self, *modules: nn.Module) -> None:
        """Patch the transformers models within these modules; others are left.

        Raises:
            ValueError: there is nothing to patch in them, and this accelerator has patched nothing
                before; or as `liger_kernel.transformers.apply` does.
        """
        why = list[str]()
        for model in chain.from_iterable(map(models_within, modules)):
            there = patch_of(model)
            try:
                patch = apply(model, self.config)
            except NoRecipe as error:
                why.append(str(error))
                continue
            found = self.patches if there is None else self._theirs
            if all(patch is not p for p in (*self.patches, *self._theirs)):
                found.append(patch)
        if modules and not (self.patches or self._theirs):
            names = ", ".join(type(m).__name__ for m in modules)
            raise ValueError(
                f"liger has nothing to patch in {names}: "
                f"{'; '.join(why) or 'there is no transformers model'}. Turn it off with "
                f"{VARIABLE}=false, or leave the LigerPlugin out"
            )

    def revert(self) -> None:
        """Restore the accelerator, and every model that it has patched."""
        own = vars(self.accelerator)
        for name, before in self._before.items():
            if before is None:
                own.pop(name, None)
            else:
                own[name] = before
        own.pop("_liger", None)
        self._before.clear()
        self._theirs.clear()
        while self.patches:
            self.patches.pop().revert()

    def __enter__(self) -> "AcceleratorPatch":
        return self

    def __exit__(self, *_: object) -> None:
        self.revert()


def _preparing(
    liger: AcceleratorPatch, original: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Replaces `prepare` and `prepare_model`."""
    given = (*args, *kwargs.values())
    liger.patch(*(arg for arg in given if isinstance(arg, nn.Module)))
    return original(*args, **kwargs)


def _turn_on(accelerator: accelerate.Accelerator, plugin: LigerPlugin | None) -> None:
    if plugin is None and flag(VARIABLE, os.environ.get(VARIABLE) or "false"):
        plugin = LigerPlugin()
    if plugin is None:
        return
    if not isinstance(plugin, LigerPlugin):
        raise ValueError(f"liger_plugin must be a LigerPlugin, got {plugin!r}")
    plugin.apply(accelerator)


class LigerAccelerator(accelerate.Accelerator):
    """accelerate's own, which also takes `liger_plugin`.

    Args:
        liger_plugin: None for `LigerPlugin()` where ACCELERATE_USE_LIGER is true, as
            `accelerate-liger launch` sets it, and else for no patch.
    """

    def __init__(self, *args: Any, liger_plugin: LigerPlugin | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _turn_on(self, liger_plugin)


def _taking_ours(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def __init__(self: Any, *args: Any, liger_plugin: Any = None, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if not isinstance(self, LigerAccelerator):  # which does so itself
            _turn_on(self, liger_plugin)

    return __init__


def install() -> Callable[[], None]:
    """Have every Accelerator take what LigerAccelerator takes; returns what takes it back."""
    edits = ClassEdits()
    edits.put(accelerate.Accelerator, "__init__", _taking_ours(accelerate.Accelerator.__init__))
    return edits.revert
