"""The gated MLPs with gelu, under upstream's names."""

from liger_kernel.transformers.swiglu import GatedMLP, TiledMLP


class LigerGEGLUMLP(GatedMLP):
    """The MLP of Gemma and its kin: gelu, in the tanh form."""

    act = "gelu_tanh"
    names = ("gelu_pytorch_tanh", "gelu_new", "gelu")  # Gemma's legacy "gelu" means the tanh form


class LigerTiledGEGLUMLP(TiledMLP, LigerGEGLUMLP):
    """LigerGEGLUMLP over tiles of tokens."""
