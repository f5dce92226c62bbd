"""The job that test_checkpoint.py kills: a tiny random llama under HF Trainer on the CPU.

    python kill_resume_job.py OUTPUT [--stall ENDING]

Started again, it resumes from the newest complete checkpoint.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from kill_resume import stall_half_way

STEPS, SAVE_STEPS, STEP_SECONDS = 8, 2, 0.3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--stall", help="be half-way through the file ending so for a minute")
    args = parser.parse_args()
    if args.stall:  # before transformers takes its own reference
        torch.save = stall_half_way(torch.save, args.stall)
        safetensors.torch.save_file = stall_half_way(safetensors.torch.save_file, args.stall)

    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        set_seed,
    )

    from liger_kernel.checkpoint import newest_complete

    class Say(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            print(f"step {state.global_step} done", flush=True)
            time.sleep(STEP_SECONDS)  # a window that a kill surely hits

    set_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_dropout=0.1,  # so that the state of the random numbers matters
    )
    blocks = torch.randint(64, (2 * STEPS, 16), generator=torch.Generator().manual_seed(0))
    trainer = Trainer(
        LlamaForCausalLM(config),
        TrainingArguments(
            output_dir=str(args.output),
            num_train_epochs=1,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            logging_steps=1,
            save_steps=SAVE_STEPS,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
        ),
        train_dataset=[{"input_ids": b, "labels": b} for b in blocks],  # pyright: ignore
        callbacks=[Say()],
    )
    found = newest_complete(args.output)
    print("resuming from", found, flush=True)
    trainer.train(resume_from_checkpoint=str(found) if found else None)


if __name__ == "__main__":
    main()
