"""`install()`: frameworks' own classes take this project's options, until `uninstall()`."""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

REGISTRY = {  # framework: the module whose `install()` changes its classes and returns the way back
    "trl": "liger_kernel.trl.trainers",  # first: its classes are to be there before transformers'
    "transformers": "liger_kernel.transformers.training_args",
    "accelerate": "liger_kernel.accelerate.plugin",
}
_installed: dict[str, Callable[[], None]] = {}


class Unsupported(ImportError):
    """A framework that is there, in a version that has nothing to take our options."""


def install(*frameworks: str) -> None:
    """Have the stock classes of these frameworks, or of all that are there, know this project.

    `transformers.TrainingArguments(use_liger=True, liger_config={...})` and every class made from
    it; `accelerate.Accelerator(liger_plugin=...)`, which also reads ACCELERATE_USE_LIGER;
    `trl.DPOConfig(use_liger_loss=True)` and its kin with the trainers that take them. Without these
    options nothing changes. Again, it does nothing.

    Raises:
        ValueError: a name that is not known.
        ImportError: a framework that was named and is not installed, or cannot be imported;
            `Unsupported`, of its version, where it was named.
    """
    for name in _checked(frameworks) or filter(importlib.util.find_spec, REGISTRY):
        if name in _installed:
            continue
        try:
            _installed[name] = importlib.import_module(REGISTRY[name]).install()
        except Unsupported:
            if frameworks:
                raise


def uninstall(*frameworks: str) -> None:
    """Take `install` back, for these frameworks or for all; models stay patched.

    Raises:
        ValueError: a name that is not known.
    """
    gone = _installed.keys() & set(_checked(frameworks) or _installed)
    above: list[str] = []  # what was put over those, and is put back
    while gone & _installed.keys():
        name, revert = _installed.popitem()
        revert()
        if name not in gone:
            above.append(name)
    if above:
        install(*reversed(above))


def _checked(frameworks: tuple[str, ...]) -> tuple[str, ...]:
    if unknown := [name for name in frameworks if name not in REGISTRY]:
        raise ValueError(f"{unknown[0]!r} has no stock classes here; known: {', '.join(REGISTRY)}")
    return frameworks


class ClassEdits:
    """Attributes of classes that were replaced, and the way back.

    `on` is False once that was gone: what others have put around ours then does nothing.
    """

    def __init__(self) -> None:
        self.on = True
        self._edits: list[tuple[type, str, bool, Any, Any]] = []

    def put(self, cls: type, name: str, value: Any) -> None:
        """Set an attribute in the class's own namespace."""
        own = vars(cls)
        self._edits.append((cls, name, name in own, own.get(name), value))
        setattr(cls, name, value)

    def revert(self) -> None:
        """Restore every attribute that is still as it was put."""
        self.on = False
        while self._edits:
            cls, name, had, before, value = self._edits.pop()
            if vars(cls).get(name) is not value:
                continue  # somebody else has put theirs around it since
            if had:
                setattr(cls, name, before)
            else:
                delattr(cls, name)


def add_fields(
    stock: type, mixin: Any, configure: Callable[[Any], None],
    lists: Mapping[str, list[str]] | None = None,
) -> Callable[[], None]:  # fmt: skip
    """Have a dataclass and all made from it, without the mixin, take the mixin's own fields.

    Args:
        stock: the dataclass. mixin: the dataclass of the fields.
        configure: is called with each instance after its `__post_init__`.
        lists: attributes of the classes that are lists, and what is to be in them too.

    Returns:
        What takes it back, but for classes that are made later, which keep the fields they have.
    """
    edits = ClassEdits()
    names = mixin.__annotations__.keys()
    added = {n: f for n, f in mixin.__dataclass_fields__.items() if n in names}
    for cls in _family(stock, mixin):
        own = vars(cls)
        if "__dataclass_fields__" in own:
            edits.put(cls, "__dataclass_fields__", own["__dataclass_fields__"] | added)
        for name, more in (lists or {}).items():
            if name in own:
                edits.put(cls, name, [*own[name], *more])
        if "__init__" in own:
            edits.put(cls, "__init__", _taking(added, own["__init__"], edits))
    edits.put(stock, "__annotations__", stock.__annotations__ | mixin.__annotations__)
    edits.put(stock, "__post_init__", _then(configure, vars(stock)["__post_init__"], edits))
    for name, ours in added.items():
        edits.put(stock, name, ours.default)

    def revert() -> None:
        edits.revert()
        for cls in _family(stock, mixin):
            if added.keys() <= vars(cls).get("__dataclass_fields__", {}).keys():
                cls.__post_init__ = _then(configure, cls.__post_init__, ClassEdits())

    return revert


def _family(cls: type, mixin: type) -> set[Any]:
    """The class and all made from it, those left out that have the mixin."""
    if issubclass(cls, mixin):
        return set()
    return {cls}.union(*(_family(sub, mixin) for sub in cls.__subclasses__()))


def _taking(
    names: Mapping[str, object], init: Callable[..., None], edits: ClassEdits
) -> Callable[..., None]:
    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in names.keys() & kwargs.keys() if edits.on else ():
            setattr(self, name, kwargs.pop(name))
        init(self, *args, **kwargs)

    return __init__


def _then(
    configure: Callable[[Any], None], post_init: Callable[[Any], None], edits: ClassEdits
) -> Callable[[Any], None]:
    @functools.wraps(post_init)
    def __post_init__(self: Any) -> None:
        post_init(self)
        if edits.on:
            configure(self)

    return __post_init__
