"""A tiny model, a tokenizer and pairs of texts for TRL's trainers; and one run of a trainer."""

import copy
import warnings
from pathlib import Path
from typing import Any

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
    given: dict[str, Any] | None = None, **options: Any,
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
        it.train()
    return it, [log for log in it.state.log_history if "loss" in log], gradients.seen


def reference(model: Any) -> Any:
    """A frozen reference that is not the model itself, so that the log-ratios are not 0."""
    ref = copy.deepcopy(model)
    with torch.no_grad():
        for p in ref.parameters():
            p.mul_(1.05)
    return ref
