"""Lightning: every way of turning the patch on, by the numbers of the run without it."""

import csv
import itertools
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import peft
import pytest
import pytorch_lightning
import torch
from lightning.fabric import Fabric
from torch import nn
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from liger_kernel.check import allowed
from liger_kernel.lightning import LigerCallback, LigerPlugin, LigerStrategy, TokenMean
from liger_kernel.transformers import LigerRMSNorm, apply, patch_of
from liger_kernel.transformers.within import models_within
from tiny import Rows, V, build, state

QUIET: dict[str, Any] = dict(
    accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
)  # fmt: skip
NAMESPACES = {"lightning": pl, "pytorch_lightning": pytorch_lightning}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:Warning"),
    pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`:Warning"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval:Warning"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used:Warning"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training:Warning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:Warning"),
]


def module(api: Any = pl, where: str = "init", **more: Any) -> Any:
    """A LightningModule of the user's, whose model is made where it is said."""

    class Module(api.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.losses: list[float] = []
            self.widths: list[int] = []
            self.grads: dict[str, torch.Tensor] = {}
            if where == "init":
                self.lm = self.make()

        def make(self) -> nn.Module:
            model = build()
            return torch.compile(model, backend="aot_eager") if more.get("compiled") else model

        def setup(self, stage: str) -> None:
            if where == "setup" and not hasattr(self, "lm"):
                self.lm = self.make()

        def configure_model(self) -> None:
            if where == "configure_model" and not hasattr(self, "lm"):
                self.lm = self.make()

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            out = self.lm(**batch, use_cache=False)
            self.losses.append(float(out.loss.detach()))
            self.widths.append(out.logits.shape[-1])
            return out.loss

        def validation_step(self, batch: Any, _: int) -> None:
            self.log("val_loss", self.lm(**batch).loss)

        test_step = validation_step

        def predict_step(self, batch: Any, _: int) -> torch.Tensor:
            return self.lm(input_ids=batch["input_ids"]).logits

        def on_before_optimizer_step(self, _: Any) -> None:
            named = self.named_parameters()
            self.grads = {n: p.grad.clone() for n, p in named if p.grad is not None}

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Module()


def rows() -> Any:
    return torch.utils.data.DataLoader(Rows(), 2)  # pyright: ignore


def fit(lm: Any, api: Any = pl, **options: Any) -> Any:
    trainer = api.Trainer(**QUIET | dict(max_steps=3) | options)
    trainer.fit(lm, rows())
    return trainer


def same(got: Any, want: Any) -> None:
    assert got.widths == [0] * len(want.widths) and set(want.widths) == {V}
    assert got.losses == pytest.approx(want.losses, rel=1e-5)
    for name, g in want.grads.items():
        error = (got.grads[name] - g).norm()
        assert error <= 2e-5 * g.norm(), f"{name}: {error:.1e} of {g.norm():.1e}"


class LigerSingleDeviceStrategy(LigerStrategy, pl.strategies.SingleDeviceStrategy):
    """The mixin on a strategy of the user's."""


WAYS: dict[str, Any] = {
    "plugin": lambda: dict(plugins=[LigerPlugin()]),
    "callback": lambda: dict(callbacks=[LigerCallback()]),
    "strategy": lambda: dict(strategy="liger_single"),
    "auto": lambda: dict(strategy="liger_auto"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("where", ["init", "setup", "configure_model"])
@pytest.mark.parametrize("name", NAMESPACES)
def test_no_number_changes(name: str, where: str, way: str) -> None:
    api = NAMESPACES[name]
    want, got = module(api, where), module(api, where)
    fit(want, api, accumulate_grad_batches=2)
    before = state(got.lm) if where == "init" else None
    fit(got, api, accumulate_grad_batches=2, **WAYS[way]())
    same(got, want)
    assert patch_of(got.lm) is None  # gone with the run
    assert before is None or state(got.lm) == before
    build().load_state_dict(got.lm.state_dict(), strict=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_precisions_err_no_more_than_the_plain_run(precision: Any, way: str) -> None:
    exact, theirs, ours = module(), module(), module()
    fit(exact)
    fit(theirs, precision=precision)
    fit(ours, precision=precision, **WAYS[way]())
    assert ours.widths == [0, 0, 0]
    for o, t, e in zip(ours.losses, theirs.losses, exact.losses, strict=True):
        assert abs(o - e) <= allowed(abs(t - e), e, torch.bfloat16)


@pytest.mark.parametrize("way", WAYS)
def test_compiled_and_fitted_twice(way: str) -> None:
    want, got = module(compiled=True), module(compiled=True)
    for _ in range(2):
        fit(want)
        fit(got, **WAYS[way]())
    same(got, want)
    assert len(want.losses) == 6


@pytest.mark.parametrize("way", WAYS)
def test_validate_test_and_predict(way: str) -> None:
    want, got = module(), module()
    plain, ours = pl.Trainer(**QUIET), pl.Trainer(**QUIET | WAYS[way]())
    for call in ("validate", "test"):
        (theirs,) = getattr(plain, call)(want, rows(), verbose=False)
        (found,) = getattr(ours, call)(got, rows(), verbose=False)
        assert found == pytest.approx(theirs, rel=1e-5)
    pairs = zip(plain.predict(want, rows()), ours.predict(got, rows()), strict=True)  # pyright: ignore
    for theirs, found in pairs:
        torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-4)


def test_inert_without_a_plugin() -> None:
    LigerPlugin()
    lm = module()
    trainer = fit(lm)
    assert set(lm.widths) == {V} and patch_of(lm.lm) is None
    assert "setup" not in vars(trainer.strategy)


class Pair(pl.LightningModule):
    """A student and a frozen teacher."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        if "teacher" in parts:
            self.teacher.requires_grad_(False)

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        self.patched = {n for n, m in self.named_children() if patch_of(m) is not None}
        return sum(p.float().square().sum() for p in self.parameters() if p.requires_grad)  # pyright: ignore

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_teacher_is_patched_or_left(frozen: bool) -> None:
    for options in (
        dict(plugins=[LigerPlugin(frozen=frozen)]),
        dict(callbacks=[LigerCallback(frozen=frozen)]),
        dict(strategy=LigerSingleDeviceStrategy(frozen=frozen)),
    ):
        lm = Pair(student=build(), teacher=build(), other=nn.Linear(2, 2))
        fit(lm, max_steps=1, **options)
        assert lm.patched == ({"student", "teacher"} if frozen else {"student"})


@pytest.mark.parametrize("way", WAYS)
def test_nothing_to_patch_is_an_error(way: str) -> None:
    with pytest.raises(ValueError, match="nothing to patch in Pair: there is no"):
        fit(Pair(other=nn.Linear(2, 2)), **WAYS[way]())
    fit(Pair(ours=LigerRMSNorm(8)), max_steps=1, **WAYS[way]())  # needs no patch


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_breaks_off_leaves_no_trace(way: str) -> None:
    lm = module()
    before = state(lm.lm)
    lm.on_before_optimizer_step = lambda _: 1 / 0
    with pytest.raises(ZeroDivisionError):
        fit(lm, **WAYS[way]())
    assert state(lm.lm) == before


def test_a_patch_of_the_users_own_stays() -> None:
    lm = module()
    patch = apply(lm.lm)
    fit(lm, callbacks=[LigerCallback()])
    assert patch_of(lm.lm) is patch
    with pytest.raises(ValueError, match="already patched with"):
        fit(lm, plugins=[LigerPlugin(rope=False)])


def test_plugin_and_callback_together(tmp_path: Path) -> None:
    lm = module()
    logger = pl.loggers.CSVLogger(tmp_path)
    fit(
        lm, plugins=[LigerPlugin()], callbacks=[LigerCallback()], logger=logger,
        log_every_n_steps=1, max_steps=4,
    )  # fmt: skip
    assert lm.widths == [0] * 4
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        found = [row for row in csv.DictReader(file) if row["liger_tokens_per_second"]]
    assert [int(row["step"]) for row in found] == [0, 1, 2, 3]
    assert all(float(row["liger_peak_memory_mib"]) > 10 for row in found)
    with pytest.raises(ValueError, match="already patched with"):
        fit(lm, plugins=[LigerPlugin(rope=False)], callbacks=[LigerCallback()])
    with pytest.raises(ValueError, match="not both"):
        LigerPlugin({"rope": False}, norm=False)


def test_batch_norm_is_not_lost() -> None:
    plugin, model = LigerPlugin(), nn.Sequential(nn.BatchNorm1d(2))
    with pytest.raises(ValueError, match="0 is a BatchNorm: say LigerPlugin"):
        plugin.apply(model)
    assert type(LigerPlugin(sync_batchnorm=False).apply(model)[0]) is nn.BatchNorm1d
    synced = LigerPlugin(sync_batchnorm=True).apply(model)
    assert type(synced[0]) is nn.SyncBatchNorm
    plain = LigerPlugin(sync_batchnorm=True).revert(synced)
    assert not isinstance(plain[0], nn.SyncBatchNorm)


def test_lora() -> None:
    def lora(model: Any) -> Any:
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)
        return peft.get_peft_model(model, config)

    want, got = module(), module()
    want.lm, got.lm = lora(want.lm), lora(got.lm)
    fit(want)
    fit(got, plugins=[LigerPlugin()])
    same(got, want)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fabric(precision: Any) -> None:
    losses = []
    for callbacks in ([], [LigerCallback()]):
        fabric = Fabric(accelerator="cpu", devices=1, precision=precision, callbacks=callbacks)
        model = build()
        wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for batch in itertools.islice(rows(), 3):
            out = wrapped(**batch, use_cache=False)
            assert (out.logits.shape[-1] == 0) == bool(callbacks)
            fabric.backward(out.loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(out.loss.detach()))
    assert losses[3:] == pytest.approx(losses[:3], rel=1e-5 if precision == "32-true" else 1e-2)


def token_means(window: int) -> tuple[list[dict[str, torch.Tensor]], Any]:
    """Gradients of the token mean over each window of batches, the last of which is cut short."""
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    grads, batches = [], list(rows())
    for at in range(0, len(batches), window):
        part = batches[at : at + window]
        total = sum((b["labels"][:, 1:] != -100).sum() for b in part)
        for b in part:
            model(**b, num_items_in_batch=total, use_cache=False).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
        optimizer.step()
        optimizer.zero_grad()
    return grads, model


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("way", ["plain", *WAYS])
def test_token_mean(way: str, window: int) -> None:
    """6 batches: a window of 4, and one of 2."""
    want, model = token_means(window)
    lm = module()
    found: list[Any] = []
    lm.on_before_optimizer_step = lambda _: found.append(
        {n.removeprefix("lm."): p.grad.clone() for n, p in lm.named_parameters()}
    )
    options = WAYS.get(way, dict)()
    options["callbacks"] = [*options.get("callbacks", []), TokenMean()]
    fit(lm, max_steps=-1, max_epochs=1, accumulate_grad_batches=window, **options)
    assert len(found) == len(want) == -(-6 // window)
    for ours, theirs in zip(found, want, strict=True):
        for name, g in theirs.items():
            assert (ours[name] - g).norm() <= 2e-5 * g.norm(), name
    for p, q in zip(lm.lm.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    assert not lm.lm._forward_pre_hooks


def test_token_mean_says_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="one transformers model to train, got 2"):
        fit(Pair(a=build(), b=build()), callbacks=[TokenMean()])
    lm = module()
    lm.automatic_optimization = False
    with pytest.raises(ValueError, match="needs automatic_optimization"):
        fit(lm, callbacks=[TokenMean()])
    lm = module()
    lm.lm = build(AutoModelForSequenceClassification, num_labels=2)
    with pytest.raises(ValueError, match="LlamaForSequenceClassification has another loss"):
        fit(lm, callbacks=[TokenMean()])
    lm = module()
    lm.lm = build(model_type="mixtral", output_router_logits=True, num_local_experts=2)
    with pytest.raises(ValueError, match="a loss of its routers"):
        fit(lm, callbacks=[TokenMean()])
    lm = module()
    lm.training_step = lambda batch: lm.lm(batch["input_ids"]).logits.square().mean()
    with pytest.raises(ValueError, match="has seen no labels"):
        fit(lm, callbacks=[TokenMean()])


def mean_of(part: list[Any], model: Any) -> dict[str, torch.Tensor]:
    """The gradient of the token mean over some batches."""
    total = sum((b["labels"][:, 1:] != -100).sum() for b in part)
    for b in part:
        model(**b, num_items_in_batch=total, use_cache=False).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
@pytest.mark.parametrize("out", [(), (1,)], ids=["all", "one left out"])
def test_token_mean_of_windows_that_change_and_batches_left_out(out: tuple[int, ...]) -> None:
    lm, model, found = module(), build(), list[Any]()
    step, optimizer = lm.training_step, torch.optim.SGD(model.parameters(), lr=0.1)
    lm.training_step = lambda batch, batch_idx: None if batch_idx in out else step(batch, 0)
    lm.on_before_optimizer_step = lambda _: found.append(
        {n.removeprefix("lm."): p.grad.clone() for n, p in lm.named_parameters()}
    )
    first = 1 if out else 0  # with a batch left out, windows of one would step with no gradient
    windows = pl.callbacks.GradientAccumulationScheduler({0: 3} if out else {0: 1, 1: 3})
    fit(
        lm, max_steps=-1, max_epochs=2 - first, callbacks=[windows, TokenMean()],
        limit_train_batches=3,
    )  # fmt: skip
    kept = [b for at, b in enumerate(list(rows())[:3]) if at not in out]
    parts = [kept] if out else [*([b] for b in kept), kept]
    assert len(found) == len(parts)
    for ours, part in zip(found, parts, strict=True):
        for name, g in mean_of(part, model).items():
            assert (ours[name] - g).norm() <= 2e-5 * g.norm(), name
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("way", WAYS)
def test_a_model_in_eval_mode_is_said(way: str) -> None:
    lm = module()
    lm.lm.eval()  # as from_pretrained leaves it
    with pytest.warns(UserWarning, match="the model is in eval mode, as from_pretrained"):
        fit(lm, **WAYS[way]())


def test_what_goes_to_other_processes_can() -> None:
    registered = pl.strategies.StrategyRegistry.get("liger_single")
    for thing in (LigerCallback(), LigerPlugin(), registered, LigerSingleDeviceStrategy()):
        again, lm = pickle.loads(pickle.dumps(thing)), module()
        kind = "strategy" if isinstance(again, LigerStrategy) else "callbacks"
        fit(lm, **{"plugins" if isinstance(again, LigerPlugin) else kind: again})
        assert lm.widths == [0, 0, 0] and patch_of(lm.lm) is None


class Inside(pl.Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.patched = patch_of(pl_module.mine.inner) is not None


def test_models_that_are_met_twice_or_within_others() -> None:
    class Mine(PreTrainedModel):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__(PretrainedConfig())
            self.inner = inner

    lm = Pair(student=build())
    lm.again = nn.ModuleList([lm.student])
    assert list(models_within(lm)) == [lm.student]
    lm = Pair(mine=Mine(build()))
    fit(lm, max_steps=1, callbacks=[check := Inside(), LigerCallback()])
    assert check.patched


def test_a_search_for_the_learning_rate_leaves_no_trace(tmp_path: Path) -> None:
    for options in (dict(callbacks=[LigerCallback()]), dict(plugins=[LigerPlugin()])):
        lm = module()
        before = state(lm.lm)
        lm.on_before_optimizer_step = lambda _: 1 / 0
        lm.lr = 0.1
        trainer = pl.Trainer(**QUIET, max_epochs=1, default_root_dir=tmp_path, **options)  # pyright: ignore
        with pytest.raises(ZeroDivisionError):
            pl.tuner.Tuner(trainer).lr_find(lm, rows(), num_training=3)
        assert state(lm.lm) == before and "setup" not in vars(trainer.strategy)


def test_one_callback_for_two_runs(tmp_path: Path) -> None:
    callbacks = [LigerCallback()]
    fit(module(), callbacks=callbacks, plugins=[LigerPlugin()])
    with pytest.raises(ValueError, match="nothing to patch"):
        fit(Pair(other=nn.Linear(2, 2)), callbacks=callbacks)
    logger = pl.loggers.CSVLogger(tmp_path)
    trainer = fit(module(), callbacks=callbacks, logger=logger, log_every_n_steps=0)
    assert "setup" not in vars(trainer.strategy)
