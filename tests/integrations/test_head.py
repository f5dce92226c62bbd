"""The head that computes its loss: every way of giving labels, in training and evaluation."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from liger_kernel.transformers import apply
from numerics import assert_errs_no_more
from tiny import V, assert_same, batch, build, step


def shifted() -> torch.Tensor:
    return F.pad(batch()[1], (0, 1), value=-100)[:, 1:].contiguous()


@pytest.mark.parametrize("total", [None, 14, 13.5, torch.tensor(13), torch.tensor(13.5)], ids=str)
def test_every_kind_of_token_count(total: Any) -> None:
    model = build()
    want = step(model, num_items_in_batch=total)
    apply(model)
    assert_same(step(model, num_items_in_batch=total), want)


def test_four_uneven_micro_batches_are_one_batch() -> None:
    model = build()
    ids = torch.randint(3, V, (4, 33), generator=torch.Generator().manual_seed(0))
    labels = ids.where(torch.arange(33) >= torch.tensor([[26], [0], [20], [31]]), -100)
    n = (labels[:, 1:] != -100).sum()
    model(input_ids=ids, labels=labels).loss.backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    apply(model)
    for row in range(4):
        model(
            input_ids=ids[row, None], labels=labels[row, None], num_items_in_batch=n
        ).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, want[name], rtol=1e-5, atol=1e-6)


def test_shift_labels_win_and_need_no_labels() -> None:
    model = build()
    want = step(model)
    apply(model)
    assert_same(step(model, labels=torch.zeros_like(batch()[1]), shift_labels=shifted()), want)
    assert_same(step(model, labels=None, shift_labels=shifted()), want)


def test_positional_labels() -> None:
    model = build()
    want = step(model)
    apply(model)
    ids, labels = batch()
    out = model(ids, None, None, None, None, labels)
    assert out.logits.shape[-1] == 0
    torch.testing.assert_close(out.loss, want[0].loss)


@pytest.mark.filterwarnings("ignore:lm_head makes full logits, with a gradient:UserWarning")
def test_who_gets_logits() -> None:
    model = build().eval()
    ids, labels = batch()
    want = model(input_ids=ids, labels=labels)
    apply(model, dict(rope=False, norm=False, mlp=False))
    got = model(input_ids=ids, labels=labels)
    assert torch.equal(got.logits, want.logits) and torch.equal(got.loss, want.loss)
    with torch.no_grad():
        lean = model(input_ids=ids, labels=labels, skip_logits=True)
    assert lean.logits.shape == (*ids.shape, 0)
    torch.testing.assert_close(lean.loss, want.loss)
    assert model(input_ids=ids, skip_logits=True).logits.shape[-1] == V  # there is no loss instead
    model.train()
    assert model(input_ids=ids, labels=labels, skip_logits=False).logits.shape[-1] == V
    assert model(input_ids=ids).logits.shape[-1] == V


@pytest.mark.parametrize("keep", [4, torch.tensor([1, 5, 6])], ids=["int", "indices"])
def test_logits_to_keep_with_as_many_labels(keep: Any) -> None:
    model = build()
    _, labels = batch()
    n = keep if isinstance(keep, int) else len(keep)
    kwargs = dict(labels=labels[:, -n:], logits_to_keep=keep)
    want = step(model, **kwargs)
    apply(model)
    assert_same(step(model, **kwargs), want)
    with pytest.raises(ValueError, match=r"labels must have shape \(2, \d\)"):
        step(model, logits_to_keep=keep)
    assert_same(step(model, **kwargs), want)  # nothing is left over from the call that raised


def test_a_label_out_of_range_is_named_and_nothing_is_lost() -> None:
    model = build()
    want = step(model)
    apply(model)
    _ids, labels = batch()
    labels[1, 8] = V
    with pytest.raises(ValueError, match=rf"in \[0, {V}\).*got {V}"):
        step(model, labels=labels)
    assert_same(step(model), want)


def test_all_labels_ignored_is_zero_not_nan() -> None:
    model = build()
    apply(model)
    out, grads = step(model, labels=torch.full((2, 9), -100))
    assert out.loss == 0 and all(not g.any() for g in grads.values())


def test_two_calls_before_one_backward() -> None:
    model = build()
    ids, labels = batch()

    def loss() -> torch.Tensor:
        return sum(
            model(input_ids=i[None], labels=y[None]).loss for i, y in zip(ids, labels, strict=True)
        )

    model.zero_grad()
    loss().backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters()}
    apply(model)
    model.zero_grad()
    loss().backward()
    torch.testing.assert_close({n: p.grad for n, p in model.named_parameters()}, want)


def test_the_loss_of_full_logits_can_be_ours() -> None:
    model = build()
    want = step(model, num_items_in_batch=torch.tensor(13))
    patch = apply(model, dict(fused_head=False, cross_entropy=True))
    assert "cross entropy" in str(patch)
    assert_same(step(model, num_items_in_batch=torch.tensor(13)), want, width=V)
    assert_same(step(model, num_items_in_batch=13, shift_labels=shifted()), want, width=V)


def test_a_frozen_head_and_a_frozen_model() -> None:
    model = build()
    model.lm_head.requires_grad_(False)
    want = step(model)
    apply(model)
    assert_same(step(model), want)
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    assert set(step(model)[1]) == {"lm_head.weight"}
    torch.testing.assert_close(step(model)[1]["lm_head.weight"], step(build())[1]["lm_head.weight"])


def test_a_biased_head() -> None:
    model = build()
    model.lm_head.bias = torch.nn.Parameter(
        torch.randn(V, generator=torch.Generator().manual_seed(0))
    )
    want = step(model)
    apply(model)
    assert_same(step(model), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_errs_no_more_than_the_model(dtype: torch.dtype) -> None:
    model = build()
    exact = step(model)[1]

    def cast() -> Any:
        with torch.autocast("cpu", dtype):
            return step(model)

    theirs = cast()[1]
    apply(model)
    out, ours = cast()
    assert out.logits.shape[-1] == 0 and out.loss.dtype == torch.float32
    assert_errs_no_more(ours, theirs, exact, dtype)


def test_a_head_wrapped_later_is_said() -> None:
    model = build()
    apply(model)
    want = step(build())
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.warns(UserWarning, match="full logits are made"):
        got = step(model)
    torch.testing.assert_close(got[0].loss, want[0].loss)
