"""What a finished stage leaves: its trained parts in safetensors, and a header in JSON that says what they belong to.

The frozen tower is not in it. Stage 1 keeps the tower it trained in the run's folder `tower/`; later stages name it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigvivit.config import ClipConfig, ConfigError, ModelConfig
from bigvivit.memory.plan import MemoryPlan
from bigvivit.units import format_bytes

if TYPE_CHECKING:
    from torch import Tensor

HEADER, TRAINABLES, TOWER = "checkpoint.json", "trainables.safetensors", "tower"
BANK = "bank.safetensors"
"""In a checkpoint of a probe bank: every head, of which TRAINABLES holds the best."""
CHECKPOINTS = "checkpoints"
"""Where a run that has not finished keeps what it can go on from (`training/progress.py`)."""
SEAL = "sha256"
CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM}
"""What the system says of a disk; a connection's or a pipe's errors are none of these."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What must be known to build the model again."""

    stage: int
    model: ModelConfig
    clip: ClipConfig
    memory: MemoryPlan
    classes: tuple[str, ...]
    seed: int
    clip_seconds: float | None
    """What a clip spans; None where that could not be measured."""
    tower_folder: str | None
    """Trained tower, relative to the run's folder; None where the tower is as `model.tower` names it."""
    tower_checksum: str | None
    """SHA-256 over the tower's weight files; None for random weights, which `seed` gives again."""
    trainables_checksum: str = ""
    """SHA-256 of the trained parts' file; set when it is written."""


@contextmanager
def explain_full_disk(run: Path, what: str) -> Iterator[None]:
    """Turn what a failed write raises into a ConfigError that says what to do."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        if error.errno not in CANNOT_WRITE if isinstance(error, OSError) else "os error" not in str(error):
            raise
        existing = next(folder for folder in (run, *run.absolute().parents) if folder.is_dir())
        free = shutil.disk_usage(existing).free
        raise ConfigError(
            f"{what} could not be written into {run} ({error}): the disk has {format_bytes(free)} free. Make room, "
            f"then go on from the last checkpoint with --resume"
        ) from None


def seal(record: dict[str, Any]) -> str:
    """A record as JSON text that holds the SHA-256 of the rest of it: `read_sealed` finds what was edited."""
    record = json.loads(json.dumps(record, default=str))  # as it will be read
    return json.dumps({**record, SEAL: record_checksum(record)}, indent=2) + "\n"


def record_checksum(record: dict[str, Any]) -> str:
    """SHA-256 over a record's values, however its text is laid out."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def read_sealed(path: Path) -> dict[str, Any]:
    """A record that `seal` wrote, without its seal. Raises OSError, and ValueError for a torn or edited file."""
    record = json.loads(path.read_text())
    if not isinstance(record, dict) or SEAL not in record:
        raise ValueError(f"it holds no {SEAL} of itself, which this version writes")
    if record.pop(SEAL) != record_checksum(record):
        raise ValueError("it was edited: its SHA-256 differs")
    return record


def write_checkpoint(run: Path, header: Header, trainables: dict[str, Tensor]) -> None:
    """The trained parts, then the header that vouches for them: without a header there is no checkpoint."""
    from safetensors.torch import save

    blob = save({name: tensor.contiguous() for name, tensor in trainables.items()})
    (run / TRAINABLES).write_bytes(blob)
    record = {**asdict(header), "trainables_checksum": hashlib.sha256(blob).hexdigest()}
    temporary = run / f"{HEADER}.tmp"
    temporary.write_text(seal(record))
    flush(run)
    os.replace(temporary, run / HEADER)
    flush(run, files=False)


def flush(folder: Path, *, files: bool = True) -> None:
    """Have the operating system put a folder, and the files under it, on the disk."""
    for path in [*(folder.rglob("*") if files else ()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def read_header(run: Path) -> Header:
    """The header of a finished run. Needs no torch. Raises ConfigError where there is none."""
    path = run / HEADER
    try:
        record = read_sealed(path)
    except OSError:
        if unfinished := sorted((run / CHECKPOINTS).glob("step-*")):
            raise ConfigError(
                f"{run} holds no {HEADER}: its training has not finished; go on with --resume, or give a checkpoint "
                f"of it, {unfinished[-1]}"
            ) from None
        raise ConfigError(
            f"{run} holds no {HEADER}: give the folder that a finished training run was told with --out"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}): put it back, or train the stage again") from None
    try:
        parts = {
            "model": ModelConfig(**record["model"]),
            "clip": ClipConfig(**record["clip"]),
            "memory": MemoryPlan(**record["memory"]),
            "classes": tuple(record["classes"]),
        }
        if record["model"].get("temporal_input") is None:
            raise KeyError("model.temporal_input")  # of a version before there was a choice
        return Header(**{**record, **parts})
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not a header this version wrote ({error}): train the stage again") from None


def read_trainables(run: Path, header: Header) -> dict[str, Tensor]:
    """The trained parts, on the CPU. Raises ConfigError for a file that is not the one the header was written with."""
    from safetensors.torch import load

    path = run / TRAINABLES
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}), though {HEADER} names it") from None
    if hashlib.sha256(blob).hexdigest() != header.trainables_checksum:
        raise ConfigError(f"{path} has changed since {HEADER} was written (SHA-256 differs): train the stage again")
    return load(blob)
