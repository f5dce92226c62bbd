"""Lightning: `plugins=[LigerPlugin()]`, `strategy="liger_fsdp"` or `callbacks=[LigerCallback()]`.

For `lightning.pytorch` and, where that is installed, for `pytorch_lightning`: the same classes
serve both. Importing this registers the strategies' names.
"""

from liger_kernel.lightning.callback import LigerCallback
from liger_kernel.lightning.plugin import LigerPlugin
from liger_kernel.lightning.strategy import LigerStrategy
from liger_kernel.lightning.token_mean import TokenMean

__all__ = ["LigerCallback", "LigerPlugin", "LigerStrategy", "TokenMean"]
