"""A tiny model, a tokenizer and pairs of texts for TRL's trainers; and one run of a trainer."""

import copy
import functools
import gc
import importlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, TrainerCallback

from tiny import V, build

WORDS = [f"w{i}" for i in range(V - 3)]


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {w: i + 3 for i, w in enumerate(WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def text(seed: int, words: int) -> str:
    drawn = torch.randint(len(WORDS), (words,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[i] for i in drawn.tolist())


def pairs(n: int = 12) -> Dataset:
    """Prompts and completions of uneven lengths."""
    return Dataset.from_list(
        [
            {
                "prompt": text(3 * i, 2 + i % 4),
                "chosen": " " + text(3 * i + 1, 1 + i % 6),
                "rejected": " " + text(3 * i + 2, 7 - i % 5),
            }
            for i in range(n)
        ]
    )


class Gradients(TrainerCallback):
    """Those of each step, before they are used."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        self.seen.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )


def run(
    config: type, trainer: type, folder: Path, data: Dataset, *, model: Any = None,
    given: dict[str, Any] | None = None, resume: Any = None, **options: Any,
) -> tuple[Any, list[dict[str, float]], list[dict[str, Tensor]]]:  # fmt: skip
    """Three steps: the trainer, what it logs at each, and its gradients."""
    torch.manual_seed(0)
    model = build() if model is None else model
    settings: dict[str, Any] = dict(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=4, learning_rate=0.1,
        optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, logging_steps=1,
        report_to=[], save_strategy="no", use_cpu=not torch.cuda.is_available(), bf16=False,
        dataloader_pin_memory=False, disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    gradients = Gradients()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        it = trainer(
            model, args=config(**settings | options), train_dataset=data,
            processing_class=tokenizer(), callbacks=[gradients], **(given or {}),
        )  # fmt: skip
        it.train(resume_from_checkpoint=resume)
    return it, [log for log in it.state.log_history if "loss" in log], gradients.seen


def reference(model: Any) -> Any:
    """A frozen reference that is not the model itself, so that the log-ratios are not 0."""
    ref = copy.deepcopy(model)
    with torch.no_grad():
        for p in ref.parameters():
            p.mul_(1.05)
    return ref


@functools.cache
def trainer_of(name: str, ours: bool = False) -> tuple[Any, Any]:
    """A trainer's configuration and class: TRL's own, or those of this project."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's experimental ones say that they are
        if ours:
            room: Any = importlib.import_module("liger_kernel.trl")
        elif name in ("ORPO", "CPO"):
            room = importlib.import_module(f"trl.experimental.{name.lower()}")
        else:
            room = importlib.import_module("trl")
        found = getattr(room, f"{name}Config"), getattr(room, f"{name}Trainer")
    gc.freeze()  # accelerate collects at the end of every run: more than half of a run's time
    return found


def prompts() -> Dataset:
    return pairs().select_columns("prompt")


def texts() -> Dataset:
    return Dataset.from_list([{"text": p["prompt"] + p["chosen"]} for p in pairs()])  # pyright: ignore


def completions() -> Dataset:
    rows: list[Any] = list(pairs())
    return Dataset.from_list([{"prompt": p["prompt"], "completion": p["chosen"]} for p in rows])


def judged() -> Dataset:
    """Single completions, of which one in three is bad."""
    rows: list[Any] = list(pairs())
    return Dataset.from_list(
        [
            {"prompt": p["prompt"], "completion": p[side], "label": side == "chosen"}
            for i, p in enumerate(rows)
            for side in ["chosen" if i % 3 else "rejected"]
        ]
    )


def data_of(name: str) -> Dataset:
    """What a trainer of this name is trained on."""
    return {"KTO": judged, "SFT": texts, "GRPO": prompts, "RLOO": prompts}.get(name, pairs)()


def variety(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs within every group, so that the gradient is no difference of zeros."""
    return [float(sum(map(ord, c)) % 7) for c in completions]


def needed(name: str, model: Any) -> dict[str, Any]:
    """What this trainer is given besides model and data."""
    if name in ("DPO", "KTO"):
        return {"ref_model": reference(model)}
    return {"reward_funcs": variety} if name in ("GRPO", "RLOO") else {}


Run = tuple[Any, list[dict[str, float]], list[dict[str, Tensor]]]


def both(
    name: str, folder: Path, *, make: Any = build, data: Any = None,
    given: dict[str, Any] | None = None, liger: dict[str, Any] | None = None, **options: Any,
) -> tuple[Run, Run]:  # fmt: skip
    """The same steps by TRL alone, and with `use_liger_loss`."""
    runs: list[Run] = []
    for ours in (False, True):
        model = make()
        parts = needed(name, model) if given is None else copy.deepcopy(given)
        more = {"use_liger_loss": True} | (liger or {}) if ours else {}
        runs.append(
            run(
                *trainer_of(name, ours), folder / str(ours), data or data_of(name),
                model=model, given=parts, **{"learning_rate": 0.01} | options | more,
            )
        )  # fmt: skip
    return runs[0], runs[1]


TIMES = {"step_time", "epoch", "total_flos"}


def assert_logged(got: list[dict[str, Any]], want: list[dict[str, Any]], tol: float = 1e-4) -> None:
    def kept(log: dict[str, Any]) -> dict[str, Any]:
        slow = ("runtime", "_per_second", *TIMES)
        return {k: v for k, v in log.items() if not k.endswith(slow)}

    assert len(got) == len(want) > 0
    for a, b in zip(got, want, strict=True):
        close = {k: pytest.approx(v, rel=tol, abs=tol, nan_ok=True) for k, v in kept(b).items()}
        assert kept(a).keys() == close.keys(), kept(a).keys() ^ close.keys()
        assert not (off := {k: (a[k], b[k]) for k, v in close.items() if a[k] != v}), off


TOL = 2e-5 if torch.cuda.is_available() else 1e-5  # losses that diverge amplify the order of sums


def assert_parity(plain: Run, ours: Run, tol: float = TOL) -> None:
    """Everything that is logged, and the gradients of every step, by the norm of each."""
    assert_logged(ours[1], plain[1])
    assert len(ours[2]) == len(plain[2]) > 0
    for step, (got, want) in enumerate(zip(ours[2], plain[2], strict=True)):
        assert got.keys() == want.keys()
        for name, gradient in want.items():
            error, norm = (got[name] - gradient).norm(), gradient.norm()
            assert error <= tol * norm + 1e-9, f"step {step}, {name}: {error:.1e} of {norm:.1e}"
    assert any(g.any() for g in plain[2][0].values())


def foreseen(ours: Run) -> int:
    """Gradients of the policy that were known in forward; none of them was mistaken."""
    fused = ours[0]._liger.fused
    assert not any(f.mistaken for f in fused)
    assert not any(f.foreseen for f in fused[1:])
    return fused[0].foreseen
