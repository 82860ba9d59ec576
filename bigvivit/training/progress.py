"""Checkpoints on the way: what training needs to go on as if it had not stopped.

`RUN/checkpoints/step-00000120/` holds what a finished stage leaves (`training/checkpoint.py`) and beside it the
optimizer's state, the random states and `progress.json`, which vouches for them. A checkpoint is written under another
name, flushed and renamed: whenever training is killed, the last one is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigvivit.config import ConfigError, TrainConfig

if TYPE_CHECKING:
    from torch import Tensor

CHECKPOINTS, PROGRESS = "checkpoints", "progress.json"
OPTIMIZER, RANDOM = "optimizer.safetensors", "random.safetensors"
FREE = {
    "out",
    "data.workers",
    "data.time_limit",
    "data.max_failed",
    "data.train",
    "ds",
    "fsdp",
    "device",
    "log_every",
    "save_every",
    "keep",
    "resume",
}
"""Settings that may change when training goes on; the manifest is compared by its contents."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run has come, and what it must go on with."""

    step: int
    """Optimizer steps done."""
    settings: dict[str, Any]
    """Every setting, by dotted name."""
    manifest_checksum: str
    scheduler: dict[str, Any]
    world: int
    checksums: dict[str, str]
    """SHA-256 of the files that no other header vouches for."""


def flat_settings(config: TrainConfig) -> dict[str, Any]:
    """Every setting by its dotted name, as JSON has it."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        else:
            flat[prefix] = str(value) if isinstance(value, Path) else value

    walk("", asdict(config))
    return flat


def file_checksum(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_progress(
    folder: Path,
    *,
    step: int,
    config: TrainConfig,
    world: int,
    scheduler: dict[str, Any],
    optimizer: dict[str, Tensor],
    random: dict[str, Tensor],
) -> None:
    """Complete a checkpoint in a temporary folder; `commit_checkpoint` makes it count."""
    from safetensors.torch import save_file

    for name, tensors in ((OPTIMIZER, optimizer), (RANDOM, random)):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name)
    progress = Progress(
        step=step,
        settings=flat_settings(config),
        manifest_checksum=file_checksum(config.data.train),
        scheduler=scheduler,
        world=world,
        checksums={name: file_checksum(folder / name) for name in (OPTIMIZER, RANDOM)},
    )
    (folder / PROGRESS).write_text(json.dumps(asdict(progress), indent=2) + "\n")


def begin_checkpoint(run: Path, step: int) -> Path:
    """An empty folder under a temporary name."""
    folder = run / CHECKPOINTS / f".step-{step:08d}"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed while it saved
    folder.mkdir(parents=True)
    return folder


def commit_checkpoint(folder: Path, keep: int) -> None:
    """Flush every file, give the folder its name, and remove all but the last `keep`."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    final = folder.with_name(folder.name.removeprefix("."))
    shutil.rmtree(final, ignore_errors=True)
    folder.rename(final)
    for old in list_checkpoints(folder.parents[1])[keep:]:
        shutil.rmtree(old)


def list_checkpoints(run: Path) -> list[Path]:
    """Whole checkpoints of a run, the newest first."""
    return sorted((run / CHECKPOINTS).glob("step-*"), reverse=True)


def read_progress(folder: Path, config: TrainConfig) -> Progress:
    """The progress that training with `config` can go on from.

    Raises ConfigError for a damaged file, naming the checkpoint before, and for settings or clips that are not those
    of the run.
    """
    others = [other for other in list_checkpoints(config.out) if other < folder]
    way_out = f"delete {folder} to go on from {others[0].name}" if others else "start again in another folder"
    try:
        progress = Progress(**json.loads((folder / PROGRESS).read_text()))
        changed = [name for name, value in progress.checksums.items() if file_checksum(folder / name) != value]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"checkpoint {folder} cannot be read ({error}): {way_out}") from None
    if changed:
        raise ConfigError(f"checkpoint {folder}: {', '.join(changed)} changed since it was written: {way_out}")
    now = flat_settings(config)
    differ = [
        f"{name}={now.get(name)}, but the run has {value}"
        for name, value in progress.settings.items()
        if name not in FREE and name != "optim.accumulate" and now.get(name) != value
    ]
    if differ:
        raise ConfigError(
            f"resume of {config.out} with other settings: {'; '.join(differ)}: give the same, or start anew"
        )
    if file_checksum(config.data.train) != progress.manifest_checksum:
        raise ConfigError(
            f"data.train={config.data.train} is not the manifest that {config.out} was trained with (SHA-256 differs): "
            f"give that one, or start anew"
        )
    return progress


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one of the checkpoint's files, on the CPU."""
    from safetensors.torch import load_file

    return load_file(folder / name)
