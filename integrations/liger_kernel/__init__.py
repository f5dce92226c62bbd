"""liger_core for training frameworks, under the import name that they already know."""

from liger_kernel.config import LigerConfig
from liger_kernel.stock import install, uninstall

__version__ = "1.0.0.dev0"
__all__ = ["LigerConfig", "__version__", "install", "uninstall"]
