"""A command started on virtual GPUs, followed to its end, and what its ranks wrote of themselves."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bigvivit.config import ConfigError
from bigvivit.forecast import virtual_gpu
from bigvivit.forecast.accelerators import Accelerator
from bigvivit.forecast.dryrun import sandbox
from bigvivit.forecast.hardware import find_accelerator
from bigvivit.forecast.overhead import context

VARIABLE = "BIGVIVIT_DRYRUN"
"""What the recorder in each process reads."""
PR_SET_PDEATHSIG = 1
"""Of Linux's prctl."""
GRACE_SECONDS = 30.0
"""How long a command may go on after all of its ranks have done their steps."""
END_SECONDS = 10.0
"""How long its processes may take from SIGTERM to SIGKILL."""
PEAKS = ("peak_allocated_bytes", "peak_reserved_bytes", "peak_driver_bytes")
TAIL_LINES = 20
"""Last lines of a failed program's output that are shown."""

ERROR_LINE = re.compile(r"(\[rank[0-9]+\]: ?)?[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit)\b")
"""The line that ends a traceback, behind the rank that torchrun's processes may write first."""
LAUNCHERS = re.compile(r"ChildFailedError|CalledProcessError|ProcessRaisedException|ProcessExitedException")
"""What launchers raise when a process of theirs has failed."""
NO_ANSWER = "virtual GPU has no answer to"
"""What the library writes where a program needs a part of CUDA that is not imitated."""

Word = Literal["fits", "out of memory", "failed", "no GPU used"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """A dry run that is wanted."""

    command: tuple[str, ...]
    gpu: str
    gpus: int
    steps: int
    minutes: float = 30.0
    """After which it is ended without a verdict."""
    sandbox: bool = False
    skip_init: bool = False
    """Weights that the host makes are left as they were allocated."""
    conf: str | None = None
    """PYTORCH_ALLOC_CONF of the run; None leaves the user's."""
    known: Accelerator | None = None
    """The GPU's row with what a calibration says of it; None for the table's alone."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one ended."""

    request: Request
    exit_code: int
    """Of the command; negative: the signal that ended it."""
    records: tuple[dict[str, Any], ...]
    """What each process wrote that used a GPU, by rank."""
    output: str
    """All that it printed."""
    seconds: float
    timed_out: bool

    @property
    def word(self) -> Word:
        """The verdict. Only a program that ended well, or whose every rank did its steps, fits; one that caught an
        out-of-memory error does if it stepped after it."""
        for record in self.records:
            caught = record["shortages"][-1]["step"] <= record["steps"] if record["shortages"] else True
            if record["error_is_out_of_memory"] or not caught:
                return "out of memory"
        trained = [record["ended"] == "steps" for record in self.records if record["steps"]]
        if (self.exit_code != 0 or self.timed_out) and not (all(trained) and len(trained) >= self.world):
            return "failed"
        return "fits" if self.records else "no GPU used"

    @property
    def ranks(self) -> tuple[dict[str, Any], ...]:
        """Records of the processes that trained; where none did, of all that used a GPU."""
        return tuple(record for record in self.records if record["steps"]) or self.records

    @property
    def world(self) -> int:
        """Ranks that there should be."""
        return max((record["world"] for record in self.records), default=1)

    @property
    def shortage(self) -> dict[str, Any] | None:
        """The allocation that ended the program: the last that failed."""
        failed = [record["shortages"][-1] for record in self.records if record["shortages"]]
        return failed[-1] if failed and self.word == "out of memory" else None

    @property
    def error_text(self) -> str:
        """PyTorch's own words, from the process that died of it or from what was printed."""
        for record in self.records:
            if record["error_is_out_of_memory"]:
                return str(record["error"]["text"]).strip()
        found = re.findall(r"(?:OutOfMemoryError|RuntimeError): (.*out of memory.*)", self.output)
        return found[-1].strip() if found else ""

    @property
    def caught(self) -> int:
        """Failed allocations that the program lived with."""
        return sum(len(record["shortages"]) for record in self.records) if self.word == "fits" else 0

    @property
    def estimates(self) -> dict[str, int]:
        """Calls of NVIDIA's libraries whose scratch is not known (`virtual_gpu.estimates`), where there were any: the
        most of a rank."""
        most: dict[str, int] = {}
        for record in self.ranks:
            for name, count in record["estimates"].items():
                most[name] = max(count, most.get(name, 0))
        return {name: count for name, count in most.items() if count}

    def peak(self, key: str) -> int:
        """The most of a counter, such as `peak_reserved_bytes`, over all ranks and devices."""
        return max((device[key] for record in self.records for device in record["devices"]), default=0)

    @property
    def peaks(self) -> dict[str, int]:
        """The most of each counter."""
        return {key: self.peak(key) for key in PEAKS}

    @property
    def fullest(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The rank, and of it the GPU, on which most was reserved."""
        pairs = [(record, device) for record in self.ranks for device in record["devices"]]
        return max(pairs, key=lambda pair: int(pair[1]["peak_reserved_bytes"]))

    @property
    def tail(self) -> str:
        """What the virtual GPU lacks and the lines that asked for it, where that ended it; else the end of the last
        traceback, before what its launcher says of it; else the last lines."""
        lines = self.output.rstrip().splitlines()
        lacks = next((number for number, line in enumerate(lines) if NO_ANSWER in line), None)
        if lacks is not None:
            return "\n".join(lines[lacks : lacks + TAIL_LINES])
        ends = [number for number, line in enumerate(lines) if ERROR_LINE.match(line) and not LAUNCHERS.search(line)]
        last = ends[-1] + 1 if ends else len(lines)
        return "\n".join(lines[max(last - TAIL_LINES, 0) : last])


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Where ranks write; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="bigvivit_dryrun_", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def dry_run(request: Request, folder: Path, *, snapshot: bool = False) -> Outcome:
    """Run the command to the end of its steps, or its own. `folder` then holds each rank's events, and the snapshot of
    rank 0 where it is wanted. Raises ConfigError where there is no such program or no virtual GPU."""
    return run_recorded(request, folder, prepare_environment(request, folder, snapshot))


def run_recorded(request: Request, folder: Path, environment: dict[str, str]) -> Outcome:
    """The same in any environment that has the recorder's variables, on real GPUs too."""
    words = find_program(request.command, environment)
    if request.sandbox:
        words = sandbox.wrap(words, folder)
        environment |= sandbox.OFFLINE
    began, log = time.monotonic(), folder / "output.txt"
    with log.open("wb") as file:
        process = subprocess.Popen(
            words, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=end_with_us,  # noqa: PLW1509 (no threads here)
        )  # fmt: skip
        try:
            timed_out = not wait(process, folder, 60 * request.minutes)
        finally:
            end_group(process)
    return Outcome(
        request=request,
        exit_code=process.returncode,
        records=read_records(folder),
        output=log.read_text(errors="replace"),
        seconds=time.monotonic() - began,
        timed_out=timed_out,
    )


def end_with_us() -> None:
    """In the new process: ask the system for a SIGTERM when this program dies, as of a time limit in CI."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def prepare_environment(request: Request, folder: Path, snapshot: bool) -> dict[str, str]:
    """The user's, on virtual GPUs, with what the recorder must know."""
    card = request.known or find_accelerator(request.gpu)
    sizes = {"memory_bytes": card.memory_bytes, "context_bytes": context(card).expected_bytes}
    environment = {**os.environ, **virtual_gpu.environment(card.name, gpus=request.gpus, **sizes)}
    environment.pop("CUDA_VISIBLE_DEVICES", None)  # it chooses among real ones
    environment |= recorder_variables(request, folder, snapshot)
    if request.conf is not None:
        environment.pop("PYTORCH_CUDA_ALLOC_CONF", None)
        environment["PYTORCH_ALLOC_CONF"] = request.conf
    return environment


def recorder_variables(request: Request, folder: Path, snapshot: bool) -> dict[str, str]:
    """What the recorder in each process must know."""
    settings = {"folder": str(folder), "steps": request.steps, "snapshot": snapshot, "skip_init": request.skip_init}
    return {VARIABLE: json.dumps(settings)}


def find_program(command: tuple[str, ...], environment: dict[str, str]) -> list[str]:
    """The words, if their first is a program; one that lies beside this Python is found without its environment being
    activated."""
    if shutil.which(command[0]) is None:
        beside = str(Path(sys.executable).parent)
        if shutil.which(command[0], path=beside) is None:
            raise ConfigError(f"{command[0]!r} is no program that can be run: give the command as in your shell")
        environment["PATH"] = f"{beside}:{environment.get('PATH', '')}"
    return [shutil.which(command[0], path=environment.get("PATH")) or command[0], *command[1:]]


def wait(process: subprocess.Popen[bytes], folder: Path, seconds: float) -> bool:
    """Until the command has ended, or so long; says whether it ended in time. One that goes on after all ranks are done
    (to evaluate what was never saved) is not waited for."""
    began, done_since = time.monotonic(), None
    while process.poll() is None:
        if time.monotonic() - began > seconds:
            return False
        records = read_records(folder)
        trained = [record for record in records if record["ended"] == "steps"]
        if trained and len(trained) >= trained[0]["world"]:
            done_since = done_since or time.monotonic()
            if time.monotonic() - done_since > GRACE_SECONDS:
                return True
        time.sleep(0.1)
    return True


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Whatever is left of the command, its launchers and workers."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(END_SECONDS)


def read_records(folder: Path) -> tuple[dict[str, Any], ...]:
    """By rank, of those that asked a GPU for memory."""
    records = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    records = [record for record in records if record["devices"]]
    return tuple(sorted(records, key=lambda record: (record["rank"], record["pid"])))
