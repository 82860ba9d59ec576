"""`bigvivit cache`: compute the tower's vectors ahead of training, on one process or on several.

`torchrun --nproc_per_node 8 -m bigvivit.cli cache …` shares the clips out; the settings are those of `bigvivit train`.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bigvivit.config import ConfigError, TrainConfig
from bigvivit.training.stop import StopSignal

if TYPE_CHECKING:
    import torch

    from bigvivit.data.cached import FeatureLoader
    from bigvivit.data.loader import Batch
    from bigvivit.memory.ranks import Board
    from bigvivit.train import Job

log = logging.getLogger("bigvivit")
SAY_EVERY_S = 30.0
"""Between two lines where there is no terminal for a moving one."""
SHOWN = 10


def fill_cache(config: TrainConfig) -> None:
    """Keep every view that training by these settings, and its validation, will ask for. A killed one is continued by
    starting it again. Raises ConfigError for what training would refuse."""
    from bigvivit.train import prepare, run_stage

    folder = config.data.cache
    if folder is None:
        raise ConfigError("data.cache is not set: give the folder to fill, --data.cache DIR")
    with StopSignal() as stop:
        run_stage(prepare(replace(config, out=folder, resume=False)), stop, compute_views)


def compute_views(job: Job, device: torch.device, board: Board, stop: StopSignal) -> bool:
    """This rank's share. Returns True: a stop ends it at once, and what was computed is kept."""
    from bigvivit.caching import open_cache
    from bigvivit.data.loader import build_eval_loader
    from bigvivit.memory.ranks import gather_over_ranks
    from bigvivit.train import build_prepared
    from bigvivit.training.tower_pass import TowerPass

    config = job.config
    model, source, _, sharder = build_prepared(job, device)
    tower = TowerPass(model.eval(), device, start_engine(job, model, device) if sharder is not None else None)
    cache = open_cache(config, source, device)
    assert cache is not None
    failed: list[tuple[str, str]] = []
    started = time.perf_counter()
    with closing(cache):
        clips = job.manifest.clips
        loaders = [cache.ahead(config, clips, tower, batch_size=job.micro_batch, rank=job.rank, world=job.world)]
        if job.val is not None:
            val_loader = build_eval_loader(
                config.clip, job.val, views=1, crops=1, batch_size=job.micro_batch,
                workers=config.data.workers, time_limit=config.data.time_limit, rank=job.rank, world=job.world,
            )  # fmt: skip
            loaders.append(cache.evaluation(val_loader, tower, views=1, crops=1))
        for what, loader in zip(("views for training", "views for validation"), loaders, strict=False):
            for batch in follow(loader, what):
                paths = loader.loader.dataset.clips
                failed += [(str(paths[index].path), reason) for index, reason in batch.failed]
        computed = cache.summary()["cache"]["views_computed"]
        broken = dict(entry for share in gather_over_ranks(failed) for entry in share)
    for reason in list(broken.values())[:SHOWN]:
        log.warning("not read: %s", reason)
    if broken:
        log.warning("%d videos cannot be read: in training others take their places", len(broken))
    log.info("computed %d views in %.0f s, kept in %s", computed, time.perf_counter() - started, cache.folder)
    return True


def start_engine(job: Job, model: Any, device: torch.device) -> Any:
    """The engine of a model that ranks share, which only runs forwards."""
    from bigvivit.memory.parallel import build_engine
    from bigvivit.training.optim import build_optimizer, build_scheduler

    optim = job.config.optim
    optimizer = build_optimizer(model, optim)
    scheduler = build_scheduler(optimizer, optim, steps_per_epoch=1)
    return build_engine(
        model, optimizer, scheduler, optim, ds=job.ds, fsdp=job.config.fsdp, world=job.world, device=device
    )


def follow(loader: FeatureLoader, what: str) -> Iterator[Batch]:
    """The loader's batches under a moving line on a terminal, else with a line now and then; rank 0 speaks."""
    from rich.progress import Progress

    shown = log.isEnabledFor(logging.INFO)
    with Progress(disable=not (shown and sys.stdout.isatty())) as progress:
        task = progress.add_task(what, total=len(loader))
        started = said = time.perf_counter()
        for done, batch in enumerate(loader, start=1):
            yield batch
            progress.advance(task)
            now = time.perf_counter()
            if progress.disable and now - said > SAY_EVERY_S:
                said = now
                left = (now - started) / done * (len(loader) - done)
                log.info("%s: %d of %d micro-batches, %.0f s left", what, done, len(loader), left)
