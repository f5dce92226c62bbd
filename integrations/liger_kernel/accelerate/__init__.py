"""Accelerate: `LigerAccelerator(liger_plugin=LigerPlugin())` and the command `accelerate-liger`."""

from liger_kernel.accelerate.plugin import AcceleratorPatch, LigerAccelerator, LigerPlugin

__all__ = ["AcceleratorPatch", "LigerAccelerator", "LigerPlugin"]
