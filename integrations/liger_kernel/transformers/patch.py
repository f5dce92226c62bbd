"""Put liger_core's ops into one model instance, say what changed, and take it all back."""

import operator
import types
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from liger_core.dispatch import use_triton
from liger_kernel.config import LigerConfig, disabled
from liger_kernel.transformers import head
from liger_kernel.transformers.engines import WRAPPERS, class_of
from liger_kernel.transformers.layers import replacement
from liger_kernel.transformers.recipes import RECIPES, Recipe


@dataclass(frozen=True, slots=True)
class Change:
    """One replacement: `before` is the class of the module at `path`."""

    path: str
    before: str
    after: str


@dataclass(slots=True)
class Patch:
    """What was replaced in one model. A context manager: leaving it reverts."""

    model: nn.Module
    config: LigerConfig
    recipe: Recipe | None = None
    changes: list[Change] = field(default_factory=list[Change])
    left: dict[str, str] = field(default_factory=dict[str, str])
    _undo: list[Callable[[], object]] = field(default_factory=list[Callable[[], object]])

    def set(self, module: nn.Module, attr: str, value: object) -> None:
        """Shadow `module.attr` on this instance only."""
        own = vars(module)
        self.undo(partial(_restore, module, attr, attr in own, own.get(attr), value))
        own[attr] = value

    def undo(self, call: Callable[[], object]) -> None:
        """Have `revert` make this call."""
        self._undo.append(call)

    def replace(self, path: str, module: nn.Module, new: object, after: str) -> None:
        """Put `new` where the module's class's forward is, within what was put around it.

        accelerate's hooks keep what they wrap as `_old_forward`; transformers' tensor parallelism
        keeps it in a closure, of which a copy is made.

        Raises:
            RuntimeError: something else has taken the forward's place.
        """
        attr = "_old_forward" if "_old_forward" in vars(module) else "forward"
        there = vars(module).get(attr)
        if there is not None and not _is_own(module, there) and not _kernelized(module):
            if (wrapper := _rewired(there, partial(_is_own, module), new)) is None:
                raise RuntimeError(
                    f"{path} ({type(module).__name__}) has had its forward replaced already, by "
                    f"{getattr(there, '__qualname__', type(there).__name__)}; undo that first, or "
                    f"turn this part off in liger_config"
                )
            new = wrapper
        self.set(module, attr, new)
        self.record(path, module, after)

    def record(self, path: str, module: nn.Module, after: str) -> None:
        """Note a replacement for the report."""
        self.changes.append(Change(path, class_of(module).__name__, after))

    def leave(self, part: str, why: str) -> None:
        """Note what was asked for and is left as it is; raise instead where `strict`."""
        if self.config.strict:
            raise ValueError(f"{part} cannot be patched: {why}; turn it off or drop strict=True")
        self.left[part] = why

    def revert(self) -> None:
        """Restore the instance exactly as it was."""
        while self._undo:
            self._undo.pop()()
        self.changes.clear()
        self.left.clear()

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *_: object) -> None:
        self.revert()

    def __str__(self) -> str:
        kinds = Counter((c.before, c.after) for c in self.changes)
        lines = [f"  {before} x{n} -> {after}" for (before, after), n in kinds.items()]
        lines += [f"  {part}: left as it is, {why}" for part, why in self.left.items()]
        name = type(self.model).__name__
        return "\n".join([f"liger: {len(self.changes)} modules of {name} patched", *lines])


def _restore(module: nn.Module, attr: str, had: bool, before: object, ours: object) -> None:
    """Put `before` where `ours` is now: others may have moved it, or put something around it."""
    own = vars(module)
    if own.get(attr) is ours:
        if had:
            own[attr] = before
        else:
            del own[attr]
        return
    if attr not in ("forward", "_old_forward", "train"):
        return
    before = before if had else types.MethodType(getattr(type(module), attr), module)
    for name in ("train",) if attr == "train" else ("forward", "_old_forward"):
        there = own.get(name)
        now = before if there is ours else _rewired(there, partial(operator.is_, ours), before)
        if now is not None:
            own[name] = now
            return


def _is_own(module: nn.Module, fn: object) -> bool:
    """Whether fn is the bound forward of the module's class."""
    own = type(module).forward
    return getattr(fn, "__self__", None) is module and getattr(fn, "__func__", None) is own


def _kernelized(module: nn.Module) -> bool:
    """Whether the `kernels` package has bound a layer's forward to this module."""
    there = vars(module).get("forward")
    bound = isinstance(there, types.MethodType) and there.__self__ is module
    return bound and hasattr(type(module), "kernel_layer_name")


def _rewired(
    fn: object, is_it: Callable[[object], bool], new: object, within: tuple[object, ...] = ()
) -> types.FunctionType | None:
    """A copy of fn with `new` for what its closure, or one within, holds; None if it does not."""
    if not isinstance(fn, types.FunctionType) or fn in within:
        return None
    cells, found = list[types.CellType](), False
    for cell in fn.__closure__ or ():
        try:
            held = cell.cell_contents
        except ValueError:  # not set yet
            held = None
        put = new if is_it(held) else _rewired(held, is_it, new, (*within, fn))
        cells.append(cell if put is None else types.CellType(put))
        found |= put is not None
    if not found:
        return None
    copy = types.FunctionType(
        fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, tuple(cells)
    )
    copy.__kwdefaults__, copy.__dict__ = fn.__kwdefaults__, fn.__dict__  # counters and the like
    return copy


def _train(model: nn.Module, below: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
    """Replaces the `train` of a model that uses kernels, which binds forwards anew there."""
    kept = {
        module: vars(module)["forward"]
        for module in model.modules()
        if "forward" in vars(module) and not _kernelized(module)
    }
    out = (partial(type(model).train, model) if below is None else below)(*args, **kwargs)
    for module, forward in kept.items():
        vars(module)["forward"] = forward
    return out


def _no_replica(name: str) -> nn.Module:
    raise RuntimeError(
        f"nn.DataParallel shares one patched {name} among its GPUs' threads; start one process a "
        f"GPU with torchrun or accelerate launch, or show one GPU with CUDA_VISIBLE_DEVICES=0"
    )


def _layers(patch: Patch, recipe: Recipe) -> None:
    """Replace the forwards that the recipe names and the configuration asks for."""
    wanted = {cls: p for cls, p in recipe.parts.items() if getattr(patch.config, p.field)}
    done: set[str] = set()
    why: dict[str, str] = {}
    for path, module in list(patch.model.named_modules()):
        if (part := wanted.get(class_of(module).__name__)) is None:
            continue
        new = replacement(module, part, patch.config)
        if isinstance(new, str):
            why[part.field] = f"{path} ({class_of(module).__name__}): {new}"
            continue
        attr, fn, op = new
        if attr == "forward":
            patch.replace(path, module, fn, op)
        else:
            patch.set(module, attr, fn)
            patch.record(path, module, op)
        done.add(part.field)
    for name in dict.fromkeys(part.field for part in wanted.values()):
        if name in why or name not in done:
            classes = [cls for cls, part in wanted.items() if part.field == name]
            patch.leave(name, why.get(name, f"no {' or '.join(classes)} was found"))
    if wanted and not done:
        raise ValueError(
            f"the {recipe.model_type!r} recipe matches nothing in {type(patch.model).__name__}: "
            f"it looks for {', '.join(wanted)}"
        )


def patch_of(model: nn.Module) -> Patch | None:
    """The patch that is on this model, or None."""
    return vars(_bare(model)).get("_liger_patch")


def _bare(model: Any) -> nn.Module:
    """Without what torch.compile, DDP, FSDP1, DeepSpeed and PEFT put around it."""
    while [*model._modules] in ([name] for name in (*WRAPPERS, "module")):
        (model,) = model._modules.values()
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _take_over(model: nn.Module, config: LigerConfig) -> None:
    """Revert the patches of parts of the model, which the whole one's will include."""
    there = {p: vars(m).get("_liger_patch") for p, m in model.named_modules()}
    parts: dict[str, Patch] = {path: part for path, part in there.items() if part is not None}
    for path, part in parts.items():  # all are checked before the first one is touched
        if part.config != config:
            raise ValueError(
                f"{path or 'the model'} is already patched with {part.config}; revert() that "
                f"before applying {config}"
            )
    for part in parts.values():
        part.revert()


class NoRecipe(ValueError):
    """A model of a family that no recipe is for."""


def _recipe(model: nn.Module, config: LigerConfig) -> Recipe:
    model_type: Any = getattr(getattr(model, "config", None), "model_type", None)
    if (recipe := RECIPES.get(model_type)) is not None:
        return recipe
    if config.generic and model_type is not None:
        return Recipe(model_type, {})
    raise NoRecipe(
        f"no recipe for model type {model_type!r} ({type(model).__name__}); known: "
        f"{', '.join(RECIPES)}. generic=True fuses the head of a causal language model alone"
    )


def _keep_smoothing(config: LigerConfig, why: str) -> None:
    """Label smoothing is a part of the loss: a patch that cannot put it there is refused."""
    if config.label_smoothing:
        raise ValueError(
            f"liger_config's label_smoothing has no loss to go into: {why}; leave it out, or use "
            f"label_smoothing_factor of TrainingArguments"
        )


def apply(model: nn.Module, config: LigerConfig | Mapping[str, Any] | str | None = None) -> Patch:
    """Patch this model instance and no other.

    Args:
        model: a transformers model of a family in `RECIPES`, or a PEFT model around one; with
            `generic`, any whose forward calls `self.loss_function` on what its head returns.
        config: what `LigerConfig.of` takes.

    Returns:
        The Patch; printed, it says what was replaced and what was left. Applying the same
        configuration again returns the same Patch. Under LIGER_DISABLE=1 it is empty.

    Raises:
        ValueError: a family without a recipe (`NoRecipe`), a model that is patched with another
            configuration, or label smoothing where the model's loss cannot be replaced.
    """
    config, model = LigerConfig.of(config), _bare(model)
    patch = Patch(model, config)
    if disabled():
        _keep_smoothing(config, "LIGER_DISABLE is set")
        patch.left["everything"] = "LIGER_DISABLE is set"
        return patch
    if (there := patch_of(model)) is not None and there.config == config:
        return there
    patch.recipe = recipe = _recipe(model, config)
    if config.impl == "triton" and not torch.cuda.is_available():
        use_triton("triton", torch.empty(0))  # raises, unless interpreted
    _take_over(model, config)
    try:
        _layers(patch, recipe)
        if (why := head.fuse(patch, recipe)) is not None:
            _keep_smoothing(config, why)
            patch.leave("fused_head", why)
        if getattr(model, "use_kernels", False):
            patch.set(model, "train", partial(_train, model, vars(model).get("train")))
        refuse = partial(_no_replica, type(model).__name__)
        patch.set(model, "_replicate_for_data_parallel", refuse)
        patch.set(model, "_liger_patch", patch)
    except Exception:
        patch.revert()
        raise
    return patch
