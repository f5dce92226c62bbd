"""LigerConfig: what every adapter, YAML file and environment variable of this project means."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from liger_core.dispatch import Impl

UPSTREAM = {  # names that frameworks and users of Liger-Kernel write
    "rms_norm": "norm",
    "swiglu": "mlp",
    "geglu": "mlp",
    "fused_linear_cross_entropy": "fused_head",
}
NUMBERS = {"memory_budget": (int, "a number of bytes"), "label_smoothing": (float, "a number")}
USE_LIGER = "ACCELERATE_USE_LIGER"  # of the adapter for Accelerate
TRUE, FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
AccumDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LigerConfig:
    """What a patch replaces, and how.

    Attributes:
        rope: rotary position embedding of queries and keys.
        norm: RMSNorm layers.
        layer_norm: LayerNorm layers of vision towers.
        mlp: the gated product of SwiGLU and GEGLU layers.
        mlp_inplace: let its backward use up what it was computed from, which nobody else has seen;
            False to go backward twice through one forward (`retain_graph=True`).
        fused_head: lm_head computes the loss itself while training with labels; no logits.
        cross_entropy: the loss of logits that do exist (evaluation, or without `fused_head`).
        label_smoothing: of a patched model's loss, in [0, 1), in evaluation too. In place of
            Trainer's `label_smoothing_factor`, which takes the labels away and needs full logits.
        memory_budget: bytes of logits that the fused head holds at once; None for a quarter of
            them, within 32 MiB and 1 GiB.
        accum_dtype: in which the head's weight gradient is summed over chunks, "float32" or
            "bfloat16"; None for the weight's own where that is as exact as torch, else fp32.
        impl: "auto" (Triton on GPUs), "triton" or "torch".
        strict: raise where something asked for cannot be replaced, rather than report it.
        generic: of a model family without a recipe, fuse the head alone, rather than raise.
    """

    rope: bool = True
    norm: bool = True
    layer_norm: bool = True
    mlp: bool = True
    mlp_inplace: bool = True
    fused_head: bool = True
    cross_entropy: bool = False
    label_smoothing: float = 0.0
    memory_budget: int | None = None
    accum_dtype: AccumDtype | None = None
    impl: Impl = "auto"
    strict: bool = False
    generic: bool = False

    def __post_init__(self) -> None:
        for name in FLAGS:
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {value!r}")
        smoothing = self.label_smoothing
        if isinstance(smoothing, bool) or not (
            isinstance(smoothing, int | float) and 0 <= smoothing < 1
        ):
            raise ValueError(f"label_smoothing must be in [0, 1), got {smoothing!r}")
        budget = self.memory_budget
        if budget is not None and (type(budget) is not int or budget <= 0):
            raise ValueError(f"memory_budget must be a positive number of bytes, got {budget!r}")
        for name, kind in (("accum_dtype", AccumDtype), ("impl", Impl)):
            value = getattr(self, name)
            if value not in get_args(kind) and not (name == "accum_dtype" and value is None):
                raise ValueError(f"{name} must be one of {get_args(kind)}, got {value!r}")

    @classmethod
    def of(cls, value: "LigerConfig | Mapping[str, Any] | str | None" = None) -> "LigerConfig":
        """A configuration from whatever a framework hands over, then the environment, which wins.

        Args:
            value: a LigerConfig, a mapping of its fields or of upstream's names, the same as a JSON
                string, or None for the defaults. `LIGER_ROPE=0`, `LIGER_IMPL=torch`,
                `LIGER_MEMORY_BUDGET=268435456` and so on override it.

        Raises:
            ValueError: a name that is not known, two names that contradict, a value out of range.
        """
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise ValueError(f"liger_config is not valid JSON ({error}): {value!r}") from None
        if isinstance(value, cls):
            given = value.to_dict()
        elif value is None or isinstance(value, Mapping):
            given = named(value or {})
        else:
            raise ValueError(f"liger_config must be a mapping, JSON or None, got {value!r}")
        return LigerConfig(**given | from_environment())

    def to_dict(self) -> dict[str, Any]:
        """LigerConfig's fields as plain values, for JSON and YAML."""
        return {name: getattr(self, name) for name in NAMES}


NAMES = tuple(f.name for f in fields(LigerConfig))
FLAGS = tuple(f.name for f in fields(LigerConfig) if isinstance(f.default, bool))


def whole(value: Mapping[str, Any] | None) -> bool:
    """Whether these are all fields of a LigerConfig, as `to_dict` gives them."""
    return value is not None and set(NAMES) <= value.keys()


def named(value: Mapping[str, Any]) -> dict[str, Any]:
    """Options by LigerConfig's own names, of a mapping that may have upstream's.

    Raises:
        ValueError: a name that is not known, or two that contradict.
    """
    given: dict[str, Any] = {}
    for name, setting in value.items():
        field = UPSTREAM.get(name, name)
        if field not in NAMES:
            known = ", ".join((*NAMES, *UPSTREAM))
            raise ValueError(f"{name!r} is not a liger_config option; known: {known}")
        if given.setdefault(field, setting) != setting:
            raise ValueError(f"liger_config says both {field}={given[field]} and {name}={setting}")
    return given


def from_environment() -> dict[str, Any]:
    """The fields that LIGER_* variables set."""
    return {
        name: _parse(name, text)
        for name in NAMES
        if (text := os.environ.get(f"LIGER_{name.upper()}"))  # empty is unset
    }


def _parse(name: str, text: str) -> Any:
    if name in ("impl", "accum_dtype"):
        return text
    if (number := NUMBERS.get(name)) is not None:
        kind, unit = number
        try:
            return kind(text)
        except ValueError:
            raise ValueError(f"LIGER_{name.upper()} must be {unit}, got {text!r}") from None
    return flag(f"LIGER_{name.upper()}", text)


def flag(variable: str, text: str) -> bool:
    """What an environment variable says, true or false.

    Raises:
        ValueError: it says something else.
    """
    if text.lower() in (*TRUE, *FALSE):
        return text.lower() in TRUE
    raise ValueError(f"{variable} must be one of {', '.join((*TRUE, *FALSE))}, got {text!r}")


def disabled() -> bool:
    """True under LIGER_DISABLE=1: nothing is patched, whatever asks for it."""
    return flag("LIGER_DISABLE", os.environ.get("LIGER_DISABLE") or "0")
