"""The command `liger`: what is installed, which models are known, whether a patch is right here."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from liger_kernel.check import check
from liger_kernel.config import LigerConfig
from liger_kernel.environment import environment
from liger_kernel.transformers.patch import apply
from liger_kernel.transformers.recipes import RECIPES, Recipe
from liger_kernel.transformers.sample import auto_class, cut, sample_batch, sample_model

DTYPES = ("float32", "bfloat16", "float16")
COLUMNS = ("model type", "norm", "MLP", "RoPE", "head")


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
    add.set_defaults(run=_env)
    add = commands.add_parser("models", help="the families, and what a patch replaces in each")
    add.add_argument("--markdown", action="store_true", help="as a Markdown table")
    add.set_defaults(run=_models)
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
    add.set_defaults(run=_check)
    return parser


def _count(text: str) -> int:
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {text}")
    return number


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def _env(args: argparse.Namespace) -> int:
    """Print what this process runs on; 1 where the installation is not as it should be."""
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


def _models(args: argparse.Namespace) -> int:
    """Print the table of RECIPES."""
    rows = [COLUMNS, *map(_row, RECIPES.values())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if args.markdown:
        rows.insert(1, tuple("-" * width for width in widths))
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print(f"| {' | '.join(cells)} |" if args.markdown else "  ".join(cells).rstrip())
    return 0


def _row(recipe: Recipe) -> tuple[str, ...]:
    parts = recipe.parts.values()
    cells = [
        ", ".join(dict.fromkeys(str(part) for part in parts if part.field in fields))
        for fields in (("norm", "layer_norm"), ("mlp",), ("rope",))
    ]
    head = ["fused"]
    head += ["softcap"] if recipe.softcap else []
    head += ["logits divided"] if recipe.logits_divided_by else []
    return recipe.model_type, *cells, ", ".join(head)


def _check(args: argparse.Namespace) -> int:
    """Load or build the model, print and write the report; 1 where it does not agree."""
    gpu = torch.cuda.is_available()
    device = args.device if args.device != "auto" else "cuda" if gpu else "cpu"
    if device == "cuda" and not gpu:
        raise UsageError("--device cuda: torch sees no GPU")
    dtype = getattr(torch, args.dtype or ("bfloat16" if device == "cuda" else "float32"))
    try:
        config = LigerConfig.of(args.config)
        model = _load(args.model, dtype, device, args.layers)
        apply(model, config).revert()
        batch = sample_batch(
            model.config, args.batch, args.length, device=model.device, dtype=dtype
        )
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(error) from error
    report = check(model, batch, config, steps=args.steps)
    print(report)
    if args.json:
        given = {k: v for k, v in vars(args).items() if k not in ("run", "json")}
        figures = {"arguments": given} | report.to_dict() | {"environment": environment()}
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0 if report.ok else 1


def _load(name: str, dtype: torch.dtype, device: str, layers: int | None) -> Any:
    """The model of a folder or hub id; that of a config.json with random weights."""
    from transformers import AutoConfig
    from transformers.utils import logging

    if name.startswith(("/", ".", "~")) or name.endswith(".json"):  # no hub id
        if not Path(name).expanduser().exists():
            raise UsageError(f"{name}: no such folder or file")
        name = str(Path(name).expanduser())
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(name)
    if name.endswith(".json"):
        return sample_model(config, layers=layers, dtype=dtype, device=device)
    config = cut(config, layers)
    return auto_class(config).from_pretrained(name, config=config, dtype=dtype).to(device)


if __name__ == "__main__":
    sys.exit(main())
