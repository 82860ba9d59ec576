"""Runs rows in child processes until the time is up: what ends one costs that row, and the rest goes on.

One thread asks the device; beside it another lets a trace and a virtual card answer, but while seconds are measured.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from bigvivit.calibrate.journal import Journal, Side
from bigvivit.calibrate.rows import Row
from bigvivit.forecast.virtual_gpu import VirtualGpuError
from bigvivit.forecast.virtual_gpu.session import Child

LONGEST_REASON = 400
"""Characters of why a row failed."""
QUIET = {"KINETO_LOG_LEVEL": "99"}
"""PyTorch's profiler, which counts a CPU's allocations, writes lines about itself."""
ONE_CORE = {"OMP_NUM_THREADS": "1"}
CPU_ONLY = {"CUDA_VISIBLE_DEVICES": "", **ONE_CORE}
"""Of the process that traces: it must not touch the device."""
ENOUGH_CORES = 4
"""For a program that is timed and one that computes beside it."""
OTHERS: tuple[Side, ...] = ("forecast", "virtual")
EVIDENCE: dict[Side, str] = {"virtual": "virtual", "forecast": "forecast"}


class Worker:
    """A child that answers jobs, another one after any that failed."""

    def __init__(self, env: dict[str, str]) -> None:
        self.env = env
        self.child: Child | None = None

    def answer(self, job: Callable[[], dict[str, Any]], seconds: float) -> dict[str, Any] | None:
        """What the job gives, or `failed` with the reason; None where it took longer than `seconds`."""
        fresh, late = self.child is None, threading.Event()
        if self.child is None:
            self.child = Child({**QUIET, **self.env}, "its process")
        timer = threading.Timer(max(seconds, 0.0), partial(end_late, self.child, late))
        timer.start()
        try:
            if fresh:  # Ctrl-C goes to all processes of a terminal: it is ours to end this one
                self.child.call(signal.signal, signal.SIGINT, signal.SIG_IGN)
            return self.child.call(job)
        except Exception as error:  # whatever a row can fail of: the others do not depend on it
            self.close()
            return None if late.is_set() else {"failed": say_why(error)}
        finally:
            timer.cancel()

    def close(self) -> None:
        """The next job gets a process that has done nothing."""
        if self.child is not None:
            child, self.child = self.child, None
            child.close()

    def kill(self) -> None:
        """End it, whatever it is at."""
        if self.child is not None:
            self.child.kill()


def end_late(child: Child, late: threading.Event) -> None:
    """For a timer."""
    late.set()
    child.kill()


def say_why(error: Exception) -> str:
    """One line."""
    text = " ".join(str(error).split())
    if not isinstance(error, VirtualGpuError):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}..."


class Session:
    """A run over rows."""

    def __init__(self, journal: Journal, rows: list[Row], *, seconds: float, virtual: dict[str, str]) -> None:
        """`virtual` are the variables of a virtual card of the device's name, where rows have one."""
        self.journal, self.rows = journal, rows
        self.deadline = time.monotonic() + seconds
        device = Worker({})
        # On a CPU the same process traces, in turn: two would take each other's cores.
        self.apart = journal.identity["device"] == "cuda"
        self.workers: dict[Side, Worker] = {"device": device, "forecast": Worker(CPU_ONLY) if self.apart else device}
        self.workers["virtual"] = Worker({**virtual, **ONE_CORE})
        self.quiet, self.others_may = threading.Lock(), threading.Event()
        self.others_may.set()
        self.stopped = False

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def is_open(self, row: Row, side: Side) -> bool:
        """Whether this side could answer and has not."""
        return side in row.jobs and (row.key, side) not in self.journal.rows

    def expected_seconds(self) -> float:
        """Until the end: of the device's rows that fit in what is left."""
        open_rows = sum(row.seconds for row in self.rows if self.is_open(row, "device"))
        return max(min(open_rows, self.left()), 0.0)

    def run(self, answered: Callable[[dict[str, Any]], None]) -> None:
        """Ask for every open row, the device and beside it the others. `answered` sees each, in whichever thread."""
        with self.others(answered) if self.apart else nullcontext():
            for row in self.rows:
                if row.fresh and self.is_open(row, "device"):
                    self.workers["device"].close()
                if row.alone and self.journal.identity["cores"] < ENOUGH_CORES:
                    self.others_may.clear()
                    with self.quiet:  # they are through with the row they were at
                        self.ask("device", row, answered)
                else:
                    self.others_may.set()
                    self.ask("device", row, answered)
                if not self.apart:
                    self.ask("forecast", row, answered)

    @contextmanager
    def others(self, answered: Callable[[dict[str, Any]], None]) -> Iterator[None]:
        """The forecasts and the virtual card, in a thread; their rest follows when the device is done."""
        thread = threading.Thread(target=self.ask_others, args=(answered,))
        thread.start()
        try:
            yield
            self.others_may.set()
            thread.join()
        finally:
            self.stopped = True
            self.others_may.set()
            while thread.is_alive():  # it may be about to start one
                for worker in self.workers.values():
                    worker.kill()
                thread.join(0.2)

    def ask_others(self, answered: Callable[[dict[str, Any]], None]) -> None:
        """Row by row, in the order of the device's."""
        for row in self.rows:
            for side in OTHERS:
                self.others_may.wait()
                with self.quiet:
                    self.ask(side, row, answered)

    def close(self) -> None:
        """End all children, whatever they are at."""
        for worker in self.workers.values():
            worker.kill()
            worker.close()

    def ask(self, side: Side, row: Row, answered: Callable[[dict[str, Any]], None]) -> None:
        """One row of one side: left to the next run where it would not, or did not, end in time."""
        if self.stopped or not self.is_open(row, side) or self.left() < row.seconds:
            return
        job, start = self.with_guess(row.jobs[side], row), time.monotonic()
        found = self.workers[side].answer(job, self.left())
        if found is None or self.stopped:
            return
        evidence = EVIDENCE.get(side, self.journal.identity["evidence"])
        kept = {"key": row.key, "group": row.group, "name": row.name, "side": side, "evidence": evidence}
        kept["took_seconds"] = round(time.monotonic() - start, 2)
        self.journal.add({**kept, **found})
        answered({**kept, **found})

    def with_guess(self, job: Callable[[], dict[str, Any]], row: Row) -> Callable[[], dict[str, Any]]:
        """A search for a capacity begins where the forecast, if there is one by now, ended."""
        forecast = self.journal.found(row.key, "forecast")
        if isinstance(job, partial) and "guess" in job.keywords and forecast is not None:
            return partial(job, guess=max(forecast["frames"], 2))
        return job
