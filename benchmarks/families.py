"""Every family at the width of a model people train: is the patch right, and what does it save?

    python -m benchmarks.families --out benchmarks/results/families-h100-bf16.json \\
        --peer liger=FOLDER --compile llama gemma2

`liger_kernel.check` on random weights, `--layers` layers of the language model deep, with images
where the family has eyes: loss and every gradient against the plain model in fp32, time and memory
of forward and backward beside it; the status is 1 where one does not agree. Liger-Kernel, whose
import name is the same, patches the same models in a process of its own, and is timed there in
calls back to back. With so few layers the head weighs more than in the whole model.
"""

import argparse
import gc
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoConfig

OURS = Path(__file__).parents[1] / "integrations" / "liger_kernel"


def text(
    hidden: int, mlp: int, heads: int, kv: int, vocabulary: int, eps: float = 1e-6, **more: Any
) -> dict[str, Any]:
    return dict(
        hidden_size=hidden, intermediate_size=mlp, num_attention_heads=heads,
        num_key_value_heads=kv, vocab_size=vocabulary, rms_norm_eps=eps, **more,
    )  # fmt: skip


QWEN2_7B = text(3584, 18944, 28, 4, 152064)
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama 3.1 8B", text(4096, 14336, 32, 8, 128256, 1e-5)),
    "mistral": ("Mistral 7B v0.3", text(4096, 14336, 32, 8, 32768, 1e-5)),
    "mixtral": ("Mixtral 8x7B", text(4096, 14336, 32, 8, 32000, 1e-5, output_router_logits=True)),
    "gemma": ("Gemma 7B", text(3072, 24576, 16, 16, 256000, head_dim=256)),
    "gemma2": ("Gemma 2 9B", text(3584, 14336, 16, 8, 256000, head_dim=256)),
    "gemma3_text": ("Gemma 3 1B", text(1152, 6912, 4, 1, 262144, head_dim=256)),
    "gemma3": ("Gemma 3 4B", dict(
        text_config=text(2560, 10240, 8, 4, 262208, head_dim=256),
        vision_config=dict(hidden_size=1152, intermediate_size=4304, num_attention_heads=16,
                           num_hidden_layers=4, image_size=896, patch_size=14),
    )),
    "qwen2": ("Qwen2.5 7B", QWEN2_7B),
    "qwen2_vl": ("Qwen2-VL 7B", dict(text_config=QWEN2_7B, vision_config=dict(
        depth=4, embed_dim=1280, hidden_size=3584, num_heads=16))),
    "qwen2_5_vl": ("Qwen2.5-VL 7B", dict(text_config=QWEN2_7B, vision_config=dict(
        depth=4, hidden_size=1280, out_hidden_size=3584, num_heads=16, intermediate_size=3420,
        fullatt_block_indexes=[3]))),
    "qwen3": ("Qwen3 8B", text(4096, 12288, 32, 8, 151936, head_dim=128)),
    "qwen3_moe": ("Qwen3 30B-A3B", text(
        2048, 6144, 32, 4, 151936, head_dim=128, moe_intermediate_size=768, num_experts=128,
        num_experts_per_tok=8, norm_topk_prob=True, output_router_logits=True)),
    "phi3": ("Phi-3 mini", text(3072, 8192, 32, 32, 32064, 1e-5, pad_token_id=32000)),
    "granite": ("Granite 3 8B", text(
        4096, 12800, 32, 8, 49155, 1e-5, logits_scaling=16.0, residual_multiplier=0.22,
        embedding_multiplier=12.0, attention_multiplier=0.0078125)),
    "olmo2": ("OLMo 2 7B", text(4096, 11008, 32, 32, 100352)),
    "glm4": ("GLM-4 9B 0414", text(
        4096, 13696, 32, 2, 151552, 1e-5, head_dim=128, pad_token_id=151329)),
    "mllama": ("Llama 3.2 11B Vision", dict(
        text_config=text(4096, 14336, 32, 8, 128256, 1e-5, cross_attention_layers=[1]),
        vision_config=dict(num_hidden_layers=2, num_global_layers=1, image_size=560,
                           intermediate_layers_indices=[0], vision_output_dim=2560))),
}  # fmt: skip


def ours(name: str) -> Any:
    """A module of this project that needs torch alone, also where liger_kernel is another's."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, OURS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def case(model_type: str, args: argparse.Namespace, device: str) -> tuple[Any, dict[str, Any]]:
    sample, dtype = ours("transformers/sample"), torch.bfloat16
    config = AutoConfig.for_model(model_type, **SIZES[model_type][1])
    model = sample.sample_model(config, layers=args.layers, dtype=dtype, device=device)
    size = args.batch, args.length
    batch = sample.sample_batch(model.config, *size, device=device, dtype=dtype)
    return model.train(), batch


def checked(model_type: str, args: argparse.Namespace, device: str) -> dict[str, Any]:
    from liger_kernel.check import check

    found = check(*case(model_type, args, device))
    print(found, flush=True)
    facts = found.to_dict()
    facts["gradients"] = max(len(facts.pop("rows")) - 1, 0)
    return facts | {"worst": [asdict(row) | {"used": row.used} for row in found.worst]}


def timed(model_type: str, args: argparse.Namespace, device: str) -> dict[str, Any]:
    """Loss, time and memory of the model as the peer patches it, or compiled."""
    measure = ours("measure")
    model, batch = case(model_type, args, device)
    if args.timed == "compile":
        step_model = torch.compile(model)
    else:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model)
        step_model = model
    loss = torch.empty(0)

    def step() -> None:
        nonlocal loss
        model.zero_grad()
        loss = step_model(**batch).loss
        loss.backward()
        loss = loss.detach()

    where = next(model.parameters()).device
    step()
    model.zero_grad()
    with measure.PeakMemory(where) as peak:
        step()
    ms = median(measure.call_ms(step, where) for _ in range(5))
    found = {"loss": float(loss), "peak_mib": peak.mib, "step_ms": ms}
    print(args.timed, found, flush=True)
    return found


def each(args: argparse.Namespace, run: Any, report: dict[str, Any], key: str | None) -> None:
    """`run` on every family, into the report; what fails is said there."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for model_type in args.families:
        name = SIZES[model_type][0]
        print(name, flush=True)
        try:
            found = run(model_type, args, device)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
            print(found, flush=True)
        entry = report.setdefault(model_type, {"size": name})
        entry.update(found if key is None else {key: found})
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        args.out.write_text(json.dumps(report, indent=1) + "\n")


def main() -> int:
    """1 where a family does not agree or could not be checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--families", nargs="*", default=list(SIZES), choices=SIZES)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--peer", help="liger=FOLDER of an unpacked Liger-Kernel")
    parser.add_argument("--compile", nargs="*", default=[], choices=SIZES, help="torch.compile too")
    parser.add_argument("--timed", help=argparse.SUPPRESS)  # a process of a peer's
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.timed:
        each(args, timed, json.loads(args.out.read_text()), args.timed)
        return 0
    from benchmarks.training_step import machine

    device = "cuda" if torch.cuda.is_available() else "cpu"
    report = machine(device) | {k: getattr(args, k) for k in ("layers", "batch", "length")}
    each(args, checked, report, None)
    name, _, folder = (args.peer or "").partition("=")
    for key, path, families in ((name, folder, args.families), ("compile", "", args.compile)):
        if key and families:
            sizes = [f"--{k}={getattr(args, k)}" for k in ("layers", "batch", "length")]
            command = [sys.executable, __file__, "--timed", key, *sizes, "--out", str(args.out)]
            env = os.environ | ({"PYTHONPATH": path} if path else {})
            done = subprocess.run([*command, "--families", *families], env=env)
            if done.returncode:  # the figures that there are have been written
                print(f"{key} has ended with status {done.returncode}", file=sys.stderr)
    return int(not all(report[name].get("ok") for name in args.families))


if __name__ == "__main__":
    sys.exit(main())
