"""What the swappable parts of each model family are called. Data; `patch.py` reads it.

Modules are matched by class name wherever they sit, so no paths are needed.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMSNorm class."""

    cls: str
    eps: str = "variance_epsilon"  # the attribute that holds eps
    offset: float = 0.0  # added to the weight
    casting: Literal["llama", "gemma"] = "llama"


@dataclass(frozen=True, slots=True)
class Glu:
    """A gated MLP class with gate_proj, up_proj and down_proj."""

    cls: str
    act: str = "hidden_act"  # the config attribute that names the activation


@dataclass(frozen=True, slots=True)
class Recipe:
    """One family."""

    model_type: str  # config.model_type
    norm: Norm
    glu: Glu
    attention: str  # a class whose forward calls apply_rotary_pos_emb(q, k, cos, sin)


RECIPES = {
    r.model_type: r
    for r in (Recipe("llama", Norm("LlamaRMSNorm"), Glu("LlamaMLP"), "LlamaAttention"),)
}
