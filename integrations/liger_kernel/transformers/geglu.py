"""LigerGEGLUMLP, under upstream's name."""

from liger_kernel.transformers.swiglu import GatedMLP


class LigerGEGLUMLP(GatedMLP):
    """The MLP of Gemma and its kin: gelu, in the tanh form."""

    act = "gelu_tanh"
    names = ("gelu_pytorch_tanh", "gelu_new", "gelu")  # Gemma's legacy "gelu" means the tanh form
