"""The command `liger`: what is installed, which models are known, whether a patch is right here."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from liger_kernel.transformers.recipes import Part, Recipe

DTYPES = ("float32", "bfloat16", "float16")
COLUMNS = ("model type", "norm", "MLP", "RoPE", "head")
TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


class UsageError(Exception):
    """Said in one line, status 2."""


def main(argv: list[str] | None = None) -> int:
    """0 where all is well, 1 where something is wrong, 2 for an error in the arguments."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except UsageError as error:
        print(f"liger {args.command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="liger", description=(__doc__ or "").strip())
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("env", help="versions, devices, whose liger_kernel is imported")
    add.set_defaults(run=env)
    add = commands.add_parser("models", help="the families, and what a patch replaces in each")
    add.add_argument("--markdown", action="store_true", help="as a Markdown table")
    add.set_defaults(run=models)
    add = commands.add_parser(
        "check",
        help="compare a patched model with the plain one",
        description="Loss and every gradient of one training step, patched against plain, by the "
        "error of both against a wider dtype; then time and memory of both.",
    )
    add.add_argument("model", help="a folder, a hub id, or a config.json: random weights")
    add.add_argument("--config", help='LigerConfig as JSON, for example {"rope": false}')
    add.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, else float32")
    add.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add.add_argument("--batch", type=_positive, default=2, help="sequences (%(default)s)")
    add.add_argument("--length", type=_positive, default=128, help="tokens of each (%(default)s)")
    add.add_argument("--layers", type=_positive, help="keep so many layers of the language model")
    add.add_argument("--steps", type=_count, default=5, help="to time of each (%(default)s)")
    add.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    add.set_defaults(run=check)
    return parser


def _count(text: str) -> int:
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {text}")
    return number


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def env(args: argparse.Namespace) -> int:
    """Print what this process runs on; 1 where the installation is not as it should be."""
    from liger_kernel.environment import environment

    facts = environment()
    for name, value in facts.items():
        if name == "variables":
            value = [f"{k}={v}" for k, v in value.items()]
        if name != "warnings":
            lines = value if isinstance(value, list) else [value]
            print("\n".join(f"{name:14}{line}" for line in lines or ["none"]))
    for warning in facts["warnings"]:
        print(f"WARNING: {warning}")
    return 1 if facts["warnings"] else 0


def models(args: argparse.Namespace) -> int:
    """Print the table of RECIPES."""
    from liger_kernel.transformers.recipes import RECIPES

    rows = [COLUMNS, *map(_row, RECIPES.values())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if args.markdown:
        rows.insert(1, tuple("-" * width for width in widths))
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print(f"| {' | '.join(cells)} |" if args.markdown else "  ".join(cells).rstrip())
    return 0


def _row(recipe: "Recipe") -> tuple[str, ...]:
    kinds: dict[str, list[str]] = {name: [] for name in ("norm", "mlp", "rope")}
    for part in recipe.parts.values():
        field, words = _words(part)
        if words not in kinds[field]:
            kinds[field].append(words)
    head = ["fused"]
    head += ["softcap"] if recipe.softcap else []
    head += ["logits divided"] if recipe.logits_divided_by else []
    cells = [", ".join(words) or "-" for words in kinds.values()]
    return recipe.model_type, *cells, ", ".join(head)


def _words(part: "Part") -> tuple[str, str]:
    from liger_kernel.transformers.recipes import Glu, LayerNorm, Norm

    if isinstance(part, Norm):
        return "norm", "RMSNorm (1 + w)" if part.offset else "RMSNorm"
    if isinstance(part, LayerNorm):
        return "norm", "LayerNorm (vision)"
    if isinstance(part, Glu):
        name = {"swiglu": "SwiGLU", "geglu": "GEGLU"}[part.name]
        return "mlp", name if part.kind == "split" else f"{name} ({part.kind})"
    return "rope", "yes" if part.kind == "half" else part.kind


def check(args: argparse.Namespace) -> int:
    """Load or build the model, print and write the report; 1 where it does not agree."""
    import torch

    from liger_kernel.check import check
    from liger_kernel.config import LigerConfig
    from liger_kernel.environment import environment
    from liger_kernel.transformers import apply

    gpu = torch.cuda.is_available()
    device = args.device if args.device != "auto" else "cuda" if gpu else "cpu"
    if device == "cuda" and not gpu:
        raise UsageError("--device cuda: torch sees no GPU")
    dtype = getattr(torch, args.dtype or ("bfloat16" if device == "cuda" else "float32"))
    try:
        config = LigerConfig.of(args.config)
        model = _load(args.model, dtype, args.layers).to(device)
        apply(model, config).revert()
        batch = _batch(args, model)
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(error) from error
    report = check(model, batch | {"use_cache": False}, config, steps=args.steps)
    print(report)
    if args.json:
        given = {k: str(v) if k == "json" else v for k, v in vars(args).items() if k != "run"}
        figures = {"arguments": given, **report.to_dict(), "environment": environment()}
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0 if report.ok else 1


def _load(name: str, dtype: Any, layers: int | None) -> Any:
    """The model of a folder or hub id; that of a config.json with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    settings = AutoConfig.from_pretrained(name)
    if layers is not None:
        _cut(settings.get_text_config(), layers)
    vision = getattr(settings, "vision_config", None) is not None
    auto = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    if not name.endswith(".json"):
        return auto.from_pretrained(name, config=settings, dtype=dtype)
    torch.manual_seed(0)
    model = auto.from_config(settings, dtype=dtype)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:  # norms at 1 and biases at 0 would hide what goes wrong with them
                p += 0.1 * torch.randn_like(p)
    return model


def _cut(text: Any, layers: int) -> None:
    """Keep the first `layers` layers of a language model's configuration."""
    if layers > text.num_hidden_layers:
        raise ValueError(f"--layers {layers}: the model has {text.num_hidden_layers}")
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    if getattr(text, "cross_attention_layers", None):
        text.cross_attention_layers = [i for i in text.cross_attention_layers if i < layers]


def _batch(args: argparse.Namespace, model: Any) -> dict[str, Any]:
    """Text where there is a tokenizer, and random tokens, with images if need be, elsewhere."""
    from liger_kernel.transformers.inputs import sample_batch

    size = (args.batch, args.length)
    if (ids := _text(args.model, model, *size)) is None:
        return sample_batch(model.config, *size, device=model.device, dtype=model.dtype)
    labels = ids.clone()
    labels[:, : args.length // 4] = -100  # as a prompt's
    return {"input_ids": ids, "attention_mask": ids.new_ones(size), "labels": labels}


def _text(name: str, model: Any, batch: int, length: int) -> Any:
    """Ids (batch, length) of Python's documentation; None without a tokenizer of text alone."""
    from pydoc_data.topics import topics

    import torch
    from transformers import AutoTokenizer

    path = Path(name)
    bare = path.is_dir() and not any((path / file).is_file() for file in TOKENIZER)
    if bare or path.is_file() or getattr(model.config, "vision_config", None) is not None:
        return None
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError):
        return None
    n = batch * length
    ids = tokenizer("\n".join(topics[name] for name in sorted(topics))[: 16 * n])["input_ids"]
    ids = torch.tensor((ids * -(-n // len(ids)))[:n]).view(batch, length)
    return ids if ids.max() < model.get_input_embeddings().num_embeddings else None


if __name__ == "__main__":
    sys.exit(main())
