"""`install()`: frameworks' own classes take this project's options, until `uninstall()`."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

REGISTRY = {  # framework: the module whose `install()` changes its classes and returns the way back
    "transformers": "liger_kernel.transformers.training_args",
    "accelerate": "liger_kernel.accelerate.plugin",
}
_installed: dict[str, Callable[[], None]] = {}


def install(*frameworks: str) -> None:
    """Have the stock classes of these frameworks, or of all that are there, know this project.

    `transformers.TrainingArguments(use_liger=True, liger_config={...})` and every class made from
    it; `accelerate.Accelerator(liger_plugin=...)`, which also reads ACCELERATE_USE_LIGER. Without
    these options nothing changes. Again, it does nothing.

    Raises:
        ValueError: a name that is not known. ImportError: a framework that is not installed.
    """
    for name in _checked(frameworks) or filter(importlib.util.find_spec, REGISTRY):
        if name not in _installed:
            _installed[name] = importlib.import_module(REGISTRY[name]).install()


def uninstall(*frameworks: str) -> None:
    """Take `install` back, for these frameworks or for all; models stay patched.

    Raises:
        ValueError: a name that is not known.
    """
    for name in _checked(frameworks) or list(_installed):
        if (revert := _installed.pop(name, None)) is not None:
            revert()


def _checked(frameworks: tuple[str, ...]) -> tuple[str, ...]:
    if unknown := [name for name in frameworks if name not in REGISTRY]:
        raise ValueError(f"{unknown[0]!r} has no stock classes here; known: {', '.join(REGISTRY)}")
    return frameworks


class ClassEdits:
    """Attributes of classes that were replaced, and the way back.

    `on` is False once that was gone: what others have put around ours then does nothing.
    """

    def __init__(self) -> None:
        self.on = True
        self._edits: list[tuple[type, str, bool, Any, Any]] = []

    def put(self, cls: type, name: str, value: Any) -> None:
        """Set an attribute in the class's own namespace."""
        own = vars(cls)
        self._edits.append((cls, name, name in own, own.get(name), value))
        setattr(cls, name, value)

    def revert(self) -> None:
        """Restore every attribute that is still as it was put."""
        self.on = False
        while self._edits:
            cls, name, had, before, value = self._edits.pop()
            if vars(cls).get(name) is not value:
                continue  # somebody else has put theirs around it since
            if had:
                setattr(cls, name, before)
            else:
                delattr(cls, name)
