"""Writing a run: checkpoints on the way, and the finished stage."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from bigvivit.assemble import TowerSource
from bigvivit.config import TrainConfig
from bigvivit.memory.engine import Engine
from bigvivit.model.weights import finish_tower, tower_checksum, write_piece
from bigvivit.training.bank import BEST
from bigvivit.training.checkpoint import BANK, TOWER, Header, explain_full_disk, write_checkpoint
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
        self.zero_stage, self.clip_seconds, self.best_head = zero_stage, clip_seconds, 0
        self.heads = config.probe.heads(config.optim, config.model)
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if self.world > 1 else 0

    def checkpoint(self, step: int, scores: dict[str, float] | None) -> None:
        """What training can go on from, with the scores of a validation. Raises ConfigError where it cannot be written;
        those before stay whole."""
        out = self.config.out
        with explain_full_disk(out, f"the checkpoint of step {step}"):
            try:
                self.write_checkpoint(begin_checkpoint(out, step) if self.rank == 0 else out, step, scores)
            except BaseException:
                if self.rank == 0:
                    drop_unfinished(out)  # gives its space back
                raise

    def write_checkpoint(self, folder: Path, step: int, scores: dict[str, float] | None) -> None:
        """The model as a finished stage leaves it, and what training needs besides."""
        with self.engine.averaged():  # the optimizer's state then holds the weights themselves, until it is written
            self.write_model(folder, scores)
            if self.heads:
                self.write_bank(folder)
            optimizer_state, random = self.engine.gather_optimizer(), gather_random(self.rank, self.world)
            if self.rank == 0:
                write_progress(
                    folder,
                    step=step,
                    config=self.config,
                    world=self.world,
                    zero_stage=self.zero_stage,
                    val_top1=scores["val_top1"] if scores else None,
                    scheduler=scheduler_state(self.engine.scheduler),
                    optimizer=optimizer_state,
                    random=random,
                )
        if self.rank == 0:
            commit_checkpoint(folder, self.config.keep)

    def finish(self, summary: dict[str, Any], scores: dict[str, float] | None) -> None:
        """The finished stage takes the checkpoints' place, but for one that validated better."""
        out, val_top1 = self.config.out, scores["val_top1"] if scores else None
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
                self.write_model(out, scores)
            if self.rank == 0:
                drop_checkpoints(out, but=best[0] if best else None)

    def write_bank(self, folder: Path) -> None:
        """Every head, where `write_model` writes the best."""
        state = self.engine.gather(cast(nn.Module, self.engine.module.heads))
        if self.rank == 0:
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / BANK)

    def write_model(self, out: Path, scores: dict[str, float] | None) -> None:
        """Trained parts and header; after stage 1 also the tower, piece by piece. Of a probe bank, the best head as a
        run of one would leave it: by these scores, or the last there were."""
        config, source = self.config, self.source
        module, model = self.engine.module, config.model
        if self.heads:
            self.best_head = int(scores[BEST]) if scores else self.best_head
            module = cast(nn.ModuleDict, module.heads)[str(self.best_head)]
            model = replace(model, temporal_depth=self.heads[self.best_head].depth)
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
        for name, part in module.named_children():
            if name != "tower":
                trainables.update({f"{name}.{key}": value for key, value in self.engine.gather(part).items()})
        if self.rank == 0:
            header = Header(
                stage=config.stage,
                model=model,
                clip=config.clip,
                memory=config.memory,
                classes=self.classes,
                seed=config.seed,
                clip_seconds=self.clip_seconds,
                tower_folder=None if folder is None else os.path.relpath(folder, out),
                tower_checksum=checksum,
            )
            write_checkpoint(out, header, trainables)
