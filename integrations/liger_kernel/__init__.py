"""liger_core for training frameworks, under the import name that they already know."""

from liger_kernel.config import LigerConfig

__version__ = "1.0.0.dev0"
__all__ = ["LigerConfig", "__version__"]
