"""Put liger_core's ops into one model instance, say what changed, and take it all back on request.

A replacement is a partial of a module-level function over the module it serves, never a closure:
deepcopy then rebinds it to the copy (a DPO reference model is a deepcopy) and pickle can carry it.
"""

import sys
import types
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from liger_core import rms_norm
from liger_core.dispatch import Impl, use_triton
from liger_core.ops.glu import Activation
from liger_kernel.config import LigerConfig, disabled
from liger_kernel.transformers import head
from liger_kernel.transformers.recipes import RECIPES, Norm, Recipe
from liger_kernel.transformers.rope import liger_rotary_pos_emb
from liger_kernel.transformers.swiglu import gated

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclass(frozen=True, slots=True)
class Change:
    """One replacement: `before` is the class of the module at `path`."""

    path: str
    before: str
    after: str
    scope: str = "instance"


@dataclass(slots=True)
class Patch:
    """What was replaced in one model. A context manager: leaving it reverts."""

    model: nn.Module
    config: LigerConfig
    changes: list[Change] = field(default_factory=list[Change])
    left: dict[str, str] = field(default_factory=dict[str, str])
    _undo: list[Callable[[], object]] = field(default_factory=list[Callable[[], object]])

    def set(self, module: nn.Module, attr: str, value: object) -> None:
        """Shadow `module.attr` on this instance only."""
        own = vars(module)
        self.undo(partial(_restore, module, attr, attr in own, own.get(attr)))
        own[attr] = value

    def undo(self, call: Callable[[], object]) -> None:
        """Have `revert` make this call."""
        self._undo.append(call)

    def replace(self, path: str, module: nn.Module, new: object, after: str) -> None:
        """Put `new` in place of the module's forward."""
        self.set(module, head.own_forward(module), new)
        self.record(path, module, after)

    def record(self, path: str, module: nn.Module, after: str) -> None:
        """Note a replacement for the report."""
        self.changes.append(Change(path, type(module).__name__, after))

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
        kinds = Counter((c.before, c.after, c.scope) for c in self.changes)
        lines = [
            f"  {before} x{n} -> {after}{'' if scope == 'instance' else f' (scope={scope})'}"
            for (before, after, scope), n in kinds.items()
        ]
        lines += [f"  {part}: left as it is, {why}" for part, why in self.left.items()]
        name = type(self.model).__name__
        return "\n".join([f"liger: {len(self.changes)} modules of {name} patched", *lines])


def _restore(module: nn.Module, attr: str, had: bool, value: object) -> None:
    if had:
        vars(module)[attr] = value
    else:
        vars(module).pop(attr, None)


def _norm(module: nn.Module, spec: Norm, impl: Impl, hidden_states: Tensor) -> Tensor:
    eps = cast(float, getattr(module, spec.eps))
    weight = cast(Tensor, module.weight)
    return rms_norm(hidden_states, weight, eps, offset=spec.offset, casting=spec.casting, impl=impl)


def _attention(module: nn.Module, impl: Impl, *args: Any, **kwargs: Any) -> Any:
    if (key := (type(module), impl)) not in _WITH_ROTARY:  # a model that was unpickled
        _rebind(*key)
    return _WITH_ROTARY[key](module, *args, **kwargs)


_WITH_ROTARY: dict[tuple[type, Impl], types.FunctionType] = {}  # torch.compile cannot trace a cache


def _rebind(cls: type, impl: Impl) -> None:
    """Keep `cls.forward` over a copy of its globals in which apply_rotary_pos_emb is ours.

    The copy is a module of its own: torch.compile looks globals up by the module's name.
    """
    fn = cast(types.FunctionType, cls.forward)  # pyright: ignore
    there = _WITH_ROTARY.get((cls, impl))
    if there is not None and there.__code__ is fn.__code__:
        return
    name = f"{fn.__module__}_liger_{cls.__name__}_{impl}"
    copy = types.ModuleType(name)
    vars(copy).update(fn.__globals__, __name__=name)
    vars(copy)["apply_rotary_pos_emb"] = partial(liger_rotary_pos_emb, impl=impl)
    sys.modules[name] = copy
    own = types.FunctionType(fn.__code__, vars(copy), fn.__name__, fn.__defaults__, fn.__closure__)
    own.__kwdefaults__ = fn.__kwdefaults__
    _WITH_ROTARY[cls, impl] = own


def _calls_rotary(cls: type) -> bool:
    code = getattr(cls.forward, "__code__", None)  # pyright: ignore
    return code is not None and "apply_rotary_pos_emb" in code.co_names


def _layers(patch: Patch, recipe: Recipe) -> None:
    """Replace the forwards that the recipe names and the configuration asks for."""
    config, impl = patch.config, patch.config.impl
    found: set[str] = set()
    act = ACTIVATIONS.get(name := str(getattr(patch.model.config, recipe.glu.act)))  # pyright: ignore
    for path, module in list(patch.model.named_modules()):
        cls = type(module).__name__
        if cls == recipe.norm.cls and config.norm:
            new, op = partial(_norm, module, recipe.norm, impl), "rms_norm"
        elif cls == recipe.glu.cls and config.mlp and act:
            new, op = partial(gated, module, act, impl, config.mlp_inplace), f"glu[{act}]"
        elif cls == recipe.attention and config.rope and _calls_rotary(type(module)):
            _rebind(type(module), impl)
            new, op = partial(_attention, module, impl), "rope"
        else:
            continue
        if head.own_forward(module) == "forward" and "forward" in vars(module):
            raise RuntimeError(
                f"{path} ({cls}) has had its forward replaced already, by "
                f"{type(vars(module)['forward']).__name__}; undo that first"
            )
        patch.replace(path, module, new, op)
        found.add(cls)
    wanted = {
        recipe.norm.cls: (config.norm, "norm", ""),
        recipe.glu.cls: (config.mlp, "mlp", "" if act else f"its activation is {name!r}"),
        recipe.attention: (config.rope, "rope", ""),
    }
    for cls, (on, part, why) in wanted.items():
        if on and cls not in found:
            patch.leave(part, why or f"no {cls} that fits was found")
    if not found and (config.rope or config.norm or config.mlp):
        raise ValueError(
            f"the {recipe.model_type!r} recipe matches nothing in {type(patch.model).__name__}: "
            f"it looks for {', '.join(wanted)}"
        )


def patch_of(model: nn.Module) -> Patch | None:
    """The patch that is on this model, or None."""
    return vars(_bare(model)).get("_liger_patch")


def _bare(model: Any) -> nn.Module:
    """Without what torch.compile and PEFT put around it."""
    model = getattr(model, "_orig_mod", model)
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


def apply(model: nn.Module, config: LigerConfig | Mapping[str, Any] | str | None = None) -> Patch:
    """Patch this model instance and no other.

    Args:
        model: a transformers model of a family in `RECIPES`, or a PEFT model around one.
        config: what `LigerConfig.of` takes.

    Returns:
        The Patch; printed, it says what was replaced and what was left. Applying the same
        configuration again returns the same Patch. Under LIGER_DISABLE=1 it is empty.

    Raises:
        ValueError: a family without a recipe, or a model that is patched with another
            configuration.
    """
    config, model = LigerConfig.of(config), _bare(model)
    patch = Patch(model, config)
    if disabled():
        patch.left["everything"] = "LIGER_DISABLE is set"
        return patch
    if (there := patch_of(model)) is not None and there.config == config:
        return there
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if (recipe := RECIPES.get(model_type)) is None:  # pyright: ignore
        raise ValueError(
            f"no recipe for model type {model_type!r} ({type(model).__name__}); "
            f"known: {', '.join(sorted(RECIPES))}"
        )
    if config.impl == "triton" and not torch.cuda.is_available():
        use_triton("triton", torch.empty(0))  # raises, unless interpreted
    _take_over(model, config)
    try:
        _layers(patch, recipe)
        if (why := head.fuse(patch, model, config)) is not None:
            patch.leave("fused_head", why)
        patch.set(model, "_liger_patch", patch)
    except Exception:
        patch.revert()
        raise
    return patch
