"""Efficient Triton kernels and fused-linear losses, on torch and triton alone.

Functions only: no modules, no global state. Every op runs its kernels on GPU tensors and the same
chunked algorithm in torch elsewhere; `impl=` says otherwise.
"""

from liger_core.ops.cross_entropy import cross_entropy, cross_entropy_stats
from liger_core.ops.glu import geglu, glu, glu_packed, swiglu
from liger_core.ops.labels import LabelScan
from liger_core.ops.layer_norm import layer_norm
from liger_core.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_stats
from liger_core.ops.linear_logprob import linear_logprob, linear_token_stats
from liger_core.ops.linear_loss import linear_loss
from liger_core.ops.rms_norm import add_rms_norm, rms_norm
from liger_core.ops.rope import rope
from liger_core.ops.tiled import tiled
from liger_core.ops.vocab_parallel import VocabShard

__all__ = [
    "LabelScan",
    "VocabShard",
    "add_rms_norm",
    "cross_entropy",
    "cross_entropy_stats",
    "geglu",
    "glu",
    "glu_packed",
    "layer_norm",
    "linear_cross_entropy",
    "linear_cross_entropy_stats",
    "linear_logprob",
    "linear_loss",
    "linear_token_stats",
    "rms_norm",
    "rope",
    "swiglu",
    "tiled",
]
