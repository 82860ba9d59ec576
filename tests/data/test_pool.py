"""A pool whose workers crash, hang and are killed."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from bigvivit.data.errors import DecodeError, WorkerLostError
from bigvivit.data.pool import Pool, WorkerError
from tests.launching import ROOT


def misbehave(argument: Any, slot: np.ndarray | None) -> Any:
    """What decoders do, on demand."""
    kind, value = argument
    if kind == "crash":
        ctypes.string_at(0)  # as C code does: no Python exception
    elif kind == "hang":
        ctypes.PyDLL(None).sleep(1000)  # in C, and holding the interpreter's lock
    elif kind == "exit":
        os._exit(value)
    elif kind == "fail":
        raise DecodeError(f"{value} is broken")
    elif kind == "bug":
        raise KeyError(value)
    elif kind == "memory":
        raise MemoryError
    elif kind == "pid":
        return os.getpid()
    elif kind == "fill":
        assert slot is not None
        slot[:] = value
    return value


@pytest.fixture
def pool() -> Iterator[Pool]:
    pool = Pool(misbehave, 2, time_limit=1.5, slots=4, slot_bytes=1000)
    yield pool
    pool.close()


def test_arrays_come_through_slots(pool: Pool) -> None:
    futures = [pool.submit(("fill", number), slot) for slot, number in enumerate((7, 8, 9, 10))]
    assert [future.result() for future in futures] == [7, 8, 9, 10]
    slots = [pool.read_slot(slot) for slot in range(4)]
    assert [set(slot.tolist()) for slot in slots if slot is not None] == [{7}, {8}, {9}, {10}]


def test_each_failure_is_that_of_its_task_alone(pool: Pool) -> None:
    """Whatever one task does to its process, those before and after it come through."""
    bad = [
        (("crash", 0), WorkerLostError, "was ended by SIGSEGV"),
        (("hang", 0), WorkerLostError, r"not decoded after 1\.5 s"),
        (("exit", 3), WorkerLostError, "ended with exit code 3"),
        (("fail", "x.mp4"), DecodeError, r"x\.mp4 is broken"),
        (("memory", 0), DecodeError, "more memory than there is"),
        (("bug", "name"), WorkerError, "KeyError: 'name'"),
    ]
    futures = []
    for number, (argument, _, _) in enumerate(bad):
        futures += [pool.submit(("good", number)), pool.submit(argument)]
    futures.append(pool.submit(("good", "last")))
    for number, (_, kind, message) in enumerate(bad):
        assert futures[2 * number].result() == number
        with pytest.raises(kind, match=message):
            futures[2 * number + 1].result()
    assert futures[-1].result() == "last"


def test_a_worker_killed_while_it_waits_costs_nothing(pool: Pool) -> None:
    pids = {pool.submit(("pid", 0)).result() for _ in range(20)}
    for pid in list(pool.pids):
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.5)
    assert {pool.submit(("pid", 0)).result() for _ in range(20)}.isdisjoint(pids)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_leave_stopping_to_the_parent(pool: Pool, number: signal.Signals) -> None:
    before = {pool.submit(("pid", 0)).result() for _ in range(20)}
    for pid in before:
        os.kill(pid, number)
    assert {pool.submit(("pid", 0)).result() for _ in range(20)} <= set(pool.pids)
    assert before <= set(pool.pids)


def test_closing_does_not_wait_for_one_that_hangs() -> None:
    pool = Pool(misbehave, 1, time_limit=1000)
    pool.submit(("good", 0)).result()
    hanging, waiting = pool.submit(("hang", 0)), pool.submit(("good", 1))
    time.sleep(0.2)
    before = time.monotonic()
    pool.close()
    assert time.monotonic() - before < 5
    assert hanging.done()
    assert waiting.cancelled()
    assert not pool.pids


def test_without_workers_the_task_runs_here() -> None:
    pool = Pool(misbehave, 0, time_limit=1, slots=2, slot_bytes=3)
    assert pool.submit(("pid", 0)).result() == os.getpid()
    assert pool.submit(("fill", 5), 1).result() == 5
    slot = pool.read_slot(1)
    assert slot is not None
    assert slot.tolist() == [5, 5, 5]
    with pytest.raises(DecodeError, match="broken"):
        pool.submit(("fail", "x")).result()


class CannotStart:
    """A task that takes its worker down when it arrives there."""

    def __call__(self, argument: Any, slot: np.ndarray | None) -> None: ...

    def __reduce__(self) -> Any:
        return os._exit, (4,)


def test_a_worker_that_cannot_start_is_an_error() -> None:
    pool = Pool(CannotStart(), 1, time_limit=1)
    with pytest.raises(WorkerError, match="did not start: it ended with exit code 4"):
        pool.submit(0).result()
    pool.close()


@pytest.mark.parametrize("end", ["kill", "exit", "hang"])
def test_workers_end_with_their_parent(end: str, tmp_path: Path) -> None:
    """However it ends, and also those that hang."""
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(f"""
        import time
        from bigvivit.data.pool import Pool
        from tests.data.test_pool import misbehave
        if __name__ == "__main__":
            pool = Pool(misbehave, 2, time_limit=1000, slots=2, slot_bytes=10)
            [future.result() for future in [pool.submit(("good", 0)) for _ in range(50)]]
            while len(pool.pids) < 2:
                time.sleep(0.01)
            {'[pool.submit(("hang", 0)) for _ in range(2)]; time.sleep(0.3)' if end == "hang" else ""}
            print(*pool.pids, flush=True)
            {"" if end == "exit" else "time.sleep(1000)"}
        """)
    )
    parent = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 2
    workers = [psutil.Process(pid) for pid in pids if end != "exit"]
    if end != "exit":
        parent.kill()
    assert parent.wait(timeout=20) == (0 if end == "exit" else -signal.SIGKILL)
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
    assert not any(psutil.pid_exists(pid) for pid in pids)
