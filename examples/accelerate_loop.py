"""Fine-tune a causal language model in a training loop of Accelerate's, on texts of uneven lengths.

Nothing in here is of this project's. It is turned on from outside,

    accelerate-liger launch --config_file configs/accelerate/fsdp2.yaml examples/accelerate_loop.py

or, under `accelerate launch` with ACCELERATE_USE_LIGER=true, by one changed line:

    from liger_kernel.accelerate import LigerAccelerator as Accelerator

Started again, the same command goes on from the newest checkpoint. The last line is JSON.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from _data import pretrained, sections
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, set_seed
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    get_cosine_schedule_with_warmup,
)


def save(accelerator: Accelerator, output: Path, step: int) -> None:
    """Write `checkpoint-STEP` and drop older ones; a folder of that name is always whole."""
    unfinished, old = output / "unfinished", list(output.glob("checkpoint-*"))
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(unfinished)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        unfinished.rename(output / f"checkpoint-{step}")
        for folder in old:
            shutil.rmtree(folder)


def main(argv: list[str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, a model's folder or a hub id")
    parser.add_argument("--output", type=Path, default=Path("runs/accelerate"))
    parser.add_argument("--texts", type=int, default=512, help="texts to train on")
    parser.add_argument("--max_length", type=int, default=512, help="tokens of a text")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=4, help="texts in a forward pass")
    parser.add_argument("--accumulation", type=int, default=1, help="forward passes in a step")
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument("--save_steps", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    set_seed(args.seed)
    accelerator = Accelerator(
        # A step's batches are read ahead, below, so that the end of the data comes too early.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=args.accumulation, sync_with_dataloader=False
        ),
        # An epoch's order follows from its number, so that a resumed run finds the same batches.
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        step_scheduler_with_optimizer=False,  # once a step, whatever the number of processes
    )
    with accelerator.main_process_first():
        source = pretrained(args.model, args.output)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.train()

    def tokens(text: str) -> dict[str, list[int]]:
        ids = tokenizer(text + tokenizer.eos_token, truncation=True, max_length=args.max_length)
        return {"input_ids": ids["input_ids"], "labels": ids["input_ids"]}

    loader = DataLoader(
        [tokens(text) for text in sections()[0][: args.texts]],
        batch_size=args.batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=DataCollatorForSeq2Seq(tokenizer),  # pads labels with -100
        generator=torch.Generator(),  # each iter() draws from it, and a resumed run has one more
    )
    processes = accelerator.num_processes
    steps_per_epoch = len(loader) // (processes * args.accumulation)
    total = args.epochs * steps_per_epoch
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.01)
    scheduler = get_cosine_schedule_with_warmup(optimizer, total // 10, total)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    step, losses = 0, []
    checkpoints = {int(p.name.split("-")[1]): p for p in args.output.glob("checkpoint-*")}
    if checkpoints:
        step = max(checkpoints)
        accelerator.load_state(checkpoints[step])
    accelerator.print(f"starting at step {step} of {total}", flush=True)
    while step < total:
        epoch, done = divmod(step, steps_per_epoch)
        loader.set_epoch(epoch)
        batches = iter(skip_first_batches(loader, done * args.accumulation))
        for _ in range(done, steps_per_epoch):
            window = [next(batches) for _ in range(args.accumulation)]
            # What is averaged over: the labels of the whole step, on all processes.
            scored = torch.stack([(batch["labels"][:, 1:] != -100).sum() for batch in window])
            scored = accelerator.reduce(scored.sum(), "sum")
            loss = torch.zeros((), device=accelerator.device)
            for batch in window:
                with accelerator.accumulate(model):
                    part = model(**batch, num_items_in_batch=scored).loss
                    # backward divides by the first, the mean over processes by the second
                    accelerator.backward(part * args.accumulation * processes)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                loss += part.detach()
            scheduler.step()
            step += 1
            losses.append(accelerator.reduce(loss, "sum").item())
            accelerator.print(f"step {step} loss {losses[-1]:.4f}", flush=True)
            if step % args.save_steps == 0 or step == total:
                save(accelerator, args.output, step)

    accelerator.unwrap_model(model).save_pretrained(
        args.output / "model",
        is_main_process=accelerator.is_main_process,
        state_dict=accelerator.get_state_dict(model),
    )
    if accelerator.is_main_process:
        tokenizer.save_pretrained(args.output / "model")
    summary = {"first_step": step - len(losses) + 1, "losses": losses}
    accelerator.print(json.dumps(summary), flush=True)
    accelerator.end_training()
    return summary


if __name__ == "__main__":
    main()
