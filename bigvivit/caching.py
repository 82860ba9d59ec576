"""A run's cache of frozen vectors: what it is keyed by, what it will cost, and the loaders over it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch

from bigvivit.assemble import TowerSource, evaluation_plan, open_run_tower
from bigvivit.config import ClipConfig, ConfigError, EvalConfig, ModelConfig, TrainConfig
from bigvivit.data.cached import AllViews, FeatureLoader, ViewClips
from bigvivit.data.features import FeatureStore, explain_no_space
from bigvivit.data.loader import ClipLoader
from bigvivit.data.manifest import Clip
from bigvivit.memory.apply import compute_dtype
from bigvivit.memory.freeze import dtype_name
from bigvivit.memory.plan import MemoryPlan
from bigvivit.memory.ranks import gather_over_ranks
from bigvivit.training.checkpoint import Header
from bigvivit.training.tower_pass import TowerPass
from bigvivit.units import format_bytes, torch_dtype

log = logging.getLogger("bigvivit")
KEY = "key.json"
TRAIN = "train"
"""Kind of the rows that hold one random view of a training clip."""
VOLATILE = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
"""Of a tower's configuration: what says nothing about its vectors."""


def rounds_products(compute: torch.dtype, device: torch.device) -> bool:
    """Whether fp32 vectors are not exact, by training's `--tf32`."""
    return (compute, device.type, torch.backends.cuda.matmul.fp32_precision) == (torch.float32, "cuda", "tf32")


class RunCache:
    """The folder of one key under the cache's root, with a store for each kind of row."""

    def __init__(
        self,
        root: Path,
        source: TowerSource,
        model: ModelConfig,
        clip: ClipConfig,
        plan: MemoryPlan,
        *,
        seed: int,
        device: torch.device,
        dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
        by_content: bool = False,
    ) -> None:
        assert model.tubelet is not None
        compute = compute_dtype(plan, device)
        self.dtype = compute if dtype == "auto" else torch_dtype(dtype)
        self.by_content = by_content
        record = {
            "tower": source.checksum or f"{source.spec.name}, random weights of seed {seed}",
            "architecture": {k: v for k, v in source.spec.config.to_dict().items() if k not in VOLATILE},
            "mean": source.spec.mean,
            "std": source.spec.std,
            "tubelet": model.tubelet,
            "patch_grid": model.patch_grid,
            "storage": plan.storage,
            "compute": dtype_name(compute) + " with TF32" * rounds_products(compute, device),
            "kept": dtype_name(self.dtype),
            "clip": asdict(clip),
        }
        text = json.dumps(record, indent=2, sort_keys=True, default=str) + "\n"
        self.key = hashlib.sha256(text.encode()).hexdigest()
        self.folder = root / self.key[:16]
        self.vectors = clip.frames // model.tubelet, source.spec.width * (1 + model.patch_grid**2)
        self.loaders: list[FeatureLoader] = []
        with explain_no_space(root):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except (FileNotFoundError, NotADirectoryError, FileExistsError) as error:  # below /proc, or a file
                raise ConfigError(f"data.cache={root} cannot be a folder ({error.strerror}): give another") from None
            new = self.folder / f"{KEY}.{os.getpid()}"
            new.write_text(text)
            os.replace(new, self.folder / KEY)

    def train(self, loader: ClipLoader, tower: TowerPass, *, epochs: float | None = None) -> FeatureLoader:
        """The loader over a store of single views; with a run's `epochs` the log says whether it is worth it."""
        dataset = loader.dataset
        assert isinstance(dataset, ViewClips)
        store = self.open_store(TRAIN, 1)
        self.forecast(store, "training", dataset.clips, dataset.views, epochs)
        return self.add(FeatureLoader(loader, store, tower, dataset.view, forecast=epochs is not None))

    def evaluation(self, loader: ClipLoader, tower: TowerPass, *, views: int, crops: int) -> FeatureLoader:
        """The loader over a store whose rows hold all views of a clip."""
        store = self.open_store(f"eval-{views}x{crops}", views * crops)
        self.forecast(store, "evaluation", loader.dataset.clips, 1, None)
        return self.add(FeatureLoader(loader, store, tower, lambda item: 0))

    def ahead(
        self, config: TrainConfig, clips: Sequence[Clip], tower: TowerPass, *, batch_size: int, rank: int, world: int
    ) -> FeatureLoader:
        """A loader of what the store lacks of this rank's share of all views; every clip's first ones come first."""
        data = config.data
        dataset = AllViews(config.clip, clips, config.seed, data.cache_views)
        store = self.open_store(TRAIN, 1)
        self.forecast(store, "training", clips, data.cache_views, None)
        every = [(epoch, index) for epoch in range(data.cache_views) for index in range(len(clips))]
        lacking = [item for item in every[rank::world] if store.find(clips[item[1]], dataset.view(item)) is None]
        loader = ClipLoader(dataset, lacking, batch_size, data.workers, time_limit=data.time_limit, keep_last=True)
        return self.add(FeatureLoader(loader, store, tower, dataset.view))

    def add(self, loader: FeatureLoader) -> FeatureLoader:
        """Remember it."""
        self.loaders.append(loader)
        return loader

    def open_store(self, kind: str, views: int) -> FeatureStore:
        """The rows of one kind."""
        shape = views, *self.vectors
        return FeatureStore(self.folder / kind, f"{self.key} {kind}", shape, self.dtype, by_content=self.by_content)

    def forecast(self, store: FeatureStore, what: str, clips: Sequence[Clip], views: int, epochs: float | None) -> None:
        """Say what is there, what the rest costs, and whether this run will profit. Raises ConfigError for a disk that
        cannot hold it."""
        there = sum(store.holds(clip, view) for clip in clips for view in range(views))
        total = len(clips) * views
        more = (total - there) * store.row_bytes
        free = shutil.disk_usage(self.folder).free
        log.info(
            "cache %s: %d of %d views for %s are there; the others take %s at most, %s are free",
            store.folder, there, total, what, format_bytes(more), format_bytes(free),
        )  # fmt: skip
        if more > free:
            raise ConfigError(
                f"data.cache={self.folder.parent}: {total - there} views would take {format_bytes(more)}, the disk has "
                f"{format_bytes(free)} free: make room, or give fewer --data.cache-views or --data.cache-dtype bf16"
            )
        if epochs is not None and there < total and epochs <= views:
            log.info(
                "cache: not worth it for this run alone: its %g epochs see each of %d views once at most; other runs "
                "over this tower will profit, or give fewer --data.cache-views",
                epochs, views,
            )  # fmt: skip

    def summary(self) -> dict[str, Any]:
        """For the run's report: views of all ranks that were read, and computed. Every rank must call it."""
        own = (sum(loader.read for loader in self.loaders), sum(loader.computed for loader in self.loaders))
        read, computed = (sum(counts) for counts in zip(*gather_over_ranks(own), strict=True))
        return {"cache": {"folder": str(self.folder), "views_read": read, "views_computed": computed}}

    def close(self) -> None:
        """Put on the disk what this process wrote."""
        for loader in self.loaders:
            loader.store.close()


def open_cache(config: TrainConfig, source: TowerSource, device: torch.device) -> RunCache | None:
    """The cache of a training run; None for a run without."""
    data = config.data
    if data.cache is None:
        return None
    return RunCache(
        data.cache,
        source,
        config.model,
        config.clip,
        config.memory,
        seed=config.seed,
        device=device,
        dtype=data.cache_dtype,
        by_content=data.cache_by_content,
    )


def open_run_cache(run: Path, header: Header, config: EvalConfig, device: torch.device) -> RunCache:
    """The cache of a finished run's evaluation, which training with the same tower and clips shares."""
    assert config.cache is not None
    return RunCache(
        config.cache,
        open_run_tower(run, header),
        header.model,
        header.clip,
        evaluation_plan(header),
        seed=header.seed,
        device=device,
        dtype=config.cache_dtype,
        by_content=config.cache_by_content,
    )
