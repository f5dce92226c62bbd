"""Tables and plots from the JSON files of `benchmarks.run`.

    python -m benchmarks.table FILE.json [FILE.json ...] [--plots FOLDER]

Several files, of one commit and machine, are taken together. The plots need matplotlib.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

Report = dict[str, Any]
LEGEND = (
    "Share of the floor, ms, for kernels also forward + backward and the floor's "
    "GB/s, extra MiB at the peak, host us a call. "
    "≠: a value or a gradient's norm is off by over 2 %. –: not offered."
)


def mebibytes(row: Report) -> str:
    mib = row["extra_mib"]
    return f"{mib:.0f} MiB" if mib >= 10 else f"{mib:.2f} MiB"


# How a row's figures read, in their order, and which of them a group shows.
FIGURES: dict[str, Callable[[Report], str]] = {
    "share": lambda row: f"{row['share']:.1%}",
    "ms": lambda row: f"{row['ms']:.4g} ms",
    "forward_ms": lambda row: f"{row['forward_ms']:.3g} + {row['ms'] - row['forward_ms']:.3g}",
    "rate": lambda row: f"{row['rate']:.4g} {row['unit']}",
    "extra_mib": mebibytes,
    "host_us": lambda row: f"{row['host_us']:.0f} us",
}
SHOWN = {"kernels": tuple(FIGURES), "launch": ("host_us", "ms", "forward_ms", "extra_mib")}
USUAL = ("share", "ms", "extra_mib")


def join(reports: list[Report]) -> Report:
    """One report of several parts of the cases."""
    first = dict(reports[0])
    for other in reports[1:]:
        if other["commit"] != first["commit"]:
            raise ValueError(f"two commits: {first['commit']} and {other['commit']}")
        for key in ("rows", "skipped"):
            first[key] = first[key] + other[key]
        for key in ("floors", "shapes", "providers"):
            first[key] = {**first[key], **other[key]}
    return first


def cell(row: Report | None, notes: list[str]) -> str:
    if row is None:
        return ""
    if "error" in row:
        if row["error"] in ("not offered", "absent"):
            return "–" if row["error"] == "not offered" else "absent"
        if "OutOfMemory" in row["error"]:
            return "out of memory"
        note = f"{row['provider']}: {row['error'][:150]}"
        if note not in notes:
            notes.append(note)
        return f"error {notes.index(note) + 1}"
    shown = SHOWN.get(row["group"], USUAL)
    parts = [FIGURES[name](row) for name in shown if row.get(name) is not None]
    if "mismatch" in row:
        parts.append("≠ " + " ".join(f"{k} {v:.0%}" for k, v in row["mismatch"].items()))
    return ", ".join(parts)


def memory_ratio(rows: dict[str, Report]) -> str:
    """Our extra memory over eager's."""
    eager, ours = (rows.get(name, {}).get("extra_mib") for name in ("eager", "ours"))
    return f"{ours / eager:.1%}" if eager and ours else ""


def grouped(report: Report) -> dict[str, dict[str, dict[str, Report]]]:
    """group -> case -> provider -> row."""
    groups: dict[str, dict[str, dict[str, Report]]] = {}
    for row in report["rows"]:
        groups.setdefault(row["group"], {}).setdefault(row["case"], {})[row["provider"]] = row
    return groups


def table(report: Report) -> str:
    """Markdown: one table a group, then the machine, the ceilings, absences and errors."""
    notes: list[str] = []
    lines: list[str] = []
    for cases in grouped(report).values():
        present = {
            provider
            for rows in cases.values()
            for provider, row in rows.items()
            if row.get("error") not in ("not offered", "absent")
        }
        providers = [p for p in report["providers"] if p in present]
        head = ["case", *providers, "memory, ours / eager"]
        lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for name, rows in cases.items():
            cells = [name, *(cell(rows.get(p), notes) for p in providers), memory_ratio(rows)]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join([*lines, LEGEND, *footer(report, notes)])


def footer(report: Report, notes: list[str]) -> list[str]:
    lines = [f"commit {report['commit'][:12]}, {report['seconds']} s"]
    for name, hello in report["providers"].items():
        if "device" not in hello:
            lines.append(f"ABSENT {name}: {hello.get('absent') or hello.get('error')}")
            continue
        versions = {**hello["versions"], **hello["provider"]}
        shown = ", ".join(f"{k} {v}" for k, v in versions.items())
        lines.append(f"{name}: {hello['device']}, {shown}{ceilings(report, name)}")
    if report["skipped"]:
        lines.append("no time left for: " + ", ".join(report["skipped"]))
    return lines + [f"{i}. {note}" for i, note in enumerate(notes, 1)]


def ceilings(report: Report, provider: str) -> str:
    """The range of the rates that a provider's process measured."""
    text = ""
    for kind, unit in (("flops", "TFLOP/s"), ("bytes", "TB/s")):
        if found := [rate / 1e12 for rate in rates(report, kind, provider)]:
            text += f", {min(found):.3g} to {max(found):.3g} {unit}"
    return text


def rates(report: Report, kind: str, provider: str | None = None) -> list[float]:
    """One of the machine's ceilings as measured by a provider's process, or by all."""
    rows = [row for row in report["rows"] if provider in (None, row["provider"])]
    rounds = (r["rates"] for row in rows for r in row.get("rounds", []))
    return [r[kind] for r in rounds if kind in r]


def plot_memory(report: Report, file: Path) -> None:
    """Extra memory over the length of sequences, a panel an operation, all axes logarithmic."""
    from matplotlib.figure import Figure

    series: dict[str, dict[str, dict[int, float | None]]] = {}
    for row in report["rows"]:
        if row["group"] == "memory":
            length = report["shapes"][row["case"]]["length"]
            op = series.setdefault(row["case"].split("-")[1], {})
            mib = row.get("extra_mib")
            op.setdefault(row["provider"], {})[length] = mib / 1024 if mib else None
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, max(len(series), 1), sharey=True, squeeze=False)[0]
    for axes, (op, providers) in zip(panels, series.items(), strict=False):
        for provider, points in providers.items():
            fit = {length: gib for length, gib in points.items() if gib}
            label = provider if len(fit) == len(points) else f"{provider} (where it could run)"
            axes.plot(list(fit), list(fit.values()), marker="o", label=label)
        lengths = sorted({length for points in providers.values() for length in points})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.set(title=op, xlabel="tokens a sequence, 8 sequences, scored labels constant")
        axes.grid(True, alpha=0.3)
        axes.legend()
    panels[0].set_ylabel("extra GiB, gradients included")
    figure.savefig(file, dpi=150)


def plot_shares(report: Report, file: Path) -> None:
    """Bars: the share of the floor that each provider reaches in each timed case."""
    from matplotlib.figure import Figure

    shares: dict[str, dict[str, float]] = {}
    for row in report["rows"]:
        if "share" in row and row["group"] != "launch":
            shares.setdefault(row["case"], {})[row["provider"]] = row["share"] * 100
    providers = [p for p in report["providers"] if any(p in s for s in shares.values())]
    figure = Figure(figsize=(8, 1.5 + 0.55 * len(shares)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / max(len(providers), 1)
    for i, provider in enumerate(providers):
        y = [j + (i + 0.5) * height - 0.4 for j in range(len(shares))]
        axes.barh(y, [s.get(provider, 0) for s in shares.values()], height, label=provider)
    axes.axvline(100, color="black", linewidth=1)
    axes.set_xlim(0, 110)
    axes.set_yticks(range(len(shares)), list(shares))
    axes.invert_yaxis()
    axes.set_xlabel("% of the floor: ideal time at the machine's measured rate / time")
    axes.legend(loc="lower right")
    figure.savefig(file, dpi=150)


def plot_roofline(report: Report, file: Path) -> None:
    """Operations a second over operations a byte, both of the floor: a marker a provider."""
    from matplotlib.figure import Figure

    points: dict[str, list[tuple[float, float]]] = {}
    for row in report["rows"]:
        floor = report["floors"][row["case"]]
        if "ms" in row and row["group"] != "launch" and "bytes" in floor:
            point = floor["flops"] / floor["bytes"], floor["flops"] / row["ms"] / 1e9
            points.setdefault(row["provider"], []).append(point)
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log", xlabel="operations a byte of the floor", ylabel="TFLOP/s")
    axes.grid(True, alpha=0.3)
    for (provider, found), marker in zip(points.items(), "oxs^vD+*P", strict=False):
        axes.plot(*zip(*found, strict=True), marker, label=provider, fillstyle="none")
    if points:
        draw_roofs(axes, report, [x for found in points.values() for x, _ in found])
        axes.legend(loc="lower right")
    figure.savefig(file, dpi=150)


def draw_roofs(axes: Any, report: Report, intensities: list[float]) -> None:
    """The median ceilings over the range of the points."""
    copy, product = (
        statistics.median(found) / 1e12 if (found := rates(report, kind)) else math.inf
        for kind in ("bytes", "flops")
    )
    low, high = min(intensities) / 2, max(intensities) * 2
    corner = min(product / copy, high)
    axes.plot([low, corner], [low * copy, corner * copy], "k-", linewidth=1)
    axes.annotate(f"{copy:.3g} TB/s, a copy", (low, low * copy), va="top")
    if product < math.inf:
        axes.plot([corner, high], [product, product], "k-", linewidth=1)
        axes.annotate(f"{product:.3g} TFLOP/s, a product", (corner, product), va="bottom")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--plots", type=Path, help="folder for the plots")
    args = parser.parse_args()
    report = join([json.loads(file.read_text()) for file in args.files])
    print(table(report))
    if args.plots:
        args.plots.mkdir(parents=True, exist_ok=True)
        plot_memory(report, args.plots / "memory_over_length.png")
        plot_shares(report, args.plots / "share_of_floor.png")
        plot_roofline(report, args.plots / "roofline.png")


if __name__ == "__main__":
    main()
