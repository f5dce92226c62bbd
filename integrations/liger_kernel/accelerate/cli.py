"""The command `accelerate-liger`: accelerate's `config` and `launch`, with a toggle for the patch.

The choice stands in accelerate's own file, where accelerate itself reads over it:

    dynamo_config: {use_liger: true, liger_config: {rope: false}}
"""

import argparse
import json
import os
import sys
from typing import Any

from accelerate.commands.config import config_command_parser
from accelerate.commands.config.config_args import (
    ClusterConfig,
    default_config_file,
    load_config_from_file,
)
from accelerate.commands.config.config_utils import _ask_field, _convert_yes_no_to_bool
from accelerate.commands.config.default import default_command_parser
from accelerate.commands.config.update import update_command_parser
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.commands.utils import CustomArgumentParser
from accelerate.utils import DistributedType, clear_environment, patch_environment

from liger_kernel.config import FLAGS, USE_LIGER, LigerConfig, flag, named

RUN = "liger_kernel.accelerate.run"
ON = tuple(name for name in FLAGS if getattr(LigerConfig(), name))  # by default


class UsageError(Exception):
    """Said in one line, status 2."""


def main(argv: list[str] | None = None) -> int:
    """0 where all is well, 2 for an error in the arguments or the file; else as accelerate does."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except UsageError as error:
        said = " ".join(str(error).split())
        print(f"accelerate-liger {args.command}: error: {said}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CustomArgumentParser(
        prog="accelerate-liger", description="accelerate's own commands with a toggle for Liger."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    config = config_command_parser(commands)
    subcommands = config.add_subparsers(title="subcommands", dest="subcommand")
    for add in (
        config,
        default_command_parser(subcommands, parents=[]),
        update_command_parser(subcommands, parents=[]),
    ):
        # Without defaults, so that what is given before a subcommand stands.
        add.add_argument(
            "--use_liger", choices=("true", "false"), default=argparse.SUPPRESS,
            help="Whether to patch models with Liger's kernels and losses; not asked then.",
        )  # fmt: skip
        add.add_argument(
            "--liger_config", metavar="JSON", default=argparse.SUPPRESS,
            help='Options of LigerConfig, for example \'{"rope": false}\'.',
        )  # fmt: skip
        add.set_defaults(run=_config)
    launch_command_parser(commands).set_defaults(run=_launch)
    return parser


def _config(args: argparse.Namespace) -> None:
    """accelerate's command, then the choice into the file that it has written."""
    file = str(getattr(args, "save_location", None) or args.config_file or default_config_file)
    try:
        choice = _given(args)
        if choice and args.subcommand == "default" and os.path.exists(file):
            raise UsageError(
                f"{file} is there already: `accelerate-liger config update` changes it"
            )
        args.func(args)
        config = load_config_from_file(file)
        if choice is None and args.subcommand is None and isinstance(config, ClusterConfig):
            choice = _asked()
        if choice:
            config.dynamo_config = (config.dynamo_config or {}) | choice
            (config.to_json_file if file.endswith(".json") else config.to_yaml_file)(file)
            print(f"liger's choice saved at {file}: {json.dumps(choice)}")
    except (OSError, ValueError) as error:
        raise UsageError(error) from error


def _given(args: argparse.Namespace) -> dict[str, Any] | None:
    """The choice by options; None where there are none."""
    if not {"use_liger", "liger_config"} & vars(args).keys():
        return None
    choice: dict[str, Any] = {"use_liger": getattr(args, "use_liger", "true") == "true"}
    if hasattr(args, "liger_config"):
        if not choice["use_liger"]:
            raise UsageError("--liger_config says how to patch, --use_liger false not to")
        choice["liger_config"] = _options(args.liger_config)
    return choice


def _asked() -> dict[str, Any]:
    """The choice by questions in accelerate's manner."""
    use = _ask_field(
        "Do you want to patch your models with Liger's kernels and losses? [yes/NO]: ",
        _convert_yes_no_to_bool,
        default=False,
        error_message="Please enter yes or no.",
    )
    if not use:
        return {"use_liger": False}
    off = _ask_field(
        f"Which of {', '.join(ON)} do you want to turn off (separated by commas)? [none]: ",
        _turned_off,
        default={},
        error_message="Please enter some of these names, or nothing.",
    )
    return {"use_liger": True} | ({"liger_config": off} if off else {})


def _turned_off(answer: str) -> dict[str, bool]:
    off = named({name.strip(): False for name in answer.split(",")})
    if not off.keys() <= set(ON):
        raise ValueError(answer)
    return off


def _options(value: Any) -> dict[str, Any]:
    """The options that are given, by LigerConfig's own names.

    Raises:
        ValueError: as LigerConfig.of.
    """
    with clear_environment():  # LIGER_* are for a run, not for the file
        LigerConfig.of(value)
    return named((json.loads(value) if isinstance(value, str) else value) or {})


def _launch(args: argparse.Namespace) -> None:
    """accelerate's command, which starts `run` in the script's place where the patch is on."""
    file = args.config_file or default_config_file
    config = None
    try:
        # accelerate's own condition for reading it
        if args.config_file is not None or (os.path.isfile(file) and not args.cpu):
            config = load_config_from_file(file)
        variables = _variables(file, (config and config.dynamo_config) or {})
    except (OSError, ValueError) as error:
        raise UsageError(error) from error
    if variables is None:
        launch_command(args)
        return
    if args.no_python:
        raise UsageError("use_liger patches Python scripts, --no_python starts something else")
    cluster = config is None or isinstance(config, ClusterConfig)
    if not cluster or args.tpu or (config and config.distributed_type == DistributedType.XLA):
        raise UsageError(
            "use_liger is not there for TPUs and SageMaker, which start scripts otherwise"
        )
    script = [*(["-m"] if args.module else []), args.training_script]
    args.training_script_args = [*script, *args.training_script_args]
    args.training_script, args.module = RUN, True
    with patch_environment(**variables):  # every launcher hands it on
        launch_command(args)


def _variables(file: str, toggle: dict[str, Any]) -> dict[str, str] | None:
    """What turns the patch on as the file wants it, where the environment does not say otherwise.

    None where it is off: a script that asks for it itself finds the environment as it was.
    """
    wanted = os.environ.get(USE_LIGER)  # empty is unset
    use = flag(USE_LIGER, wanted) if wanted else toggle.get("use_liger") or False
    if not isinstance(use, bool):
        raise UsageError(f"{file}: use_liger must be true or false, got {use!r}")
    if not use:
        return None
    try:
        options = _options(toggle.get("liger_config"))
    except ValueError as error:
        raise UsageError(f"{file}: {error}") from error
    found = {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for field, value in options.items()
        if value is not None and not os.environ.get(name := f"LIGER_{field.upper()}")
    }
    LigerConfig.of()  # what the environment itself says, before all processes fail on it
    return {USE_LIGER: "true"} | found


if __name__ == "__main__":
    sys.exit(main())
