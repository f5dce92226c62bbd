"""The command `liger`: what it prints, what it finds, how it fails."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from liger_kernel import __version__, environment
from liger_kernel.cli import main
from liger_kernel.transformers import layers
from liger_kernel.transformers.sample import cut, sample_model
from tiny import TINY, build

SMALL = ("--device", "cpu", "--batch", "2", "--length", "16", "--steps", "0")


@pytest.fixture(autouse=True)
def quiet() -> Any:
    """The command turns transformers' messages off for its own process."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with weights."""
    path = tmp_path_factory.mktemp("llama")
    build(num_hidden_layers=3).save_pretrained(path)
    return path


def break_norm(monkeypatch: Any) -> None:
    right = layers.rms_norm
    monkeypatch.setattr(layers, "rms_norm", lambda *args, **kwargs: right(*args, **kwargs) * 1.05)


def test_env_says_what_is_here(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("LIGER_ROPE", "0")
    status, out = main(["env"]), capsys.readouterr().out
    assert status == 0 and "WARNING" not in out
    facts = {line.split()[0]: line.split(maxsplit=1)[1] for line in out.splitlines()}
    assert facts["torch"] == version("torch") and facts["variables"] == "LIGER_ROPE=0"
    assert str(Path(environment.__file__).parent) in facts["liger_kernel"]
    assert torch.cuda.is_available() or (facts["devices"], facts["ops"]) == (
        "none",
        "torch, there is no GPU",
    )


def test_env_finds_bad_variables(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("LIGER_ROPES", "0")
    monkeypatch.setenv("LIGER_IMPL", "cuda")
    status, out = main(["env"]), capsys.readouterr().out
    assert status == 1
    assert "WARNING: LIGER_ROPES is not an option" in out and "impl must be one of" in out
    monkeypatch.delenv("LIGER_IMPL")
    monkeypatch.setenv("ACCELERATE_USE_LIGER", "perhaps")
    assert main(["env"]) == 1
    assert "WARNING: ACCELERATE_USE_LIGER must be one of" in capsys.readouterr().out


def distribution(at: Path, name: str, version: str, record: str) -> None:
    info = at / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text(record)


def test_env_finds_what_another_installation_has_left(
    capsys: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    ours = Path(environment.__file__).parent
    distribution(tmp_path, "liger_kernel", "0.8.5", f"{ours}/__init__.py,,\n{ours}/gone.py,,\n")
    distribution(tmp_path, "liger_kernel_nightly", "0.9", f"{ours}/__init__.py,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    status, out = main(["env"]), capsys.readouterr().out
    assert status == 1
    assert f"WARNING: liger-kernel 0.8.5 is installed, liger_kernel {__version__} is" in out
    assert f"WARNING: liger-kernel 0.8.5 lacks {ours}/gone.py: reinstall it" in out
    assert "WARNING: liger-kernel-nightly 0.9 writes to the same folder" in out


def test_models_is_the_table_of_recipes(capsys: Any) -> None:
    from liger_kernel.transformers.recipes import RECIPES

    assert main(["models"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[-1] == "head" and [row.split()[0] for row in rows] == list(RECIPES)
    assert main(["models", "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = {
        cells[1]: cells[2:-1] for line in lines if (cells := [*map(str.strip, line.split("|"))])
    }
    assert table["llama"] == ["RMSNorm", "SwiGLU", "yes", "fused"]
    assert table["gemma2"] == ["RMSNorm (1 + w)", "GEGLU", "yes", "fused, softcap"]
    assert table["phi3"][1] == "SwiGLU (packed)" and table["mixtral"][1] == "SwiGLU (experts)"
    assert table["qwen2_vl"][0].endswith("LayerNorm (vision)")
    assert table["granite"][3] == "fused, logits divided" and table["glm"][2] == "interleaved"


@pytest.mark.parametrize("command", ["['--help']", "['models']"])
def test_help_and_models_load_no_framework(command: str) -> None:
    code = f"""
import sys
sys.path[:0] = {[p for p in sys.path if p]}
sys.modules["transformers"] = None
from liger_kernel.cli import main
try:
    main({command})
except SystemExit as done:
    assert done.code == 0
assert not {{"accelerate"}} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and done.stdout


def test_check_agrees_on_a_folder_and_writes_its_figures(
    folder: Path, capsys: Any, tmp_path: Path
) -> None:
    file = tmp_path / "report.json"
    args = ("--device", "cpu", "--length", "48", "--steps", "1", "--layers", "2")
    status = main(["check", str(folder), *args, "--json", str(file)])
    out = capsys.readouterr().out
    assert status == 0, out
    assert "LlamaRMSNorm x5 -> rms_norm" in out and "OK: loss and 21 gradients agree" in out
    report = json.loads(file.read_text())
    assert report["ok"] and report["problems"] == [] and report["dtype"] == "float32"
    assert report["shape"] == [2, 48] and report["arguments"]["layers"] == 2
    assert report["environment"]["torch"] == version("torch")
    names = [row["name"] for row in report["rows"]]
    assert names[0] == "loss" and "model.layers.1.mlp.up_proj.weight" in names and len(names) == 22
    for variant in ("plain", "patched"):
        figures = report[variant]
        assert figures["loss"] == pytest.approx(report["exact_loss"], rel=1e-5)
        assert figures["step_ms"] > 0 and figures["peak_mib"] > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_check_agrees_on_a_config(folder: Path, capsys: Any, dtype: str) -> None:
    status = main(["check", str(folder / "config.json"), *SMALL, "--dtype", dtype])
    assert status == 0, capsys.readouterr().out


def test_layers_that_are_kept_end_with_one_that_sees_all() -> None:
    kinds = ["sliding_attention"] * 3 + ["full_attention", "sliding_attention"]
    config = AutoConfig.for_model(
        "gemma3_text", **TINY | dict(num_hidden_layers=5), layer_types=kinds
    )
    assert cut(config, 2).layer_types == kinds[2:4] and cut(config, 5).layer_types == kinds
    assert cut(config, None).num_hidden_layers == config.num_hidden_layers == 5  # not changed
    model = sample_model(config, layers=1, dtype=torch.bfloat16)
    assert len(model.model.layers) == 1 and model.config.layer_types == ["full_attention"]
    assert model.dtype == torch.bfloat16 and model.model.norm.weight.std() > 0.05
    again = sample_model(config, layers=1, dtype=torch.bfloat16)
    assert torch.equal(model.model.norm.weight, again.model.norm.weight)
    config = AutoConfig.for_model("mllama_text_model", cross_attention_layers=[1, 3])
    assert cut(config, 2).cross_attention_layers == [1]


def test_check_finds_a_broken_op(folder: Path, capsys: Any, monkeypatch: Any) -> None:
    break_norm(monkeypatch)
    assert main(["check", str(folder), *SMALL]) == 1
    out = capsys.readouterr().out
    assert "MISMATCH" in out and "model.layers.0.mlp.down_proj.weight: error " in out


def test_check_with_nothing_patched_is_no_success(
    folder: Path, capsys: Any, monkeypatch: Any
) -> None:
    off = json.dumps(dict.fromkeys(("rope", "norm", "layer_norm", "mlp", "fused_head"), False))
    assert main(["check", str(folder), *SMALL, "--config", off]) == 1
    assert "nothing is patched: the configuration asks for nothing" in capsys.readouterr().out
    monkeypatch.setenv("LIGER_DISABLE", "1")
    assert main(["check", str(folder), *SMALL]) == 1
    assert "nothing is patched: LIGER_DISABLE is set" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args, said",
    [
        (["--layers", "9"], "layers=9, but the model has 3"),
        (["--config", "{rope"], "not valid JSON"),
        (["--config", '{"ropes": true}'], "'ropes' is not a liger_config option"),
        (["--length", "4"], "length=4 is too short"),
        (["--batch", "0"], "must be at least 1, got 0"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--device", "cuda"], "torch sees no GPU"),
    ],
)
def test_usage_errors(folder: Path, capsys: Any, monkeypatch: Any, args: Any, said: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        status = main(["check", str(folder / "config.json"), *SMALL, *args])
    except SystemExit as done:  # argparse's
        status = done.code
    printed = capsys.readouterr()
    assert status == 2 and said in printed.err and printed.out == ""


def test_models_that_cannot_be_checked(capsys: Any, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(
        '{"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 9}'
    )
    assert main(["check", str(config), *SMALL]) == 2
    said = capsys.readouterr().err
    assert said.startswith("liger check: error: no recipe for model type 'gpt2'")
    assert said.count("\n") == 1
    assert main(["check", str(config), *SMALL, "--config", '{"generic": true}']) == 0
    assert "fused linear cross entropy" in capsys.readouterr().out
    for name in (str(tmp_path / "nothing"), "./nothing.json", "~/nothing"):
        assert main(["check", name, *SMALL]) == 2
        said = capsys.readouterr().err
        assert said == f"liger check: error: {name}: no such folder or file\n"
