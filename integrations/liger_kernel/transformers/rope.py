"""Rotary embeddings under upstream's names and with transformers' calling conventions."""

import torch
from torch import Tensor

from liger_core import rope
from liger_core.dispatch import Impl


def liger_rotary_pos_emb(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    unsqueeze_dim: int = 1,
    rotary_dim: int | None = None,
    *,
    interleaved: bool = False,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """`apply_rotary_pos_emb` of transformers' model files, by `liger_core.rope`.

    Args:
        q, k: (B, heads, T, D) with `unsqueeze_dim` 1, (B, T, heads, D) with 2.
        cos, sin: (1 or B, T, R), already taken at the positions; dimensions from R on pass through.
        position_ids: accepted for compatibility and without effect, as in transformers.
        unsqueeze_dim: where cos and sin would get their dimension of heads.
        rotary_dim: R, where it is to be checked. Wider angles are not cut: in the half layout the
            first so many of them are those of no rotation.
        interleaved: the pairs of GLM-4; see `liger_core.rope`.

    Raises:
        ValueError: another `unsqueeze_dim` or `rotary_dim`, or shapes that do not fit.
    """
    if unsqueeze_dim not in (1, 2):
        raise ValueError(f"unsqueeze_dim must be 1 or 2, got {unsqueeze_dim}")
    if rotary_dim not in (None, cos.shape[-1]):
        raise ValueError(f"cos and sin must hold rotary_dim = {rotary_dim}, got {cos.shape[-1]}")
    if unsqueeze_dim == 1:
        return rope(q, k, cos, sin, interleaved=interleaved, impl=impl)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    q, k = rope(q, k, cos, sin, interleaved=interleaved, impl=impl)
    return q.transpose(1, 2), k.transpose(1, 2)


def liger_multimodal_rotary_pos_emb(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    mrope_section: list[int],
    unsqueeze_dim: int = 1,
    *,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """`apply_multimodal_rotary_pos_emb` of Qwen2-VL, which transformers had until 5.16.

    Args:
        q, k, unsqueeze_dim: as of `liger_rotary_pos_emb`.
        cos, sin: (3, B, T, D), by time, height and width.
        mrope_section: how many of D / 2 angles come from each of the three.
    """
    cos, sin = (
        torch.cat([part[i % 3] for i, part in enumerate(t.split(mrope_section * 2, -1))], -1)
        for t in (cos, sin)
    )
    return liger_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim, impl=impl)


def liger_rotary_pos_emb_vision(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """`apply_rotary_pos_emb_vision` of Qwen2-VL and its kin, by `liger_core.rope`.

    Args:
        q, k: (S, heads, D), any float dtype. cos, sin: (S, D), usually fp32.
    """
    q, k = q.transpose(0, 1)[None], k.transpose(0, 1)[None]
    q, k = rope(q, k, cos[None], sin[None], impl=impl)
    return q[0].transpose(0, 1), k[0].transpose(0, 1)
