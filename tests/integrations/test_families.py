"""Every family: the patched model computes what its own code does, and reverts to it."""

import copy
import inspect
import pydoc_data.topics
import sys
from collections import Counter
from types import ModuleType
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn

from families import (
    CONFIGS,
    IMAGES,
    LENGTH,
    MODULES,
    ODDITIES,
    TEXT,
    altered,
    batch,
    build,
)
from liger_kernel.check import allowed
from liger_kernel.transformers import apply, patch_of
from liger_kernel.transformers.recipes import RECIPES, Glu, Rope
from liger_kernel.transformers.sample import sample_batch
from numerics import DEVICE
from tiny import V, assert_same, state, step

pytestmark = pytest.mark.filterwarnings(  # transformers 5.17 says so of its own call
    "ignore:`hidden_state` is deprecated:FutureWarning"
)
SHOWS = 1e-3  # what a lost oddity changes the losses by, at least
NOISE = 1e-7  # of all gradients' norm: one below is rounding alone, as that of a key's bias
PARTS = ("norm", "layer_norm", "mlp", "rope", "fused_head")
LEARNERS = {"llama", "gemma2", "glm4", "qwen3_moe"}
COMPILED = {"llama": False, "gemma2": False, "glm4": False, "granite": True, "olmo2": True,
            "phi3": True, "qwen3": True}  # fmt: skip
"""Families that are compiled, and whether that waits for the slow tests."""

families = pytest.mark.parametrize("model_type", CONFIGS)
Run = tuple[Any, dict[str, Tensor]]


def parts_of(model_type: str) -> list[str]:
    asked = {part.field for part in RECIPES[model_type].parts.values()}
    return [part for part in PARTS if part in asked or part == "fused_head"]


def slow(names: Any, late: Any) -> Any:
    marked = [pytest.param(n, marks=pytest.mark.slow if late(n) else ()) for n in names]
    return pytest.mark.parametrize("model_type", marked)


def fuses(model: nn.Module) -> bool:
    """Whether the model's loss can be the head's: Gemma3's own code took it until 5.16."""
    return "loss_function" in inspect.unwrap(type(model).forward).__code__.co_names


def width(model: nn.Module) -> int:
    return 0 if fuses(model) else V


def rotary(module: nn.Module) -> str:
    """What this attention's forward calls; until 5.16 Qwen2-VL's had its own."""
    (name,) = {
        name
        for name in inspect.unwrap(type(module).forward).__code__.co_names
        if name.startswith("apply_") and "rotary_pos_emb" in name
    }
    return name


def kept(model: Any) -> tuple[set[str], set[str]]:
    """The parts that this version of transformers has us leave, and their modules' classes."""
    return (set(), set()) if fuses(model) else ({"fused_head"}, {"Linear"})


def patched(model: Any, config: Any = None) -> Any:
    """The patch, with nothing left but what has to be."""
    patch = apply(model, config)
    assert set(patch.left) == kept(model)[0], patch.left
    return patch


def same(got: Run, want: Run, width: int) -> None:
    """Loss and gradients agree; those that are rounding alone have only to be as small."""
    least = NOISE * torch.stack([g.norm() for g in want[1].values()]).norm()
    faint = {n for n, g in want[1].items() if g.norm() <= least}
    assert got[1].keys() == want[1].keys()
    assert all(got[1][n].norm() <= least for n in faint)
    loud = [(out, {n: g for n, g in grads.items() if n not in faint}) for out, grads in (got, want)]
    assert_same(*loud, width=width)


def equal(got: Run, want: Run) -> None:
    assert torch.equal(got[0].loss, want[0].loss) and torch.equal(got[0].logits, want[0].logits)
    assert got[1].keys() == want[1].keys()
    assert all(torch.equal(got[1][n], g) for n, g in want[1].items())


def code(model: nn.Module) -> dict[ModuleType, dict[str, Any]]:
    """The modules that define the model's classes, and the classes of those."""
    files = {sys.modules[cls.__module__] for m in model.modules() for cls in type(m).__mro__[:-1]}
    classes = {type(m) for m in model.modules()}
    return {f: dict(vars(f)) for f in files} | {c: dict(vars(c)) for c in classes}


def losses(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Of each token, in whose mean changes may cancel; and the model's own."""
    with torch.no_grad():
        out = model(**inputs, use_cache=False)
    rows = out.logits[:, :-1].mT, inputs["labels"][:, 1:]
    return torch.cat([F.cross_entropy(*rows, reduction="none").flatten(), out.loss[None]])


def shows(got: Tensor, own: Tensor) -> bool:
    return bool((got - own).norm() > SHOWS * own.norm())


@families
def test_loss_and_gradients_are_the_models_own(model_type: str) -> None:
    model = build(model_type)
    inputs = batch(model)
    want = step(model, **inputs)
    patch = patched(model)
    all_but = {k: n for k, n in MODULES[model_type].items() if k not in kept(model)[1]}
    assert Counter(c.before for c in patch.changes) == all_but
    same(step(model, **inputs), want, width(model))


@families
def test_the_trainers_count_of_tokens(model_type: str) -> None:
    model = build(model_type)
    inputs = batch(model) | dict(num_items_in_batch=torch.tensor(5))
    want = step(model, **inputs)
    assert not fuses(model) or want[0].loss != step(model, **batch(model))[0].loss
    patched(model)
    same(step(model, **inputs), want, width(model))


@pytest.mark.parametrize("model_type, part", [(n, p) for n in CONFIGS for p in parts_of(n)])
def test_each_part_alone(model_type: str, part: str) -> None:
    model = build(model_type)
    inputs = batch(model)
    want = step(model, **inputs)
    patch = apply(model, dict.fromkeys(PARTS, False) | {part: True})
    assert len({c.after for c in patch.changes}) == (part != "fused_head" or fuses(model))
    same(step(model, **inputs), want, 0 if part == "fused_head" and fuses(model) else V)


@pytest.mark.parametrize("model_type", IMAGES)
def test_images_reach_the_tower_and_every_input_counts(model_type: str) -> None:
    model = build(model_type)
    inputs, eye = batch(model), f".{IMAGES[model_type]}."
    own = losses(model, inputs)
    grads = step(model, **inputs)[1]
    tower = [n for n, p in model.named_parameters() if eye in n and n not in grads]
    assert all(".head." in n for n in tower), "SigLIP's pooling is not asked for, all else is"
    for name in inputs.keys() - {"input_ids", "attention_mask", "labels"}:
        value = inputs[name]
        other = value[:, [0, 2, 1]] if name == "image_grid_thw" else torch.zeros_like(value)
        assert shows(losses(model, inputs | {name: other}), own), name


@pytest.mark.parametrize(
    "model_type, oddity", [(name, oddity) for name in CONFIGS for oddity in ODDITIES[name]]
)
def test_each_oddity_shows(model_type: str, oddity: str) -> None:
    model = build(model_type)
    inputs = batch(model)
    other = altered(model_type, ODDITIES[model_type][oddity])
    assert shows(losses(other, inputs), losses(model, inputs))


@families
def test_each_class_that_is_replaced_shows(model_type: str, monkeypatch: Any) -> None:
    """Another eps, activation, rotation of any of them: the comparison sees it."""
    model = build(model_type)
    inputs = batch(model)
    own = losses(model, inputs)
    for name, part in RECIPES[model_type].parts.items():
        other = copy.deepcopy(model)
        found = [m for m in other.modules() if type(m).__name__ == name]
        with monkeypatch.context() as patching:
            for module in found:
                if isinstance(part, Glu):
                    setattr(module, part.act, nn.Tanh())
                elif isinstance(part, Rope):
                    names = inspect.unwrap(type(module).forward).__globals__
                    patching.setitem(names, rotary(module), lambda q, k, *_, **__: (q, k))
                else:
                    eps = getattr(part, "eps", "eps")
                    setattr(module, eps, 2 * getattr(module, eps))
            assert shows(losses(other, inputs), own), name


@families
def test_norms_round_where_the_models_do(model_type: str) -> None:
    """In fp32 it would not show whether the weight meets rounded numbers."""
    model = build(model_type)
    norms = {n: m for n, m in model.named_modules() if type(m).__name__.endswith("RMSNorm")}
    for p in model.parameters():
        p.data = p.data.bfloat16()
    torch.manual_seed(0)
    inputs = {n: torch.randn(64, m.weight.numel()).bfloat16() for n, m in norms.items()}
    want = {n: m(inputs[n]) for n, m in norms.items()}
    patched(model, dict(impl="torch"))
    for name, module in norms.items():
        differ = (module(inputs[name]) != want[name]).float().mean()
        assert differ < 0.01, name


@pytest.mark.parametrize("model_type", ["glm", "glm4"])
def test_pairs_are_not_halves(model_type: str, monkeypatch: Any) -> None:
    model = build(model_type)
    inputs = batch(model)
    own = losses(model, inputs)
    llama = sys.modules["transformers.models.llama.modeling_llama"]
    monkeypatch.setattr(sys.modules[type(model).__module__], "rotate_half", llama.rotate_half)
    assert shows(losses(model, inputs), own)


@families
def test_revert_leaves_no_trace(model_type: str) -> None:
    model = build(model_type)
    inputs = batch(model)
    want, before, files = step(model, **inputs), state(model), code(model)
    patch = patched(model)
    step(model, **inputs)
    assert code(model) == files, "what other instances share was touched"
    patch.revert()
    assert state(model) == before and patch_of(model) is None and not patch.changes
    equal(step(model, **inputs), want)


@families
def test_a_sibling_is_untouched(model_type: str) -> None:
    model, sibling = build(model_type), build(model_type)
    inputs = batch(model)
    want, before = step(sibling, **inputs), state(sibling)
    patched(model)
    step(model, **inputs)
    assert state(sibling) == before
    equal(step(sibling, **inputs), want)


@families
def test_evaluation_gives_the_models_own_logits_and_loss(model_type: str) -> None:
    model = build(model_type).eval()
    inputs = batch(model)
    with torch.no_grad():
        want = model(**inputs)
        patched(model)
        got = model(**inputs)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.loss, want.loss)


@pytest.mark.parametrize(
    "model_type, reentrant",
    [(n, False) for n in CONFIGS] + [(n, True) for n in ("llama", "gemma2", "qwen3_moe")],
)
def test_gradient_checkpointing(model_type: str, reentrant: bool) -> None:
    model = build(model_type)
    inputs = batch(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    want = step(model, **inputs)  # reentrant, it loses what a router's loss would teach
    patched(model)
    same(step(model, **inputs), want, width(model))


@pytest.mark.parametrize("model_type", TEXT)
def test_generate_after_training(model_type: str) -> None:
    model, plain = build(model_type), build(model_type)
    inputs = batch(model)
    patched(model)
    step(model, **inputs)
    ids = inputs["input_ids"]
    for m in (model, plain):  # transformers cannot generate with it
        m.config.output_router_logits = False
    new = [
        m.eval().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5,
                          do_sample=False)
        for m in (model, plain)
    ]  # fmt: skip
    assert torch.equal(*new)


@slow(COMPILED, COMPILED.get)
def test_compiles_whole(model_type: str) -> None:
    model = build(model_type)
    inputs = batch(model)
    want = step(model, **inputs)
    patched(model)
    torch._dynamo.reset()
    same(
        step(torch.compile(model, backend="aot_eager", fullgraph=True), **inputs),
        want,
        width(model),
    )


@pytest.mark.gpu
@pytest.mark.filterwarnings("default::UserWarning")  # Inductor advises
@pytest.mark.parametrize("model_type", COMPILED)
def test_compiles_for_a_gpu(model_type: str) -> None:
    model = build(model_type).to("cuda")
    inputs = batch(model, device="cuda")
    want = step(model, **inputs)
    patched(model)
    torch._dynamo.reset()
    same(step(torch.compile(model, fullgraph=True), **inputs), want, width(model))


def text(steps: int, rows: int, length: int) -> Tensor:
    prose = "".join(pydoc_data.topics.topics.values()).encode()[: steps * rows * length]
    return torch.frombuffer(bytearray(prose), dtype=torch.uint8).view(steps, rows, length).long()


@slow(CONFIGS, lambda name: name not in LEARNERS)
def test_learns_the_same_from_real_text(model_type: str) -> None:
    config: dict[str, Any] = dict(vocab_size=256, initializer_range=0.05)
    ours = build(model_type, **(dict(text_config=config) if model_type in IMAGES else config))
    plain = copy.deepcopy(ours)
    patched(ours)
    (first, own), (_, other) = learn(plain), learn(ours)
    assert own < 0.8 * first
    assert abs(other - own) < 1e-3


def learn(model: nn.Module) -> tuple[float, float]:
    """The first and the last loss of a short run."""
    optimizer, values = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for ids in text(50, 4, 64):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    return values[0], values[-1]


def errs_no_more(model_type: str, device: str, config: Any = None) -> None:
    """Of bf16 weights, against the plain model in fp32; over batches, as chance has its part."""
    plain = build(model_type).to(device)
    for p in plain.parameters():  # not buffers: in bf16 the rotation would be another one
        p.data = p.data.bfloat16()
    exact, ours = copy.deepcopy(plain), copy.deepcopy(plain)
    for p in exact.parameters():
        p.data = p.data.float()
    patched(ours, config)
    sums = Counter[tuple[str, str]]()
    for seed in range(8):
        inputs = batch(plain, seed=seed, device=device)
        want, far, near = (
            {"loss": out.loss} | grads
            for out, grads in (step(m, **inputs) for m in (exact, plain, ours))
        )
        assert near.keys() == far.keys() == want.keys()
        for name, e in want.items():
            for kind, value in ("norm", e), ("plain", far[name] - e), ("ours", near[name] - e):
                sums[name, kind] += value.detach().double().square().sum().item()
    for name in want:
        norm, theirs, error = (sums[name, kind] ** 0.5 for kind in ("norm", "plain", "ours"))
        assert error <= allowed(theirs, norm, torch.bfloat16), f"{name}: {error:.1e} {theirs:.1e}"


@pytest.mark.gpu
@families
def test_bf16_errs_no_more_than_the_model(model_type: str) -> None:
    errs_no_more(model_type, DEVICE)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen2_5_vl"])
def test_bf16_errs_no_more_than_the_model_on_a_cpu(model_type: str) -> None:
    errs_no_more(model_type, "cpu", dict(impl="torch"))


@families
def test_a_batch_says_what_it_needs(model_type: str) -> None:
    config = build(model_type).config
    inputs = sample_batch(config, 3, LENGTH, seed=1)
    lengths = (inputs["labels"] < 0).sum(1)
    assert len(set(lengths.tolist())) == 3 and (lengths < LENGTH).all()
    again = sample_batch(config, 3, LENGTH, seed=1)
    assert all(torch.equal(value, again[name]) for name, value in inputs.items())
    assert inputs.keys() >= sample_batch(config, images=False).keys()
    with pytest.raises(ValueError, match=rf"length=4 is too short for {model_type}: a row needs"):
        sample_batch(config, length=4)
