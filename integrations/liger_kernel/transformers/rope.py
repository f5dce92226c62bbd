"""liger_rotary_pos_emb, under upstream's name and with transformers' calling convention."""

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
    *,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """`apply_rotary_pos_emb` of transformers' model files, by `liger_core.rope`.

    Args:
        q, k: (B, heads, T, D) with `unsqueeze_dim` 1, (B, T, heads, D) with 2.
        cos, sin: (1 or B, T, D), already taken at the positions.
        position_ids: accepted for compatibility and without effect, as in transformers.
        unsqueeze_dim: where cos and sin would get their dimension of heads.

    Raises:
        ValueError: another `unsqueeze_dim`, or shapes that do not fit.
    """
    if unsqueeze_dim not in (1, 2):
        raise ValueError(f"unsqueeze_dim must be 1 or 2, got {unsqueeze_dim}")
    if unsqueeze_dim == 1:
        return rope(q, k, cos, sin, impl=impl)
    q, k = rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin, impl=impl)
    return q.transpose(1, 2), k.transpose(1, 2)
