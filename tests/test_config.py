"""One configuration: fields, upstream's names, JSON, the environment."""

from typing import Any

import pytest

from liger_kernel import LigerConfig
from liger_kernel.config import disabled


def test_every_way_of_saying_it_means_the_same() -> None:
    want = LigerConfig(norm=False, fused_head=False, memory_budget=1 << 20)
    for value in (
        want,
        want.to_dict(),
        dict(rms_norm=False, fused_linear_cross_entropy=False, memory_budget=1 << 20),
        '{"norm": false, "fused_head": false, "memory_budget": 1048576}',
    ):
        assert LigerConfig.of(value) == want


def test_the_environment_wins(monkeypatch: Any) -> None:
    for name, text in (
        ("ROPE", "0"), ("MLP", "yes"), ("IMPL", "torch"), ("MEMORY_BUDGET", "123"),
        ("ACCUM_DTYPE", "float32"),
    ):  # fmt: skip
        monkeypatch.setenv(f"LIGER_{name}", text)
    assert LigerConfig.of(dict(rope=True, mlp=False, norm=False)) == LigerConfig(
        rope=False, mlp=True, norm=False, impl="torch", memory_budget=123, accum_dtype="float32"
    )


@pytest.mark.parametrize(
    "value, match",
    [
        (dict(rmsnorm=True), "'rmsnorm' is not a liger_config option; known: rope, norm, layer"),
        (dict(swiglu=True, mlp=False), "says both mlp=.* and (mlp|swiglu)=False"),
        (dict(rope="yes"), "rope must be true or false, got 'yes'"),
        (dict(memory_budget=0), "memory_budget must be a positive number of bytes, got 0"),
        (dict(memory_budget=True), "memory_budget must be a positive number"),
        (dict(impl="cuda"), "impl must be one of .*, got 'cuda'"),
        (dict(accum_dtype="int8"), "accum_dtype must be one of"),
        ("{rope", "not valid JSON"),
        (["rope"], "must be a mapping, JSON or None"),
    ],
)
def test_what_is_wrong_is_said(value: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        LigerConfig.of(value)


@pytest.mark.parametrize(
    "name, text, match",
    [
        ("LIGER_ROPE", "maybe", "LIGER_ROPE must be one of 1, true"),
        ("LIGER_MEMORY_BUDGET", "1GB", "LIGER_MEMORY_BUDGET must be a number of bytes"),
    ],
)
def test_what_is_wrong_in_the_environment_is_said(
    monkeypatch: Any, name: str, text: str, match: str
) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(ValueError, match=match):
        LigerConfig.of()


def test_an_empty_variable_is_unset(monkeypatch: Any) -> None:
    for name in ("ROPE", "IMPL", "MEMORY_BUDGET", "DISABLE"):
        monkeypatch.setenv(f"LIGER_{name}", "")
    assert LigerConfig.of() == LigerConfig() and not disabled()


@pytest.mark.parametrize("text, off", [("1", True), ("true", True), ("0", False), ("", False)])
def test_disabled(monkeypatch: Any, text: str, off: bool) -> None:
    monkeypatch.setenv("LIGER_DISABLE", text)
    assert disabled() == off


def test_the_default_is_hashable_and_plain() -> None:
    assert LigerConfig() == LigerConfig.of(None) and hash(LigerConfig()) == hash(LigerConfig.of({}))
