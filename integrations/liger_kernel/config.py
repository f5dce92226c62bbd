"""LigerConfig: what every adapter, YAML file and environment variable of this project means."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from liger_core.dispatch import Impl

UPSTREAM = {  # names that frameworks and users of Liger-Kernel write
    "rms_norm": "norm",
    "swiglu": "mlp",
    "geglu": "mlp",
    "fused_linear_cross_entropy": "fused_head",
}
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
    memory_budget: int | None = None
    accum_dtype: AccumDtype | None = None
    impl: Impl = "auto"
    strict: bool = False
    generic: bool = False

    def __post_init__(self) -> None:
        for name in FLAGS:
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {value!r}")
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
            given = asdict(value)
        elif value is None or isinstance(value, Mapping):
            given = _named(value or {})
        else:
            raise ValueError(f"liger_config must be a mapping, JSON or None, got {value!r}")
        return cls(**given | _environment())

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for JSON and YAML."""
        return asdict(self)


NAMES = tuple(f.name for f in fields(LigerConfig))
FLAGS = tuple(f.name for f in fields(LigerConfig) if isinstance(f.default, bool))


def _named(value: Mapping[str, Any]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for name, setting in value.items():
        field = UPSTREAM.get(name, name)
        if field not in NAMES:
            known = ", ".join((*NAMES, *UPSTREAM))
            raise ValueError(f"{name!r} is not a liger_config option; known: {known}")
        if given.setdefault(field, setting) != setting:
            raise ValueError(f"liger_config says both {field}={given[field]} and {name}={setting}")
    return given


def _environment() -> dict[str, Any]:
    return {
        name: _parse(name, text)
        for name in NAMES
        if (text := os.environ.get(f"LIGER_{name.upper()}"))  # empty is unset
    }


def _parse(name: str, text: str) -> Any:
    if name in ("impl", "accum_dtype"):
        return text
    if name == "memory_budget":
        try:
            return int(text)
        except ValueError:
            raise ValueError(
                f"LIGER_MEMORY_BUDGET must be a number of bytes, got {text!r}"
            ) from None
    return _flag(f"LIGER_{name.upper()}", text)


def _flag(variable: str, text: str) -> bool:
    if text.lower() in (*TRUE, *FALSE):
        return text.lower() in TRUE
    raise ValueError(f"{variable} must be one of {', '.join((*TRUE, *FALSE))}, got {text!r}")


def disabled() -> bool:
    """True under LIGER_DISABLE=1: nothing is patched, whatever asks for it."""
    return _flag("LIGER_DISABLE", os.environ.get("LIGER_DISABLE") or "0")
