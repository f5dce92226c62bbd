"""One process's error stops all of them within a minute, where they would hang in a collective.

Where one process raises, say for a label out of range, the others wait for it in a collective until
the backend's timeout, 10 to 30 minutes. Here the error goes by the default group's store instead:

    together.watch()            # in every process, once a training step
    ...
    together.announce(error)    # in the one that is about to raise what it does not recover from

No collective is added, and the store is not asked while steps follow each other.
"""

import atexit
import ctypes
import sys
import threading
import time
import uuid
import weakref
from contextlib import suppress
from typing import Any

import torch.distributed as dist

__all__ = ["INTERVAL", "OtherRankError", "announce", "watch"]

INTERVAL = 5.0  # seconds between two looks of the thread at whether steps still follow each other
PATIENCE = 6  # intervals that an announcement waits for the others
KEY = "liger_kernel/error"  # in the store: an error's own name and its sentence, "" for none
NAME = 32  # letters of the name

_steps = 0  # calls of watch()
_caller = 0  # the thread that made the last one
_told = ""  # what this process has announced
_heard = ""  # what it has heard of last
_thread: threading.Thread | None = None
_end = threading.Event()


class OtherRankError(RuntimeError):
    """Raised in the processes that did not find the error; says which one did, and what."""

    said = "another process failed"

    def __init__(self, *args: object) -> None:
        super().__init__(*(args or (self.said,)))  # one thread makes another raise a bare class


def announce(error: BaseException) -> None:
    """Tell the other processes of `error` before it is raised; the first that is announced stays.

    Returns once all of them know or have announced one themselves: after one or two intervals as a
    rule, after PATIENCE of them at the latest. For when this process ends, gloo breaks off the
    others' collectives, a launcher kills them and the store may go, and none of these says why.
    Where not all of them wait, or this process takes another step, the error was none that stops:
    it is withdrawn. Does nothing in a process on its own, and raises nothing itself.
    """
    global _told
    with suppress(Exception):
        if not _in_group():
            return
        store, world = dist.distributed_c10d._get_default_store(), dist.get_world_size()
        said = f"{type(error).__name__}: {error}"
        _told = f"{uuid.uuid4().hex}rank {dist.get_rank()}: {said}"
        first = store.compare_set(KEY, "", _told).decode()
        known = f"{KEY}/{first[:NAME]}"
        store.add(known, 1)
        if not first.endswith(said):
            print(first[NAME:], file=sys.stderr, flush=True)
        deadline = time.monotonic() + PATIENCE * INTERVAL
        while store.add(known, 0) < world:
            if time.monotonic() > deadline:
                return _withdraw()
            time.sleep(0.1)


def _withdraw() -> None:
    global _told
    with suppress(Exception):
        dist.distributed_c10d._get_default_store().compare_set(KEY, _told, "")
    _told = ""


def watch() -> None:
    """Say that this process takes a training step; the first call in a group starts its thread.

    That looks every INTERVAL whether there were more calls. If not, it asks the store for another
    process's error, prints it, has OtherRankError raised in the thread that called this last, and
    aborts the process groups, which makes NCCL's kernels return. A gloo collective returns when
    another process ends, with an error of its own.
    """
    global _steps, _caller, _thread
    _steps, _caller = _steps + 1, threading.get_ident()
    if _told:
        _withdraw()
    if (_thread is None or not _thread.is_alive()) and _in_group():
        _thread = threading.Thread(target=_look, name="liger-together", daemon=True)
        _thread.start()


def _look() -> None:
    group = store = None
    steps = -1
    while not _end.wait(INTERVAL) and dist.is_initialized():
        idle, steps = steps == _steps, _steps
        try:
            if group is None or group() is not dist.group.WORLD:
                store, group = None, weakref.ref(dist.group.WORLD)  # weak: it holds the port
                shared: Any = dist.distributed_c10d._get_default_store()
                # whoever waits for a key holds the shared connection
                store = shared.clone() if hasattr(shared, "clone") else shared
                del shared
            if idle and store is not None and store.check([KEY]):
                said = store.get(KEY).decode()
                if not _told and said not in ("", _heard):
                    return _stop(said, store)
        except Exception:  # the store is gone, or is of a kind that cannot do this
            store = None


def _stop(said: str, store: Any) -> None:
    global _heard
    _heard, OtherRankError.said = said, said[NAME:]
    with suppress(Exception):  # stderr may be closed
        print(OtherRankError.said, file=sys.stderr, flush=True)
    # The error comes first: an aborted collective returns anything, and no step may be taken with
    # it. Each group has a thread to abort in, because one can wait for another's kernels.
    raised = ctypes.py_object(OtherRankError)
    if not ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(_caller), raised):
        return  # the thread that trained is gone, and nobody waits
    groups = list(dist.distributed_c10d._world.pg_names)
    aborts = [threading.Thread(target=group.abort, daemon=True) for group in groups]
    for thread in aborts:
        thread.start()
    store.add(f"{KEY}/{said[:NAME]}", 1)
    for thread in aborts:
        thread.join(INTERVAL)


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@atexit.register
def _join() -> None:
    """No thread is to be inside torch when the interpreter goes."""
    _end.set()
    if _thread is not None:
        _thread.join(INTERVAL)
