"""Inside each process of a dry run: what it allocates, in which phase of a step, and its end after some steps.

Installed by the startup hook of the virtual GPU before the user's program; on a real GPU it counts the same
(`bench/dryrun_truth.py`). Imports no torch: it waits until the program does. Nothing of the program is replaced but
three functions that are wrapped: `torch.autograd.backward`, `torch.autograd.grad` and `GradScaler.update`; steps are
seen by PyTorch's global hooks of optimizers.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import itertools
import json
import logging
import multiprocessing
import multiprocessing.util
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from bigvivit.forecast import virtual_gpu
from bigvivit.forecast.dryrun.history import Interval, describe_device, find_caller, write_events
from bigvivit.forecast.dryrun.skip_init import skip_init
from bigvivit.forecast.virtual_gpu import hooks, inside

VARIABLE = "BIGVIVIT_DRYRUN"
"""Names what a dry run's processes must know, as JSON: `folder`, `steps`, `snapshot`, `skip_init`."""
MAX_EVENTS = 500_000
"""Of the allocator, kept for each device: some GiB of Python objects when they are read."""
PEERS_SECONDS = 60.0
"""How long a rank that has done its steps waits for the others, which may still be reading from it."""
OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED")
"""How PyTorch, cuBLAS and cuDNN say it in errors that are no OutOfMemoryError."""


class Recorder:
    """What one process did so far."""

    def __init__(self, folder: Path, steps: int, snapshot: bool) -> None:
        self.folder, self.wanted, self.snapshot = folder, steps, snapshot
        self.reset()

    def reset(self) -> None:
        """Nothing yet: also in a child that was forked."""
        self.began = time.monotonic()
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.intervals: list[Interval] = []
        self.phase, self.step, self.line = "loading", 1, ""
        self.depth, self.stepping = 0, 0  # backward passes, and optimizer steps, within one another
        self.backward_since: set[int] = set()  # optimizers that have stepped since the last backward began
        self.counts: Counter[int] = Counter()
        self.calls, self.calls_per_step = 0, 0
        self.updates_without_step, self.stepped_since_update = 0, False
        self.step_ends: list[float] = []
        self.shortages: list[dict[str, Any]] = []
        self.peaks: dict[int, dict[str, int]] = {}
        self.written = False

    # What PyTorch calls

    def watch(self, torch: ModuleType) -> None:
        """Follow a PyTorch that was imported just now."""
        self.torch = torch
        torch.cuda._lazy_call(self.begin)
        optimizer = importlib.import_module("torch.optim.optimizer")  # a name that torch.optim deletes
        optimizer.register_optimizer_step_pre_hook(self.before_step)
        optimizer.register_optimizer_step_post_hook(self.after_step)
        self.first_forward = torch.nn.modules.module.register_module_forward_pre_hook(self.before_forward)
        torch.autograd.backward = self.around_backward(torch.autograd.backward)
        torch.autograd.grad = self.around_backward(torch.autograd.grad)
        scaler = torch.amp.GradScaler
        scaler.update = self.around_update(scaler.update)
        for holder, name in ((torch._C, "_cuda_resetPeakMemoryStats"), (torch._C, "_accelerator_resetPeakStats")):
            if hasattr(holder, name):
                setattr(holder, name, self.around_reset(getattr(holder, name)))
        os.register_at_fork(after_in_child=self.reset)

    def begin(self) -> None:
        """CUDA was initialised."""
        self.torch.cuda.memory._record_memory_history(max_entries=MAX_EVENTS, stacks="python", context="alloc")
        self.torch._C._cuda_attach_out_of_memory_observer(self.note_shortage)
        multiprocessing.util.Finalize(None, self.write, args=("exit",), exitpriority=-100)

    def before_forward(self, module: Any, inputs: Any) -> None:
        """The first forward pass of training ends loading and initialisation."""
        if self.torch.compiler.is_compiling():
            return
        if self.torch.is_grad_enabled() and module.training:
            self.enter("forward")
            self.first_forward.remove()

    def around_backward(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A backward pass, which can contain others (reentrant checkpoints)."""

        @functools.wraps(function)
        def backward(*args: Any, **kwargs: Any) -> Any:
            if self.torch.compiler.is_compiling():  # torch.compile knows the function, and not this one
                return function(*args, **kwargs)
            if not self.depth:
                self.first_forward.remove()
                self.backward_since.clear()
                self.enter("backward", find_caller())
            self.depth += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1
                if not self.depth:
                    self.enter("optimizer" if self.stepping else "after backward")
                    self.end_when_done()

        return backward

    def before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """An optimizer begins a step. A step that begins a further iteration ends the run."""
        new = id(optimizer) not in self.backward_since
        if new and self.counts[id(optimizer)] >= self.wanted:
            self.finish()
        self.stepping += 1
        self.enter("optimizer", find_caller())

    def after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """An optimizer has stepped. Several calls after one backward are one step (ZeRO's groups of parameters), and
        several optimizers (a GAN's two) take turns: the run ends when as many calls were made as in the step before."""
        self.stepping -= 1
        self.stepped_since_update = True
        self.enter("backward" if self.depth else "forward")
        key, before = id(optimizer), max(self.counts.values(), default=0)
        if key not in self.backward_since:
            self.backward_since.add(key)
            self.counts[key] += 1
        if max(self.counts.values()) > before:
            self.calls_per_step, self.calls = self.calls, 0
            self.step = before + 2
            self.step_ends.append(time.monotonic())
            if before == 0 and self.torch.cuda.is_initialized():
                (self.folder / f"{os.getpid()}.stepping").touch()
            inside.let_collectives_go()
        self.calls += 1
        self.end_when_done()

    def end_when_done(self) -> None:
        """End after the last call of the last step, but not within a backward pass that steps as it goes."""
        done = max(self.counts.values(), default=0) >= self.wanted
        if done and self.calls >= self.calls_per_step and not self.depth and not self.stepping:
            self.finish()

    def around_update(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """GradScaler skips steps whose gradients are not finite: an iteration all the same."""

        @functools.wraps(function)
        def update(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            if not self.stepped_since_update:
                self.updates_without_step += 1
                if self.updates_without_step + max(self.counts.values(), default=0) >= self.wanted:
                    self.finish()
            self.stepped_since_update = False
            return result

        return update

    def around_reset(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The program resets its peaks: keep what they were."""

        @functools.wraps(function)
        def reset(*args: Any, **kwargs: Any) -> Any:
            self.keep_peaks()
            return function(*args, **kwargs)

        return reset

    def note_shortage(self, device: int, asked: int, total: int, free: int) -> None:
        """An allocation is about to fail with PyTorch's OutOfMemoryError."""
        self.keep_peaks()
        stats = self.torch.cuda.memory_stats(device)
        self.shortages.append(
            {
                "device": device,
                "asked_bytes": asked,
                "free_bytes": free,
                "total_bytes": total,
                "allocated_bytes": stats["allocated_bytes.all.current"],
                "reserved_bytes": stats["reserved_bytes.all.current"],
                "phase": self.phase,
                "step": self.step,
                "line": find_caller() or self.line,
            }
        )

    # Phases and peaks

    def enter(self, phase: str, line: str = "") -> None:
        """Another phase begins: close the one before."""
        self.close_interval()
        self.phase, self.line = phase, line

    def close_interval(self) -> None:
        """Keep what the counters say at the end of a phase."""
        if not self.torch.cuda.is_initialized():
            return
        self.find_rank()
        self.keep_peaks()
        counters = {}
        for device in range(self.torch.cuda.device_count()):
            stats = self.torch.cuda.memory_stats(device)
            if device in self.peaks:
                counters[device] = {
                    "allocations": stats["allocation.all.allocated"],
                    "frees": stats["allocation.all.freed"],
                    **self.peaks[device],
                }
        self.intervals.append(Interval(self.step, self.phase, self.line, counters))

    def keep_peaks(self) -> None:
        """The most so far, of each device, whatever the program resets."""
        if not self.torch.cuda.is_initialized():
            return
        for device in range(self.torch.cuda.device_count()):
            stats = self.torch.cuda.memory_stats(device)
            if not stats.get("allocation.all.allocated") and not stats.get("num_ooms"):
                continue
            kept = self.peaks.setdefault(device, {"peak_allocated": 0, "peak_reserved": 0})
            kept["peak_allocated"] = max(kept["peak_allocated"], stats["allocated_bytes.all.peak"])
            kept["peak_reserved"] = max(kept["peak_reserved"], stats["reserved_bytes.all.peak"])

    def find_rank(self) -> None:
        """Which rank this is, where the program has said so."""
        distributed = self.torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            self.rank, self.world = distributed.get_rank(), distributed.get_world_size()

    # The end

    def write(self, ended: str) -> None:
        """The record, once; nothing where this process never used a GPU."""
        if self.written or not self.torch.cuda.is_initialized():
            return
        self.written = True
        self.close_interval()
        snapshot = self.torch.cuda.memory._snapshot()
        stem = self.folder / str(os.getpid())
        devices = []
        for device, peaks in self.peaks.items():
            found = describe_device(snapshot["device_traces"][device], self.intervals, device, MAX_EVENTS)
            properties = self.torch.cuda.get_device_properties(device)
            stats = self.torch.cuda.memory_stats(device)
            if found["complete"]:
                write_events(snapshot["device_traces"][device], stem.with_suffix(f".{device}.jsonl.gz"))
            devices.append(
                {
                    "device": device,
                    "name": properties.name,
                    "total_bytes": properties.total_memory,
                    **{f"{name}_bytes": value for name, value in peaks.items()},
                    "peak_driver_bytes": virtual_gpu.driver_bytes(device) if virtual_gpu.is_active() else None,
                    "retries": stats["num_alloc_retries"],
                    **found,
                }
            )
        if self.snapshot and self.rank == 0:
            self.torch.cuda.memory._dump_snapshot(str(stem.with_suffix(".pickle")))
        error = getattr(sys, "last_value", None)  # what Python printed as it ended
        record = {
            "rank": self.rank,
            "world": self.world,
            "pid": os.getpid(),
            "program": sys.argv,
            "torch": self.torch.__version__,
            "ended": ended,
            "steps": max(self.counts.values(), default=0),
            "skipped_steps": self.updates_without_step,
            "seconds": round(time.monotonic() - self.began, 3),
            "step_seconds": [round(end - begin, 4) for begin, end in itertools.pairwise(self.step_ends)],
            "shortages": self.shortages,
            "estimates": virtual_gpu.estimates() if virtual_gpu.is_active() else {},
            "error": None if error is None else {"type": type(error).__name__, "text": str(error)},
            "error_is_out_of_memory": error is not None and self.is_out_of_memory(error),
            "devices": devices,
        }
        part = stem.with_suffix(".part")
        part.write_text(json.dumps(record))
        part.replace(stem.with_suffix(".json"))

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether the device's memory ran out, or that is what it was raised from."""
        if isinstance(error, self.torch.OutOfMemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
            return True
        return error.__cause__ is not None and self.is_out_of_memory(error.__cause__)

    def finish(self) -> None:
        """End this process, which has done its steps, as one that succeeded: launchers must have nothing to report."""
        self.write("steps")
        deadline = time.monotonic() + PEERS_SECONDS
        while time.monotonic() < deadline and any(self.lacks_record(path) for path in self.folder.glob("*.stepping")):
            time.sleep(0.02)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler says that workers of a DataLoader died
            for child in multiprocessing.active_children():
                child.terminate()
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        ctypes.CDLL(None).fflush(None)
        os._exit(0)

    def lacks_record(self, path: Path) -> bool:
        """Whether another rank is alive and not done."""
        return not path.with_suffix(".json").exists() and Path(f"/proc/{path.stem}").exists()


def install() -> None:
    """Read what the parent wants, and wait for torch."""
    settings = json.loads(os.environ[VARIABLE])
    recorder = Recorder(Path(settings["folder"]), settings["steps"], settings["snapshot"])
    if settings["skip_init"]:
        hooks.when_imported("torch", skip_init)
    hooks.when_imported("torch", recorder.watch)
