"""What finetune.py ends with: summary.json, a table and a plot of the two runs."""

import json
from pathlib import Path
from typing import Any

from _settings import Settings

PEAK_IS = (
    "peak_mib_*: peak of one training step's forward and backward beyond weights, gradients and "
    "optimizer state, taken once after training"
)
STEP_IS = (
    "step_ms_*: median of forward and backward of one batch, plain and patched in turns on one "
    "model; run_step_ms_*: median over the run's steps, optimizer included, the two runs one after "
    "the other"
)


def read(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, content: Any) -> None:
    """Write JSON so that a kill leaves the old file or the new one, never half of it."""
    _put(path, json.dumps(content, indent=1) + "\n")


def write_lines(path: Path, rows: list[Any]) -> None:
    """Write JSON, a row a line, all or nothing as `write` does."""
    _put(path, "".join(json.dumps(row) + "\n" for row in rows))


def _put(path: Path, text: str) -> None:
    half = path.with_name(path.name + ".tmp")
    half.write_text(text, encoding="utf-8")
    half.replace(path)


def summarise(settings: Settings, plain: dict[str, Any], liger: dict[str, Any]) -> dict[str, Any]:
    """Join the two results."""
    pairs = list(zip(plain["loss"], liger["loss"], strict=True))
    return {
        "steps": len(pairs),
        "loss_plain": plain["loss"],
        "loss_liger": liger["loss"],
        "max_rel_loss_difference": max(abs(a - b) / abs(a) for a, b in pairs),
        "eval_ppl_before": liger["ppl_before"],
        "eval_ppl_after": liger["ppl_after"],
        "eval_ppl_after_plain": plain["ppl_after"],
        "step_ms_plain": liger["turns"].get("plain", plain["step_ms"]),
        "step_ms_liger": liger["turns"].get("liger", liger["step_ms"]),
        "run_step_ms_plain": plain["step_ms"],
        "run_step_ms_liger": liger["step_ms"],
        "tokens_per_second_plain": plain["tokens_per_second"],
        "tokens_per_second_liger": liger["tokens_per_second"],
        "peak_mib_plain": plain["peak_mib"],
        "peak_mib_liger": liger["peak_mib"],
        "notes": [STEP_IS, PEAK_IS],
        "patch": liger["patch"],
        "device": liger["device"],
        "dtype": liger["dtype"],
        "versions": liger["versions"],
        "settings": settings.recorded(),
    }


def table(summary: dict[str, Any]) -> str:
    """The summary as text."""
    s = summary
    before = s["eval_ppl_before"]
    rows = [
        ("loss, first step", s["loss_plain"][0], s["loss_liger"][0], ".4f"),
        ("loss, last step", s["loss_plain"][-1], s["loss_liger"][-1], ".4f"),
        ("held-out perplexity before", before, before, ".3f"),
        ("held-out perplexity after", s["eval_ppl_after_plain"], s["eval_ppl_after"], ".3f"),
        ("step time in turns, ms", s["step_ms_plain"], s["step_ms_liger"], ".1f"),
        ("tokens per second", s["tokens_per_second_plain"], s["tokens_per_second_liger"], ".0f"),
        ("memory of a step, MiB", s["peak_mib_plain"], s["peak_mib_liger"], ".1f"),
    ]
    lines = [f"{'':28}{'plain':>12}{'liger':>12}{'liger/plain':>13}"]
    for name, a, b, form in rows:
        lines.append(f"{name:28}{a:>12{form}}{b:>12{form}}{b / a:>12.1%}")
    lines += [
        f"largest relative difference of the loss at a step: {s['max_rel_loss_difference']:.2e}",
        f"{s['steps']} steps, {s['dtype']}, on {s['device']}",
        s["patch"] or "nothing was patched: is LIGER_DISABLE set?",
    ]
    return "\n".join(lines)


def plot(summary: dict[str, Any], path: Path) -> None:
    """Loss curves, step time and memory of both runs, as a PNG."""
    pyplot = _pyplot()
    colours = {"plain": "tab:gray", "liger": "tab:blue"}
    figure, (left, *bars) = pyplot.subplots(
        1, 3, figsize=(11, 3.6), width_ratios=[2, 1, 1], layout="constrained"
    )
    steps = range(1, summary["steps"] + 1)
    left.plot(steps, summary["loss_plain"], color=colours["plain"], linewidth=4, label="plain")
    left.plot(steps, summary["loss_liger"], color=colours["liger"], label="liger", marker=".")
    left.set(xlabel="step", ylabel="training loss", title="Loss")
    left.legend()
    for axes, key, title in zip(
        bars, ("step_ms", "peak_mib"), ("Step time, ms", "Memory of a step, MiB"), strict=True
    ):
        heights = [summary[f"{key}_{name}"] for name in colours]
        axes.bar_label(axes.bar(list(colours), heights, color=list(colours.values())), fmt="%.4g")
        axes.set(title=title)
        axes.margins(y=0.12)
    figure.suptitle(f"{summary['settings']['model']} on {summary['device']}", fontsize=10)
    _save(figure, path)


def plot_log(log: list[dict[str, float]], keys: list[str], title: str, path: Path) -> None:
    """What Trainer logged under each of `keys`, in training and held out, over steps, as a PNG."""
    pyplot = _pyplot()
    figure, all_axes = pyplot.subplots(
        1, len(keys), figsize=(4.5 * len(keys), 3.6), layout="constrained", squeeze=False
    )
    for axes, key in zip(all_axes[0], keys, strict=True):
        for name, label in (key, "training"), (f"eval_{key}", "held out"):
            points = [(entry["step"], entry[name]) for entry in log if name in entry]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", label=label)
        axes.set(xlabel="step", title=key)
        axes.legend()
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def _pyplot() -> Any:
    """matplotlib's, which needs no screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    half = path.with_name(path.name + ".tmp")
    figure.savefig(half, format="png", dpi=150)
    half.replace(path)
    _pyplot().close(figure)
