"""A random model and a random batch of any family, made from a configuration alone.

Vision-language families get images: what stands for one in the text, and what the model sees of it.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["sample_batch", "sample_model"]

IGNORED = -100
SPECIAL = ("pad", "bos", "eos", "image", "video", "boi", "eoi", "vision_start", "vision_end")
LEADS = 3  # rows in turn have one to three tokens before their image


@dataclass(frozen=True, slots=True)
class Images:
    """One image a row."""

    block: list[int]  # the tokens that stand for it
    inputs: dict[str, Tensor]
    placed: Callable[[Tensor], dict[str, Tensor]]  # from where the image tokens are


Noise = Callable[..., Tensor]


def _gemma3(config: Any, batch: int, noise: Noise) -> Images:
    vision, tokens = config.vision_config, [config.image_token_id] * config.mm_tokens_per_image
    pixels = noise(batch, vision.num_channels, vision.image_size, vision.image_size)
    return Images(
        [config.boi_token_id, *tokens, config.eoi_token_id],
        {"pixel_values": pixels},
        lambda here: {"token_type_ids": here.long()},
    )


def _mllama(config: Any, batch: int, noise: Noise) -> Images:
    vision, size = config.vision_config, config.vision_config.image_size
    ratios = vision.supported_aspect_ratios
    kinds = [(row + 1) % len(ratios) for row in range(batch)]
    used = torch.tensor([ratios[kind] for kind in kinds]).prod(1)
    tiles = torch.arange(vision.max_num_tiles) < used[:, None]
    pixels = noise(batch, 1, vision.max_num_tiles, vision.num_channels, size, size)
    return Images(
        [config.image_token_id],
        {
            "pixel_values": pixels * tiles[:, None, :, None, None, None],
            "aspect_ratio_ids": torch.tensor(kinds)[:, None] + 1,  # 0: no image
            "aspect_ratio_mask": tiles[:, None].long(),
        },
        lambda here: {
            "cross_attention_mask": (here.cumsum(1)[..., None] * tiles[:, None]).long()[:, :, None]
        },
    )


def _qwen2_vl(config: Any, batch: int, noise: Noise) -> Images:
    vision, merge = config.vision_config, config.vision_config.spatial_merge_size
    # In merged patches: more than a window, where there are any, and no square.
    side = getattr(vision, "window_size", 0) // (vision.patch_size * merge) or 2
    sides = [(side + 1, side) if row % 2 else (side, side + 1) for row in range(batch)]
    grid = torch.tensor([(1, h * merge, w * merge) for h, w in sides])
    pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    tokens = [config.image_token_id] * (side * (side + 1))
    return Images(
        [config.vision_start_token_id, *tokens, config.vision_end_token_id],
        {"pixel_values": noise(int(grid.prod(1).sum()), pixels), "image_grid_thw": grid},
        lambda here: {"mm_token_type_ids": here.int()},
    )


IMAGES: dict[str, Callable[[Any, int, Noise], Images]] = {
    "gemma3": _gemma3,
    "mllama": _mllama,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_vl,
}


def sample_model(
    config: Any,
    *,
    layers: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Any:
    """A model with random weights, the same every time, in which no part is without effect.

    Args:
        config: of a transformers model with a language-model head, with a tower or without; not
            changed.
        layers: how many layers of the language model to keep; None for all.
        dtype, device: of the parameters, which are made there.

    Raises:
        ValueError: more layers than there are.
    """
    config = cut(config, layers)
    torch.manual_seed(0)
    with torch.device(device), torch.no_grad():
        model: Any = auto_class(config).from_config(config, dtype=dtype)
        for p in model.parameters():
            if p.ndim < 2:  # norms at 1, biases and gates at 0 would hide what goes wrong with them
                p += 0.1 * torch.randn_like(p)
    return model


def auto_class(config: Any) -> Any:
    """transformers' AutoModel for a configuration with a language-model head."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    vision = getattr(config, "vision_config", None) is not None
    return AutoModelForImageTextToText if vision else AutoModelForCausalLM


def cut(config: Any, layers: int | None) -> Any:
    """A copy with so many layers of the language model, the last of them one that sees all."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    if layers is None:
        return config
    if layers > text.num_hidden_layers:
        raise ValueError(f"layers={layers}, but the model has {text.num_hidden_layers}")
    text.num_hidden_layers = layers
    if kinds := getattr(text, "layer_types", None):
        full = kinds.index("full_attention") + 1 if "full_attention" in kinds else layers
        text.layer_types = kinds[max(full, layers) - layers : max(full, layers)]
    if (crossed := getattr(text, "cross_attention_layers", None)) is not None:
        text.cross_attention_layers = [i for i in crossed if i < layers]
    return config


def sample_batch(
    config: Any,
    batch: int = 2,
    length: int = 512,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    images: bool = True,
) -> dict[str, Tensor]:
    """What the model's forward takes: random tokens, labels after a prompt, and images.

    Args:
        config: of a transformers model.
        batch: rows, each with a prompt of another length, and one image in it.
        length: tokens a row, those of the image included.
        seed: the same numbers every time, on any device.
        device: of all tensors.
        dtype: of the pixels.
        images: whether a vision-language model gets any.

    Raises:
        ValueError: rows are too short for the image and a token to predict.
    """
    rng = torch.Generator().manual_seed(seed)
    text = config.get_text_config()
    family = IMAGES.get(config.model_type) if images else None
    seen = (
        family(config, batch, lambda *shape: torch.randn(shape, generator=rng)) if family else None
    )
    block = seen.block if seen else []
    if length < (least := LEADS + len(block) + 2):
        why = f", of which an image takes {len(block)}; or pass images=False" if block else ""
        raise ValueError(
            f"length={length} is too short for {config.model_type}: a row needs {least} tokens{why}"
        )
    words = torch.tensor(sorted(set(range(text.vocab_size)) - _special(config) - _special(text)))
    ids = words[torch.randint(len(words), (batch, length), generator=rng)]
    prompt = torch.empty(batch, 1, dtype=torch.long)
    for row in range(batch):
        lead = 1 + row % LEADS
        end = lead + len(block)
        ids[row, lead:end] = torch.tensor(block, dtype=torch.long)
        prompt[row] = end + (length - end) * (row + 1) // (batch + 2)
    labels = ids.where(torch.arange(length) >= prompt, IGNORED)
    out = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if seen:
        out |= seen.inputs | seen.placed(ids == config.image_token_id)
    return {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in out.items()}


def _special(config: Any) -> set[int]:
    """Tokens that mean something to the model, and which random text must not hold."""
    ids = [getattr(config, f"{name}_token_id", None) for name in SPECIAL]
    return {
        i for found in ids for i in (found if isinstance(found, list) else [found]) if i is not None
    }
