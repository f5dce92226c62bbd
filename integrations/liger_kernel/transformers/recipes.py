"""What each model family is made of, and how its parts compute. Data; `patch.py` reads it.

Modules are matched by class name wherever they sit, so no paths are needed. A family whose oddities
have a word below is one entry of `RECIPES`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMSNorm: x / rms(x) * (weight + offset)."""

    field: ClassVar = "norm"  # of LigerConfig, that asks for it
    eps: str = "variance_epsilon"  # the attribute that holds eps
    offset: float = 0.0
    casting: Literal["llama", "gemma"] = "llama"  # what is rounded before the weight is multiplied

    def __str__(self) -> str:
        return "RMSNorm (1 + w)" if self.offset else "RMSNorm"


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """`torch.nn.LayerNorm`, in the vision towers."""

    field: ClassVar = "layer_norm"

    def __str__(self) -> str:
        return "LayerNorm (vision)"


@dataclass(frozen=True, slots=True)
class Glu:
    """An MLP with a gate, by how gate and up come about."""

    field: ClassVar = "mlp"
    kind: Literal["split", "packed", "experts"] = "split"  # experts: `_apply_gate`, of packed ones
    act: str = "act_fn"  # the attribute that holds the activation
    name: Literal["swiglu", "geglu"] = "swiglu"  # upstream's flag

    def __str__(self) -> str:
        name = "SwiGLU" if self.name == "swiglu" else "GEGLU"
        return name if self.kind == "split" else f"{name} ({self.kind})"


@dataclass(frozen=True, slots=True)
class Rope:
    """An attention whose forward calls a global function on queries and keys."""

    field: ClassVar = "rope"
    kind: Literal["half", "interleaved", "vision"] = "half"

    def __str__(self) -> str:
        return "yes" if self.kind == "half" else self.kind


Part = Norm | LayerNorm | Glu | Rope


@dataclass(frozen=True, slots=True)
class Recipe:
    """One family."""

    model_type: str  # config.model_type
    parts: Mapping[str, Part]  # by class name
    softcap: str | None = None  # of the logits: the attribute of the configuration that holds it
    logits_divided_by: str | None = None  # likewise
    part_of: str | None = None  # the family whose code it shares, where it is a part of another

    @property
    def folder(self) -> str:
        """Of transformers.models."""
        return self.part_of or self.model_type


NORM, GEMMA, OLMO = Norm(), Norm("eps", 1.0, "gemma"), Norm(casting="gemma")
GLU, GEGLU = Glu(), Glu(name="geglu")
PACKED, EXPERTS = Glu("packed", "activation_fn"), Glu("experts")
ROPE, INTERLEAVED, VISION = Rope(), Rope("interleaved"), Rope("vision")
CAP = "final_logit_softcapping"


def _parts(
    prefix: str, norm: Norm = NORM, mlp: Glu = GLU, rope: Rope = ROPE,
    mlp_class: str | None = None, rope_class: str | None = None,
) -> dict[str, Part]:  # fmt: skip
    """Of a family that names its classes as most do, but for those that are named here."""
    return {
        f"{prefix}RMSNorm": norm,
        mlp_class or f"{prefix}MLP": mlp,
        rope_class or f"{prefix}Attention": rope,
    }


_GEMMA3 = _parts("Gemma3", GEMMA, GEGLU)
_MLLAMA = _parts("MllamaText", rope_class="MllamaTextSelfAttention")
_QWEN2_VL = _parts("Qwen2VL", mlp_class="Qwen2MLP")
_QWEN2_5_VL = _parts("Qwen2_5_VL", mlp_class="Qwen2MLP")
_TOWER: dict[str, Part] = {"LayerNorm": LayerNorm()}

RECIPES: dict[str, Recipe] = {
    recipe.model_type: recipe
    for recipe in (
        Recipe("gemma", _parts("Gemma", GEMMA, GEGLU)),
        Recipe("gemma2", _parts("Gemma2", GEMMA, GEGLU), softcap=CAP),
        Recipe("gemma3", _GEMMA3 | _TOWER),  # this one never caps its logits
        Recipe("gemma3_text", _GEMMA3, softcap=CAP, part_of="gemma3"),
        Recipe("glm", _parts("Glm", mlp=PACKED, rope=INTERLEAVED)),
        Recipe("glm4", _parts("Glm4", mlp=PACKED, rope=INTERLEAVED)),
        Recipe("granite", _parts("Granite"), logits_divided_by="logits_scaling"),
        Recipe("llama", _parts("Llama")),
        Recipe("mistral", _parts("Mistral")),
        Recipe("mixtral", _parts("Mixtral", mlp=EXPERTS, mlp_class="MixtralExperts")),
        Recipe("mllama", _MLLAMA | _TOWER),
        Recipe("mllama_text_model", _MLLAMA, part_of="mllama"),
        Recipe("olmo2", _parts("Olmo2", OLMO)),
        Recipe("phi3", _parts("Phi3", mlp=PACKED)),
        Recipe("qwen2", _parts("Qwen2")),
        Recipe("qwen2_vl", _QWEN2_VL | _TOWER | {"VisionAttention": VISION}),
        Recipe("qwen2_vl_text", _QWEN2_VL, part_of="qwen2_vl"),
        Recipe(
            "qwen2_5_vl",
            _QWEN2_5_VL | {"Qwen2_5_VLMLP": GLU, "Qwen2_5_VLVisionAttention": VISION},
        ),
        Recipe("qwen2_5_vl_text", _QWEN2_5_VL, part_of="qwen2_5_vl"),
        Recipe("qwen3", _parts("Qwen3")),
        Recipe("qwen3_moe", _parts("Qwen3Moe") | {"Qwen3MoeExperts": EXPERTS}),
    )
}
FAMILIES = (*(name for name, recipe in RECIPES.items() if recipe.part_of is None), "gemma3_text")
"""What there is an `apply_liger_kernel_to_*` for."""
