"""The benchmark runner: floors by their formulas, and one run at tiny sizes."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.cases import CASES
from benchmarks.providers import PROVIDERS
from benchmarks.run import flag
from benchmarks.table import plot_memory, plot_shares, table

ROOT = Path(__file__).parents[1]
BY_NAME = {case.name: case for case in CASES}


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
    assert floor.gemm is not None and floor.gemm[1:] == (hidden, vocab)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
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
    cases = "^(linear-16k-half|linear-16k-frozen|memory-linear_ce-1024)$"
    command = [sys.executable, "-m", "benchmarks.run", "--smoke", "--cases", cases]
    command += ["--providers", "eager,ours,cce", "--rounds", "2", "--calls", "1", "--out", str(out)]
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


@pytest.mark.skipif(find_spec("cut_cross_entropy") is not None, reason="it is installed")
def test_a_missing_package_is_reported(report: dict) -> None:
    assert "cut_cross_entropy" in report["providers"]["cce"]["absent"]
    errors = {row.get("error") for row in report["rows"] if row["provider"] == "cce"}
    assert errors == {"absent"}
    assert "ABSENT cce" in table(report)


def test_plots(report: dict, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for plot in (plot_memory, plot_shares):
        file = tmp_path / f"{plot.__name__}.png"
        plot(report, file)
        assert file.stat().st_size > 5000
