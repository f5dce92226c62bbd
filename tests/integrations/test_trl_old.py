"""TRL before 1.13 has Liger losses of its own: they call `liger_kernel.chunked_loss` by hand."""

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest

try:
    VERSION = tuple(int(n) for n in importlib.metadata.version("trl").split(".")[:2])
except importlib.metadata.PackageNotFoundError:
    VERSION = (1, 13)
if VERSION >= (1, 13):
    pytest.skip("TRL 1.13 and newer call no Liger loss", allow_module_level=True)


from liger_kernel.transformers import patch_of
from preferences import assert_parity, data_of, needed, run, trainer_of
from tiny import build


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("tiny"))
    build().save_pretrained(path)
    return path


def trained(name: str, model: str, output: Path, liger: bool, options: dict[str, Any]) -> Any:
    policy = build()
    policy.config._name_or_path = model  # where GRPO finds its reference
    if name == "GRPO":
        options = dict(num_generations=4, max_completion_length=6, num_iterations=2) | options
    return run(
        *trainer_of(name), output,
        data_of(name), model=policy, given=needed(name, policy),
        **dict(use_liger_kernel=liger, learning_rate=1e-2) | options,
    )  # fmt: skip


CASES: list[tuple[str, dict[str, Any]]] = [
    ("DPO", dict()),
    ("DPO", dict(loss_type="apo_zero", beta=0.3)),
    ("KTO", dict()),
    ("GRPO", dict()),
    ("GRPO", dict(beta=0.2, loss_type="grpo", delta=1.5)),
    ("GRPO", dict(beta=0.2, loss_type="bnpo", importance_sampling_level="sequence")),
    ("GRPO", dict(beta=0.2, loss_type="dr_grpo", use_bias_correction_kl=True)),
    ("GRPO", dict(loss_type="cispo", epsilon_high=5.0, gradient_accumulation_steps=2)),
    ("GRPO", dict(loss_type="sapo", temperature=0.7)),
    ("GRPO", dict(loss_type="vespo")),
    ("GRPO", dict(loss_type="luspo", importance_sampling_level="sequence")),
]
UNLIKE = ("clip_ratio", "cispo_", "vespo/", "entropy", "logits/", "mean_token_accuracy")
"""What TRL logs in one of the two only, or of other positions."""


@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n}-{o}" for n, o in CASES])
def test_its_own_liger_losses_change_no_number(
    name: str, options: dict[str, Any], folder: str, tmp_path: Path
) -> None:
    plain = trained(name, folder, tmp_path / "plain", False, options)
    ours = trained(name, folder, tmp_path / "liger", True, options)
    assert type(ours[0].liger_loss).__module__.startswith("liger_kernel.chunked_loss.")
    assert patch_of(ours[0].model) is not None
    for _, log, _ in plain, ours:
        for entry in log:
            for key in [key for key in entry if key.startswith(UNLIKE)]:
                del entry[key]
    assert_parity(plain, ours, tol=1e-4)
