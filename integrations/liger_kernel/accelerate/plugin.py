"""Models are patched when an Accelerator is about to prepare them, before any engine wraps them."""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import accelerate
from torch import nn

from liger_kernel.config import USE_LIGER, LigerConfig, flag, from_environment
from liger_kernel.stock import ClassEdits
from liger_kernel.transformers.patch import Patch
from liger_kernel.transformers.within import ModelsWithin


@dataclass(frozen=True, kw_only=True)
class LigerPlugin(LigerConfig):
    """Turns the patch on for one Accelerator. Its other fields are those of `LigerConfig`.

        accelerator = LigerAccelerator(liger_plugin=LigerPlugin(rope=False))
        LigerPlugin().apply(trainer.accelerator)

    The environment has the last word: ACCELERATE_USE_LIGER sets `use_liger`, LIGER_ROPE and so on
    the fields of their names.

    Attributes:
        use_liger: False for a plugin that does nothing.
    """

    use_liger: bool = True

    def __post_init__(self) -> None:
        wanted = os.environ.get(USE_LIGER)  # empty is unset
        given = from_environment() | ({"use_liger": flag(USE_LIGER, wanted)} if wanted else {})
        for name, value in given.items():
            object.__setattr__(self, name, value)
        if not isinstance(self.use_liger, bool):
            raise ValueError(f"use_liger must be true or false, got {self.use_liger!r}")
        super().__post_init__()

    @property
    def config(self) -> LigerConfig:
        """What models are patched with."""
        return LigerConfig(**self.to_dict())

    def apply(self, accelerator: accelerate.Accelerator) -> "AcceleratorPatch":
        """Have this instance patch the models that it prepares from now on.

        A hyperparameter search of HF Trainer makes accelerators of its own: there, take the flag or
        LigerCallback.

        Raises:
            ValueError: the accelerator has another configuration already.
        """
        there: AcceleratorPatch | None = vars(accelerator).get("_liger")
        if there is None or not self.use_liger:
            return AcceleratorPatch(accelerator, self.config, self.use_liger)
        if there.config != self.config:
            raise ValueError(
                f"the accelerator already patches with {there.config}; revert() that before "
                f"applying {self.config}"
            )
        return there


class AcceleratorPatch:
    """What an Accelerator has patched so far. A context manager, as `Patch` is."""

    def __init__(self, accelerator: accelerate.Accelerator, config: LigerConfig, on: bool) -> None:
        self.accelerator, self.config, self._on = accelerator, config, on
        self._models = ModelsWithin(config)
        self._undo: list[Callable[[], object]] = []
        if not on:
            return
        own = vars(accelerator)
        for name in ("prepare", "prepare_model"):
            before, ours = own.get(name), partial(_preparing, self, getattr(accelerator, name))
            own[name] = ours
            self._undo.append(partial(_restore, own, name, ours, before))
        own["_liger"] = self
        self._undo.append(partial(_restore, own, "_liger", self, None))

    @property
    def patches(self) -> list[Patch]:
        """Of the models that are still there, without those that were patched before."""
        return self._models.patches

    def patch(self, *modules: nn.Module) -> None:
        """Patch the transformers models within these modules; others are left.

        Raises:
            ValueError: there is nothing to patch in them, and this accelerator has patched nothing
                before; or as `liger_kernel.transformers.apply` does.
        """
        if not self._on:
            return
        why = [reason for module in modules for reason in self._models.apply(module)]
        if modules and not self._models.found:
            names = ", ".join(type(m).__name__ for m in modules)
            raise ValueError(
                f"liger has nothing to patch in {names}: "
                f"{'; '.join(why) or 'there is no transformers model'}. Turn it off with "
                f"{USE_LIGER}=false, or leave the LigerPlugin out"
            )

    def revert(self) -> None:
        """Restore the accelerator, and every model that it has patched."""
        self._on = False
        while self._undo:
            self._undo.pop()()
        self._models.revert()

    def __enter__(self) -> "AcceleratorPatch":
        return self

    def __exit__(self, *_: object) -> None:
        self.revert()


def _restore(own: dict[str, Any], name: str, ours: object, before: object) -> None:
    """Put `before` where ours is; what others have put around it calls ours, which does nothing."""
    if own.get(name) is not ours:
        return
    if before is None:
        del own[name]
    else:
        own[name] = before


def _preparing(
    liger: AcceleratorPatch, original: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Replaces `prepare` and `prepare_model`."""
    given = (*args, *kwargs.values())
    liger.patch(*(arg for arg in given if isinstance(arg, nn.Module)))
    return original(*args, **kwargs)


def _turn_on(accelerator: accelerate.Accelerator, plugin: LigerPlugin | None) -> None:
    if plugin is None and flag(USE_LIGER, os.environ.get(USE_LIGER) or "false"):
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


def _taking_plugin(init: Callable[..., None], edits: ClassEdits) -> Callable[..., None]:
    @functools.wraps(init)
    def __init__(self: Any, *args: Any, liger_plugin: Any = None, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if edits.on and not isinstance(self, LigerAccelerator):  # which does so itself
            _turn_on(self, liger_plugin)

    return __init__


def install() -> Callable[[], None]:
    """Have every Accelerator take what LigerAccelerator takes; returns what takes it back."""
    edits = ClassEdits()
    init = accelerate.Accelerator.__init__
    edits.put(accelerate.Accelerator, "__init__", _taking_plugin(init, edits))
    return edits.revert
