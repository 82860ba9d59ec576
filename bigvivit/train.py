"""The main job: train one stage. `deepspeed bigvivit/train.py --ds ds_configs/zero3.json …`, or `bigvivit train …`."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from bigvivit.config import ConfigError, TrainConfig, check_folder, check_frames, resolve_model
from bigvivit.data.manifest import Manifest, read_manifest
from bigvivit.memory.ds_json import micro_batch_size, read_ds_json, zero_stage
from bigvivit.memory.ranks import rank_and_world, start_process_group, tell_once
from bigvivit.presets import parse_train
from bigvivit.training.checkpoint import HEADER, Header, explain_full_disk, read_header
from bigvivit.training.progress import (
    OPTIMIZER,
    RANDOM,
    Progress,
    list_checkpoints,
    offer_the_one_before,
    read_progress,
    read_tensors,
)
from bigvivit.training.report import describe_run
from bigvivit.training.stop import STOPPED, StopSignal
from bigvivit.versions import require, require_for_run

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bigvivit import assemble
    from bigvivit.memory.load import Sharder
    from bigvivit.memory.ranks import Board
    from bigvivit.model.bank import ProbeBank
    from bigvivit.model.vivit import ViViT


def main(argv: list[str] | None = None) -> None:
    """Train as the command line says.

    Exit codes: 2 for a setting that cannot be, with one message; 75 for a run that was asked to stop; 1 for all else.
    """
    argv = sys.argv[1:] if argv is None else argv
    # Launchers tell the rank on the device both ways; the environment is the one that all of them set.
    argv = [word for word in argv if not word.startswith("--local_rank=")]
    try:
        train(parse_train(argv, "bigvivit train"))
    except ConfigError as error:
        tell_once(f"error: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped before there was anything to save", file=sys.stderr)
        sys.exit(STOPPED)


def train(config: TrainConfig) -> None:
    """One stage from its configuration to its checkpoint in `config.out`."""
    with StopSignal() as stop:
        run_stage(prepare(config), stop)


@dataclass(frozen=True)
class Job:
    """A configuration that has been checked as far as that goes without torch, and what was read for it."""

    config: TrainConfig
    rank: int
    world: int
    manifest: Manifest
    val: Manifest | None
    ds: dict[str, Any] | None
    micro_batch: int
    init: tuple[Path, Header] | None
    """Where the weights come from, if not from where they were published: a checkpoint, or the stage before."""
    stage1_seconds: float | None
    """What a clip of stage 1 spans, if training starts from one."""
    progress: Progress | None
    """Of the checkpoint to go on from."""


def prepare(config: TrainConfig) -> Job:
    """Find what can be wrong before torch is imported. Raises ConfigError."""
    rank, world = rank_and_world()
    require("reading videos", "av", "torchvision")
    require_for_run(ds=config.ds, optimizer=config.optim.name, storage=config.memory.storage)
    check_out(config.out)
    checkpoints = list_checkpoints(config.out)
    if checkpoints and not config.resume:
        raise ConfigError(
            f"out={config.out} holds a run that stopped at {checkpoints[0].name}: add --resume, or give another folder"
        )
    init: tuple[Path, Header] | None = None
    if config.init_from is not None:
        before = read_header(config.init_from)
        if before.stage != 1:
            raise ConfigError(
                f"init_from={config.init_from} is a run of stage {before.stage}: stage 2 starts from stage 1"
            )
        init = config.init_from, before
        config = replace(config, model=resolve_model(config.model, inherited=before.model))
    check_frames(config.clip.frames, config.model.tubelet)
    manifest = read_manifest(config.data.train, init[1].classes if init else None)
    val = read_manifest(config.data.val, manifest.classes) if config.data.val else None
    micro_batch = micro_batch_size(config.optim, world)
    ds = read_ds_json(config.ds, config.optim, world) if config.ds else None
    steps_per_epoch = len(manifest.clips) // world // micro_batch // config.optim.accumulate
    if steps_per_epoch == 0:
        raise ConfigError(
            f"optim.batch_size={config.optim.batch_size} is more than the {len(manifest.clips)} clips of "
            f"{config.data.train}: give a smaller one"
        )
    config.optim.count_warmup(steps_per_epoch)
    if val is not None and len(val.clips) < world:
        raise ConfigError(
            f"data.val={config.data.val} holds {len(val.clips)} clips for {world} ranks: give each at least one"
        )
    progress, stage1_seconds = None, init[1].clip_seconds if init else None
    if checkpoints:
        progress = read_progress(checkpoints[0], config, world=world, zero_stage=zero_stage(ds))
        init = checkpoints[0], read_header(checkpoints[0])
    return Job(config, rank, world, manifest, val, ds, micro_batch, init, stage1_seconds, progress)


def check_out(out: Path) -> None:
    """Raise where a run cannot be written."""
    if (out / HEADER).exists():
        raise ConfigError(f"out={out} holds a finished run: give another folder, or delete that one")
    check_folder("out", out)


def run_stage(job: Job, stop: StopSignal, work: Callable[..., bool] | None = None) -> None:
    """Start the ranks and train; whatever goes wrong on one of them is told once and ends all of them.

    `work` is what they do in place of training.
    """
    import torch.distributed as dist

    from bigvivit import assemble
    from bigvivit.memory.out_of_memory import is_out_of_memory, measure_shortage
    from bigvivit.oom_page import write_page
    from bigvivit.training.rank_failure import tell_failure

    logging.basicConfig(level=logging.INFO if job.rank == 0 else logging.ERROR, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    device = assemble.choose_device(job.config.device, tf32=job.config.tf32)
    board = start_process_group(device, job.world, deepspeed=job.ds is not None, fsdp=job.config.fsdp)
    try:
        with explain_full_disk(job.config.out, "a file of this run"):  # where nobody names it closer
            finished = (work or build_and_train)(job, device, board, stop)
    except (Exception, KeyboardInterrupt) as error:
        page = partial(write_page, job, measure_shortage(error, device), device) if is_out_of_memory(error) else None
        if job.world == 1 and page is None:
            raise
        if job.world == 1 and page is not None:
            print(f"error: {page()}", file=sys.stderr)
            sys.exit(1)
        code = tell_failure(error, board, job.rank, page)
        sys.stdout.flush()
        # Not sys.exit: taking down a process group whose members are gone can wait for them.
        os._exit(code)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    if not finished:
        sys.exit(STOPPED)


def build_prepared(
    job: Job, device: torch.device
) -> tuple[ViViT | ProbeBank, assemble.TowerSource, list[tuple[str, nn.Module]], Sharder | None]:
    """(model, where its tower comes from, the tower's pieces by name, what shards them): loaded, made to fit by the
    plan."""
    from bigvivit import assemble
    from bigvivit.memory.apply import apply_plan
    from bigvivit.memory.parallel import build_sharder
    from bigvivit.model.bank import ProbeBank
    from bigvivit.model.towers import Tower

    config, log = job.config, logging.getLogger("bigvivit")
    run, header = job.init or (None, None)
    own_tower = job.progress is not None and config.stage == 1  # a part of the checkpoint
    with offer_the_one_before(run) if run and own_tower else nullcontext():
        source = assemble.open_tower(
            config.model,
            seed=config.seed,
            folder=assemble.tower_folder(run, header) if run and header else None,
            checksum=header.tower_checksum if header else None,
        )
    assemble.check_types(source, config.memory)
    classes, heads = len(job.manifest.classes), config.probe.heads(config.optim, config.model)
    parts = source, config.model, config.clip
    model: ViViT | ProbeBank
    if heads:
        depths = [head.depth for head in heads]
        model = assemble.build_probes(*parts, classes=classes, seed=config.seed, depths=depths)
    else:
        model = assemble.build_model(*parts, classes=classes, adapter=config.stage == 2, seed=config.seed)
    pieces = cast(Tower, model.tower).pieces()  # under a checkpoint's names, before anything wraps them
    if run is not None and header is not None:
        loaded = assemble.load_trained(model, run, header)
        if isinstance(model, ProbeBank) and job.progress is not None:
            loaded = assemble.load_bank(model, run)
        for skipped in loaded:
            if job.progress is not None:  # a stage starts with some weights of its own; a stopped run has them all
                raise ConfigError(
                    f"checkpoint {run} lacks {skipped.name} ({skipped.reason}): delete it to use an older one"
                )
            log.info("not transferred: %s (%s)", skipped.name, skipped.reason)
    sharder = build_sharder(job.ds, fsdp=config.fsdp, device=device)
    apply_plan(
        model,
        config.memory,
        frozen=config.stage == 2,
        fill=source.fill,
        device=device,
        sharder=sharder,
        scratch=config.out,
    )
    return model, source, pieces, sharder


def build_and_train(job: Job, device: torch.device, board: Board, stop: StopSignal) -> bool:
    """Build, apply the plan, train, keep. Returns whether the stage came to its end; asked to stop, it does not."""
    import torch
    from rich.console import Console

    from bigvivit.caching import open_cache
    from bigvivit.data.cached import build_view_loader
    from bigvivit.data.errors import DecodeError
    from bigvivit.data.loader import build_eval_loader, build_train_loader
    from bigvivit.data.span import describe_span, measure_span
    from bigvivit.memory.freeze import count_parameters, describe_frozen
    from bigvivit.memory.measure import greatest, measure_peaks
    from bigvivit.memory.parallel import build_engine
    from bigvivit.saving import Saver
    from bigvivit.training import loop
    from bigvivit.training.bank import build_bank_optimizer, head_table
    from bigvivit.training.failed_clips import Failures, TooManyFailuresError
    from bigvivit.training.metrics import MetricsLog, build_head_table
    from bigvivit.training.optim import build_optimizer, build_scheduler
    from bigvivit.training.patience import resume_patience
    from bigvivit.training.state import restore_random, restore_scheduler
    from bigvivit.training.tower_pass import TowerPass

    config, rank, world = job.config, job.rank, job.world
    log = logging.getLogger("bigvivit")
    torch.manual_seed(config.seed + rank)  # stochastic depth; initial weights and data have seeds of their own
    model, source, pieces, sharder = build_prepared(job, device)

    ranks: Any = {"workers": config.data.workers, "time_limit": config.data.time_limit, "rank": rank, "world": world}
    kept: dict[str, Any] = {} if config.data.cache is None else {"views": config.data.cache_views}
    build_loader = build_view_loader if kept else build_train_loader
    loader: Any = build_loader(config.clip, job.manifest, batch_size=job.micro_batch, seed=config.seed, **kept, **ranks)
    val_loader: Any = None
    if job.val is not None:
        val_loader = build_eval_loader(config.clip, job.val, views=1, crops=1, batch_size=job.micro_batch, **ranks)
    steps_per_epoch = len(loader) // config.optim.accumulate
    steps = config.optim.count_steps(steps_per_epoch)
    heads = config.probe.heads(config.optim, config.model)
    if heads:
        optimizer = build_bank_optimizer(model, heads, config.optim)
        log.info("probe bank: %d heads on one pass of the tower", len(heads))
    else:
        optimizer = build_optimizer(model, config.optim)
    scheduler = build_scheduler(optimizer, config.optim, steps_per_epoch)
    if config.stage == 2:
        log.info(describe_frozen("tower", model.tower, optimizer))
    trainable, frozen = count_parameters(model)
    engine = build_engine(
        model, optimizer, scheduler, config.optim, ds=job.ds, fsdp=config.fsdp, world=world, device=device
    )
    log.info(
        "stage %d: %d clips, %d frames each, %d steps of %d, engine %s on %d %s rank(s)",
        config.stage,
        len(job.manifest.clips),
        config.clip.frames,
        steps,
        config.optim.batch_size,
        engine.name,
        world,
        device.type,
    )
    cache = open_cache(config, source, device)
    if cache is not None:
        tower = TowerPass(model, device, engine if sharder is not None else None)
        loader = cache.train(loader, tower, epochs=steps / steps_per_epoch)
        if val_loader is not None:
            val_loader = cache.evaluation(val_loader, tower, views=1, crops=1)
    span = measure_span(config.clip, job.manifest.clips) if rank == 0 else None
    if span is not None:
        log.info(describe_span(span, config.clip, before=job.stage1_seconds))
    first_step = 0
    if job.progress is not None:
        assert job.init is not None
        run, first_step = job.init[0], job.progress.step
        engine.load_optimizer(read_tensors(run, OPTIMIZER))
        restore_scheduler(scheduler, job.progress.scheduler)
        restore_random(read_tensors(run, RANDOM), seed=config.seed + first_step, rank=rank, world=world)
        log.info("going on from %s", run)
    metrics = None
    if rank == 0:
        config.out.mkdir(parents=True, exist_ok=True)
        record = describe_run(config, engine=engine.name, world=world, device=device)
        (config.out / "run.json").write_text(json.dumps(record, indent=2, default=str) + "\n")
        metrics = MetricsLog(config.out / "metrics.jsonl", steps, f"stage {config.stage}", first_step)

    saver = Saver(
        config,
        engine,
        source,
        pieces,
        job.manifest.classes,
        zero_stage=zero_stage(job.ds),
        clip_seconds=span.seconds if span is not None else None,
    )
    paths = [clip.path for clip in job.manifest.clips]
    out = config.out if rank == 0 else None
    failures = Failures(paths, config.data.max_failed, out, resume=job.progress is not None)
    stop.serve(board, world)
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
            save=saver.checkpoint,
            stop=stop.after,
            val_loader=val_loader,
            patience=resume_patience(config.optim.patience, config.out, first_step, config.save_every),
        )
        if result.asked_to_stop:
            log.info("stopped after step %d of %d, as asked: --resume goes on", result.steps, steps)
            return False
        peaks = measure_peaks(device)
        peak = greatest(peaks)
        summary = {
            "stage": config.stage,
            "frames": config.clip.frames,
            "trainable_parameters": trainable,
            "frozen_parameters": frozen,
            "steps": result.steps,
            "seconds_per_step": result.seconds_per_step,
            "peak_bytes": peak.peak_bytes,
            "peak_measured_by": peak.how,
            "memory": [asdict(rank_peak) for rank_peak in peaks],
            "loss": result.loss,
            **failures.summary(),
            **(cache.summary() if cache is not None else {}),
        }
        if heads and result.scores is not None:
            summary["heads"] = head_table(heads, result.losses, result.scores)
        saver.finish(summary, result.scores)
        if heads and rank == 0:
            Console().print(build_head_table(summary["heads"]))
    except TooManyFailuresError as error:
        raise ConfigError(str(error)) from None
    except DecodeError as error:
        raise ConfigError(f"{error}: look at the manifest with `bigvivit check`") from None
    except loop.NonFiniteError as error:
        clips = ", ".join(str(job.manifest.clips[index].path) for index in error.indices)
        raise ConfigError(
            f"{error}: no finite number any more. Clips: {clips}. Try a lower --optim.lr, or look at these clips"
        ) from None
    finally:
        if metrics is not None:
            metrics.close()
        if cache is not None:
            cache.close()

    log.info("kept %s", config.out)
    return True


if __name__ == "__main__":
    main()
