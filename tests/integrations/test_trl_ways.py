"""The ways to ask for `use_liger_loss`, what is left when nobody does, and what is refused."""

# What trl's own __init__ names, it loads lazily.
# pyright: reportPrivateImportUsage=false

import dataclasses
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import trl
from torch import nn
from transformers import AutoModelForSeq2SeqLM, HfArgumentParser, T5Config

import families
import liger_kernel
from liger_core.losses import DPO, KTO, ORPO
from liger_core.losses.linear import PairShare
from liger_kernel.transformers import apply, patch_of
from liger_kernel.transformers.sample import sample_batch
from liger_kernel.trl import LigerLoss, LigerLossArguments, concatenated, head, known
from preferences import (
    Run,
    assert_parity,
    both,
    data_of,
    foreseen,
    needed,
    pairs,
    run,
    trainer_of,
)
from tiny import TINY, build, state

NAMES = ["DPO", "KTO", "ORPO", "CPO", "SFT", "GRPO", "RLOO"]
SAMPLED = dict(num_generations=4, max_completion_length=6)


def options_of(name: str, **options: Any) -> dict[str, Any]:
    sampled = SAMPLED if name in ("GRPO", "RLOO") else {}
    return {"learning_rate": 1e-3, **sampled, **options}


def make(folder: Path) -> Any:
    """A model that says where RLOO finds its reference."""
    model = build()
    model.save_pretrained(folder / "model")
    model.config._name_or_path = str(folder / "model")
    return model


def stock(name: str, folder: Path, ours: bool | None = None, **options: Any) -> Run:
    """A run of TRL's own classes, whatever has been done to them."""
    asked = {} if ours is None else {"use_liger_loss": ours}
    return run(
        *trainer_of(name), folder, data_of(name), model=make(folder), given=needed(name, build()),
        **options_of(name, **asked, **options),
    )  # fmt: skip


def assert_same_bits(got: Run, want: Run) -> None:
    for a, b in zip(got[2], want[2], strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[n], g) for n, g in b.items())
    assert vars(got[0]).keys() == vars(want[0]).keys()
    assert state(got[0].model) == state(want[0].model)


@dataclasses.dataclass
class OwnConfig(LigerLossArguments, trl.DPOConfig):
    mine: int = 3


class Own(LigerLoss, trl.DPOTrainer):
    """Somebody's subclass."""


def test_ones_own_subclass(tmp_path: Path) -> None:
    plain = stock("DPO", tmp_path)
    ours = run(
        OwnConfig, Own, tmp_path, pairs(), given=needed("DPO", build()), learning_rate=1e-3,
        use_liger_loss=True, mine=4,
    )  # fmt: skip
    assert_parity(plain, ours)
    assert foreseen(ours) == 3


CACHES = {"__doc__", "__slotnames__"}  # Python's own


def facts() -> dict[str, dict[str, Any]]:
    classes = {c for name in NAMES for own in trainer_of(name) for c in own.__mro__}
    return {
        f"{c.__module__}.{c.__name__}": {k: v for k, v in vars(c).items() if k not in CACHES}
        for c in classes
        if c.__module__.startswith("trl.")
    }


@pytest.fixture
def installed() -> Iterator[None]:
    before = facts()
    liger_kernel.install("trl")
    yield
    liger_kernel.uninstall("trl")
    after = facts()
    assert after.keys() == before.keys()
    for name, own in before.items():
        assert after[name] == own, name
    with pytest.raises(TypeError, match="use_liger_loss"):
        trl.DPOConfig(output_dir="x", use_liger_loss=True)  # pyright: ignore


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", NAMES)
def test_stock_classes(name: str, tmp_path: Path) -> None:
    plain, ours = stock(name, tmp_path), stock(name, tmp_path, ours=True)
    assert not hasattr(plain[0], "_liger")
    assert not any(patch_of(m) for m in (plain[0].model,))
    assert_parity(plain, ours)
    assert foreseen(ours) == (3 if name in ("DPO", "KTO", "ORPO", "CPO") else 0)


@pytest.mark.usefixtures("installed")
def test_a_subclass_of_a_stock_class(tmp_path: Path) -> None:
    class Mine(trl.DPOTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.mine = True

    given: dict[str, Any] = dict(learning_rate=1e-3)
    it = run(
        trl.DPOConfig, Mine, tmp_path, pairs(), given=needed("DPO", build()), use_liger_loss=True,
        **given,
    )  # fmt: skip
    assert it[0].mine and foreseen(it) == 3
    assert_parity(stock("DPO", tmp_path), it)


LATER = """
import sys, warnings
import liger_kernel
liger_kernel.install("trl")
warnings.simplefilter("ignore")
assert "trl.experimental.orpo" not in sys.modules
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from preferences import foreseen, pairs, run
from pathlib import Path
it = run(ORPOConfig, ORPOTrainer, Path(sys.argv[1]), pairs(), use_liger_loss=True)
assert foreseen(it) == 3
liger_kernel.uninstall("trl")
assert "__init__" in vars(ORPOTrainer) and not hasattr(ORPOTrainer.__init__, "__wrapped__")
"""


def test_trainers_that_are_imported_later(tmp_path: Path) -> None:
    code = f"import sys; sys.path[:] = {sys.path!r}\n{LATER}"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", ["DPO", "KTO", "ORPO", "SFT"])
@pytest.mark.parametrize("way", ["not asked", "LIGER_DISABLE"])
def test_inert(name: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "LIGER_DISABLE":
        monkeypatch.setenv("LIGER_DISABLE", "1")
    asked = {"use_liger_loss": way == "LIGER_DISABLE"}
    plain, ours = both(name, tmp_path, liger=asked)
    assert_same_bits(ours, plain)


@pytest.mark.parametrize("name", NAMES)
def test_revert(name: str, tmp_path: Path) -> None:
    plain, ours = both(name, tmp_path, make=partial(make, tmp_path), **options_of(name))
    ours[0]._liger.revert()
    del ours[0]._liger
    assert vars(ours[0]).keys() == vars(plain[0]).keys()
    for attribute in ("model", "ref_model"):
        got, want = (getattr(it[0], attribute, None) for it in (ours, plain))
        assert (got is None) == (want is None)
        if got is not None and want is not None:
            assert state(got) == state(want)


def test_one_trainer_after_another(tmp_path: Path) -> None:
    """Of one model, as where SFT comes first; and reverted, all of it is TRL's again."""
    runs: list[list[Run]] = []
    for ours in (False, True):
        model, asked = make(tmp_path), {"use_liger_loss": True} if ours else {}
        runs.append(
            [
                run(
                    *trainer_of(name, ours), tmp_path, data_of(name), model=model,
                    given=needed(name, build()), **options_of(name, **asked),
                )
                for name in ("SFT", "DPO", "ORPO", "KTO")
            ]
        )  # fmt: skip
    for plain, ours in zip(*runs, strict=True):
        assert_parity(plain, ours)
    for it, _, _ in reversed(runs[1]):
        it._liger.revert()
    assert state(runs[1][0][0].model) == state(runs[0][0][0].model)


LAYERS: dict[str, dict[str, Any]] = {
    "layers": dict(use_liger=True),
    "layers and loss": dict(use_liger=True, use_liger_loss=True),
    "upstream's flag": dict(use_liger_kernel=True, use_liger_loss=True),
}


@pytest.mark.parametrize("name", ["DPO", "ORPO", "SFT"])
@pytest.mark.parametrize("case", LAYERS)
def test_layers(name: str, case: str, tmp_path: Path) -> None:
    plain, ours = both(name, tmp_path, liger={"use_liger_loss": False} | LAYERS[case])
    patch = patch_of(ours[0].model)
    assert patch is not None and "RMSNorm" in str(patch)
    assert_parity(plain, ours, 2e-5)
    asked = LAYERS[case].get("use_liger_loss", False)
    assert hasattr(ours[0], "_liger") == asked
    if asked:
        assert foreseen(ours) == (0 if name == "SFT" else 3)


@pytest.mark.parametrize("name", ["DPO", "KTO", "ORPO", "CPO"])
@pytest.mark.parametrize("budget", ["liger_memory_budget", "liger_saved_logits_budget"])
def test_budgets_change_no_number(name: str, budget: str, tmp_path: Path) -> None:
    plain, ours = both(name, tmp_path, liger={budget: 1 << 11})
    assert_parity(plain, ours)


def test_a_loss_that_was_foreseen_wrongly_is_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known, "dpo_loss", lambda _: DPO(beta=9.0))
    monkeypatch.setattr(known, "kto_loss", lambda _: KTO(beta=9.0, desirable_weight=0.1))
    monkeypatch.setattr(concatenated, "ORPO", lambda **_: ORPO(beta=9.0, nll_weight=0.1))
    lora = peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    cases = [("DPO", {}), ("KTO", {}), ("ORPO", {}), ("ORPO", {"peft_config": lora})]
    for name, more in cases:
        given = needed(name, build()) | more
        plain, ours = both(name, tmp_path, given=given, gradient_accumulation_steps=2)
        assert_parity(plain, ours)
        fused = ours[0]._liger.fused[0]
        # The second step takes what is left of an epoch: one batch.
        assert (fused.foreseen, fused.mistaken) == (0, 5), name


def seen(features: list[Any], *, config: Any, kto: bool) -> dict[str, Any]:
    """A collator of pictures: rows of one length, of which the last ones are the completion."""
    rows = len(features) * (1 if kto else 2)
    batch: dict[str, Any] = dict(sample_batch(config, rows, 24, seed=len(str(features))))
    labels = batch.pop("labels")
    batch["completion_mask"] = (labels != -100).long()
    if kto:
        batch["label"] = torch.arange(rows) % 3 > 0
        ids, mask = batch["input_ids"], batch["completion_mask"]
        batch["KL_input_ids"] = torch.where(mask == 1, ids.flip(0), ids)
        batch["KL_attention_mask"], batch["KL_completion_mask"] = batch["attention_mask"], mask
        if "mm_token_type_ids" in batch:
            batch["KL_mm_token_type_ids"] = batch["mm_token_type_ids"]
    return batch


@pytest.mark.parametrize("name", ["DPO", "KTO"])
def test_pictures(name: str, tmp_path: Path) -> None:
    sees = partial(families.build, "qwen2_vl")
    collate = partial(seen, config=sees().config, kto=name == "KTO")
    given = needed(name, sees()) | {"data_collator": collate}
    plain, ours = both(name, tmp_path, make=sees, given=given)
    assert any("visual" in n and g.any() for n, g in plain[2][0].items())
    assert_parity(plain, ours)
    assert foreseen(ours) == (3 if name == "DPO" else 0)


HERE: dict[str, Any] = dict(output_dir="x", use_cpu=True, bf16=False)
# fmt: off
WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "a word": ("use_liger_loss must be true or false", dict(use_liger_loss="yes")),
    "a number": ("use_liger_loss must be true or false", dict(use_liger_loss=1)),
    "none": ("must be a positive number of bytes", dict(liger_memory_budget=0)),
    "negative": ("must be a positive number of bytes", dict(liger_saved_logits_budget=-1)),
    "broken": ("must be a positive number of bytes", dict(liger_memory_budget=1.5)),
    "boolean": ("must be a positive number of bytes", dict(liger_saved_logits_budget=True)),
    "no loss": ("use_liger_loss is not", dict(liger_memory_budget=1, use_liger_loss=False)),
    "head": ("a fused head of its own", dict(use_liger=True, liger_config={"fused_head": True})),
    "smoothing": ("label_smoothing", dict(use_liger=True, liger_config={"label_smoothing": 0.1})),
}
# fmt: on


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("name", ["DPO", "ORPO"])
def test_wrong_options(name: str, case: str, tmp_path: Path) -> None:
    sentence, options = WRONG[case]
    with pytest.raises(ValueError, match=sentence):
        trainer_of(name, ours=True)[0](**{**HERE, "use_liger_loss": True} | options)


@pytest.mark.usefixtures("installed")
def test_trainers_without_such_a_loss() -> None:
    assert not hasattr(trl.RewardConfig(**HERE), "_liger")
    with pytest.raises(ValueError, match="RewardConfig has no liger loss"):
        trl.RewardConfig(**HERE, use_liger_loss=True)  # pyright: ignore


def seq2seq() -> Any:
    torch.manual_seed(0)
    sizes = dict(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)
    config = T5Config(vocab_size=TINY["vocab_size"], **sizes)  # pyright: ignore
    return AutoModelForSeq2SeqLM.from_config(config)


def patched() -> Any:
    model = build()
    apply(model)
    return model


def small_head() -> Any:
    model = build()
    model.lm_head = nn.Linear(32, 40, bias=False)
    return model


@pytest.mark.parametrize("name", ["DPO", "ORPO", "SimPO"])
def test_their_command_line(name: str) -> None:
    words = ["--output_dir", "x", "--use_cpu", "--bf16", "false", "--use_liger_loss", "true"]
    words += ["--liger_memory_budget", "1024"]
    parser: Any = HfArgumentParser(trainer_of(name, ours=True)[0])
    args = parser.parse_args_into_dataclasses(words)[0]
    for one in (args, dataclasses.replace(args, seed=1)):
        assert one.use_liger_loss and one.liger_memory_budget == 1024
        assert json.loads(one.to_json_string())["use_liger_loss"] is True


BAD: dict[str, tuple[type[Exception], str, str, Callable[[], Any]]] = {
    "patched": (ValueError, "DPO", "patched to compute its own loss", patched),
    "patched, no head": (ValueError, "ORPO", "patched to compute its own loss", patched),
    "encoder": (ValueError, "ORPO", "is for decoders", seq2seq),
    "label": (ValueError, "DPO", "label", small_head),
    "label, no head": (ValueError, "CPO", "label", small_head),
}


@pytest.mark.parametrize("case", BAD)
def test_models_that_are_refused(case: str, tmp_path: Path) -> None:
    error, name, sentence, bad = BAD[case]
    model = bad()
    given = {"ref_model": build()} if name == "DPO" else {}
    with pytest.raises(error, match=sentence):
        run(
            *trainer_of(name, ours=True), tmp_path, pairs(), model=model, given=given,
            use_liger_loss=True,
        )  # fmt: skip


@pytest.mark.parametrize("gone", ["the hook", "the kernel", "_compute_loss"])
def test_another_trl(gone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = sys.modules["trl.trainer.dpo_trainer"]
    if gone == "the hook":
        monkeypatch.delattr(module, "add_fused_lm_head")
    elif gone == "the kernel":
        monkeypatch.setitem(head.OURS, "_NewKernel", None)
    else:
        monkeypatch.setattr(trl.DPOTrainer, "compute_loss", vars(trl.DPOTrainer)["_compute_loss"])
        monkeypatch.delattr(trl.DPOTrainer, "_compute_loss")
    before, model = dict(vars(module)), build()
    clean = state(model)
    with pytest.raises(RuntimeError, match="use_liger_loss knows TRL"):
        run(
            *trainer_of("DPO", ours=True), tmp_path, pairs(), model=model,
            given=needed("DPO", build()), use_liger_loss=True,
        )  # fmt: skip
    assert vars(module) == before
    if gone == "the hook":
        assert state(model) == clean


@pytest.mark.parametrize("name", ["DPO", "ORPO"])
def test_a_head_that_comes_later(name: str, tmp_path: Path) -> None:
    class Late(trainer_of(name, ours=True)[1]):
        def train(self, *args: Any, **kwargs: Any) -> Any:
            self.model.lm_head = nn.Linear(32, 97)
            return super().train(*args, **kwargs)

    with pytest.raises(RuntimeError, match="replaced after the trainer was built"):
        run(
            trainer_of(name, ours=True)[0], Late, tmp_path, pairs(),
            given=needed(name, build()), use_liger_loss=True,
        )  # fmt: skip


def wrapped(cls: type) -> type:
    """Somebody's trainer, which passes on whatever it is given."""

    class Passing(cls):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    return Passing


def test_a_trainer_in_between(tmp_path: Path) -> None:
    class Mine(LigerLoss, wrapped(trl.DPOTrainer)):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            return self._compute_loss(model, inputs, return_outputs=False)

    given = needed("DPO", build())
    ours = run(OwnConfig, Mine, tmp_path, pairs(), given=given, use_liger_loss=True)
    assert foreseen(ours) == 3


def test_a_trainer_that_makes_its_own_arguments(tmp_path: Path) -> None:
    class Making(trl.DPOTrainer):
        def __init__(self, model: Any, **kwargs: Any) -> None:
            args = OwnConfig(
                output_dir=str(tmp_path), use_liger_loss=True, use_cpu=True, bf16=False
            )
            super().__init__(model, args=args, **kwargs)

    class Mine(LigerLoss, Making):
        def __init__(self, model: Any, args: Any, **kwargs: Any) -> None:
            super().__init__(model, **kwargs)

    with pytest.raises(ValueError, match="makes its own arguments"):
        run(trl.DPOConfig, Mine, tmp_path, pairs(), given=needed("DPO", build()))


def more_of(cls: type) -> type:
    """A trainer whose loss has a term of the entropy, and another call of the model."""

    class More(cls):
        def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
            ids = inputs["input_ids"][:2]
            out = model(input_ids=ids, labels=ids, fused_lm_head=True)
            again = super()._compute_loss(model, inputs, return_outputs)
            return again + out.log_probs.mean() + 0.1 * out.entropy.mean()

    return More


@pytest.mark.parametrize("name", ["DPO", "KTO"])
def test_a_loss_of_ones_own(name: str, tmp_path: Path) -> None:
    plain, ours = (
        run(
            trainer_of(name, liger)[0], more_of(trainer_of(name, liger)[1]), tmp_path,
            data_of(name), given=needed(name, build()), learning_rate=0.01,
            **({"use_liger_loss": True} if liger else {}),
        )
        for liger in (False, True)
    )  # fmt: skip
    assert_parity(plain, ours)
    assert foreseen(ours) == 0


def test_a_concatenated_forward_of_ones_own_is_not_passed_by(tmp_path: Path) -> None:
    config, trainer = trainer_of("ORPO", ours=True)

    class Mine(trainer):
        def concatenated_forward(self, *args: Any) -> Any:
            return super().concatenated_forward(*args)

    with pytest.raises(ValueError, match="concatenated_forward of Mine"):
        run(config, Mine, tmp_path, pairs(), use_liger_loss=True)


@pytest.mark.usefixtures("installed")
def test_what_trl_makes_of_these_trainers_for_logits() -> None:
    from trl.experimental.gkd import GKDConfig

    with pytest.raises(ValueError, match="GKDConfig has no liger loss"):
        GKDConfig(**HERE, use_liger_loss=True)  # pyright: ignore


@pytest.mark.parametrize("name", ["DPO", "ORPO"])
def test_revert_within_autocast(name: str, tmp_path: Path) -> None:
    """accelerate's autocast, which is around the forward, stays there."""
    config, trainer = trainer_of(name, ours=True)
    given = needed(name, build())
    it = run(config, trainer, tmp_path, data_of(name), given=given, use_liger_loss=True, bf16=True)[
        0
    ]
    around = vars(it.model)["forward"]
    it._liger.revert()
    assert vars(it.model)["forward"] is around
    it.train()


def headed() -> tuple[Any, head.Fused]:
    from trl.trainer.utils import add_fused_lm_head

    model, fused = build(), head.Fused()
    add_fused_lm_head(model)
    head.take_over(model, fused)
    return model, fused


IDS = torch.arange(18).view(2, 9) + 3


def test_an_error_before_the_head_leaves_nothing() -> None:
    model, _ = headed()
    want = model(IDS).logits

    def fail(*_: Any) -> None:
        raise KeyError

    hook = model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        model(IDS, labels=IDS, fused_lm_head=True)
    hook.remove()
    assert torch.equal(model(IDS).logits, want)


def test_gradients_are_computed_again_as_forward_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """In its autocast; and what was foreseen, NaN here, is not even multiplied by 0."""
    model, fused = headed()
    share = PairShare(DPO(beta=9.0), IDS[:, 1:], IDS[:, 1:], 0.0, torch.zeros(2))
    dtypes, again = list[Any](), head.linear_logprob

    def spy(*args: Any, **kwargs: Any) -> Any:
        dtypes.append(torch.get_autocast_dtype("cpu"))
        return again(*args, **kwargs)

    monkeypatch.setattr(head, "linear_logprob", spy)
    fused.share = head.Share.of(share)
    with torch.autocast("cpu", torch.float16):
        logp = model(IDS, labels=IDS, fused_lm_head=True).log_probs
    logp.square().sum().backward()
    assert dtypes == [torch.float16]
    model.zero_grad()
    fused.share = head.Share(lambda tokens, _: (tokens.logp * torch.inf).sum(), "batch")
    model(IDS, labels=IDS, fused_lm_head=True).log_probs.sum().backward()
    assert fused.mistaken == 2
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_threads_do_not_take_each_others_labels() -> None:
    models, others = [headed()[0] for _ in range(2)], list[bool]()
    labels = [IDS, IDS.where(torch.arange(9) > 5, -100)]
    before = sys.getswitchinterval()

    @torch.no_grad()
    def score(i: int) -> Any:
        return models[i](IDS, labels=labels[i], fused_lm_head=True).log_probs

    want = [score(i) for i in range(2)]

    def work(i: int) -> None:
        others.extend(not torch.allclose(score(i), want[i]) for _ in range(50))

    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert len(others) == 100 and not any(others)
