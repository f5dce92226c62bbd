"""`python -m liger_kernel.accelerate.run [-m] SCRIPT ARGS...`: a script under the toggle.

`accelerate-liger launch` starts it; the script's Accelerators read ACCELERATE_USE_LIGER. Else it is
as with `python SCRIPT ARGS...`, but that `sys.argv[0]` is absolute, and that torch is imported
already. Processes that the script starts itself are not patched.
"""

import importlib.util
import os
import runpy
import sys
from collections.abc import Callable
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import liger_kernel


class WhenImported:
    """A finder that installs this project as soon as the script has imported accelerate.

    Not before: Hugging Face's libraries read HF_HOME and others, which scripts set at their top,
    when they are imported.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "accelerate":
            return None
        finders: list[Any] = sys.meta_path
        at = finders.index(self)
        del finders[at]
        try:
            spec = importlib.util.find_spec(name)
        finally:
            finders.insert(at, self)  # many look for it before one imports it
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = partial(self._load, spec.loader.exec_module)
        return spec

    def _load(self, load: Callable[[ModuleType], None], module: ModuleType) -> None:
        sys.meta_path.remove(self)  # pyright: ignore
        load(module)
        liger_kernel.install("accelerate")


def main(argv: list[str] | None = None) -> None:
    """Run the script as `__main__`; what it raises and exits with is its own.

    Args:
        argv: the script's file, or -m and its module, and its arguments; None for the process's.
    """
    argv = sys.argv[1:] if argv is None else argv
    module = argv[:1] == ["-m"]
    if len(argv) <= module:
        print(f"usage: python -m {__spec__.name} [-m] SCRIPT ARGS...", file=sys.stderr)
        sys.exit(2)
    if "accelerate" in sys.modules:
        liger_kernel.install("accelerate")
    else:
        sys.meta_path.insert(0, WhenImported())  # pyright: ignore
    name, sys.argv = argv[module], argv[module:]
    if module:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
        return
    if not sys.flags.safe_path:  # python -m has put the working directory there
        sys.path[0] = os.path.dirname(os.path.realpath(name))
    runpy.run_path(os.path.abspath(name), run_name="__main__")  # still true after a chdir


if __name__ == "__main__":
    main()
