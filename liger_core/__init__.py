"""Efficient Triton kernels and fused-linear losses, on torch and triton alone.

Functions only: no modules, no global state. Every op runs its kernels on GPU tensors and the same
chunked algorithm in torch elsewhere; `impl=` says otherwise.
"""

from liger_core.ops.cross_entropy import cross_entropy
from liger_core.ops.glu import geglu, glu, swiglu
from liger_core.ops.labels import LabelScan
from liger_core.ops.layer_norm import layer_norm
from liger_core.ops.linear_logprob import linear_cross_entropy, linear_logprob
from liger_core.ops.rms_norm import rms_norm
from liger_core.ops.rope import rope

__all__ = [
    "LabelScan",
    "cross_entropy",
    "geglu",
    "glu",
    "layer_norm",
    "linear_cross_entropy",
    "linear_logprob",
    "rms_norm",
    "rope",
    "swiglu",
]
