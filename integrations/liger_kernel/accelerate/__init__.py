"""Accelerate: `LigerAccelerator(liger_plugin=LigerPlugin())` and the command `accelerate-liger`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from liger_kernel.accelerate.plugin import AcceleratorPatch, LigerAccelerator, LigerPlugin

__all__ = ["AcceleratorPatch", "LigerAccelerator", "LigerPlugin"]


def __getattr__(name: str) -> Any:  # `run` comes before accelerate is imported
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from liger_kernel.accelerate import plugin

    return getattr(plugin, name)
