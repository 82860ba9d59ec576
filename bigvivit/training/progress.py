"""Checkpoints on the way: what training needs to go on as if it had not stopped.

`RUN/checkpoints/step-00000120/` holds what a finished stage leaves (`training/checkpoint.py`) and beside it the
optimizer's state, the random states and `progress.json`, which vouches for them. A checkpoint is written under another
name, flushed and renamed: whenever training is killed, the last one is whole.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigvivit.config import ConfigError, TrainConfig
from bigvivit.training.checkpoint import CHECKPOINTS, TOWER, flush, read_sealed, seal

if TYPE_CHECKING:
    from torch import Tensor

PROGRESS, OPTIMIZER, RANDOM = "progress.json", "optimizer.safetensors", "random.safetensors"
FREE = {
    "out",
    "data.workers",
    "data.time_limit",
    "data.max_failed",
    "data.train",
    "data.val",
    "ds",
    "fsdp",
    "device",
    "tf32",
    "optim.fused",
    "memory.placement",
    "memory.group",
    "memory.chunk",
    "memory.recompute",
    "memory.offload_activations",
    "log_every",
    "save_every",
    "preset",
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
    zero_stage: int
    """0 also where DeepSpeed was not used."""
    val_top1: float | None
    """Share of the validation clips that were right at this step; None where there were none."""
    checksums: dict[str, str]
    """SHA-256 of every file of the checkpoint but the tower's weights, which the header vouches for."""


def flat_settings(config: TrainConfig) -> dict[str, Any]:
    """Every setting by its dotted name, as JSON has it."""
    return flatten(asdict(config))


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted names; paths as text."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            as_read = list(value) if isinstance(value, tuple) else value
            flat[f"{prefix}{key}"] = str(value) if isinstance(value, Path) else as_read
    return flat


def file_checksum(path: Path) -> str:
    """SHA-256 of a file, read in blocks: an optimizer's state is large, and every rank checks it."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            total.update(block)
    return total.hexdigest()


def checksums(folder: Path) -> dict[str, str]:
    """Of every file of a checkpoint but PROGRESS, where they are kept, and the tower's weights, read often enough."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / PROGRESS)
    names = [path.relative_to(folder) for path in files]
    return {str(name): file_checksum(folder / name) for name in names if not is_tower_weight(name)}


def is_tower_weight(name: Path) -> bool:
    """Whether the header's `tower_checksum` covers this file."""
    return name.parts[0] == TOWER and name.suffix == ".safetensors"


def write_progress(
    folder: Path,
    *,
    step: int,
    config: TrainConfig,
    world: int,
    zero_stage: int,
    val_top1: float | None,
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
        zero_stage=zero_stage,
        val_top1=val_top1,
        checksums=checksums(folder),
    )
    (folder / PROGRESS).write_text(seal(asdict(progress)))


def begin_checkpoint(run: Path, step: int) -> Path:
    """An empty folder under a temporary name."""
    drop_unfinished(run)  # left by a run that was killed while it saved
    folder = run / CHECKPOINTS / f".step-{step:08d}"
    folder.mkdir(parents=True)
    return folder


def drop_unfinished(run: Path) -> None:
    """Remove what `begin_checkpoint` began and nothing committed."""
    for left in (run / CHECKPOINTS).glob(".step-*"):
        shutil.rmtree(left)


def commit_checkpoint(folder: Path, keep: int) -> None:
    """Flush every file, give the folder its name, and remove all but the last `keep` and the best."""
    flush(folder)
    final, run = folder.with_name(folder.name.removeprefix(".")), folder.parents[1]
    shutil.rmtree(final, ignore_errors=True)
    folder.rename(final)
    flush(folder.parent, files=False)
    best = best_checkpoint(run)
    for old in list_checkpoints(run)[keep:]:
        if best is None or old != best[0]:
            shutil.rmtree(old)


def list_checkpoints(run: Path) -> list[Path]:
    """Whole checkpoints of a run, the newest first."""
    return sorted((run / CHECKPOINTS).glob("step-*"), reverse=True)


def checkpoint_step(folder: Path) -> int:
    """Optimizer steps that a checkpoint's name says were done."""
    return int(folder.name.rpartition("-")[2])


def best_checkpoint(run: Path) -> tuple[Path, float] | None:
    """The checkpoint that validated best, the newest among equals, and its top-1; None where none was validated."""
    scored = []
    for folder in list_checkpoints(run):
        with suppress(OSError, ValueError):  # a damaged one is found, and refused, when it is gone on from
            top1 = read_sealed(folder / PROGRESS).get("val_top1")
            scored += [(folder, float(top1))] if top1 is not None else []
    return max(scored, key=lambda entry: entry[1], default=None)


def drop_checkpoints(run: Path, but: Path | None) -> None:
    """Remove what a finished stage has no more use for."""
    if but is None:
        shutil.rmtree(run / CHECKPOINTS, ignore_errors=True)
        return
    for folder in (run / CHECKPOINTS).iterdir():
        if folder != but:
            shutil.rmtree(folder)


def way_out(folder: Path) -> str:
    """How to go on without this checkpoint."""
    earlier = [other for other in list_checkpoints(folder.parents[1]) if other < folder]
    return f"delete {folder} to go on from {earlier[0].name}" if earlier else "start again in another folder"


@contextmanager
def offer_the_one_before(folder: Path) -> Iterator[None]:
    """Add to a refusal of this checkpoint how to go on without it."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"checkpoint {folder}: {error}; or {way_out(folder)}") from None


def read_progress(folder: Path, config: TrainConfig, *, world: int, zero_stage: int) -> Progress:
    """The progress that training with `config` can go on from.

    Raises ConfigError for a damaged file, naming the checkpoint before, for settings or clips that are not those of the
    run, and for 8-bit optimizer states that lie across other ranks.
    """
    try:
        progress = Progress(**read_sealed(folder / PROGRESS))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"checkpoint {folder}: {PROGRESS} cannot be read ({error}): {way_out(folder)}") from None
    try:
        changed = [name for name, value in progress.checksums.items() if file_checksum(folder / name) != value]
    except OSError as error:
        raise ConfigError(f"checkpoint {folder} cannot be read ({error}): {way_out(folder)}") from None
    if changed:
        raise ConfigError(f"checkpoint {folder}: {', '.join(changed)} changed since it was written: {way_out(folder)}")
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
    moved = (zero_stage, world) != (progress.zero_stage, progress.world)
    if config.optim.eight_bit and moved and (zero_stage or progress.zero_stage):
        raise ConfigError(
            f"resume of {config.out} with ZeRO stage {zero_stage} on {world} ranks: the 8-bit states of optim.name="
            f"{config.optim.name} lie as stage {progress.zero_stage} on {progress.world} ranks left them, and fit "
            f"nothing else; use those"
        )
    return progress


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one of the checkpoint's files, on the CPU."""
    from safetensors.torch import load_file

    return load_file(folder / name)
