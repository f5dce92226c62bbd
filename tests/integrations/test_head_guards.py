"""The head computes a loss before the model asks for it: what makes that another one is said."""

import copy
from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutput

from liger_kernel.transformers import apply, recipes
from tiny import V, assert_same, batch, build, step


def of(model: Any, fn: Callable[..., Tensor], loss: Callable[..., Tensor] | None = None) -> Any:
    """The model with another forward: fn of the logits, `loss` of model, logits and labels."""

    class Own(type(model)):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
            logits = fn(self.lm_head(self.model(input_ids)[0]))
            if labels is None:
                return CausalLMOutput(logits=logits)  # pyright: ignore
            if loss is not None:
                value = loss(self, logits, labels)
            else:
                value = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
            return CausalLMOutput(loss=value, logits=logits)  # pyright: ignore

    model.__class__ = Own
    return model


class Quarter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x / 4

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy / 4


def masked(logits: Tensor) -> Tensor:
    logits[..., 5:9] = -1e4
    return logits


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "product": lambda z: z * 0.25,
    "in place": lambda z: z.mul_(0.25),
    "clamp": lambda z: z.clamp(-1, 1),
    "assignment": masked,
    "cast and product": lambda z: z.double() * 0.25,
    "Function": Quarter.apply,  # pyright: ignore
}


@pytest.mark.parametrize("generic", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_logits(change: str, generic: bool, monkeypatch: Any) -> None:
    if generic:
        monkeypatch.delitem(recipes.RECIPES, "llama")
    model = of(build(), CHANGES[change])
    apply(model, dict(generic=True))
    with pytest.raises(RuntimeError, match=r"Own changes the logits .*fused_head=False"):
        step(model)
    torch.testing.assert_close(  # with logits it is the model's own
        model(batch()[0], labels=batch()[1], skip_logits=False).loss,
        of(build(), CHANGES[change])(batch()[0], labels=batch()[1]).loss,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_harmless_changes_of_a_family_without_a_recipe(
    dtype: torch.dtype, monkeypatch: Any
) -> None:
    monkeypatch.delitem(recipes.RECIPES, "llama")
    model = of(build(), lambda z: z.to(dtype)[None].squeeze(0).view(z.shape))
    want = step(model)
    apply(model, dict(generic=True))
    assert_same(step(model), want)


def test_where_nobody_can_tell_a_family_without_a_recipe_is_refused() -> None:
    model = build(model_type="cohere", logit_scale=0.25, layer_norm_eps=0.1).eval()
    apply(model, dict(generic=True))
    inputs = dict(zip(("input_ids", "labels"), batch(), strict=True))
    with torch.no_grad(), pytest.raises(RuntimeError, match="a step in eager mode first"):
        model(**inputs, skip_logits=True)
    model.train()
    torch._dynamo.reset()
    with pytest.raises(Exception, match="a step in eager mode first"):
        torch.compile(model, backend="eager", fullgraph=True)(**inputs)


def test_a_family_without_a_recipe_after_a_step_in_eager_mode() -> None:
    model = build(model_type="stablelm", hidden_act="silu", layer_norm_eps=0.1)
    want = step(model)
    apply(model, dict(generic=True))
    assert_same(step(model), want)
    torch._dynamo.reset()
    assert_same(step(torch.compile(model, backend="eager")), want)
    with torch.no_grad():
        out = model.eval()(input_ids=batch()[0], labels=batch()[1], skip_logits=True)
    torch.testing.assert_close(out.loss, want[0].loss)


@pytest.mark.parametrize("hook", [lambda m, a, out: out * 3, lambda m, a, out: out.mul_(3)])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "granite"])
def test_a_hook_that_changes_the_heads_output(model_type: str, hook: Any) -> None:
    model = build(model_type=model_type)
    apply(model)
    step(model)
    model.lm_head.register_forward_hook(hook)
    with pytest.raises(RuntimeError, match="changes the logits after its head"):
        step(model)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "labels that are not shifted": lambda m, z, y: m.loss_function(z, None, V, shift_labels=y),
    "other labels": lambda m, z, y: m.loss_function(z, y.clamp_min(3), V),
    "another ignored label": lambda m, z, y: m.loss_function(z, y, V, ignore_index=3),
    "another count": lambda m, z, y: m.loss_function(z, y, V, torch.tensor(3)),
    "other classes": lambda m, z, y: m.loss_function(z, y, V - 1),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_another_loss_than_was_computed(loss: str) -> None:
    model = of(build(), lambda z: z, LOSSES[loss])
    apply(model)
    with pytest.raises(RuntimeError, match=r"Own .*which its fused head does not know of"):
        step(model)


@pytest.mark.parametrize("loss", list(LOSSES)[:2])
def test_another_loss_without_the_fused_head(loss: str) -> None:
    model = of(build(), lambda z: z, LOSSES[loss])
    want = step(model)
    assert (want[0].loss - step(build())[0].loss).abs() > 1e-3
    apply(model, dict(fused_head=False))
    assert_same(step(model), want, V)


def test_labels_that_are_equal_are_the_same() -> None:
    model = of(build(), lambda z: z, lambda m, z, y: m.loss_function(z, y.clone(), V))
    want = step(model)
    apply(model)
    assert_same(step(model), want)


@pytest.mark.parametrize("config", [{}, dict(fused_head=False, cross_entropy=True)], ids=str)
def test_an_ignored_label_of_the_callers(config: Any) -> None:
    labels = batch()[1]
    inputs = dict(labels=labels.where(labels >= 0, 7), ignore_index=7)
    model = build()
    want = step(model, **inputs)
    torch.testing.assert_close(want[0].loss, step(model)[0].loss)
    apply(model, config)
    assert_same(step(model, **inputs), want, V if config else 0)


def test_a_loss_of_the_users_own() -> None:
    def twice(*args: Any, **kwargs: Any) -> Tensor:
        return 2 * ForCausalLMLoss(*args, **kwargs)

    model = build()
    want = step(model)
    model.loss_function = wraps(ForCausalLMLoss)(twice)
    patch = apply(model)
    assert "not transformers' ForCausalLMLoss" in patch.left["fused_head"]
    torch.testing.assert_close(step(model)[0].loss, 2 * want[0].loss)
    patch.revert()
    del model._loss_function
    apply(model)
    model.loss_function = twice
    with pytest.warns(UserWarning, match="set after the model was patched"):
        got = step(model)
    torch.testing.assert_close(got[0].loss, 2 * want[0].loss)


@pytest.mark.parametrize(
    "model_type, name, value",
    [("granite", "logits_scaling", 3.0), ("gemma2", "final_logit_softcapping", None)],
)
def test_a_configuration_that_is_replaced_later(model_type: str, name: str, value: Any) -> None:
    model, plain = build(model_type=model_type), build(model_type=model_type)
    apply(model)
    before = step(model)
    for m in (model, plain):
        m.config = copy.deepcopy(m.config)
        setattr(m.config, name, value)
    want = step(plain)
    assert (want[0].loss - before[0].loss).abs() > 1e-4
    assert_same(step(model), want)


def test_two_models_with_one_head() -> None:
    llama, granite = build(), build(model_type="granite", logits_scaling=0.3)
    granite.lm_head = llama.lm_head
    want = step(llama), step(granite)
    apply(llama)
    apply(granite)
    assert_same(step(llama), want[0])
    assert_same(step(granite), want[1])


@pytest.mark.parametrize("where", ["norm", "lm_head"])
def test_nothing_is_left_of_a_call_that_raised(where: str) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    model = build()
    apply(model)
    module = model.lm_head if where == "lm_head" else model.model.norm
    hook = module.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        step(model)
    hook.remove()
    ids, labels = batch()
    assert model.forward(input_ids=ids).logits.shape[-1] == V
    logits = build()(input_ids=ids).logits
    want = ForCausalLMLoss(logits, labels, V)
    torch.testing.assert_close(model.loss_function(logits, labels, V), want)


def test_a_head_that_is_gone_or_another() -> None:
    model, want = build(), step(build())
    apply(model)
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)
    with pytest.warns(UserWarning, match="full logits are made"):
        torch.testing.assert_close(step(model)[0].loss, want[0].loss)
    model.lm_head = nn.Linear(32, V, bias=False)
    assert step(model)[0].logits.shape[-1] == 0
    assert isinstance(model, LlamaForCausalLM)


def test_a_head_whose_forward_is_wrapped_is_left() -> None:
    """As transformers' tensor parallelism does, within which the weight is a part of itself."""
    model = build()
    original = model.lm_head.forward
    model.lm_head.forward = lambda x: original(x) * 1
    want = step(model)
    assert "is around its forward" in apply(model).left["fused_head"]
    assert_same(step(model), want, V)


def test_a_head_that_is_checkpointed_is_left() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    want, model = step(build()), build()
    model.lm_head = checkpoint_wrapper(model.lm_head)
    assert "more than a matrix product" in apply(model).left["fused_head"]
    loss = step(model)[0].loss
    torch.testing.assert_close(loss, want[0].loss)
