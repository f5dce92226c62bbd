"""Times every case with every provider, in turns, and prints a table.

    python -m benchmarks.run --out FILE.json --peer liger=FOLDER --peer trl=FOLDER:FOLDER

From the repository's root. Each provider has a process and a PYTHONPATH of its own, since two of
them share an import name; `--peer` names the folders of an unpacked package. Only one works at a
time, also while it compiles and tunes. Case by case all of them prepare, then take turns, a timing
round each and every time another one first, so that all meet the same temperatures and clocks.
Every round measures the machine's ceilings in the same process right after the calls: a share of
the floor is a round's floor / time, its median is reported. Forward alone builds its graph and
drops it; backward is what both take beyond that. Times are the device's own: it waits until the
host has the calls ready, whose own time is told apart (before commit cdcdce8: calls back to back,
by whichever was slower). Without a GPU, or with `--smoke`, the shapes are
tiny, and only the logic is tested.
"""

import argparse
import contextlib
import json
import os
import queue
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch

from benchmarks.cases import CASES, Case
from benchmarks.providers import PROVIDERS
from benchmarks.table import table

ROOT = Path(__file__).parents[1]
OWN = [str(ROOT), str(ROOT / "integrations")]
TIMING = ("calls", "round_ms", "ceiling_ms")  # of one round, see `Worker.round`
Reply = dict[str, Any]


class Process:
    """A provider's worker, see `worker.py`."""

    def __init__(self, name: str, folders: list[str], device: str, smoke: bool) -> None:
        self.name, self.folders = name, folders
        self.command = [sys.executable, "-m", "benchmarks.worker", name, device]
        self.command.append("smoke" if smoke else "full")
        self.start()

    def start(self) -> None:
        inherited = os.environ.get("PYTHONPATH", "")
        path = os.pathsep.join(p for p in [*self.folders, inherited] if p)
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            self.command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
        )  # fmt: skip
        self.replies: queue.Queue[str] = queue.Queue()
        threading.Thread(
            target=self._read, args=(self.process.stdout, self.replies), daemon=True
        ).start()
        self.hello: Reply | None = None

    @staticmethod
    def _read(stdout: IO[str], replies: "queue.Queue[str]") -> None:
        for line in stdout:
            replies.put(line)
        replies.put("")

    def greet(self, timeout: float) -> Reply:
        """Its first message, which it sends unasked."""
        if self.hello is None:
            self.hello = self.receive(timeout)
        return self.hello

    def ask(self, timeout: float, **request: Any) -> Reply:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # receive() tells
            print(json.dumps(request), file=self.process.stdin, flush=True)
        return self.receive(timeout)

    def receive(self, timeout: float) -> Reply:
        """The answer; an error where the process has died or is given up."""
        try:
            line = self.replies.get(timeout=timeout)
        except queue.Empty:
            self.stop()
            return {"error": f"no answer in {timeout:.0f} s"}
        if line:
            reply = json.loads(line)
            if reply.get("fatal"):
                self.stop()
            return reply
        code = self.process.wait()
        self.log.seek(0)
        last = [text.strip() for text in self.log if text.strip()][-1:]
        return {"error": f"the process ended with {code}: {''.join(last)}"[:300]}

    def alive(self, timeout: float) -> bool:
        """Whether it takes a case; started again if it had worked and ended."""
        if self.process.poll() is not None and "device" in (self.hello or {}):
            self.start()
        return "device" in self.greet(timeout)

    def stop(self, patience: float = 0) -> None:
        """Ends it, by itself within `patience` seconds or else by force."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def measure(case: Case, processes: list[Process], args: argparse.Namespace) -> list[Reply]:
    """One row a provider."""
    absent = [p for p in processes if not p.alive(args.timeout)]
    rows = [row(case, p.name, {"error": "absent"}, []) for p in absent]
    processes = [p for p in processes if p not in absent]
    replies = {p.name: p.ask(args.timeout, do="prepare", name=case.name) for p in processes}
    rounds: dict[str, list[Reply]] = {p.name: [] for p in processes}
    for turn in range(args.rounds if case.timed else 0):
        first = turn % max(len(processes), 1)
        for process in processes[first:] + processes[:first]:
            if "error" in replies[process.name]:
                continue
            timing = {k: getattr(args, k) for k in TIMING}
            answer = process.ask(args.timeout, do="round", **timing)
            if "error" in answer:
                replies[process.name] = answer
            rounds[process.name].append(answer)
    for process in processes:
        if "error" not in replies[process.name]:
            process.ask(args.timeout, do="free")
    return rows + [row(case, p.name, replies[p.name], rounds[p.name]) for p in processes]


def row(case: Case, provider: str, reply: Reply, rounds: list[Reply]) -> Reply:
    """What is known of one case by one provider."""
    head = {"case": case.name, "group": case.group, "provider": provider}
    if "error" in reply:
        return {**head, "error": reply["error"]}
    result = {**head, **reply}
    if rounds:
        floor = case.shape.floor
        rates = [r["rates"][floor.kind] for r in rounds]

        def median(name: str) -> float:
            return statistics.median(r[name] for r in rounds)

        def share(name: str, amount: int) -> float:
            each = zip(rates, rounds, strict=True)
            return statistics.median(amount / rate * 1e3 / r[name] for rate, r in each)

        result |= {name: median(name) for name in ("ms", "forward_ms", "host_us")}
        result |= {
            "share": share("ms", floor.amount),
            "forward_share": share("forward_ms", floor.forward),
            "floor_ms": statistics.median(floor.amount / rate * 1e3 for rate in rates),
            "rate": floor.amount / result["ms"] / (1e6 if floor.kind == "bytes" else 1e9),
            "unit": "GB/s" if floor.kind == "bytes" else "TFLOP/s",
            "rounds": rounds,
        }
    return result


def flag(rows: list[Reply], tolerance: float = 0.02) -> None:
    """Adds to a row what differs by more than 2 % from eager, or from ours where eager has none."""
    values = {(r["case"], r["provider"]): r["values"] for r in rows if "values" in r}
    like = {c.name: c.like or c.name for c in CASES}
    for r in rows:
        key = like[r["case"]]
        wanted = values.get((key, "eager")) or values.get((key, "ours"))
        if "values" in r and wanted:
            off = {k: abs(v - wanted[k]) / (abs(wanted[k]) or 1.0) for k, v in r["values"].items()}
            far = {k: d for k, d in off.items() if not d <= tolerance}  # NaN is far, too
            r |= {"mismatch": far} if far else {}


def run(args: argparse.Namespace, device: str) -> Reply:
    """All of it, as it goes into the JSON file."""
    began = time.monotonic()
    cases = [
        c.tiny() if args.smoke else c
        for c in CASES
        if re.search(args.cases, c.name) and c.group in args.group
    ]
    folders = dict(entry.split("=", 1) for entry in args.peer)
    processes = [
        Process(name, [folders[name]] if name in folders else [], device, args.smoke)
        if PROVIDERS[name].peer
        else Process(name, OWN, device, args.smoke)
        for name in args.providers
    ]
    for process in processes:
        process.greet(args.timeout)
    rows: list[Reply] = []
    skipped: list[str] = []
    longest = 0.0
    try:
        for case in cases:
            start = time.monotonic()
            if start - began + longest > args.time_budget:
                skipped.append(case.name)
                continue
            some = [p for p in processes if case.only is None or p.name in case.only]
            rows += measure(case, some, args)
            longest = max(longest, time.monotonic() - start)
            print(f"{case.name}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
    finally:
        for process in processes:
            process.stop(patience=10)
    flag(rows)
    return {
        "setting": {k: getattr(args, k) for k in ("smoke", "rounds", *TIMING)},
        "seconds": round(time.monotonic() - began, 1),
        "commit": commit(),
        "providers": {p.name: p.greet(args.timeout) for p in processes},
        "floors": {c.name: describe(c) for c in cases},
        "shapes": {c.name: {**vars(c.shape), **c.options} for c in cases},
        "skipped": skipped,
        "rows": rows,
    }


def describe(case: Case) -> Reply:
    floor = case.shape.floor
    return {**vars(floor), "amount": floor.amount}


def commit() -> str:
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    return os.environ.get("COMMIT") or git.stdout.strip() or "not a git checkout"


def arguments() -> argparse.Namespace:
    def some_of(known: list[str], text: str) -> list[str]:
        unknown = [n for n in text.split(",") if n not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown} not among {known}")
        return text.split(",")

    def chosen(known: Iterable[str]) -> dict[str, Any]:
        names = list(dict.fromkeys(known))
        return {"type": partial(some_of, names), "default": names, "metavar": "LIST"}

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--cases", default="", metavar="REGEX", help="search in the names of cases")
    add("--group", **chosen(c.group for c in CASES), help="comma-separated groups of cases")
    add("--providers", **chosen(PROVIDERS), help="comma-separated")
    add("--peer", action="append", default=[], metavar="NAME=FOLDER", help="its PYTHONPATH")
    add("--out", type=Path, help="JSON file")
    add("--rounds", type=int, default=3, help="timing rounds of a case")
    add("--calls", type=int, default=2, help="timed calls a round, at least")
    add("--round-ms", type=float, default=20, help="of timed calls a round, at least")
    add("--ceiling-ms", type=float, default=250, help="of matrix products a round")
    add("--time-budget", type=float, default=345, help="seconds; later cases are skipped")
    add("--timeout", type=float, default=120, help="seconds to wait for one answer")
    add("--smoke", action="store_true", help="tiny shapes")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" or args.smoke:
        args.smoke, args.ceiling_ms = True, min(args.ceiling_ms, 20)
    report = run(args, device)
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))


if __name__ == "__main__":
    main()
