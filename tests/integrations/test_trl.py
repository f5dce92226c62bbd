"""TRL's trainers with `use_liger_loss` log what they log without it, and have its gradients."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import transformers

from liger_kernel.trl import LigerLossArguments
from preferences import assert_parity, both, completions, foreseen, pairs, run, trainer_of
from tiny import build

STEPS = 3
Options = dict[str, Any]

# fmt: off
ALONE = ["sigmoid", "hinge", "ipo", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
         "aot_unpaired", "apo_zero", "apo_down", "sft", "sigmoid_norm"]
DPO: dict[str, Options] = {t: {"loss_type": [t]} for t in ALONE} | {
    f"{f}, {t}": {"f_divergence_type": f, "loss_type": [t]}
    for f in ("forward_kl", "js_divergence", "alpha_divergence")
    for t in ("sigmoid", "hinge", "ipo", "sft", "robust", "sigmoid_norm")
} | {
    "beta": {"beta": 0.5},
    "smoothing": {"label_smoothing": 0.1},  # TRL's sigmoid has none
    "smoothing, exo_pair": {"loss_type": ["exo_pair"], "label_smoothing": 0.1},
    "smoothing, robust": {"loss_type": ["robust"], "label_smoothing": 0.2},
    "smoothing, aot": {"loss_type": ["aot"], "label_smoothing": 0.2},
    "smoothing, aot_unpaired": {"loss_type": ["aot_unpaired"], "label_smoothing": 0.2},
    "smoothing of one of two": {"loss_type": ["robust", "sigmoid"], "label_smoothing": 0.2},
    "several": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "several, no weights": {"loss_type": ["hinge", "sft"]},
    "several, sorted": {"loss_type": ["aot", "ipo"], "loss_weights": [2.0, 0.1]},
    "ld": {"ld_alpha": 0.5},
    "ld, ipo": {"ld_alpha": 0.0, "loss_type": ["ipo"]},
    "ld, sft": {"ld_alpha": 0.5, "loss_type": ["sigmoid", "sft"]},
    "weighting": {"use_weighting": True},
    "weighting, ld": {"use_weighting": True, "ld_alpha": 0.3},
    "weighting, several": {"use_weighting": True, "loss_type": ["sigmoid", "apo_zero"]},
    "alpha 1": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
    "alpha 1.5": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.5},
    "discopop": {"loss_type": ["discopop"], "discopop_tau": 0.5},  # TRL's is inexact below
    "discopop, js": {"loss_type": ["discopop"], "discopop_tau": 0.5,
                     "f_divergence_type": "js_divergence"},
    "precomputed": {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 3},
    "synced": {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.3},
    "short": {"max_length": 6},
    "short, from the end": {"max_length": 6, "truncation_mode": "keep_end"},
    "padded": {"pad_to_multiple_of": 8},
    "padding_free": {"padding_free": True},  # TRL falls back
}
KTO: dict[str, Options] = {
    "kto": {},
    "beta": {"beta": 0.5},
    "apo": {"loss_type": "apo_zero_unpaired"},
    "weights": {"desirable_weight": 1.5, "undesirable_weight": 0.4},
    "negative weight": {"undesirable_weight": -0.5},
    "apo, weights": {"loss_type": "apo_zero_unpaired", "desirable_weight": 0.3},
    "precomputed": {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 3},
    "synced": {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.3},
    "short": {"max_length": 6},
    "padded": {"pad_to_multiple_of": 8},
}
ORPO: dict[str, Options] = {
    "orpo": {},
    "beta": {"beta": 1.5},
    "nll alone": {"beta": 0.0},
    "short": {"max_length": 8, "max_completion_length": 3},
    "padded": {"padding_value": 3},
}
CPO: dict[str, Options] = {
    f"{t}, {nll}": {"loss_type": t, "cpo_alpha": nll}
    for t in ("sigmoid", "hinge", "ipo", "simpo") for nll in (0.0, 0.7)
} | {
    "beta": {"beta": 0.5},
    "gamma": {"loss_type": "simpo", "simpo_gamma": 1.5},
    "alphapo": {"loss_type": "alphapo", "alpha": 0.05, "cpo_alpha": 0.0},
    "alpha, ipo": {"loss_type": "ipo", "alpha": -0.1},
    "smoothing": {"label_smoothing": 0.1},
    "smoothing, simpo": {"loss_type": "simpo", "label_smoothing": 0.1},
    "smoothing, half": {"loss_type": "simpo", "label_smoothing": 0.5},
    "smoothing, hinge": {"loss_type": "hinge", "label_smoothing": 0.1},  # has no meaning
    "short": {"max_length": 6, "max_completion_length": 3},
}
SFT: dict[str, Options] = {
    "nll": {},
    "dft": {"loss_type": "dft"},
    "smoothing": {"label_smoothing_factor": 0.1},
    "packed": {"packing": True, "max_length": 16},
    "packed, wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 16},
    "padding_free": {"padding_free": True, "max_length": None},
    "short": {"max_length": 4, "truncation_mode": "keep_end"},
}
GRPO: dict[str, Options] = {
    t: {"loss_type": t} for t in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo")
} | {
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "num_iterations": 2},
    "temperature": {"temperature": 0.7, "beta": 0.1},
    "entropy": {"top_entropy_quantile": 0.5},
    "entropy bonus": {"entropy_coef": 0.1},
    "reference": {"beta": 0.1},
    "twice": {"num_iterations": 2, "beta": 0.1},
    "fp32 head": {"cast_lm_head_to_fp32": True},
    "scale": {"scale_rewards": "none", "mask_truncated_completions": True},
}
RLOO: dict[str, Options] = {
    "rloo": {},
    "reference": {"beta": 0.2},
    "temperature": {"temperature": 0.7},
    "twice": {"num_iterations": 2},
}
# fmt: on
CASES = {"DPO": DPO, "KTO": KTO, "ORPO": ORPO, "CPO": CPO, "SFT": SFT, "GRPO": GRPO, "RLOO": RLOO}
UNKNOWN = {
    ("DPO", "smoothing of one of two"),
    ("KTO", "negative weight"),
    ("ORPO", "nll alone"),
    ("CPO", "smoothing, half"),
}
"""Combinations that there is no loss for here: their gradients come with TRL's, in backward."""

SAMPLED: Options = {"num_generations": 4, "max_completion_length": 6, "learning_rate": 1e-3}
LOADED = {"GRPO", "RLOO"}  # TRL loads their reference anew


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("tiny"))
    build().save_pretrained(path)
    return path


def loaded(folder: str) -> Any:
    """A model that says where TRL finds it again."""
    model = build()
    model.config._name_or_path = folder
    return model


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name, cases in CASES.items() for case in cases]
)
def test_each_option(name: str, case: str, tmp_path: Path, folder: str) -> None:
    options = (SAMPLED if name in LOADED else {}) | CASES[name][case]
    plain, ours = both(name, tmp_path, make=lambda: loaded(folder), **options)
    assert_parity(plain, ours)
    known = name not in LOADED | {"SFT"} and (name, case) not in UNKNOWN
    assert foreseen(ours) == (STEPS if known else 0)


@pytest.mark.parametrize("name", ["DPO", "KTO"])
@pytest.mark.parametrize("precompute", [False, True])
def test_a_reference_that_is_loaded_anew(
    name: str, precompute: bool, tmp_path: Path, folder: str
) -> None:
    plain, ours = both(
        name, tmp_path, make=lambda: loaded(folder), given={}, precompute_ref_log_probs=precompute
    )
    assert_parity(plain, ours)
    assert foreseen(ours) == STEPS
    assert len(ours[0]._liger.fused) == (1 if precompute else 2)


@pytest.mark.parametrize("only", [True, False])
def test_sft_of_completions(only: bool, tmp_path: Path) -> None:
    plain, ours = both("SFT", tmp_path, data=completions(), completion_only_loss=only)
    assert_parity(plain, ours)


@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_simpo_is_cpo_by_another_name(alpha: float, tmp_path: Path) -> None:
    cpo, _ = both("CPO", tmp_path, loss_type="simpo", cpo_alpha=0.0, alpha=alpha)
    simpo = run(
        *trainer_of("SimPO", ours=True), tmp_path, pairs(), alpha=alpha, learning_rate=0.01,
        use_liger_loss=True,
    )  # fmt: skip
    assert_parity(cpo, simpo)
    assert foreseen(simpo) == STEPS


NO_LOSS = {
    "model_init_kwargs": "how a model is loaded",
    "trust_remote_code": "how a model is loaded",
    "disable_dropout": "the backbone's",
    "dataset_num_proc": "who prepares the data",
    "activation_offloading": "where a GPU keeps the backbone's activations",
    "pad_token": "its id is the attention mask's business",
    "generate_during_eval": "samples to look at",
    "is_encoder_decoder": "refused: test_trl_ways.py",
    "router_aux_loss_coef": "of families that have one: test_trl_options.py",
}
"""Fields of TRL's configurations that no case here sets, and why."""


@pytest.mark.parametrize("name", ["DPO", "KTO", "ORPO", "CPO"])
def test_every_field_is_thought_of(name: str) -> None:
    theirs = {f.name for f in dataclasses.fields(trainer_of(name)[0])}
    theirs -= {f.name for f in dataclasses.fields(transformers.TrainingArguments)}
    theirs -= {f.name for f in dataclasses.fields(LigerLossArguments)}  # where it was installed
    tried = set().union(*CASES[name].values())
    assert tried <= theirs
    assert not tried & NO_LOSS.keys()
    assert not theirs - tried - NO_LOSS.keys()
