"""The main job: train one stage. `deepspeed bigvivit/train.py --ds ds_configs/zero3.json …`, or `bigvivit train …`."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import tyro

from bigvivit.config import ConfigError, TrainConfig, check_frames, resolve_model
from bigvivit.data.manifest import Manifest, read_manifest
from bigvivit.memory.ds_json import micro_batch_size, read_ds_json
from bigvivit.memory.ranks import rank_and_world, start_process_group
from bigvivit.training.checkpoint import HEADER, TOWER, Header, read_header, write_checkpoint
from bigvivit.training.progress import (
    CHECKPOINTS,
    OPTIMIZER,
    RANDOM,
    Progress,
    begin_checkpoint,
    commit_checkpoint,
    list_checkpoints,
    read_progress,
    read_tensors,
    write_progress,
)
from bigvivit.training.report import describe_run

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bigvivit.assemble import TowerSource
    from bigvivit.memory.engine import Engine
    from bigvivit.memory.load import Sharder


def main(argv: list[str] | None = None) -> None:
    """Train as the command line says; a wrong setting ends it with one message and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    # Launchers tell the rank on the device both ways; the environment is the one that all of them set.
    argv = [word for word in argv if not word.startswith("--local_rank=")]
    try:
        train(tyro.cli(TrainConfig, args=argv, prog="bigvivit train"))
    except ConfigError as error:
        if rank_and_world()[0] == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def train(config: TrainConfig) -> None:
    """One stage from its configuration to its checkpoint in `config.out`."""
    rank, world = rank_and_world()

    # What can be wrong is found here, before torch is imported.
    if (config.out / HEADER).exists():
        raise ConfigError(f"out={config.out} holds a finished run: give another folder, or delete that one")
    checkpoints = list_checkpoints(config.out)
    if checkpoints and not config.resume:
        raise ConfigError(
            f"out={config.out} holds a run that stopped at {checkpoints[0].name}: add --resume, or give another folder"
        )
    before = None
    if config.init_from is not None:
        before = read_header(config.init_from)
        if before.stage != 1:
            raise ConfigError(
                f"init_from={config.init_from} is a run of stage {before.stage}: stage 2 starts from stage 1"
            )
        config = replace(config, model=resolve_model(config.model, inherited=before.model))
    check_frames(config.clip.frames, config.model.tubelet)
    manifest = read_manifest(config.data.train, before.classes if before else None)
    micro_batch = micro_batch_size(config.optim, world)
    ds = read_ds_json(config.ds, config.optim, world) if config.ds else None
    if len(manifest.clips) // world // micro_batch // config.optim.accumulate == 0:
        raise ConfigError(
            f"optim.batch_size={config.optim.batch_size} is more than the {len(manifest.clips)} clips of "
            f"{config.data.train}: give a smaller one"
        )

    resumed = None
    if checkpoints:
        resumed = Resumed(checkpoints[0], read_header(checkpoints[0]), read_progress(checkpoints[0], config))

    run_stage(config, manifest, before, resumed, ds, rank=rank, world=world, micro_batch=micro_batch)


@dataclass(frozen=True)
class Resumed:
    """The checkpoint that training goes on from."""

    folder: Path
    header: Header
    progress: Progress


def run_stage(
    config: TrainConfig,
    manifest: Manifest,
    before: Header | None,
    resumed: Resumed | None,
    ds: dict | None,
    *,
    rank: int,
    world: int,
    micro_batch: int,
) -> None:
    """Build, apply the plan, train, keep."""
    import torch

    from bigvivit import assemble
    from bigvivit.data.errors import DecodeError
    from bigvivit.data.loader import build_train_loader
    from bigvivit.memory.apply import apply_plan
    from bigvivit.memory.engine import DdpEngine, PlainEngine
    from bigvivit.memory.freeze import count_parameters, describe_frozen
    from bigvivit.memory.measure import measure_peak_over_ranks
    from bigvivit.model.towers import Tower
    from bigvivit.training import loop
    from bigvivit.training.failures import Failures, TooManyFailuresError
    from bigvivit.training.metrics import MetricsLog
    from bigvivit.training.optim import build_optimizer, build_scheduler, total_steps
    from bigvivit.training.state import gather_random, restore_random, restore_scheduler, scheduler_state

    logging.basicConfig(level=logging.INFO if rank == 0 else logging.ERROR, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    log = logging.getLogger("bigvivit")
    torch.manual_seed(config.seed + rank)  # stochastic depth; initial weights and data have seeds of their own

    device = assemble.choose_device(config.device)
    # Weights come from the checkpoint to go on from, else from the stage before, else from where they were published.
    run, header = (resumed.folder, resumed.header) if resumed else (config.init_from, before)
    source = assemble.open_tower(
        config.model,
        seed=config.seed,
        folder=assemble.tower_folder(run, header) if run and header else None,
        checksum=header.tower_checksum if header else None,
    )
    start_process_group(device, world, deepspeed=ds is not None, fsdp=config.fsdp)

    model = assemble.build_model(
        source, config.model, config.clip, classes=len(manifest.classes), adapter=config.stage == 2, seed=config.seed
    )
    pieces = cast(Tower, model.tower).pieces()  # under a checkpoint's names, before anything wraps them
    if run is not None and header is not None:
        for skipped in assemble.load_trained(model, run, header):
            if resumed is not None:  # a stage starts with some weights of its own; a stopped run has them all
                raise ConfigError(
                    f"checkpoint {run} lacks {skipped.name} ({skipped.reason}): delete it to use an older one"
                )
            log.info("not transferred: %s (%s)", skipped.name, skipped.reason)
    sharder: Sharder | None = None
    if ds is not None:
        from bigvivit.memory.zero import ZeroEngine, ZeroSharder, zero_stage

        sharder = ZeroSharder(ds) if zero_stage(ds) == 3 else None
    elif config.fsdp:
        from bigvivit.memory.fsdp import FsdpEngine, FsdpSharder

        sharder = FsdpSharder(device)
    apply_plan(model, config.memory, frozen=config.stage == 2, fill=source.fill, device=device, sharder=sharder)

    loader = build_train_loader(
        config.clip,
        manifest,
        batch_size=micro_batch,
        workers=config.data.workers,
        rank=rank,
        world=world,
        seed=config.seed,
        time_limit=config.data.time_limit,
    )
    steps_per_epoch = len(loader) // config.optim.accumulate
    steps = total_steps(config.optim, steps_per_epoch)
    optimizer = build_optimizer(model, config.optim)
    scheduler = build_scheduler(optimizer, config.optim, steps_per_epoch)
    if config.stage == 2:
        log.info(describe_frozen("tower", model.tower, optimizer))
    trainable, frozen = count_parameters(model)
    engine: Engine
    if ds is not None:
        engine = ZeroEngine(model, optimizer, scheduler, ds=ds)
    else:
        kind = FsdpEngine if config.fsdp else DdpEngine if world > 1 else PlainEngine
        accumulate, clip_norm = config.optim.accumulate, config.optim.clip_norm
        engine = kind(model, optimizer, scheduler, device=device, accumulate=accumulate, clip_norm=clip_norm)

    log.info(
        "stage %d: %d clips, %d frames each, %d steps of %d, engine %s on %d %s rank(s)",
        config.stage,
        len(manifest.clips),
        config.clip.frames,
        steps,
        config.optim.batch_size,
        engine.name,
        world,
        device.type,
    )
    first_step = 0
    if resumed is not None:
        first_step = resumed.progress.step
        engine.load_optimizer(read_tensors(resumed.folder, OPTIMIZER))
        restore_scheduler(scheduler, resumed.progress.scheduler)
        restore_random(read_tensors(resumed.folder, RANDOM), seed=config.seed + first_step, rank=rank, world=world)
        log.info("going on from %s", resumed.folder)
    metrics = None
    if rank == 0:
        config.out.mkdir(parents=True, exist_ok=True)
        record = describe_run(config, engine=engine.name, world=world, device=device)
        (config.out / "run.json").write_text(json.dumps(record, indent=2, default=str) + "\n")
        metrics = MetricsLog(config.out / "metrics.jsonl", steps, f"stage {config.stage}", first_step)

    paths = [clip.path for clip in manifest.clips]
    failures = Failures(paths, config.data.max_failed, config.out if rank == 0 else None, resume=resumed is not None)

    def save(step: int) -> None:
        folder = begin_checkpoint(config.out, step) if rank == 0 else config.out
        keep(config, engine, source, pieces, manifest.classes, folder)
        optimizer_state, random = engine.gather_optimizer(), gather_random(rank, world)
        if rank == 0:
            write_progress(
                folder,
                step=step,
                config=config,
                world=world,
                scheduler=scheduler_state(scheduler),
                optimizer=optimizer_state,
                random=random,
            )
            commit_checkpoint(folder, config.keep)

    try:
        result = loop.train(
            engine,
            loader,
            config.optim,
            steps=steps,
            log_every=config.log_every,
            metrics=metrics,
            failures=failures,
            first_step=first_step,
            save_every=config.save_every,
            save=save,
        )
    except TooManyFailuresError as error:
        raise ConfigError(str(error)) from None
    except DecodeError as error:  # this rank has nothing to train on, so that it cannot wait for the others to know
        print(f"error: rank {rank}: {error}: look at the manifest with `bigvivit check`", file=sys.stderr)
        sys.exit(2)
    except loop.NonFiniteError as error:
        clips = ", ".join(str(manifest.clips[index].path) for index in error.indices)
        raise ConfigError(
            f"{error}: no finite number any more. Clips on rank {rank}: {clips}. "
            f"Try a lower --optim.lr, or look at these clips"
        ) from None
    finally:
        if metrics is not None:
            metrics.close()

    peak = measure_peak_over_ranks(device)
    keep(config, engine, source, pieces, manifest.classes, config.out)
    if rank == 0:
        summary = {
            "stage": config.stage,
            "frames": config.clip.frames,
            "trainable_parameters": trainable,
            "frozen_parameters": frozen,
            "steps": result.steps,
            "seconds_per_step": result.seconds_per_step,
            "peak_bytes": peak.peak_bytes,
            "peak_measured_by": peak.how,
            "loss": result.loss,
            **failures.summary(),
        }
        (config.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        shutil.rmtree(config.out / CHECKPOINTS, ignore_errors=True)  # the finished stage takes their place
        log.info("kept %s", config.out)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def keep(
    config: TrainConfig,
    engine: Engine,
    source: TowerSource,
    pieces: list[tuple[str, nn.Module]],
    classes: tuple[str, ...],
    out: Path,
) -> None:
    """Model and header into `out`. Every rank must call it: engines gather piece by piece, and rank 0 writes."""
    from bigvivit.model.weights import finish_tower, tower_checksum, write_piece

    rank, _ = rank_and_world()
    folder, checksum = source.folder, source.checksum
    if config.stage == 1:
        assert config.model.tubelet is not None
        folder = out / TOWER
        for name, piece in pieces:
            state = engine.gather(piece)
            if rank == 0:
                write_piece(folder, source.spec, name, state)
        if rank == 0:
            finish_tower(folder, source.spec, config.model.tubelet)
            checksum = tower_checksum(folder)
    trainables: dict[str, Tensor] = {}
    for name, part in engine.module.named_children():
        if name != "tower":
            trainables.update({f"{name}.{key}": value for key, value in engine.gather(part).items()})
    if rank == 0:
        header = Header(
            stage=config.stage,
            model=config.model,
            clip=config.clip,
            memory=config.memory,
            classes=classes,
            seed=config.seed,
            tower_folder=None if folder is None else os.path.relpath(folder, out),
            tower_checksum=checksum,
        )
        write_checkpoint(out, header, trainables)


if __name__ == "__main__":
    main()
