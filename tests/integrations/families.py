"""One tiny model of every family, in which whatever its patch has to respect shows in the loss."""

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.mllama.modeling_mllama import MllamaForCausalLM

from liger_kernel.transformers.sample import sample_batch
from tiny import TINY

LENGTH = 20
EPS = 0.1  # of every norm: at 1e-6 none would show
Config = Mapping[str, Any]


def _rope(**kw: Any) -> dict[str, Any]:
    """At a low theta every channel turns visibly within a short text."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0} | kw}


# fmt: off
SLIDING = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=4)
QWEN = dict(use_sliding_window=True, max_window_layers=1, sliding_window=4)
GEMMA2 = SLIDING | dict(query_pre_attn_scalar=4, final_logit_softcapping=2.0,
                        attn_logit_softcapping=1.0)
ROPES = {"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 2.0},
                             "full_attention": {"rope_type": "default", "rope_theta": 100.0}}}
GEMMA3 = GEMMA2 | ROPES | dict(attention_bias=True)
MOE = dict(num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=0.5)
MLLAMA = dict(hidden_act="silu", num_hidden_layers=3, cross_attention_layers=[1])
MROPE = _rope(mrope_section=[2, 1, 1])
SIGLIP = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
              image_size=8, patch_size=2, layer_norm_eps=EPS)
MLLAMA_VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_global_layers=1,
                     attention_heads=4, image_size=8, patch_size=4, vision_output_dim=64,
                     intermediate_layers_indices=[0], norm_eps=EPS, initializer_range=0.3)
QWEN2_VISION = dict(depth=2, embed_dim=32, hidden_size=32, mlp_ratio=2, num_heads=4, patch_size=2,
                    spatial_merge_size=2, temporal_patch_size=2, initializer_range=0.3)
QWEN2_5_VISION = dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=4, patch_size=2,
                      spatial_merge_size=2, temporal_patch_size=2, window_size=8,
                      out_hidden_size=32, fullatt_block_indexes=[1], initializer_range=0.3)
QWEN_TOKENS = dict(image_token_id=96, video_token_id=95, vision_start_token_id=94,
                   vision_end_token_id=93)
# fmt: on

CONFIGS: dict[str, Config] = {
    "gemma": dict(attention_bias=True, tie_word_embeddings=True, **_rope()),
    "gemma2": GEMMA2 | _rope() | dict(attention_bias=True, tie_word_embeddings=True),
    "gemma3": dict(  # its text part has a softcap, which this model never applies
        text_config=TINY | GEMMA3,
        vision_config=SIGLIP,
        mm_tokens_per_image=4,
        image_token_index=97,  # beyond the vocabulary, as the real one is
        boi_token_index=94,
        eoi_token_index=95,
        initializer_range=0.3,
    ),
    "gemma3_text": GEMMA3 | dict(tie_word_embeddings=True),
    "glm": dict(attention_bias=True, partial_rotary_factor=0.5, **_rope(partial_rotary_factor=0.5)),
    "glm4": dict(
        attention_bias=True, partial_rotary_factor=0.5, **_rope(partial_rotary_factor=0.5)
    ),
    "granite": dict(
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        attention_multiplier=0.5,
        logits_scaling=4.0,
        mlp_bias=True,
        attention_bias=True,
        tie_word_embeddings=True,
        **_rope(),
    ),
    "llama": dict(mlp_bias=True, attention_bias=True, **_rope()),
    "mistral": dict(sliding_window=4, tie_word_embeddings=False, **_rope()),
    "mixtral": MOE | dict(num_local_experts=4, sliding_window=4) | _rope(),
    "mllama": dict(
        text_config=TINY | MLLAMA | _rope(), vision_config=MLLAMA_VISION, image_token_index=97
    ),
    "mllama_text_model": MLLAMA | _rope(),
    "olmo2": dict(attention_bias=True, **_rope()),
    "phi3": dict(sliding_window=4, **_rope(partial_rotary_factor=0.5)),
    "qwen2": QWEN | dict(tie_word_embeddings=True) | _rope(),
    "qwen2_vl": dict(text_config=TINY | MROPE, vision_config=QWEN2_VISION, **QWEN_TOKENS),
    "qwen2_5_vl": dict(
        text_config=TINY | MROPE,
        vision_config=QWEN2_5_VISION,
        tie_word_embeddings=True,
        **QWEN_TOKENS,
    ),
    "qwen3": QWEN | dict(attention_bias=True, tie_word_embeddings=False) | _rope(),
    "qwen3_moe": MOE
    | dict(num_experts=4, moe_intermediate_size=24, norm_topk_prob=True, mlp_only_layers=[1])
    | dict(attention_bias=True)
    | _rope(),
}
IMAGES = {
    "gemma3": "vision_tower",
    "mllama": "vision_model",
    "qwen2_vl": "visual",
    "qwen2_5_vl": "visual",
}
"""The families that see, and what their eyes are called."""
TEXT = [name for name in CONFIGS if name not in IMAGES]

MODULES: dict[str, dict[str, int]] = {
    "gemma": dict(GemmaAttention=2, GemmaMLP=2, GemmaRMSNorm=5, Linear=1),
    "gemma2": dict(Gemma2Attention=2, Gemma2MLP=2, Gemma2RMSNorm=9, Linear=1),
    "gemma3": dict(Gemma3Attention=2, Gemma3MLP=2, Gemma3RMSNorm=14, LayerNorm=6, Linear=1),
    "gemma3_text": dict(Gemma3Attention=2, Gemma3MLP=2, Gemma3RMSNorm=13, Linear=1),
    "glm": dict(GlmAttention=2, GlmMLP=2, GlmRMSNorm=5, Linear=1),
    "glm4": dict(Glm4Attention=2, Glm4MLP=2, Glm4RMSNorm=9, Linear=1),
    "granite": dict(GraniteAttention=2, GraniteMLP=2, GraniteRMSNorm=5, Linear=1),
    "llama": dict(Linear=1, LlamaAttention=2, LlamaMLP=2, LlamaRMSNorm=5),
    "mistral": dict(Linear=1, MistralAttention=2, MistralMLP=2, MistralRMSNorm=5),
    "mixtral": dict(Linear=1, MixtralAttention=2, MixtralExperts=2, MixtralRMSNorm=5),
    "mllama": dict(
        LayerNorm=8, Linear=1, MllamaTextMLP=3, MllamaTextRMSNorm=9, MllamaTextSelfAttention=2
    ),
    "mllama_text_model": dict(
        Linear=1, MllamaTextMLP=3, MllamaTextRMSNorm=9, MllamaTextSelfAttention=2
    ),
    "olmo2": dict(Linear=1, Olmo2Attention=2, Olmo2MLP=2, Olmo2RMSNorm=9),
    "phi3": dict(Linear=1, Phi3Attention=2, Phi3MLP=2, Phi3RMSNorm=5),
    "qwen2": dict(Linear=1, Qwen2Attention=2, Qwen2MLP=2, Qwen2RMSNorm=5),
    "qwen2_vl": dict(
        LayerNorm=5, Linear=1, Qwen2MLP=2, Qwen2VLAttention=2, Qwen2VLRMSNorm=5, VisionAttention=2
    ),
    "qwen2_5_vl": dict(
        Linear=1,
        Qwen2MLP=2,
        Qwen2_5_VLAttention=2,
        Qwen2_5_VLMLP=2,
        Qwen2_5_VLRMSNorm=10,
        Qwen2_5_VLVisionAttention=2,
    ),
    "qwen3": dict(Linear=1, Qwen3Attention=2, Qwen3MLP=2, Qwen3RMSNorm=9),
    "qwen3_moe": dict(
        Linear=1, Qwen3MoeAttention=2, Qwen3MoeExperts=1, Qwen3MoeMLP=1, Qwen3MoeRMSNorm=9
    ),
}
"""The modules that a patch replaces; Linear is the head."""

Oddity = Config | tuple[str, Callable[[Tensor], Tensor]]
"""Another configuration; or a pattern of parameters' names, and what becomes of those."""

OFFSET: Oddity = (r"norm\.weight", lambda w: w - 1)
BIAS: Oddity = (r"_proj\.bias", torch.zeros_like)
CAP: dict[str, Oddity] = {"softcap": dict(final_logit_softcapping=None)}
SCORES: dict[str, Oddity] = {"scale of queries": dict(query_pre_attn_scalar=16)}
WINDOW: dict[str, Oddity] = {"window": dict(sliding_window=LENGTH)}
QK_NORM: dict[str, Oddity] = {
    "q_norm": (r"q_norm", lambda w: 2 * w + 1),
    "k_norm": (r"k_norm", lambda w: 2 * w + 1),
}
PARTIAL: dict[str, Oddity] = {"partial rotary": _rope(partial_rotary_factor=1.0)}
ROUTER: dict[str, Oddity] = {
    "auxiliary loss": dict(router_aux_loss_coef=0.0),
    "experts": dict(num_experts_per_tok=1),
}
MROPE_SECTION: dict[str, Oddity] = {"mrope": dict(text_config=_rope(mrope_section=[1, 1, 2]))}
GATES: dict[str, Oddity] = {
    "attention's gate": (r"cross_attn_attn_gate", torch.zeros_like),
    "MLP's gate": (r"cross_attn_mlp_gate", torch.zeros_like),
    "global layers": (r"global_transformer.*gate", torch.zeros_like),
    "position gate": (r"gated_positional_embedding.gate", torch.zeros_like),
}


def _of_text(oddities: Mapping[str, Oddity]) -> dict[str, Oddity]:
    return {k: dict(text_config=v) if isinstance(v, Mapping) else v for k, v in oddities.items()}


ODDITIES: dict[str, dict[str, Oddity]] = {
    "gemma": {"offset": OFFSET, "bias": BIAS},
    "gemma2": {
        **(CAP | SCORES | WINDOW),
        "attention's softcap": dict(attn_logit_softcapping=None),
        "offset": OFFSET,
        "bias": BIAS,
    },
    "gemma3": {
        **_of_text(SCORES | WINDOW | QK_NORM),
        "offset": OFFSET,
        "theta of windows": dict(
            text_config=dict(rope_parameters=dict(sliding_attention=dict(rope_theta=100.0)))
        ),
    },
    "gemma3_text": {
        **(CAP | SCORES | WINDOW | QK_NORM),
        "offset": OFFSET,
        "bias": BIAS,
        "theta of windows": dict(rope_parameters=dict(sliding_attention=dict(rope_theta=100.0))),
    },
    "glm": PARTIAL | {"bias": BIAS},
    "glm4": PARTIAL | {"bias": BIAS},
    "granite": {
        "embedding_multiplier": dict(embedding_multiplier=1.0),
        "residual_multiplier": dict(residual_multiplier=1.0),
        "attention_multiplier": dict(attention_multiplier=1.0),
        "logits_scaling": dict(logits_scaling=1.0),
        "bias": BIAS,
        "MLP's bias": (r"mlp.*bias", torch.zeros_like),
    },
    "llama": {"bias": BIAS, "MLP's bias": (r"mlp.*bias", torch.zeros_like)},
    "mistral": WINDOW,
    "mixtral": ROUTER | WINDOW,
    "mllama": GATES
    | QK_NORM
    | {"layers": dict(vision_config=dict(intermediate_layers_indices=[1]))},
    "mllama_text_model": {},
    "olmo2": QK_NORM | {"bias": BIAS},
    "phi3": PARTIAL | WINDOW,
    "qwen2": WINDOW | {"bias": BIAS},
    "qwen2_vl": MROPE_SECTION | {"bias": BIAS},
    "qwen2_5_vl": MROPE_SECTION
    | {
        "bias": BIAS,
        "MLP's bias of the tower": (r"visual.*mlp.*bias", torch.zeros_like),
        "windows": dict(vision_config=dict(window_size=100)),
        "full layers": dict(vision_config=dict(fullatt_block_indexes=[])),
    },
    "qwen3": WINDOW | QK_NORM | {"bias": BIAS},
    "qwen3_moe": ROUTER | QK_NORM | {"bias": BIAS, "top k": dict(norm_topk_prob=False)},
}
"""What each family has that a patch could lose; each changes the loss."""


def _merged(base: Config, over: Config) -> dict[str, Any]:
    nested = {
        k: _merged(base[k], v) for k, v in over.items() if isinstance(v, Mapping) and k in base
    }
    return {**base, **over, **nested}


def build(model_type: str, attention: str = "eager", **over: Any) -> Any:
    """The same random weights every time, no norm's weight or eps left at what hides a fault."""
    torch.manual_seed(0)
    images = model_type in IMAGES
    base = CONFIGS[model_type] if images else TINY | CONFIGS[model_type]
    config = AutoConfig.for_model(model_type, **copy.deepcopy(_merged(base, over)))
    auto = AutoModelForImageTextToText if images else AutoModelForCausalLM
    make = MllamaForCausalLM._from_config if model_type == "mllama_text_model" else auto.from_config
    model: Any = make(config, dtype=torch.float32, attn_implementation=attention)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1 or not p.any():
                p += 0.3 * torch.randn(p.shape)
    for module in model.modules():
        for attr in ("eps", "variance_epsilon"):
            if type(vars(module).get(attr)) is float:
                setattr(module, attr, EPS)
    return model.train()


def altered(model_type: str, oddity: Oddity) -> Any:
    """The same model in another configuration, or with other parameters."""
    if isinstance(oddity, Mapping):
        model = build(model_type, **oddity)
        model.load_state_dict(build(model_type).state_dict())
        return model
    model, (pattern, change) = build(model_type), oddity
    found = [p for name, p in model.named_parameters() if re.search(pattern, name)]
    assert found, pattern
    with torch.no_grad():
        for p in found:
            p.copy_(change(p))
    return model


def batch(model: nn.Module, **kwargs: Any) -> dict[str, Tensor]:
    return sample_batch(model.config, length=LENGTH, **kwargs)
