"""The command `liger`: what it prints, what it finds, how it fails."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from liger_kernel import __version__, environment
from liger_kernel.check import FACTOR, FLOOR, Row, allowed, check
from liger_kernel.cli import main
from liger_kernel.exact import SameRoutes, wider
from liger_kernel.transformers import apply, layers, patch_of
from tiny import batch, build

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
    """A tiny llama with weights and a byte tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("llama")
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<eos>"]
    tokens = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<eos>").save_pretrained(path)
    build(vocab_size=len(alphabet), num_hidden_layers=3).save_pretrained(path)
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


def distribution(at: Path, name: str, version: str, record: str) -> None:
    info = at / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text(record)


def test_env_finds_what_another_installation_has_left(
    capsys: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    ours = Path(environment.__file__).parent
    distribution(tmp_path, "liger_kernel", "0.8.5", f"{ours}/__init__.py,sha256=abc,1\n")
    distribution(tmp_path, "liger_kernel_nightly", "0.9", f"{ours}/__init__.py,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    status, out = main(["env"]), capsys.readouterr().out
    assert status == 1
    assert f"WARNING: liger-kernel 0.8.5 is installed, liger_kernel {__version__} is" in out
    assert "WARNING: not as liger-kernel 0.8.5 has installed them: " in out
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
assert not {{"accelerate", "liger_kernel.check"}} & sys.modules.keys()
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
        (["--layers", "9"], "--layers 9: the model has 3"),
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
    assert main(["check", str(tmp_path / "nothing"), *SMALL]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# The function


def inputs() -> dict[str, torch.Tensor]:
    ids, labels = batch()
    return {"input_ids": ids, "labels": labels}


def state(model: Any) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in (*model.named_parameters(), *model.named_buffers())}


def test_the_model_comes_back_as_it_was() -> None:
    model = build(attention_dropout=0.5, tie_word_embeddings=True).bfloat16().eval()
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.float() / 3
    model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)
    for p in model.model.layers[0].parameters():
        p.requires_grad_(False)
    before = state(model)
    report = check(model, inputs(), steps=1)
    assert report.ok, report
    after = state(model)
    assert after.keys() == before.keys() and patch_of(model) is None and not model.training
    for name, t in after.items():
        assert t.dtype == before[name].dtype and torch.equal(t, before[name])
    assert model.model.norm.weight.grad.sum() == 32 and model.lm_head.weight.grad is None
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.layers[0].self_attn.attention_dropout == 0.5
    assert {row.name for row in report.rows} == {
        "loss",
        *(n for n, p in model.named_parameters() if p.requires_grad),
    }


def test_a_gradient_that_only_one_has_is_a_problem(monkeypatch: Any) -> None:
    right = layers.rms_norm

    def broken(x: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
        return right(x, weight.detach(), *args, **kwargs)

    monkeypatch.setattr(layers, "rms_norm", broken)
    report = check(build(), inputs(), steps=0)
    assert not report.ok and "model.norm.weight: the patched model has no gradient" in str(report)


def test_a_loss_that_is_not_a_number_is_said() -> None:
    model = build()
    model.model.norm.weight.data.fill_(float("nan"))
    report = check(model, inputs(), steps=0)
    assert report.problems == ("the plain model's own loss is nan: there is nothing to compare",)


def test_what_cannot_be_checked_raises() -> None:
    model = build()
    with pytest.raises(ValueError, match="no loss: the batch must hold labels"):
        check(model, {"input_ids": batch()[0]}, steps=0)
    with apply(model), pytest.raises(ValueError, match=r"is patched; revert\(\) that"):
        check(model, inputs())
    with pytest.raises(ValueError, match=r"fp32, bf16 or fp16, got \['torch.float64'\]"):
        check(build().double(), inputs())
    with pytest.raises(ValueError, match=r"no parameter .* requires a gradient"):
        check(model.requires_grad_(False), inputs())


def test_the_exact_model_computes_nothing_in_fp32() -> None:
    model = build()
    with wider(model, torch.float64):
        loss = model(**inputs()).loss
        hidden = model.model.norm(torch.full((1, 32), 1 / 3, dtype=torch.float64))
    assert loss.dtype == torch.float64
    want = (1 / 3) / (1 / 9 + 0.1) ** 0.5  # TINY's eps
    assert (hidden - want).abs().max() < 1e-15 and model.dtype == torch.float32


def test_routers_choose_the_same_again() -> None:
    routes, scores = SameRoutes(), torch.tensor([[3.0, 2.0, 1.0]], requires_grad=True)
    with routes:
        first = scores.topk(2)
    with routes:
        values, indices = torch.topk(-scores, k=2, dim=-1)
    assert torch.equal(indices, first.indices) and values.tolist() == [[-3.0, -2.0]]
    values.sum().backward()
    assert scores.grad is not None and scores.grad.tolist() == [[-1.0, -1.0, 0.0]]


def test_experts_are_checked_too() -> None:
    model = build(model_type="mixtral", num_local_experts=4)
    report = check(model, inputs(), steps=0)
    assert report.ok and "MixtralExperts x2 -> glu[silu]" in report.patch, report


def test_the_policy() -> None:
    eps = torch.finfo(torch.float32).eps
    assert allowed(3.0, 10.0, torch.float32) == FACTOR * 3.0 + FLOOR * eps * 10.0
    assert Row("w", 1.0, 0.1, 0.2, 0.2).ok and not Row("w", 1.0, 0.1, 0.21, 0.2).ok
    assert not Row("w", 1.0, 0.1, float("nan"), 0.2).ok
