"""What each model family is made of, and how its parts compute. Data; `patch.py` reads it.

Modules are matched by class name wherever they sit, so no paths are needed. A family whose oddities
have a word below is one entry of `RECIPES`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMSNorm: x / rms(x) * (weight + offset)."""

    eps: str = "variance_epsilon"  # the attribute that holds eps
    offset: float = 0.0
    casting: Literal["llama", "gemma"] = "llama"  # what is rounded before the weight is multiplied


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """`torch.nn.LayerNorm`, in the vision towers."""


@dataclass(frozen=True, slots=True)
class Glu:
    """An MLP with a gate, by how gate and up come about."""

    kind: Literal["split", "packed", "experts"] = "split"  # experts: `_apply_gate`, of packed ones
    act: str = "act_fn"  # the attribute that holds the activation
    name: Literal["swiglu", "geglu"] = "swiglu"  # upstream's flag


@dataclass(frozen=True, slots=True)
class Rope:
    """An attention whose forward calls a global function on queries and keys."""

    kind: Literal["half", "interleaved", "vision"] = "half"


Part = Norm | LayerNorm | Glu | Rope
FIELDS: dict[type, str] = {Norm: "norm", LayerNorm: "layer_norm", Glu: "mlp", Rope: "rope"}
"""The field of LigerConfig that asks for each kind of part."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """One family."""

    model_type: str  # config.model_type
    parts: Mapping[str, Part]  # by class name
    softcap: str | None = None  # of the logits: the attribute of the configuration that holds it
    logits_divided_by: str | None = None  # likewise
    module: str | None = None  # the folder of transformers.models, where it is not the model type


NORM, GEMMA, OLMO = Norm(), Norm("eps", 1.0, "gemma"), Norm(casting="gemma")
GLU, GEGLU, PACKED, EXPERTS = (
    Glu(),
    Glu(name="geglu"),
    Glu("packed", "activation_fn"),
    Glu("experts"),
)
ROPE, INTERLEAVED, VISION = Rope(), Rope("interleaved"), Rope("vision")
CAP = "final_logit_softcapping"


def _parts(prefix: str, norm: Norm = NORM, mlp: Glu = GLU, rope: Rope = ROPE) -> dict[str, Part]:
    """Of a family that names its classes as most do."""
    return {f"{prefix}RMSNorm": norm, f"{prefix}MLP": mlp, f"{prefix}Attention": rope}


_GEMMA3 = _parts("Gemma3", GEMMA, GEGLU)
_MIXTRAL: dict[str, Part] = {
    "MixtralRMSNorm": NORM, "MixtralExperts": EXPERTS, "MixtralAttention": ROPE
}  # fmt: skip
_MLLAMA: dict[str, Part] = {
    "MllamaTextRMSNorm": NORM, "MllamaTextMLP": GLU, "MllamaTextSelfAttention": ROPE
}  # fmt: skip
_QWEN2_VL: dict[str, Part] = {
    "Qwen2VLRMSNorm": NORM, "Qwen2MLP": GLU, "Qwen2VLAttention": ROPE
}  # fmt: skip
_QWEN2_5_VL: dict[str, Part] = {
    "Qwen2_5_VLRMSNorm": NORM, "Qwen2MLP": GLU, "Qwen2_5_VLAttention": ROPE
}  # fmt: skip
_TOWER: dict[str, Part] = {"LayerNorm": LayerNorm()}

RECIPES: dict[str, Recipe] = {
    recipe.model_type: recipe
    for recipe in (
        Recipe("gemma", _parts("Gemma", GEMMA, GEGLU)),
        Recipe("gemma2", _parts("Gemma2", GEMMA, GEGLU), softcap=CAP),
        Recipe("gemma3", _GEMMA3 | _TOWER),  # this one never caps its logits
        Recipe("gemma3_text", _GEMMA3, softcap=CAP, module="gemma3"),
        Recipe("glm", _parts("Glm", mlp=PACKED, rope=INTERLEAVED)),
        Recipe("glm4", _parts("Glm4", mlp=PACKED, rope=INTERLEAVED)),
        Recipe("granite", _parts("Granite"), logits_divided_by="logits_scaling"),
        Recipe("llama", _parts("Llama")),
        Recipe("mistral", _parts("Mistral")),
        Recipe("mixtral", _MIXTRAL),
        Recipe("mllama", _MLLAMA | _TOWER),
        Recipe("mllama_text_model", _MLLAMA, module="mllama"),
        Recipe("olmo2", _parts("Olmo2", OLMO)),
        Recipe("phi3", _parts("Phi3", mlp=PACKED)),
        Recipe("qwen2", _parts("Qwen2")),
        Recipe("qwen2_vl", _QWEN2_VL | _TOWER | {"VisionAttention": VISION}),
        Recipe("qwen2_vl_text", _QWEN2_VL, module="qwen2_vl"),
        Recipe(
            "qwen2_5_vl",
            _QWEN2_5_VL | {"Qwen2_5_VLMLP": GLU, "Qwen2_5_VLVisionAttention": VISION},
        ),
        Recipe("qwen2_5_vl_text", _QWEN2_5_VL, module="qwen2_5_vl"),
        Recipe("qwen3", _parts("Qwen3")),
        Recipe("qwen3_moe", _parts("Qwen3Moe") | {"Qwen3MoeExperts": EXPERTS}),
    )
}
FAMILIES = (*(name for name, recipe in RECIPES.items() if recipe.module is None), "gemma3_text")
"""What upstream has an `apply_liger_kernel_to_*` for."""
