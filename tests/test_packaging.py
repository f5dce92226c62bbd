"""What is installed: its dependencies, the wheel's contents, and imports without the extras."""

import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from email.parser import HeaderParser
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = ("accelerate", "datasets", "lightning", "peft", "safetensors", "transformers", "trl")

# Makes the named packages look as if they were not installed, to find_spec as well as to import.
HIDE = """
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in {hidden!r}:
            return None
        return super().find_spec(name, path, target)

sys.meta_path[:] = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
"""

MODULES = """
import liger_core
import liger_kernel.checkpoint, liger_kernel.config, liger_kernel.measure
from liger_kernel.transformers import LigerRMSNorm
print(liger_core.__file__)
"""

TORCH_PATH = """
import torch, liger_core
from liger_core.ops.rms_norm import rms_norm
x, w = torch.randn(2, 8, requires_grad=True), torch.randn(8)
y = rms_norm(x, w, 1e-6)
torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (8,), w, 1e-6))
y.sum().backward()
assert x.grad.isfinite().all() and x.grad.any()
print(liger_core.__file__)
"""


def requirement_name(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match, requirement
    return match[0].lower()


def run(code: str, folder: Path, python: str = sys.executable) -> str:
    """stdout of `code`, run in another process that finds `folder` first and this checkout last."""
    env = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [python, "-c", code], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_core_dependencies_are_torch_and_triton():
    assert [requirement_name(r) for r in PROJECT["dependencies"]] == ["torch", "triton"]
    assert "sys_platform == 'linux'" in PROJECT["dependencies"][1]


def test_wheel_holds_the_two_packages_and_nothing_else(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    info = f"liger_kernel-{PROJECT['version']}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"liger_core", "liger_kernel", info}
    assert {"liger_core/py.typed", "liger_kernel/py.typed", f"{info}/licenses/LICENSE"} <= {*names}
    sources = {
        path.relative_to(root).as_posix()
        for root, package in ((ROOT, "liger_core"), (ROOT / "integrations", "liger_kernel"))
        for path in (root / package).rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == sources


def test_one_version_everywhere(unpacked: Path):
    (metadata,) = unpacked.glob("*.dist-info/METADATA")
    headers = HeaderParser().parsestr(metadata.read_text("utf-8"))
    assert headers["Name"] == PROJECT["name"] == "liger-kernel"
    assert headers["License-Expression"] == "BSD-2-Clause"
    assert headers["Version"] == PROJECT["version"] == import_module("liger_kernel").__version__
    assert PROJECT["version"] in (ROOT / "CHANGELOG.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("hidden", "code"),
    [(EXTRAS, MODULES), (EXTRAS, TORCH_PATH), ((*EXTRAS, "triton"), TORCH_PATH)],
    ids=["modules", "ops", "ops-without-triton"],
)
def test_imports_without(unpacked: Path, hidden: tuple[str, ...], code: str):
    still_there = f"""
from importlib.util import find_spec
assert not [name for name in {hidden!r} if find_spec(name)]
"""
    where = run(HIDE.format(hidden=hidden) + still_there + code, unpacked)
    assert Path(where).is_relative_to(unpacked)


@pytest.mark.slow
def test_wheel_in_a_clean_environment(wheel: Path, tmp_path: Path):
    venv.create(tmp_path / "env", with_pip=True)
    python = str(tmp_path / "env" / "bin" / "python")
    pip = [python, "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), str(wheel)]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for code in (MODULES, TORCH_PATH):
        assert Path(run(code, tmp_path, python)).is_relative_to(tmp_path / "env")
    version = "from importlib.metadata import version\nprint(version('liger-kernel'))"
    assert run(version, tmp_path, python) == PROJECT["version"]
