"""An error of one process ends all of them, and where there is none nobody is disturbed."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

SENTENCE = "labels must lie in [0, 7), got 9"
HEAD = f"""
import os, sys, threading, time
from datetime import timedelta
import torch
import torch.distributed as dist
from liger_kernel import together
together.INTERVAL = 0.5
rank, error = int(os.environ["RANK"]), ValueError({SENTENCE!r})
def join(**where):
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(minutes=2), **where)
def steps(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        together.watch()
        time.sleep(0.05)
"""


def tcp() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{s.getsockname()[1]}"


def run(*bodies: str, url: str = "") -> list[tuple[int, str, str, float]]:
    """(exit code, stdout, stderr, end in seconds) of one process for each body."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    url = url or tcp()
    began, processes = time.monotonic(), []
    for rank, body in enumerate(bodies):
        processes.append(
            subprocess.Popen(
                [sys.executable, "-W", "error", "-c", f"{HEAD}\nurl = {url!r}\n{body}"],
                env=env | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        outcomes = []
        for process in processes:
            out, err = process.communicate(timeout=60)
            outcomes.append((process.returncode, out, err, time.monotonic() - began))
        return outcomes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


BAD = "join(init_method=url); together.watch(); together.announce(error); raise error"
STUCK = "join(init_method=url); together.watch(); dist.all_reduce(torch.ones(3))"


@pytest.mark.parametrize("bad", [0, 1], ids=["the store's server", "another"])
@pytest.mark.parametrize("store", ["tcp", pytest.param("file", marks=pytest.mark.slow)])
def test_who_waits_in_a_collective_ends_with_the_same_sentence(
    store: str, bad: int, tmp_path: Path
) -> None:
    bodies = [STUCK, STUCK]
    bodies[bad] = BAD
    outcomes = run(*bodies, url=tcp() if store == "tcp" else f"file://{tmp_path}/store")
    for code, _, err, seconds in outcomes:
        assert code == 1 and SENTENCE in err and seconds < 20
    assert f"OtherRankError: rank {bad}: ValueError: {SENTENCE}" in outcomes[1 - bad][2]


@pytest.mark.parametrize("first", ["", "t = threading.Thread(target=together.watch); t.start()"])
def test_who_runs_python_gets_an_error_that_can_be_caught(first: str) -> None:
    waits = f"""
join(init_method=url)
{first}
together.watch()
try:
    for _ in range(300):
        time.sleep(0.1)
except together.OtherRankError as e:
    print(e)
"""
    bad = "join(init_method=url); together.watch(); together.announce(error)"
    (code, out, err, seconds), other = run(waits, f"{bad}; time.sleep(8); os._exit(3)")
    said = f"rank 1: ValueError: {SENTENCE}\n"
    assert (code, out, err) == (0, said, said)
    assert other[0] == 3 and SENTENCE not in other[2], "it took its own error for another's"
    assert seconds < 8, "it came when the other process had ended"


def test_the_first_announcement_stays() -> None:
    announces = """
join(init_method=url)
time.sleep(rank)
began = time.monotonic()
together.announce(ValueError(f"of {rank}"))
waited = time.monotonic() - began
store = dist.distributed_c10d._get_default_store()
print(store.get(together.KEY).decode()[together.NAME:], waited < rank + 1.5)
dist.barrier()
dist.destroy_process_group()
"""
    first, second = run(announces, announces)
    assert first[:3] == (0, "rank 0: ValueError: of 0 True\n", "")
    assert second[:3] == (0, "rank 0: ValueError: of 0 True\n", "rank 0: ValueError: of 0\n")


@pytest.mark.slow
def test_an_error_that_nobody_waits_for_is_withdrawn() -> None:
    deaf = """
join(init_method=url)
if rank == 1:
    together.PATIENCE = 2
    together.announce(error)
else:
    steps(3)
dist.barrier()
time.sleep(2)  # an evaluation, say
dist.destroy_process_group()
"""
    for code, out, err, _ in run(deaf, deaf):
        assert (code, out, err) == (0, "", "")


@pytest.mark.slow
def test_who_waits_for_a_key_of_the_store_hears_of_it() -> None:
    """As the first collective of NCCL does: it holds the connection that the group has."""
    body = """
join(init_method=url)
steps(1)
dist.barrier()
if rank == 0:
    store = dist.distributed_c10d._get_default_store()
    try:
        store.wait(["never"], timedelta(seconds=6))
    except (dist.DistStoreError, together.OtherRankError):
        pass
else:
    began = time.monotonic()
    together.announce(error)
    print(time.monotonic() - began < 2, flush=True)
    time.sleep(6)
os._exit(0)
"""
    (_, _, err, _), (_, out, _, _) = run(body, body)
    assert f"rank 1: ValueError: {SENTENCE}" in err and out == "True\n"


@pytest.mark.parametrize("last", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_healthy_processes_do_not_notice(last: int) -> None:
    """Whichever ends seconds before the other: with rank 0 the store goes."""
    healthy = f"""
join(init_method=url)
steps(1)
assert together._thread.is_alive()
dist.barrier()
dist.destroy_process_group()
time.sleep(3 * (rank == {last}))
if rank == {last}:
    assert not together._thread.is_alive()
"""
    for code, out, err, _ in run(healthy, healthy):
        assert (code, out, err) == (0, "", "")


@pytest.mark.slow
def test_the_end_does_not_wait_for_the_thread() -> None:
    ends = "together.INTERVAL = 30; " + "join(init_method=url); together.watch(); dist.barrier()"
    for code, _, err, seconds in run(ends, ends):
        assert (code, err) == (0, "") and seconds < 20


def test_the_store_is_asked_only_when_no_step_comes() -> None:
    counts = """
asked = []
check = dist.PrefixStore.check
dist.PrefixStore.check = lambda self, keys: asked.append(keys) or check(self, keys)
join(init_method=url)
steps(3)
dist.barrier()
print(len(asked))
time.sleep(2)
print(len(asked) > 1)
dist.barrier()
dist.destroy_process_group()
"""
    for code, out, err, _ in run(counts, counts):
        assert (code, out, err) == (0, "0\nTrue\n", "")


@pytest.mark.slow
def test_a_store_that_is_gone_ends_the_watching() -> None:
    stays = (
        "join(init_method=url); steps(1); dist.barrier(); time.sleep(4); steps(1); print('here')"
    )
    _, (code, out, err, _) = run("join(init_method=url); steps(1); dist.barrier()", stays)
    assert (code, out) == (0, "here\n") and "Traceback" not in err


@pytest.mark.slow
def test_a_second_error_is_heard_and_the_first_one_not_again() -> None:
    body = """
join(init_method=url)
for _ in range(2):
    steps(1)
    time.sleep(1.5)  # the thread has time to meet the error of the last round
    print("healthy", flush=True)
    if rank == 1:
        together.announce(error)
        time.sleep(0.5)
        continue
    try:
        for _ in range(100):
            time.sleep(0.1)
    except together.OtherRankError as e:
        print(e)
time.sleep(3)
os._exit(sys.stdout.flush() or 0)
"""
    (code, out, err, _), (other, *_) = run(body, body)
    said = f"rank 1: ValueError: {SENTENCE}\n"
    assert (code, other, out, err) == (0, 0, 2 * f"healthy\n{said}", 2 * said)


@pytest.mark.slow
def test_a_new_group_is_watched_and_the_old_ones_port_is_free() -> None:
    body = """
host, port = url.removeprefix("tcp://").split(":")
for last in (False, True):
    join(store=dist.TCPStore(host, int(port), 2, rank == 0, timedelta(minutes=2)))
    steps(1.2)
    dist.barrier()
    if last and rank == 1:
        together.announce(error)
    elif last:
        try:
            for _ in range(100):
                time.sleep(0.1)
        except together.OtherRankError as e:
            print(e)
    dist.destroy_process_group()
    time.sleep(0.4 * rank)  # it is to meet the new server, before the thread wakes
time.sleep(2 * (1 - rank))
"""
    (code, out, err, _), (other, *_) = run(body, body)
    said = f"rank 1: ValueError: {SENTENCE}\n"
    assert (code, other, out, err) == (0, 0, said, said)


def test_a_process_on_its_own_starts_no_thread() -> None:
    alone = """
for world in (0, 1):
    if world:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    steps(0.2)
    together.announce(error)
    assert together._thread is None and not together._told
    assert not [t for t in threading.enumerate() if t.name == "liger-together"]
dist.destroy_process_group()
"""
    assert run(alone)[0][:3] == (0, "", "")
