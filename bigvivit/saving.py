"""Writing a run: checkpoints on the way, and the finished stage."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from bigvivit.assemble import TowerSource
from bigvivit.config import TrainConfig
from bigvivit.memory.engine import Engine
from bigvivit.model.weights import finish_tower, tower_checksum, write_piece
from bigvivit.training.checkpoint import TOWER, Header, explain_full_disk, write_checkpoint
from bigvivit.training.progress import (
    begin_checkpoint,
    best_checkpoint,
    commit_checkpoint,
    drop_checkpoints,
    drop_unfinished,
    write_progress,
)
from bigvivit.training.state import gather_random, scheduler_state


class Saver:
    """Gathers a run's state from all ranks and writes it on rank 0. Every rank must call its methods."""

    def __init__(
        self,
        config: TrainConfig,
        engine: Engine,
        source: TowerSource,
        pieces: list[tuple[str, nn.Module]],
        classes: tuple[str, ...],
        *,
        zero_stage: int,
        clip_seconds: float | None,
    ) -> None:
        self.config, self.engine, self.source, self.pieces, self.classes = config, engine, source, pieces, classes
        self.zero_stage, self.clip_seconds = zero_stage, clip_seconds
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if self.world > 1 else 0

    def checkpoint(self, step: int, val_top1: float | None) -> None:
        """What training can go on from. Raises ConfigError where it cannot be written; those before stay whole."""
        out = self.config.out
        with explain_full_disk(out, f"the checkpoint of step {step}"):
            try:
                self.write_checkpoint(begin_checkpoint(out, step) if self.rank == 0 else out, step, val_top1)
            except BaseException:
                if self.rank == 0:
                    drop_unfinished(out)  # gives its space back
                raise

    def write_checkpoint(self, folder: Path, step: int, val_top1: float | None) -> None:
        """The model as a finished stage leaves it, and what training needs besides."""
        with self.engine.averaged():  # the optimizer's state then holds the weights themselves
            self.write_model(folder)
            optimizer_state = self.engine.gather_optimizer()
        random = gather_random(self.rank, self.world)
        if self.rank == 0:
            write_progress(
                folder,
                step=step,
                config=self.config,
                world=self.world,
                zero_stage=self.zero_stage,
                val_top1=val_top1,
                scheduler=scheduler_state(self.engine.scheduler),
                optimizer=optimizer_state,
                random=random,
            )
            commit_checkpoint(folder, self.config.keep)

    def finish(self, summary: dict[str, Any], val_top1: float | None) -> None:
        """The finished stage takes the checkpoints' place, but for one that validated better."""
        out = self.config.out
        with explain_full_disk(out, "the finished stage"):
            if self.rank == 0:
                best = best_checkpoint(out)
                if best is not None and (val_top1 is None or best[1] <= val_top1):
                    best = None
                if val_top1 is not None:
                    summary["val_top1"] = val_top1
                if best is not None:
                    summary |= {"best_checkpoint": str(best[0].relative_to(out)), "best_val_top1": best[1]}
                (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
            with self.engine.averaged():
                self.write_model(out)
            if self.rank == 0:
                drop_checkpoints(out, but=best[0] if best else None)

    def write_model(self, out: Path) -> None:
        """Trained parts and header; after stage 1 also the tower, piece by piece."""
        config, source = self.config, self.source
        folder, checksum = source.folder, source.checksum
        if config.stage == 1:
            assert config.model.tubelet is not None
            folder = out / TOWER
            for name, piece in self.pieces:
                state = self.engine.gather(piece)
                if self.rank == 0:
                    write_piece(folder, source.spec, name, state)
            if self.rank == 0:
                finish_tower(folder, source.spec, config.model.tubelet)
                checksum = tower_checksum(folder)
        trainables: dict[str, Tensor] = {}
        for name, part in self.engine.module.named_children():
            if name != "tower":
                trainables.update({f"{name}.{key}": value for key, value in self.engine.gather(part).items()})
        if self.rank == 0:
            header = Header(
                stage=config.stage,
                model=config.model,
                clip=config.clip,
                memory=config.memory,
                classes=self.classes,
                seed=config.seed,
                clip_seconds=self.clip_seconds,
                tower_folder=None if folder is None else os.path.relpath(folder, out),
                tower_checksum=checksum,
            )
            write_checkpoint(out, header, trainables)
