"""Processes that may crash or hang without taking the run along.

A thread for each worker process hands it one task at a time and waits; a worker that dies or outlasts the time limit is
killed, its task fails, and the next task gets a new worker. Results that are arrays come through shared memory, into
the slot that the task was given.

Written by hand because no library does it: torch's DataLoader ends with its first lost worker; loky breaks the whole
executor and has no time limit for a task; pebble has one, but carries arrays through one pipe that all workers share
(bench/decode_pool.py measures it), and a worker that is killed while no task runs breaks its pool.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import multiprocessing
import multiprocessing.util
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np

from bigvivit.data.errors import DecodeError, WorkerLostError

START_SECONDS = 300.0
"""How long a worker may take to import what it needs; a machine that is busy or reads from a network takes its time."""
PR_SET_PDEATHSIG = 1

Task = Callable[[Any, np.ndarray | None], Any]
"""Called in a worker as task(argument, slot); the slot is uint8 [slot_bytes]. Must be picklable."""


class WorkerError(RuntimeError):
    """A worker that could not start, or an error in our own code inside one."""


@dataclass(frozen=True)
class Slots:
    """Shared memory, cut into pieces of one size. It has no name: it ends with the last process that maps it."""

    memory: np.ndarray
    """uint8 [count, slot_bytes]."""
    descriptor: int

    @classmethod
    def create(cls, count: int, slot_bytes: int) -> Slots:
        """Memory of a file that is nowhere: not in /dev/shm, which containers make small."""
        descriptor = os.memfd_create("bigvivit-clips")
        os.ftruncate(descriptor, max(1, count * slot_bytes))
        return cls.open(descriptor, count, slot_bytes)

    @classmethod
    def open(cls, descriptor: int, count: int, slot_bytes: int) -> Slots:
        """Map what another process created."""
        memory = np.frombuffer(mmap.mmap(descriptor, max(1, count * slot_bytes)), np.uint8, count * slot_bytes)
        return cls(memory.reshape(count, slot_bytes), descriptor)


class Pool:
    """`workers` spawned processes that run `task`; with none it runs in this process, unprotected."""

    def __init__(self, task: Task, workers: int, *, time_limit: float, slots: int = 0, slot_bytes: int = 0) -> None:
        self.task, self.time_limit = task, time_limit
        self.slots = Slots.create(slots, slot_bytes) if workers else None
        self.shape = (slots, slot_bytes)
        self.inline = np.empty(self.shape, np.uint8) if not workers else None
        self.tasks: queue.SimpleQueue[tuple[Future[Any], Any, int | None] | None] = queue.SimpleQueue()
        self.threads = [threading.Thread(target=self.supervise, daemon=True) for _ in range(workers)]
        self.pids: set[int] = set()
        """Of the workers that run."""
        self.closing = False
        # At exit, before multiprocessing asks its children to end, which these would not, and waits for them.
        multiprocessing.util.Finalize(self, kill_all, (self.pids,), exitpriority=0)
        for thread in self.threads:
            thread.start()

    def submit(self, argument: Any, slot: int | None = None) -> Future[Any]:
        """Run the task on this argument. The result raises DecodeError, WorkerLostError or WorkerError."""
        future: Future[Any] = Future()
        if self.threads:
            self.tasks.put((future, argument, slot))
        else:
            future.set_running_or_notify_cancel()
            try:
                future.set_result(self.task(argument, self.read_slot(slot)))
            except DecodeError as error:
                future.set_exception(error)
        return future

    def read_slot(self, slot: int | None) -> np.ndarray | None:
        """The shared memory of this slot."""
        if slot is None:
            return None
        return self.inline[slot] if self.slots is None else self.slots.memory[slot]  # type: ignore[index]

    def close(self) -> None:
        """End the workers at once, whatever they are at; what still waits is cancelled."""
        self.closing = True
        kill_all(self.pids)
        for _ in self.threads:
            self.tasks.put(None)
        for thread in self.threads:
            thread.join()

    def supervise(self) -> None:
        """One thread: keep one worker alive and feed it."""
        worker: Worker | None = None
        while (item := self.tasks.get()) is not None:
            future, argument, slot = item
            if self.closing:
                future.cancel()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                if worker is None or worker.is_lost():  # killed while it waited: no task is to blame
                    self.end_worker(worker)
                    worker = None
                    worker = self.start_worker()
                result = worker.run(argument, slot, self.time_limit)
            except BaseException as error:
                if not isinstance(error, DecodeError) or isinstance(error, WorkerLostError):
                    self.end_worker(worker)  # its slot is about to be used by another
                    worker = None
                future.set_exception(error)
            else:
                future.set_result(result)
        self.end_worker(worker)

    def start_worker(self) -> Worker:
        """A new worker, ready for its first task. Raises WorkerError."""
        assert self.slots is not None
        worker = Worker.spawn(self.task, self.slots.descriptor, self.shape)
        self.pids.add(worker.process.pid)
        try:
            worker.wait_ready()
        except WorkerError:
            self.end_worker(worker)
            raise
        return worker

    def end_worker(self, worker: Worker | None) -> None:
        """Kill a worker, if there is one, and wait until it is gone."""
        if worker is not None:
            worker.process.kill()
            worker.process.join()
            worker.connection.close()
            self.pids.discard(worker.process.pid)


@dataclass
class Worker:
    """A worker process as its supervisor sees it."""

    process: Any
    connection: Connection

    @classmethod
    def spawn(cls, task: Task, descriptor: int, shape: tuple[int, int]) -> Worker:
        """A new process: decord, CUDA and threads do not survive a fork."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(
            target=work, args=(SharedDescriptor(descriptor), theirs, task, shape, os.getpid()), daemon=True
        )
        process.start()
        theirs.close()  # so that the pipe ends with the worker
        return cls(process, ours)

    def wait_ready(self) -> None:
        """Return once it has imported what it needs. Raises WorkerError."""
        reason = f"was not ready after {START_SECONDS:.0f} s"
        try:
            if self.connection.poll(START_SECONDS):
                self.connection.recv()
                return
        except (EOFError, OSError):
            self.process.join()
            reason = describe_exit(self.process.exitcode)
        raise WorkerError(f"a process that decodes videos did not start: it {reason}")

    def is_lost(self) -> bool:
        """Whether it is gone, between two tasks: its pipe has ended, as it has nothing to say."""
        return self.connection.poll(0)

    def run(self, argument: Any, slot: int | None, time_limit: float) -> Any:
        """One task. Raises DecodeError, WorkerLostError or WorkerError."""
        try:
            self.connection.send((argument, slot))
            if not self.connection.poll(time_limit):
                raise WorkerLostError(f"not decoded after {time_limit:g} s: its process was killed")
            kind, value = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            raise WorkerLostError(f"the process that decoded it {describe_exit(self.process.exitcode)}") from None
        if kind == "failed":
            raise DecodeError(value)
        if kind == "error":
            raise WorkerError(f"in a process that decodes videos:\n{value}")
        return value


class SharedDescriptor:
    """A file descriptor that a spawned process inherits."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __getstate__(self) -> Any:
        return DupFd(self.descriptor)

    def __setstate__(self, state: Any) -> None:
        self.descriptor = state.detach()


def kill_all(pids: set[int]) -> None:
    """End these processes at once, whatever they are at."""
    for pid in list(pids):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def describe_exit(code: int | None) -> str:
    """How a process ended, in words."""
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def work(shared: SharedDescriptor, connection: Connection, task: Task, shape: tuple[int, int], parent: int) -> None:
    """The worker process: answer tasks until the pipe ends."""
    for number in (signal.SIGINT, signal.SIGTERM):  # to the whole group; the parent saves first, and may need clips
        signal.signal(number, signal.SIG_IGN)
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # by the kernel: a worker that hangs would never see the pipe end
    if os.getppid() != parent:
        return
    slots = Slots.open(shared.descriptor, *shape)
    if "torch" in sys.modules:  # what the task brought with it
        import torch

        torch.set_num_threads(1)
    connection.send("ready")
    while True:
        try:
            argument, slot = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer = ("done", task(argument, None if slot is None else slots.memory[slot]))
        except DecodeError as error:
            answer = ("failed", str(error))
        except MemoryError:
            answer = ("failed", "it needs more memory than there is")
        except Exception:
            answer = ("error", traceback.format_exc())
        connection.send(answer)
