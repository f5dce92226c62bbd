"""`lightning.pytorch` and `pytorch_lightning` are two copies of the same classes."""

import importlib
import importlib.util
from types import ModuleType
from typing import Any

NAMES = ("lightning.pytorch", "pytorch_lightning")


def installed() -> list[ModuleType]:
    """Those that are there, of which there must be one."""
    found = [name for name in NAMES if importlib.util.find_spec(name.partition(".")[0])]
    if not found:
        raise ImportError("this needs lightning: pip install lightning")
    return [importlib.import_module(name) for name in found]


def bases(module: str, name: str) -> tuple[Any, ...]:
    """The class of this name in each of them, to inherit from all."""
    return tuple(
        getattr(importlib.import_module(f"{pl.__name__}.{module}"), name) for pl in installed()
    )
