"""A training step of TRL's preference trainers: TRL's own loss, ours, and ours with our layers.

    python -m benchmarks.trl_step --out FILE.json [--cases dpo-full,orpo] [--gib 79]

A model of the Llama-3.2-1B shape with random bf16 weights, TRL's defaults (AdamW, gradient
checkpointing, bf16), sequences of `--length` tokens, the last `--scored` of them the completion.
The providers train one after another, with `--again` TRL once more; `--steps` steps each, of which
the first three do not count and the last three are for the head's own figures. `--gib` limits the
memory that there is. ORPO, CPO and SimPO take as many pairs, of `--pairs`, as TRL's own loss can
train on.

    step_ms      a whole step of `Trainer.train()`, median
    peak_gib     most memory that tensors take
    loss_ms      the head's part of it: from hidden states to log-probabilities and back, the
                 reference's too; of ORPO, CPO and SimPO from lm_head's call to its gradient
    loss_gib     most memory within that beyond what is there when it begins
"""

import argparse
import copy
import gc
import json
import statistics
import tempfile
import warnings
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.training_step import machine

LLAMA_1B = dict(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, head_dim=64, vocab_size=128256, tie_word_embeddings=True,
    max_position_embeddings=131072, rope_theta=500000.0, pad_token_id=0, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip
TINY = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=997)
PROVIDERS: dict[str, dict[str, bool]] = {
    "trl": {},
    "loss": dict(use_liger_loss=True),
    "loss and layers": dict(use_liger_loss=True, use_liger=True),
}
WARM_UP = 3
GIB = 2**30


@dataclass(frozen=True)
class Case:
    """One trainer; `pairs` a step, 0 for as many as fit; `lora` of all linear layers, else full."""

    trainer: str
    pairs: int = 8
    lora: bool = False

    @property
    def concatenated(self) -> bool:
        return self.trainer not in ("DPO", "KTO")


CASES = {
    "dpo-full": Case("DPO"),
    "dpo-lora": Case("DPO", lora=True),
    "kto-full": Case("KTO"),
    "kto-lora": Case("KTO", lora=True),
    "orpo": Case("ORPO", 0),
    "cpo": Case("CPO", 0),
    "simpo": Case("SimPO", 0),
}


class Clock:
    """Windows on the device: what passes, and the most memory, from `start` to `stop`."""

    def __init__(self) -> None:
        self.clear(on=False)

    def clear(self, on: bool) -> None:
        self.on = on
        self.events: list[tuple[Any, Any]] = []
        self.memory: list[int] = []
        self._open: list[tuple[Any, int]] = []

    def start(self, *_: object) -> None:
        if self.on:
            torch.cuda.reset_peak_memory_stats()
            self._open.append((_event(), torch.cuda.memory_allocated()))

    def stop(self, *_: object) -> None:
        if self._open:
            began, before = self._open.pop()
            self.events.append((began, _event()))
            self.memory.append(torch.cuda.max_memory_allocated() - before)

    def ms(self) -> float:
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in self.events)


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class Timed:
    """Stands for a function of hidden states and head, of which it times forward and backward."""

    def __init__(self, inner: Any, clock: "Clock") -> None:
        self.inner, self.clock = inner, clock

    def apply(self, hidden: Any, *args: Any) -> Any:
        self.clock.start()
        logp, *rest = self.inner.apply(hidden, *args)
        self.clock.stop()
        if logp.requires_grad:
            logp.register_hook(self.clock.start)
            hidden.register_hook(self.clock.stop)
        return logp, *rest


def trainer_of(
    case: Case, provider: str, clock: Clock, args: argparse.Namespace, pairs: int
) -> Any:
    """A trainer whose head's time goes to the clock."""
    import trl.trainer.utils
    from transformers import LlamaConfig, LlamaForCausalLM

    import liger_kernel.trl
    from liger_kernel.trl import head

    for names in (vars(trl.trainer.utils), head.OURS):
        there = names["_ChunkedLogProbFunction"]
        if not case.concatenated:
            names["_ChunkedLogProbFunction"] = Timed(getattr(there, "inner", there), clock)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        config = LlamaConfig(**LLAMA_1B | (TINY if args.tiny else {}))
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    given: dict[str, Any] = {}
    if case.lora:
        from peft import LoraConfig

        given["peft_config"] = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    elif not case.concatenated:
        given["ref_model"] = copy.deepcopy(model)
    tokens = tokenizer(config.vocab_size)
    options = getattr(liger_kernel.trl, f"{case.trainer}Config")(
        args.folder, max_steps=args.steps, logging_steps=args.steps, report_to=[],
        save_strategy="no",
        per_device_train_batch_size=pairs * (2 if case.trainer == "KTO" else 1),
        max_length=args.length, bf16=torch.cuda.is_available(), disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(), **PROVIDERS[provider],
    )  # fmt: skip
    return getattr(liger_kernel.trl, f"{case.trainer}Trainer")(
        model, args=options, train_dataset=data(case, args, pairs, config.vocab_size),
        processing_class=tokens, **given,
    )  # fmt: skip


def tokenizer(vocabulary: int) -> Any:
    """A word a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, vocabulary)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def data(case: Case, args: argparse.Namespace, pairs: int, vocabulary: int) -> Any:
    """Two steps' worth of random words; TRL appends the end of a completion itself."""
    from datasets import Dataset

    generator = torch.Generator().manual_seed(0)

    def text(words: int) -> str:
        drawn = torch.randint(3, vocabulary, (words,), generator=generator)
        return "".join(f" w{i}" for i in drawn.tolist())

    prompt, completion = args.length - args.scored, args.scored - 1
    rows = [(text(prompt), text(completion), text(completion)) for _ in range(2 * pairs)]
    if case.trainer == "KTO":
        both = [
            (p, c, good) for p, *two in rows for c, good in zip(two, (True, False), strict=True)
        ]
        return Dataset.from_list([dict(prompt=p, completion=c, label=g) for p, c, g in both])
    return Dataset.from_list([dict(prompt=p, chosen=c, rejected=r) for p, c, r in rows])


class Steps:
    """What the steps cost: the first three do not count, the clock runs in the last three."""

    def __init__(self, clock: Clock, steps: int) -> None:
        self.clock, self.steps, self.done = clock, steps, 0
        self.times: list[float] = []
        self.parts: list[tuple[float, int]] = []
        self.peak = 0

    def begin(self) -> None:
        self.clock.clear(on=self.done >= self.steps - 3)
        torch.cuda.synchronize()
        if self.done == WARM_UP:
            torch.cuda.reset_peak_memory_stats()
        self.began = _event()

    def end(self) -> None:
        ended = _event()
        ended.synchronize()
        if self.clock.on:
            self.parts.append((self.clock.ms(), max(self.clock.memory)))
        elif self.done >= WARM_UP:
            self.times.append(self.began.elapsed_time(ended))
            self.peak = torch.cuda.max_memory_allocated()
        self.done += 1

    def found(self) -> dict[str, Any]:
        ms, extra = zip(*self.parts, strict=True)
        return {
            "step_ms": statistics.median(self.times),
            "all_ms": [round(t, 2) for t in self.times],
            "peak_gib": self.peak / GIB,
            "loss_ms": statistics.median(ms),
            "loss_gib": max(extra) / GIB,
        }


def measure(case: Case, provider: str, args: argparse.Namespace, pairs: int) -> dict[str, Any]:
    """Train, and what the steps after the first ones cost."""
    from transformers import TrainerCallback

    clock = Clock()
    steps = Steps(clock, args.steps)

    class Callback(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            steps.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            steps.end()

    trainer = trainer_of(case, provider, clock, args, pairs)
    if case.concatenated:
        lm_head = trainer.model.get_output_embeddings()

        def called(module: Any, inputs: tuple[Any, ...]) -> None:
            clock.start()
            inputs[0].register_hook(clock.stop)

        lm_head.register_forward_pre_hook(called)
    cuda = torch.cuda.is_available()
    if cuda:
        trainer.add_callback(Callback())
    result = trainer.train()
    found = {"pairs": pairs, "training_loss": result.training_loss} | (
        steps.found() if cuda else {}
    )
    if (attached := getattr(trainer, "_liger", None)) is not None:
        policy = attached.fused[0]
        found |= {"foreseen": policy.foreseen, "mistaken": policy.mistaken}
    return found


def fitting(case: Case, args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """The most pairs, of those to try, that TRL's own loss can train on, and what they cost."""
    best: tuple[int, dict[str, Any]] | None = None
    for pairs in args.pairs:
        try:
            best = pairs, measure(case, "trl", args, pairs)
        except torch.cuda.OutOfMemoryError:
            break
        finally:
            _free()
    if best is None:
        raise SystemExit(f"not even {args.pairs[0]} pairs fit")
    return best


def run_case(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Every provider's figures, and their ratios to TRL's own."""
    case, found = CASES[name], dict[str, Any]()
    pairs = case.pairs
    if not pairs:
        pairs, found["trl"] = fitting(case, args)
        _free()
    for provider in args.providers.split(","):
        if provider not in found:
            found[provider] = measure(case, provider, args, pairs)
            _free()
    if args.again:
        found["trl, again"] = measure(case, "trl", args, pairs)
        _free()
    keys = [k for k in ("step_ms", "peak_gib", "loss_ms", "loss_gib") if k in found["trl"]]
    for row in found.values():
        row["ratio"] = {k: row[k] / found["trl"][k] for k in keys}
    return found


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--providers", default=",".join(PROVIDERS), help="trl first")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--scored", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--pairs", type=int, nargs="+", default=[8, 12, 16, 20, 24])
    parser.add_argument("--gib", type=float, help="memory that there is; None for all")
    parser.add_argument("--again", action="store_true", help="TRL once more at the end")
    parser.add_argument("--tiny", action="store_true", help="to try the script")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    cuda = torch.cuda.is_available()
    if cuda and torch.cuda.device_count() > 1:
        raise SystemExit(
            "Trainer would use nn.DataParallel: show one GPU by CUDA_VISIBLE_DEVICES=0"
        )
    if cuda and args.gib:
        whole = torch.cuda.get_device_properties(0).total_memory / GIB
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.gib / whole))
    report: dict[str, Any] = {"settings": {k: v for k, v in vars(args).items() if k != "out"}}
    report |= machine("cuda" if cuda else "cpu") | {"trl": metadata.version("trl"), "cases": {}}
    with tempfile.TemporaryDirectory() as args.folder:
        for name in args.cases.split(","):
            report["cases"][name] = found = run_case(name, args)
            for provider, row in found.items():
                print(name, provider, {k: v for k, v in row.items() if k != "all_ms"}, flush=True)
            if args.out:
                args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
