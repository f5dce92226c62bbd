"""Tiny random models, one batch, one training step: what the integration tests share."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from liger_kernel.transformers import patch_of
from liger_kernel.transformers.head import noted

V = 97
TINY = dict(
    vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    rms_norm_eps=0.1, initializer_range=0.3,  # at 0.02 neither attention nor activations matter
)  # fmt: skip


def build(auto: Any = AutoModelForCausalLM, **config: Any) -> Any:
    """The same random weights every time; attention that is exact to compare."""
    torch.manual_seed(0)
    settings = AutoConfig.for_model(config.pop("model_type", "llama"), **TINY | config)
    return auto.from_config(settings, dtype=torch.float32, attn_implementation="eager").train()


def batch() -> tuple[Tensor, Tensor]:
    """(2, 9) ids, and labels of which 3 + 6 are scored after the shift."""
    ids = torch.arange(18).view(2, 9) % (V - 3) + 3
    keep = torch.arange(9) >= torch.tensor([[6], [3]])
    return ids, ids.where(keep, -100)


class Rows(torch.utils.data.Dataset):
    """Uneven numbers of scored labels, so that a wrong normaliser shows."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = torch.randint(3, V, (16,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids.where(torch.arange(16) > i, -100)}


def fused(model: Any) -> bool:
    """Whether the model is patched, and its head has never made full logits with a gradient."""
    found = noted(model.get_output_embeddings())
    return patch_of(model) is not None and found is not None and not found[1].unfused


def step(model: nn.Module, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
    """Outputs and gradients of one step whose loss is multiplied by 3."""
    model.zero_grad()
    ids, labels = batch()
    out = model(**dict(input_ids=ids, labels=labels, use_cache=False) | kwargs)
    (out.loss * 3).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return out, {n.removeprefix("_orig_mod."): g for n, g in grads.items()}


def assert_same(got: Any, want: Any, width: int = 0) -> None:
    """Equal loss and gradients, and logits of the width expected: 0 where the head is fused."""
    assert got[0].logits.shape[-1] == width
    torch.testing.assert_close(got[0].loss, want[0].loss)
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        error = (got[1][name] - gradient).norm()
        assert error <= 1e-5 * gradient.norm(), f"{name}: {error:.1e} of {gradient.norm():.1e}"


def state(model: nn.Module) -> list[Any]:
    """Attributes, hooks and classes of all modules: what a patch may leave behind."""
    return [
        (set(vars(m)), set(m._forward_pre_hooks), set(m._forward_hooks), type(m))
        for m in model.modules()
    ]
