"""LigerPlugin: what is patched when an Accelerator prepares it, and how that is taken back."""

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import liger_kernel
from liger_kernel import LigerConfig
from liger_kernel.accelerate import LigerAccelerator, LigerPlugin
from liger_kernel.transformers import apply, patch_of
from tiny import assert_same, build, state, step

USE = "ACCELERATE_USE_LIGER"


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """accelerate keeps what the first Accelerator was given."""
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


class Holder(nn.Module):
    """A user's own module around a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inside = nn.ModuleDict({"lm": model})


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=8, n_layer=1, n_head=2))


@pytest.mark.parametrize("wrap", [lambda m: m, Holder], ids=["the model", "within a module"])
def test_prepare_patches(wrap: Any) -> None:
    want, model = step(build()), build()
    accelerator = LigerAccelerator(cpu=True, liger_plugin=LigerPlugin(rope=False))
    accelerator.prepare(torch.optim.SGD(model.parameters()))
    assert patch_of(model) is None
    accelerator.prepare(wrap(model))
    patch = patch_of(model)
    assert patch is not None and patch.config == LigerConfig(rope=False)
    assert_same(step(model), want)


def test_prepare_model_alone_patches() -> None:
    accelerator = LigerAccelerator(cpu=True, liger_plugin=LigerPlugin())
    model = accelerator.prepare_model(build(), evaluation_mode=True)
    assert patch_of(model) is not None


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_under_autocast_errs_no_more_than_the_plain_run(compiled: bool) -> None:
    exact = step(build())[0].loss
    losses = []
    for plugin in (None, LigerPlugin()):
        AcceleratorState._reset_state(True)
        dynamo = dict(dynamo_backend="aot_eager") if compiled else {}
        accelerator = LigerAccelerator(
            cpu=True, mixed_precision="bf16", liger_plugin=plugin, **dynamo
        )
        model = accelerator.prepare(build())
        losses.append(step(model)[0].loss)
    theirs, ours = losses
    assert ours.dtype == torch.float32
    assert (ours - exact).abs() <= 2 * (theirs - exact).abs() + 2**-8 * exact


def test_revert_leaves_no_trace() -> None:
    model, theirs = build(), build()
    before = state(model)
    accelerator = Accelerator(cpu=True)
    attributes = dict(vars(accelerator))
    patched = apply(theirs)
    with LigerPlugin().apply(accelerator) as handle:
        accelerator.prepare_model(model)
        accelerator.prepare_model(theirs)
        assert len(handle.patches) == 1
    assert vars(accelerator).keys() == attributes.keys() and "prepare" not in vars(accelerator)
    assert patch_of(theirs) is patched  # the user's own stays
    del model._is_accelerate_prepared
    assert state(model) == before


def test_a_plugin_that_is_off_does_nothing() -> None:
    accelerator = Accelerator(cpu=True)
    with LigerPlugin().apply(accelerator) as handle:
        with LigerPlugin(use_liger=False, rope=False).apply(accelerator) as off:
            off.patch(model := build())
        assert patch_of(model) is None
        accelerator.prepare_model(model)
        assert len(handle.patches) == 1


def test_models_are_let_go() -> None:
    accelerator = LigerAccelerator(cpu=True, liger_plugin=LigerPlugin())
    model = accelerator.prepare(build())
    there = weakref.ref(model)
    accelerator.free_memory(model)
    del model
    gc.collect()
    assert there() is None


def test_revert_leaves_what_others_have_put_around_it() -> None:
    accelerator, seen = Accelerator(cpu=True), []
    first = LigerPlugin().apply(accelerator)
    ours = accelerator.prepare

    def theirs(*args: Any) -> Any:
        seen.append(args)
        return ours(*args)

    accelerator.prepare = theirs
    first.revert()
    model = accelerator.prepare(build())
    assert len(seen) == 1 and patch_of(model) is None
    with LigerPlugin().apply(accelerator) as second:
        first.revert()  # again, which is nothing
        assert LigerPlugin().apply(accelerator) is second


def test_twice_is_once_and_another_is_an_error() -> None:
    accelerator = Accelerator(cpu=True)
    handle = LigerPlugin().apply(accelerator)
    assert LigerPlugin().apply(accelerator) is handle
    with pytest.raises(ValueError, match="already patches with"):
        LigerPlugin(rope=False).apply(accelerator)
    model = build()
    apply(model, {"norm": False})
    with pytest.raises(ValueError, match="already patched with"):
        accelerator.prepare(model)


def test_nothing_to_patch_is_an_error() -> None:
    accelerator = LigerAccelerator(cpu=True, liger_plugin=LigerPlugin())
    with pytest.raises(ValueError, match="nothing to patch in Linear: there is no transformers"):
        accelerator.prepare(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"nothing to patch in GPT2.*no recipe for model type"):
        accelerator.prepare(gpt2())
    model = build()
    accelerator.prepare(model, gpt2(), nn.Linear(2, 2))  # a discriminator beside it
    assert patch_of(model) is not None
    accelerator.prepare(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="use_liger must be true or false, got 'no'"):
        LigerPlugin(use_liger="no")  # pyright: ignore
    with pytest.raises(ValueError, match="liger_plugin must be a LigerPlugin, got True"):
        LigerAccelerator(liger_plugin=True)  # pyright: ignore


@pytest.mark.parametrize(
    "value, plugin, on",
    [
        ("true", None, True),
        ("1", None, True),
        ("false", None, False),
        ("", None, False),
        (None, None, False),
        (None, LigerPlugin, True),
        ("false", LigerPlugin, False),
        ("true", lambda: LigerPlugin(use_liger=False), True),
    ],
)
def test_the_environment(
    monkeypatch: pytest.MonkeyPatch, value: str | None, plugin: Any, on: bool
) -> None:
    if value is not None:
        monkeypatch.setenv(USE, value)
    monkeypatch.setenv("LIGER_ROPE", "0")
    model = build()
    accelerator = LigerAccelerator(cpu=True, liger_plugin=plugin and plugin())
    accelerator.prepare(model)
    patch = patch_of(model)
    assert (patch is not None) == on
    if patch is not None:
        assert patch.config == LigerConfig(rope=False)
    monkeypatch.setenv(USE, "perhaps")
    with pytest.raises(ValueError, match=f"{USE} must be one of"):
        LigerPlugin()


@pytest.mark.parametrize("way", ["environment", "argument"])
def test_stock_accelerators_after_install(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    before = Accelerator.__init__
    liger_kernel.install("accelerate")
    try:
        options: dict[str, Any] = {}
        if way == "environment":
            monkeypatch.setenv(USE, "true")
        else:
            options["liger_plugin"] = LigerPlugin(rope=False)
        model = build()
        Accelerator(cpu=True, **options).prepare(model)
        assert patch_of(model) is not None
        model = build()
        LigerAccelerator(cpu=True, liger_plugin=LigerPlugin(norm=False)).prepare(model)
        patch = patch_of(model)
        assert patch is not None and not patch.config.norm
    finally:
        liger_kernel.uninstall("accelerate")
    assert Accelerator.__init__ is before
    model = build()
    Accelerator(cpu=True).prepare(model)
    assert patch_of(model) is None
