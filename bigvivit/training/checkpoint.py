"""What a finished stage leaves: its trained parts in safetensors, and a header in JSON that says what they belong to.

The frozen tower is not in it. Stage 1 keeps the tower it trained in the run's folder `tower/`; later stages name it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bigvivit.config import ClipConfig, ConfigError, ModelConfig
from bigvivit.memory.plan import MemoryPlan
from bigvivit.units import format_bytes

if TYPE_CHECKING:
    from torch import Tensor

HEADER, TRAINABLES, TOWER = "checkpoint.json", "trainables.safetensors", "tower"


@dataclass(frozen=True, kw_only=True)
class Header:
    """What must be known to build the model again."""

    stage: int
    model: ModelConfig
    clip: ClipConfig
    memory: MemoryPlan
    classes: tuple[str, ...]
    seed: int
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
        free = shutil.disk_usage(run).free
        raise ConfigError(
            f"{what} could not be written into {run} ({error}): the disk has {format_bytes(free)} free. Make room, "
            f"then go on from the last checkpoint with --resume"
        ) from None


def write_checkpoint(run: Path, header: Header, trainables: dict[str, Tensor]) -> None:
    """The trained parts, then the header that vouches for them: without a header there is no checkpoint."""
    from safetensors.torch import save

    blob = save({name: tensor.contiguous() for name, tensor in trainables.items()})
    (run / TRAINABLES).write_bytes(blob)
    record = {**asdict(header), "trainables_checksum": hashlib.sha256(blob).hexdigest()}
    temporary = run / f"{HEADER}.tmp"
    temporary.write_text(json.dumps(record, indent=2, default=str) + "\n")
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
        record = json.loads(path.read_text())
    except OSError:
        raise ConfigError(
            f"{run} holds no {HEADER}: give the folder that a finished training run was told with --out"
        ) from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is damaged ({error}): train the stage again") from None
    try:
        parts = {
            "model": ModelConfig(**record["model"]),
            "clip": ClipConfig(**record["clip"]),
            "memory": MemoryPlan(**record["memory"]),
            "classes": tuple(record["classes"]),
        }
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
