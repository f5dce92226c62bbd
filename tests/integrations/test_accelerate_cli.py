"""`accelerate-liger`: what it asks and writes, what launched processes are given and compute."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.commands.menu import selection_menu

from launch import free_port
from liger_kernel.accelerate import cli
from liger_kernel.config import NAMES

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CONFIGS = {path.stem: path for path in (ROOT / "configs/accelerate").glob("*.yaml")}
LOOP, SHARDED = HERE / "accelerate_loop_job.py", HERE / "accelerate_cpu_sharded_job.py"
OURS, THEIRS = "liger_kernel.accelerate.cli", "accelerate.commands.accelerate_cli"
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="its numbers are a CPU's")


@pytest.fixture(autouse=True)
def environment(monkeypatch: Any, tmp_path: Path) -> None:
    """No variable of either project, and no default file."""
    for name in os.environ:
        if name.startswith(("LIGER_", "ACCELERATE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    monkeypatch.setattr(cli, "default_config_file", str(tmp_path / "default_config.yaml"))


def python(*args: Any, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    folders = os.pathsep.join(map(str, (ROOT, ROOT / "integrations")))
    if before := os.environ.get("PYTHONPATH"):
        folders += os.pathsep + before
    command = [sys.executable, "-W", "ignore", *map(str, args)]
    with subprocess.Popen(
        command, cwd=cwd, env=os.environ | {"PYTHONPATH": folders, "OMP_NUM_THREADS": "1"} | env,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as job:  # fmt: skip
        try:
            said = job.communicate(timeout=180)
        except BaseException:
            job.terminate()  # so that a launcher stops its processes, which a kill would leave
            raise
    return subprocess.CompletedProcess(command, job.returncode, *said)


def write(path: Path, **dynamo: Any) -> Path:
    config = {"distributed_type": "NO", "num_processes": 1, "dynamo_config": dynamo}
    path.write_text(json.dumps(config) if path.suffix == ".json" else yaml.safe_dump(config))
    return path


def read(path: Path) -> dict[str, Any]:
    """What stock accelerate finds in the file."""
    return load_config_from_file(str(path)).dynamo_config


# config


def answer(monkeypatch: Any, **answers: str) -> list[str]:
    """Answers by a word of the question, else the default; returns the questions as they come."""
    asked: list[str] = []

    def reply(question: str = "") -> str:
        asked.append(question)
        return next((text for word, text in answers.items() if word in question), "")

    monkeypatch.setattr(selection_menu, "in_colab", True)  # menus read numbers, not keys
    monkeypatch.setattr("builtins.input", reply)
    return asked


@pytest.mark.parametrize("name", ["config.yaml", "config.json"])
def test_the_questionnaire_writes_into_accelerates_file(
    monkeypatch: Any, tmp_path: Path, name: str
) -> None:
    file = tmp_path / name
    asked = answer(monkeypatch, CPU="yes", Liger="yes", off="rope, rms_norm")
    assert cli.main(["config", "--config_file", str(file)]) == 0
    assert read(file) == {"use_liger": True, "liger_config": {"rope": False, "norm": False}}
    assert load_config_from_file(str(file)).use_cpu is True
    assert [("Liger" in q, "turn off" in q) for q in asked[-2:]] == [(True, False), (False, True)]


def test_the_questionnaire_with_other_answers(monkeypatch: Any, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    asked = answer(monkeypatch)
    assert cli.main(["config", "--config_file", str(file)]) == 0
    assert read(file) == {"use_liger": False} and "Liger" in asked[-1]
    answer(monkeypatch, Liger="yes")
    assert cli.main(["config", "--config_file", str(file)]) == 0
    assert read(file) == {"use_liger": True}


def test_a_wrong_answer_is_asked_again(monkeypatch: Any, capsys: Any) -> None:
    replies = iter(["maybe", "yes", "ropes", "cross_entropy", "rope"])
    monkeypatch.setattr("builtins.input", lambda _: next(replies))
    assert cli._asked() == {"use_liger": True, "liger_config": {"rope": False}}
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and said[0] == "Please enter yes or no." and said[1] == said[2]


def test_options_in_place_of_questions(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("LIGER_ROPE", "perhaps")  # is for runs: neither written nor checked here
    file = tmp_path / "config.yaml"
    asked = answer(monkeypatch)
    line = ["config", "--config_file", str(file)]
    assert cli.main([*line, "--liger-config", '{"swiglu": false, "memory_budget": 7}']) == 0
    assert read(file) == {"use_liger": True, "liger_config": {"mlp": False, "memory_budget": 7}}
    assert not [question for question in asked if "Liger" in question]


def test_subcommands(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr("builtins.input", None)
    file = tmp_path / "config.yaml"
    to = ("--config_file", str(file))
    assert cli.main(["config", "--use_liger", "true", "default", *to]) == 0
    assert read(file) == {"use_liger": True}
    assert cli.main(["config", "update", *to, "--liger_config", '{"impl": "torch"}']) == 0
    assert cli.main(["config", "update", *to, "--use_liger", "false"]) == 0
    assert cli.main(["config", "update", *to]) == 0
    assert read(file) == {"use_liger": False, "liger_config": {"impl": "torch"}}
    assert cli.main(["config", "update", *to, "--liger_config", "{}"]) == 0
    assert read(file)["use_liger"] and not read(file)["liger_config"]


@pytest.mark.parametrize(
    "args, said",
    [
        (["--liger_config", '{"ropes": false}'], "'ropes' is not a liger_config option"),
        (["--liger_config", "{rope"], "not valid JSON"),
        (["--liger_config", '{"rope": 0}'], "rope must be true or false, got 0"),
        (["--use_liger", "false", "--liger_config", "{}"], "--use_liger false not to"),
        (["--use_liger", "perhaps"], "invalid choice: 'perhaps'"),
        (["default", "--config_file", "{file}", "--use_liger", "true"], "is there already"),
        (["update", "--config_file", "{file}.yaml"], "doesn't exist"),
    ],
)
def test_config_errors(
    monkeypatch: Any, capsys: Any, tmp_path: Path, args: list[str], said: str
) -> None:
    monkeypatch.setattr("builtins.input", None)  # before any question
    file = write(tmp_path / "config.json", use_liger=False)
    before = file.read_text()
    args = [arg.replace("{file}", str(file)) for arg in args]
    try:
        status = cli.main(["config", *args])
    except SystemExit as done:  # argparse's
        status = done.code
    assert status == 2 and said in capsys.readouterr().err and file.read_text() == before


# launch: what goes to accelerate


@pytest.fixture
def launched(monkeypatch: Any) -> list[Any]:
    """What accelerate's launch_command was called with, and in which environment."""
    calls: list[Any] = []
    monkeypatch.setattr(
        cli, "launch_command", lambda args: calls.append((vars(args), os.environ.copy()))
    )
    return calls


def handed_on(variables: dict[str, str]) -> dict[str, str]:
    names = {"ACCELERATE_USE_LIGER", *(f"LIGER_{name.upper()}" for name in NAMES)}
    return {name: text for name, text in variables.items() if name in names}


@pytest.mark.parametrize(
    "dynamo, before, after",
    [
        ({}, {}, None),
        ({"use_liger": False, "liger_config": {"rope": False}}, {}, None),
        ({"use_liger": True}, {}, {}),
        ({"use_liger": True, "liger_config": None}, {}, {}),
        ({"use_liger": True}, {"ACCELERATE_USE_LIGER": "false"}, None),
        ({"use_liger": True}, {"ACCELERATE_USE_LIGER": ""}, {}),
        ({"use_liger": False}, {"ACCELERATE_USE_LIGER": "1"}, {}),
        ({}, {"ACCELERATE_USE_LIGER": "true", "LIGER_ROPE": "0"}, {"LIGER_ROPE": "0"}),
        (
            {"use_liger": True, "liger_config": {"rms_norm": False, "rope": True, "impl": "torch"}},
            {"LIGER_IMPL": "triton", "LIGER_ROPE": ""},
            {"LIGER_NORM": "false", "LIGER_ROPE": "true", "LIGER_IMPL": "triton"},
        ),
        (
            {"use_liger": True, "liger_config": {"memory_budget": 7, "accum_dtype": None}},
            {},
            {"LIGER_MEMORY_BUDGET": "7"},
        ),
        ({"use_liger": True, "liger_config": '{"mlp": false}'}, {}, {"LIGER_MLP": "false"}),
    ],
)
def test_the_environment_wins_over_the_file(
    monkeypatch: Any, tmp_path: Path, launched: list[Any], dynamo: Any, before: Any, after: Any
) -> None:
    for name, text in before.items():
        monkeypatch.setenv(name, text)
    file = write(tmp_path / "config.yaml", **dynamo)
    assert cli.main(["launch", "--config_file", str(file), "train.py", "-m", "--lr", "1"]) == 0
    ((args, variables),) = launched
    script = (bool(args["module"]), args["training_script"], args["training_script_args"])
    if after is None:
        assert script == (False, "train.py", ["-m", "--lr", "1"])
        assert handed_on(variables) == before
    else:
        assert script == (True, cli.RUN, ["train.py", "-m", "--lr", "1"])
        assert handed_on(variables) == {"ACCELERATE_USE_LIGER": "true"} | after
    assert handed_on(dict(os.environ)) == before


def test_files_and_modules_as_accelerate_takes_them(
    monkeypatch: Any, tmp_path: Path, launched: list[Any]
) -> None:
    write(Path(cli.default_config_file), use_liger=True)
    assert cli.main(["launch", "-m", "pkg.train", "--lr", "1"]) == 0
    assert cli.main(["launch", "--cpu", "train.py"]) == 0  # accelerate does not read it then
    file = write(tmp_path / "config.json", use_liger=True)
    assert cli.main(["launch", "--config-file", str(file), "--cpu", "train.py"]) == 0
    given = [(args["training_script"], args["training_script_args"]) for args, _ in launched]
    assert given == [
        (cli.RUN, ["-m", "pkg.train", "--lr", "1"]), ("train.py", []), (cli.RUN, ["train.py"]),
    ]  # fmt: skip
    assert launched[0][0]["nondefault"] == {"module", "training_script", "training_script_args"}


@pytest.mark.parametrize("launcher", ["simple", "elastic", "deepspeed"])
def test_every_launcher_hands_it_on(monkeypatch: Any, tmp_path: Path, launcher: str) -> None:
    """On this machine, down to the command that accelerate would start."""
    found: dict[str, Any] = {}

    class Process:
        returncode = 0

        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            found.update(command=command, env=env)

        def wait(self) -> None: ...

    def run(args: Any) -> None:
        command = ["-m"] if args.module else []
        command += [args.training_script, *args.training_script_args]
        found.update(command=command, env=os.environ.copy())

    monkeypatch.setattr("accelerate.commands.launch.subprocess.Popen", Process)
    monkeypatch.setattr("torch.distributed.run.run", run)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_LIGER", "true")
    options = {
        "simple": ["--cpu", "--num_processes", "1"],
        "elastic": ["--multi_gpu", "--num_processes", "2"],
        "deepspeed": ["--use_deepspeed", "--num_processes", "4", "--num_machines", "2"],
    }[launcher]
    if launcher == "deepspeed":
        pytest.importorskip("deepspeed")
        options += ["--main_process_ip", "localhost", "--deepspeed_hostfile", "hosts"]
    options += ["--main_process_port", str(free_port()), "--mixed_precision", "no"]
    options += ["--config_file", str(write(tmp_path / "c.yaml", liger_config={"rope": False}))]
    assert cli.main(["launch", *options, "train.py", "--lr", "1"]) == 0
    tail = [cli.RUN, "train.py", "--lr", "1"]
    module = "--module" if launcher == "deepspeed" else "-m"
    assert found["command"][-5:] == [module, *tail]
    wanted = {"ACCELERATE_USE_LIGER": "true", "LIGER_ROPE": "false"}
    assert handed_on(found["env"]) == wanted
    if launcher == "deepspeed":  # pdsh exports what stands in this file
        lines = (tmp_path / ".deepspeed_env").read_text().splitlines()
        assert handed_on(dict(line.split("=", 1) for line in lines)) == wanted


@pytest.mark.parametrize(
    "dynamo, args, said",
    [
        ({"liger_config": {"ropes": False}}, [], "{file}: 'ropes' is not a liger_config option"),
        ({"liger_config": {"rope": "no"}}, [], "{file}: rope must be true or false, got 'no'"),
        ({"liger_config": [1]}, [], "{file}: liger_config must be a mapping"),
        ({"use_liger": "perhaps"}, [], "{file}: use_liger must be true or false, got 'perhaps'"),
        ({}, ["--no_python"], "--no_python starts something else"),
        ({}, ["--tpu"], "not there for TPUs"),
    ],
)
def test_launch_errors(
    capsys: Any, tmp_path: Path, launched: list[Any], dynamo: Any, args: list[str], said: str
) -> None:
    file = write(tmp_path / "config.yaml", **{"use_liger": True} | dynamo)
    assert cli.main(["launch", "--config_file", str(file), *args, "train.py"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("accelerate-liger launch: error: ") and printed.count("\n") == 1
    assert said.replace("{file}", str(file)) in printed and not launched


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("ACCELERATE_USE_LIGER", "perhaps", "ACCELERATE_USE_LIGER must be one of"),
        ("LIGER_ROPE", "perhaps", "LIGER_ROPE must be one of"),
    ],
)
def test_errors_of_the_environment(
    monkeypatch: Any,
    capsys: Any,
    tmp_path: Path,
    launched: list[Any],
    name: str,
    text: str,
    said: str,
) -> None:
    monkeypatch.setenv(name, text)
    file = write(tmp_path / "config.yaml", use_liger=True)
    assert cli.main(["launch", "--config_file", str(file), "train.py"]) == 2
    assert said in capsys.readouterr().err and not launched
    assert cli.main(["launch", "--config_file", f"{file}.yml", "train.py"]) == 2
    assert "does not exist" in capsys.readouterr().err


# launch: what the processes do


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_stock_accelerate_takes_the_ready_files(name: str) -> None:
    args = ["--config_file", str(CONFIGS[name]), "train.py"]
    args, config, _ = _validate_launch_command(launch_command_parser().parse_args(args))
    assert config.dynamo_config == {"use_liger": True, "liger_config": None}
    assert args.num_processes == 2 and args.dynamo_backend == "no"
    kind = "cpu" if name.startswith("cpu") else name.rstrip("123")
    assert {
        "cpu": args.use_cpu and args.multi_gpu and args.mixed_precision == "no",
        "ddp": args.multi_gpu and args.mixed_precision == "bf16",
        "fsdp": args.use_fsdp and args.fsdp_auto_wrap_policy == "TRANSFORMER_BASED_WRAP"
        and args.mixed_precision == "bf16" and str(args.fsdp_version) == name[-1],
        "zero": args.use_deepspeed and args.zero_stage == 3 and args.mixed_precision == "bf16",
    }[kind]  # fmt: skip


CPU = {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
FP32 = ["--mixed_precision", "no"]
# FSDP1 would hand the weights round by GPUs
EACH = ["--fsdp_cpu_ram_efficient_loading", "false", "--fsdp_sync_module_states", "false"]
RUNS = {  # options, script, environment, what accelerate makes of it
    "one": (["--cpu", "--num_processes", "1"], [LOOP], {}, "NO"),
    "cpu-ddp": ([], [LOOP], {"ACCELERATE_USE_CPU": "true"}, "MULTI_CPU"),
    "fsdp2": (FP32, [SHARDED, LOOP], CPU, "FSDP"),
    "fsdp1": (FP32 + EACH, [SHARDED, LOOP], CPU, "FSDP"),
    "zero3": (FP32, [SHARDED, LOOP], CPU, "DEEPSPEED"),
}
SLOW = ("fsdp1", "zero3")


def lines(done: subprocess.CompletedProcess[str]) -> list[Any]:
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')]


@no_gpu
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in RUNS]
)
def test_an_unmodified_script_trains_the_same(tmp_path: Path, name: str) -> None:
    if name == "zero3":
        pytest.importorskip("deepspeed")
    options, script, env, kind = RUNS[name]
    file = CONFIGS.get(name) or write(tmp_path / "one.yaml", use_liger=True)
    world = 1 if kind == "NO" else 2
    options = ["launch", "--config_file", file, "--main_process_port", free_port(), *options]
    on = ["-m", OURS, *options]
    off = {"one": [], "cpu-ddp": on}.get(name, ["-m", THEIRS, *options])
    plain = lines(python(*off, *script, cwd=tmp_path, ACCELERATE_USE_LIGER="false", **env))
    patched = lines(python(*on, *script, cwd=tmp_path, **env))
    assert len(plain) == len(patched) == 6 / world
    for (there, want, full), (here, got, width) in zip(plain, patched, strict=True):
        assert there == here == kind and len(want) == world and (full, width) == (97, 0)
        assert got == pytest.approx(want, rel=1e-5)


# run


SCRIPT = """
import json, multiprocessing, os, sys
import beside

def own(x):
    return [x, __name__, __file__]

if __name__ == "__main__":
    import __main__
    facts = [os.path.abspath(sys.argv[0]), sys.argv[1:], sys.path[0], __file__, __name__]
    facts.append(__main__.own is own)
    os.chdir("/")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        facts.append(pool.map(own, [1]))
    print(json.dumps(facts))
    if "raise" in sys.argv:
        raise RuntimeError("of the script")
    sys.exit(7)
"""


@pytest.mark.parametrize("args", [["script.py", "-m", "--x"], ["-m", "package.script", "raise"]])
def test_run_is_as_python_would_run_it(tmp_path: Path, args: list[str]) -> None:
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "script.py").write_text(SCRIPT)
    (tmp_path / "beside.py").touch()
    if args[0] == "script.py":
        (tmp_path / "beside.py").rename(folder / "beside.py")
        args = ["package/script.py", *args[1:]]
    plain = python(*args, cwd=tmp_path)
    ours = python("-m", cli.RUN, *args, cwd=tmp_path)
    assert plain.stdout and ours.stdout == plain.stdout, ours.stderr
    assert ours.returncode == plain.returncode == (1 if "raise" in args else 7)
    last = plain.stderr.splitlines()[-3:]  # the script's own frame and the error
    assert ours.stderr.splitlines()[-3:] == last
    assert ("RuntimeError: of the script" in last) == ("raise" in args)


def test_run_installs_however_accelerate_is_looked_for(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import importlib.util, transformers\n"
        "assert importlib.util.find_spec('accelerate')\n"
        "from accelerate import Accelerator\n"
        "from liger_kernel.stock import _installed\n"
        "print(*_installed)"
    )
    assert python("-m", cli.RUN, script).stdout == "accelerate\n"
    both = f"import accelerate, sys; from {cli.RUN} import main; main(sys.argv[1:])"
    assert python("-c", both, script).stdout == "accelerate\n"


def test_run_leaves_the_scripts_variables_their_time(tmp_path: Path) -> None:
    """What Hugging Face's libraries read when they are imported, scripts set at their top."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os; os.environ['HF_HUB_OFFLINE'] = '1'; import accelerate\n"
        "from liger_kernel.stock import _installed\n"
        "from huggingface_hub import constants\n"
        "print(constants.HF_HUB_OFFLINE, *_installed)"
    )
    done = python("-m", cli.RUN, script, HF_HUB_OFFLINE="0")
    assert done.stdout == "True accelerate\n", done.stderr


def test_run_without_a_script() -> None:
    done = python("-m", cli.RUN, "-m")
    assert done.returncode == 2 and done.stderr.startswith("usage: python -m liger_kernel")
