"""The benchmark runner: floors by their formulas, and one run at tiny sizes."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import families, kernels
from benchmarks.cases import CASES
from benchmarks.providers import PROVIDERS, Provider
from benchmarks.run import flag
from benchmarks.shapes import Head
from benchmarks.table import plot_memory, plot_roofline, plot_shares, table
from benchmarks.worker import Worker, size
from liger_kernel.transformers import layers

ROOT = Path(__file__).parents[1]
BY_NAME = {case.name: case for case in CASES}
HEADS = [case for case in CASES if isinstance(case.shape, Head)]
KERNELS = [case for case in CASES if case not in HEADS]


def named(case) -> str:
    return case.name


@pytest.mark.parametrize(
    "name, products, rows, hidden, vocab",
    [
        ("linear-8k", 3, 8192, 4096, 128256),
        ("linear-8k-budget", 3, 8192, 4096, 128256),
        ("linear-16k", 3, 16384, 4096, 128256),
        ("linear-16k-half", 3, 8192, 4096, 128256),
        ("linear-8k-gemma2", 3, 8192, 2304, 256000),
        ("linear-16k-frozen", 2, 16384, 4096, 128256),
        ("dpo-4", 4, 8192, 4096, 128256),
        ("orpo-16", 3, 8192, 4096, 128256),
        ("logprob-16-saved", 3, 8192, 4096, 128256),
        ("memory-dpo-512", 4, 4096, 4096, 128256),
        ("memory-linear_ce-32768", 3, 4096, 4096, 128256),
    ],
)
def test_floor(name: str, products: int, rows: int, hidden: int, vocab: int) -> None:
    floor = BY_NAME[name].shape.floor
    assert floor.kind == "flops"
    assert floor.amount == products * 2 * rows * hidden * vocab
    assert floor.forward == (2 if products == 4 else 1) * 2 * rows * hidden * vocab
    assert floor.gemm is not None and floor.gemm[1:] == (hidden, vocab)


@pytest.mark.parametrize(
    "name, weights, rows, size_of",
    [
        ("linear-8k", 2, 2, 2),
        ("linear-16k-frozen", 1, 2, 2),
        ("linear-8k-fp32", 2, 2, 4),
        ("dpo-4", 3, 3, 2),
    ],
)
def test_bytes_of_a_head(name: str, weights: int, rows: int, size_of: int) -> None:
    shape = BY_NAME[name].shape
    assert isinstance(shape, Head)
    wanted = weights * shape.vocab * shape.hidden + rows * shape.scored_rows * shape.hidden
    assert shape.floor.bytes == size_of * wanted


@pytest.mark.parametrize(
    "name, forward, both, elements, operations",
    [
        ("rms_norm-65536x4096", 2, 5, 65536 * 4096, 13),
        ("rms_norm-heads-2097152x128", 2, 5, 2097152 * 128, 13),
        ("add_rms_norm-65536x4096", 4, 8, 65536 * 4096, 15),
        ("layer_norm-65536x4096", 2, 5, 65536 * 4096, 20),
        ("swiglu-16384x14336", 3, 8, 16384 * 14336, 18),
        ("swiglu_inplace-16384x14336", 3, 8, 16384 * 14336, 18),
        ("swiglu_packed-16384x14336", 3, 8, 16384 * 14336, 18),
        ("geglu-16384x14336", 3, 8, 16384 * 14336, 31),
        ("rope-16x4096", 2, 4, 16 * 4096 * 40 * 128, 6),
        ("cross_entropy-8192x128256", 1, 2, 8192 * 128256, 7),
    ],
)
def test_floor_of_a_kernel(
    name: str, forward: int, both: int, elements: int, operations: int
) -> None:
    floor = BY_NAME[name].shape.floor
    assert (floor.kind, floor.gemm) == ("bytes", None)
    assert (floor.forward, floor.amount) == (2 * forward * elements, 2 * both * elements)
    assert floor.flops == operations * elements


@pytest.mark.parametrize("case", HEADS, ids=named)
def test_tiny_inputs_match_the_floor(case) -> None:
    tiny = case.tiny()
    inputs = tiny.shape.inputs("cpu")
    assert int((inputs.y != -100).sum()) == tiny.shape.scored_rows
    assert inputs.x.detach().float().std() > 0.5
    assert (inputs.ref_x is not None) == tiny.shape.reference
    assert all(leaf.requires_grad for leaf in tiny.shape.leaves(inputs).values())
    assert inputs.w.requires_grad != tiny.shape.frozen
    assert case.only is None or set(case.only) <= set(PROVIDERS)
    assert case.like is None or case.like in BY_NAME


@pytest.mark.parametrize("case", [c for c in KERNELS if c.group != "mlp"], ids=named)
def test_tensors_of_a_kernel_match_the_floor(case) -> None:
    """Forward reads all but weights, angles and labels once, and writes its outputs once."""
    shape = case.tiny().shape
    inputs = shape.inputs("cpu")
    f = kernels.eager(BY_NAME[case.like or case.name].op)
    assert f is not None
    outputs = f(*inputs.args.values())
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    leaves = shape.leaves(inputs)
    assert len(outputs) == len(shape.outputs)
    assert [y.shape for y in outputs if y.dim()] == [dy.shape for dy in inputs.dys]
    assert all(leaf.is_leaf and leaf.dtype == torch.bfloat16 for leaf in leaves.values())
    wide = sum(t.numel() for t in (*leaves.values(), *outputs) if t.dim() > 1)
    assert shape.floor.forward == 2 * wide


def test_the_floor_of_an_mlp() -> None:
    shape = BY_NAME["mlp_in_tiles-65536x4096x14336"].shape
    assert shape.floor.flops == 9 * 2 * 65536 * 4096 * 14336 == 3 * shape.floor.forward
    assert shape.floor.bytes == 2 * (4 * 65536 * 4096 + 2 * 3 * 4096 * 14336)


@pytest.mark.parametrize("case", KERNELS, ids=named)
def test_ours_agrees_with_eager(case) -> None:
    rows = []
    for name, used in (("eager", BY_NAME[case.like or case.name]), ("ours", case)):
        reply = Worker(PROVIDERS[name], "cpu", smoke=True).prepare(used.name)
        rows.append({"case": used.name, "provider": name, **reply})
    flag(rows)
    assert rows[0]["values"].keys() == rows[1]["values"].keys()
    assert "mismatch" not in rows[1] and rows[1]["extra_mib"] > 0


def test_a_provider_that_overwrites_is_compared_on_fresh_inputs() -> None:
    class Overwriting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            y = g + u
            g.zero_()
            u.zero_()
            return y

        @staticmethod
        def backward(ctx, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return dy.clone(), dy.zero_()

    name = "swiglu-512x1536"
    args, (dy,) = BY_NAME[name].tiny().shape.inputs("cpu")
    values = Worker(Provider(op=lambda _: Overwriting.apply), "cpu", smoke=True).prepare(name)
    expected = {"y": size((args["g"] + args["u"]).detach()), "dg": size(dy), "du": 0.0}
    assert values["values"] == expected


def test_results_that_differ_are_flagged() -> None:
    def row(provider: str, **values: float) -> dict:
        return {"case": "linear-8k", "provider": provider, "values": values}

    rows = [row("eager", loss=2.0, dw=1.0), row("ours", loss=2.01, dw=1.03)]
    rows += [row("trl", loss=float("nan"), dw=1.0)]
    flag(rows)
    assert "mismatch" not in rows[0]
    assert list(rows[1]["mismatch"]) == ["dw"]
    assert list(rows[2]["mismatch"]) == ["loss"]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("benchmarks") / "out.json"
    cases = "^(linear-16k-half|linear-16k-frozen|memory-linear_ce-1024"
    cases += "|rms_norm-16384x4096|cross_entropy-8192x32000|rope-1x512)$"
    command = [sys.executable, "-m", "benchmarks.run", "--smoke", "--cases", cases]
    command += ["--providers", "eager,ours,cce", "--rounds", "2", "--calls", "1", "--out", str(out)]
    command += ["--round-ms", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "| linear-16k-half |" in done.stdout
    return json.loads(out.read_text())


def test_smoke(report: dict) -> None:
    rows = {(row["case"], row["provider"]): row for row in report["rows"]}
    assert report["setting"]["smoke"] and not report["skipped"] and report["commit"]
    for name in ("eager", "ours"):
        assert report["providers"][name]["versions"].keys() == {"torch", "triton"}
        for case, grads in (("linear-16k-half", {"dx", "dw"}), ("linear-16k-frozen", {"dx"})):
            row = rows[case, name]
            assert "error" not in row and "mismatch" not in row
            assert row["values"].keys() == {"loss", *grads}
            assert row["ms"] > 0 and row["host_us"] > 0 and row["share"] > 0
            assert len(row["rounds"]) == 2 and row["rounds"][0]["rates"].keys() == {
                "flops",
                "bytes",
            }
            assert report["floors"][case]["amount"] == BY_NAME[case].tiny().shape.floor.amount
        row = rows["memory-linear_ce-1024", name]
        assert row["extra_mib"] > 0 and "ms" not in row


CE, NORM, ROPE = "cross_entropy-8192x32000", "rms_norm-16384x4096", "rope-1x512"


@pytest.mark.parametrize("provider", ["eager", "ours"])
@pytest.mark.parametrize(
    "case, values",
    [(NORM, {"y", "dx", "dw"}), (CE, {"loss", "dz"}), (ROPE, {"q", "k", "dq", "dk"})],
)
def test_smoke_of_kernels(report: dict, provider: str, case: str, values: set[str]) -> None:
    (row,) = (r for r in report["rows"] if (r["case"], r["provider"]) == (case, provider))
    assert "error" not in row and "mismatch" not in row
    assert row["values"].keys() == values
    assert row["rounds"][0]["rates"].keys() == {"bytes"} and row["unit"] == "GB/s"
    assert all(row[name] > 0 for name in ("ms", "forward_ms", "share", "forward_share", "host_us"))
    assert row["rate"] == pytest.approx(report["floors"][case]["bytes"] / row["ms"] / 1e6)


def test_tables(report: dict) -> None:
    lines = {line.split(" |")[0][2:]: line for line in table(report).splitlines()}
    assert "GB/s" in lines[NORM] and " + " in lines[NORM] and " us" in lines[NORM]
    assert "GB/s" not in lines[ROPE] and " us, " in lines[ROPE]
    assert " us" not in lines["linear-16k-half"]


def test_older_reports_stay_readable(tmp_path: Path) -> None:
    old = json.loads((ROOT / "benchmarks/results/linear_losses-h100-bf16.json").read_text())
    assert "89.2%, 40.33 ms, 1568 MiB" in table(old)
    pytest.importorskip("matplotlib")
    plot_roofline(old, tmp_path / "roofline.png")


@pytest.mark.skipif(find_spec("cut_cross_entropy") is not None, reason="it is installed")
def test_a_missing_package_is_reported(report: dict) -> None:
    assert "cut_cross_entropy" in report["providers"]["cce"]["absent"]
    errors = {row.get("error") for row in report["rows"] if row["provider"] == "cce"}
    assert errors == {"absent"}
    assert "ABSENT cce" in table(report)


def test_plots(report: dict, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for plot in (plot_memory, plot_shares, plot_roofline):
        file = tmp_path / f"{plot.__name__}.png"
        plot(report, file)
        assert file.stat().st_size > 5000


def test_families_are_checked_and_a_mismatch_is_the_status(
    monkeypatch: Any, tmp_path: Path
) -> None:
    tiny = families.text(32, 48, 4, 2, 97, 0.1, num_hidden_layers=3)
    monkeypatch.setattr(families, "SIZES", {"llama": ("Tiny", tiny)})
    out = tmp_path / "out.json"
    sizes = ["--layers", "2", "--batch", "2", "--length", "16"]
    monkeypatch.setattr(sys, "argv", ["families", *sizes, "--out", str(out)])
    assert families.main() == 0
    found = json.loads(out.read_text())["llama"]
    assert found["ok"] and found["gradients"] == 21 and len(found["worst"]) == 5
    assert found["size"] == "Tiny" and found["patched"]["step_ms"] > 0
    right = layers.rms_norm
    monkeypatch.setattr(layers, "rms_norm", lambda *args, **kw: right(*args, **kw) * 1.05)
    assert families.main() == 1
    monkeypatch.setitem(families.SIZES, "llama", ("Broken", {"hidden_size": "wide"}))
    assert families.main() == 1 and "Error" in json.loads(out.read_text())["llama"]["error"]
