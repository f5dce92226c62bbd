"""Who may import whom (DESIGN.md), read from the sources without running them."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FRAMEWORKS = {
    "accelerate",
    "datasets",
    "lightning",
    "peft",
    "pytorch_lightning",
    "transformers",
    "trl",
}
ADAPTERS = [f"liger_kernel.{name}" for name in ("lightning", "accelerate", "trl")]
LIGHT = {
    f"liger_kernel.{name}"
    for name in ("config", "checkpoint", "measure", "exact", "environment", "cli")
}
RECIPES = "liger_kernel.transformers.recipes"


def within(name: str, *packages: str) -> bool:
    return any(name == p or name.startswith(f"{p}.") for p in packages)


def deferred(node: ast.AST, child: ast.AST) -> bool:
    if isinstance(node, ast.If) and child in node.body:
        return ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def imports(module: str, source: str, package: bool = False) -> Iterator[tuple[str, bool]]:
    """(dotted name, whether it runs when the module is imported) of every import.

    `from a import b` gives `a.b`: b may be a module, and no rule below minds if it is not.
    """
    base = module.split(".") if package else module.split(".")[:-1]

    def walk(node: ast.AST, eager: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, eager) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = base[: len(base) - node.level + 1] if node.level else []
            origin = ".".join([*above, *filter(None, [node.module])])
            yield from ((f"{origin}.{alias.name}", eager) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, eager and not deferred(node, child))

    yield from walk(ast.parse(source), True)


def layer(name: str) -> int:
    """dispatch and modules beside it 0, ops 1, losses 2, the package's own namespace 3."""
    if within(name, "liger_core.ops"):
        return 1
    if within(name, "liger_core.losses"):
        return 2
    beside = ROOT.joinpath(*name.split(".")[:2]).with_suffix(".py")
    return 0 if beside.is_file() else 3


def forbidden(module: str, name: str, eager: bool) -> bool:
    top = name.partition(".")[0]
    if within(module, "liger_core"):
        if top == "liger_core":
            return module != "liger_core" and layer(name) > layer(module)
        return top not in {"torch", "triton"} and top not in sys.stdlib_module_names
    if module == RECIPES:
        return top not in sys.stdlib_module_names
    if eager and module in LIGHT and top in FRAMEWORKS:
        return True
    others = [adapter for adapter in ADAPTERS if not within(module, adapter)]
    return within(module, "liger_kernel.transformers", *ADAPTERS) and within(name, *others)


def violations(module: str, source: str, package: bool = False) -> list[str]:
    return [
        f"{module} imports {name}"
        for name, eager in imports(module, source, package)
        if forbidden(module, name, eager)
    ]


def sources() -> dict[str, Path]:
    """Module name -> file, of both packages."""
    found = {}
    for root, package in ((ROOT, "liger_core"), (ROOT / "integrations", "liger_kernel")):
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def test_every_module_keeps_to_its_layer():
    modules = sources()
    expected = {"liger_core.dispatch", "liger_core.ops.rms_norm", RECIPES, *LIGHT}
    assert expected <= modules.keys()
    assert not [
        message
        for module, path in modules.items()
        for message in violations(module, path.read_text("utf-8"), path.name == "__init__.py")
    ]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("liger_core.dispatch", "from liger_core.ops.glu import swiglu"),
        ("liger_core.dispatch", "from liger_core import ops"),
        ("liger_core.dispatch", "from . import ops"),
        ("liger_core.ops.glu", "def f():\n    from ..losses import preference"),
        ("liger_core.ops.glu", "import liger_core.losses.preference"),
        ("liger_core.ops.glu", "from liger_core import rms_norm"),
        ("liger_core.ops.glu", "import numpy as np"),
        ("liger_core.losses.preference", "from transformers import PreTrainedModel"),
        ("liger_core.losses.preference", "import liger_kernel"),
        (RECIPES, "import torch"),
        (RECIPES, "from liger_kernel.transformers.patch import apply"),
        ("liger_kernel.trl.trainer", "from liger_kernel.lightning.plugin import LigerPlugin"),
        ("liger_kernel.lightning.plugin", "def f():\n    from liger_kernel import accelerate"),
        ("liger_kernel.transformers.patch", "import liger_kernel.trl"),
        ("liger_kernel.config", "import transformers"),
        ("liger_kernel.measure", "try:\n    from accelerate import Accelerator\nexcept E: ..."),
        ("liger_kernel.checkpoint", "if TYPE_CHECKING: ...\nelse:\n    import transformers"),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str):
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("liger_core", "from liger_core.ops.glu import swiglu"),
        ("liger_core.ops.glu", "import math, torch, triton\nfrom liger_core.dispatch import Impl"),
        ("liger_core.ops.glu", "from .. import dispatch"),
        ("liger_core.losses.preference", "from liger_core.ops import linear_logprob"),
        (RECIPES, "from dataclasses import dataclass"),
        ("liger_kernel.trl.trainer", "import trl\nfrom liger_kernel.transformers import patch"),
        ("liger_kernel.accelerate.plugin", "from liger_kernel.accelerate import run"),
        ("liger_kernel.config", "import torch\ndef f():\n    import transformers"),
        (
            "liger_kernel.config",
            "if TYPE_CHECKING:\n    from transformers import TrainingArguments",
        ),
    ],
)
def test_an_allowed_import_is_not(module: str, source: str):
    assert violations(module, source) == []
