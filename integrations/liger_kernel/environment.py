"""What this process runs on: versions, devices, whose liger_kernel it imports, LIGER_*."""

import json
import os
import platform
import sys
from importlib import import_module, metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import torch

from liger_core.dispatch import HAS_TRITON
from liger_kernel.config import NAMES, USE_LIGER, LigerConfig, disabled, flag

PACKAGES = ("torch", "triton", "transformers", "accelerate", "peft", "trl", "lightning")
NAME = "liger-kernel"


def environment() -> dict[str, Any]:
    """Facts by name, plain values for JSON; `warnings` is what is wrong with the installation."""
    path, owners, warnings = installation()
    names = [k for k in sorted(os.environ) if k.startswith("LIGER_") or k == USE_LIGER]
    variables = {name: os.environ[name] for name in names}
    return {
        "python": f"{platform.python_version()}, {sys.executable}, {platform.platform()}",
        **{name: version(name) or "not installed" for name in PACKAGES},
        NAME: version(NAME) or "not installed",
        "liger_kernel": f"{path}, of {', '.join(owners) or 'no installed distribution'}",
        "devices": devices(),
        "variables": variables,
        "ops": ops(),
        "warnings": warnings + faults(variables),
    }


def version(name: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def devices() -> list[str]:
    """GPUs that torch sees: name, capability, memory, CUDA of torch and the driver's newest."""
    if not torch.cuda.is_available():
        return []
    made = f"rocm {torch.version.hip}" if torch.version.hip else f"cuda {torch.version.cuda}"
    if driver := getattr(torch._C, "_cuda_getDriverVersion", int)():
        made += f", driver for cuda {driver // 1000}.{driver % 1000 // 10}"
    found: list[str] = []
    for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count())):
        memory = f"{p.total_memory / 2**30:.1f} GiB"
        found.append(f"{p.name}, capability {p.major}.{p.minor}, {memory}, {made}")
    return found


def ops() -> str:
    """Which implementation `impl="auto"` takes here."""
    if not HAS_TRITON:
        return "torch, triton is not installed"
    if (impl := os.environ.get("LIGER_IMPL") or "auto") != "auto":
        return f"{impl}, by LIGER_IMPL"
    if torch.cuda.is_available():
        return "Triton kernels"
    return "torch, there is no GPU"


def faults(variables: dict[str, str]) -> list[str]:
    """What is wrong with the LIGER_* variables."""
    known = {USE_LIGER, "LIGER_DISABLE", *(f"LIGER_{name.upper()}" for name in NAMES)}
    found = [f"{name} is not an option" for name in variables if name not in known]
    try:
        LigerConfig.of()
        disabled()
        flag(USE_LIGER, variables.get(USE_LIGER) or "0")
    except ValueError as error:
        found.append(str(error))
    return found


def installation() -> tuple[Path, list[str], list[str]]:
    """Where liger_kernel is imported from, the distributions it belongs to, and what is wrong."""
    package, here = import_module("liger_kernel"), Path(__file__).resolve().parent
    path = Path(package.__file__).resolve().parent if package.__file__ else here
    own = getattr(package, "__version__", None)
    warnings, owners = list[str](), dict[str, str]()
    if own is None:
        warnings.append(f"the liger_kernel in {path} has no version: it is not this project's")
    for dist in metadata.distributions():
        name = dist.name.lower().replace("_", "-")
        if "liger" not in name or name in owners or (missing := _missing(dist, path)) is None:
            continue
        owners[name] = f"{name} {dist.version}"
        if name != NAME:
            warnings.append(
                f"{owners[name]} writes to the same folder: uninstall it, then reinstall"
            )
        elif missing:
            warnings.append(f"{owners[name]} lacks {', '.join(missing)}: reinstall it")
    if (there := version(NAME)) and own and there != own:
        warnings.append(f"{NAME} {there} is installed, liger_kernel {own} is imported")
    return path, list(owners.values()), warnings


def _missing(dist: metadata.Distribution, path: Path) -> list[str] | None:
    """Files of the package that the distribution has lost; None where it has put none there."""
    url = json.loads(dist.read_text("direct_url.json") or "{}")
    if url.get("dir_info", {}).get("editable"):
        return [] if path.is_relative_to(unquote(urlparse(url["url"]).path)) else None
    files = [f for f in dist.files or () if Path(str(f.locate())).resolve().is_relative_to(path)]
    missing = [str(f) for f in files if not Path(str(f.locate())).exists()]
    return missing if files else None
