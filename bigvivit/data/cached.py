"""Batches that hold a frozen tower's vectors in place of clips: read where a store has them, else computed and kept."""

from __future__ import annotations

import hashlib
import itertools
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from bigvivit.config import TIME_LIMIT, ClipConfig
from bigvivit.data.features import FeatureStore, Row
from bigvivit.data.loader import Batch, ClipLoader, EpochSampler, TrainClips, sample_generator
from bigvivit.data.manifest import Clip, Manifest

log = logging.getLogger("bigvivit")
MEASURED = 8
"""Micro-batches after the first, or as many as an epoch has, by which the seconds that a cache saves are forecast."""
WORTH = 0.1
"""Share of an epoch's time below which a cache saves too little to be worth its disk."""
CACHED = "cache"
"""Stands for a decoder where there was nothing to decode."""


NOTHING = Batch(torch.empty(0), torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))


class TowerPass(Protocol):
    """The frozen tower of a model, on every rank."""

    def most(self, value: int) -> int:
        """The largest of all ranks' values where ranks must run the tower together; else the value itself."""
        ...

    def __call__(self, clips: Tensor) -> Tensor:
        """Vectors [m, tubelets, width] on the CPU of clips uint8 [m, frames, 3, height, width]."""
        ...


class ViewClips(TrainClips):
    """K fixed random views of each video, one an epoch, asked for as (epoch, index).

    A view's cut depends on the clip and the view's number only, so that all seeds, folds and runs share it. Each K
    epochs go through all views of a clip, in an order that depends on seed and index.
    """

    def __init__(self, clip: ClipConfig, clips: Sequence[Clip], seed: int, views: int) -> None:
        super().__init__(clip, clips, seed)
        self.views = views

    def view(self, item: Any) -> int:
        """Number of the view that an item asks for."""
        epoch, index = item
        cycle, place = divmod(epoch, self.views)
        return int(torch.randperm(self.views, generator=sample_generator(self.seed, cycle, index, 1))[place])

    def generator(self, item: Any) -> torch.Generator:
        """By the clip's name, not by its folder's place or its position in a manifest."""
        clip = self.clips[item[1]]
        name = f"{clip.path.parent.name}/{clip.path.name} {clip.start} {clip.end} {self.view(item)}"
        digest = hashlib.sha256(name.encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def build_view_loader(
    clip: ClipConfig,
    manifest: Manifest,
    *,
    views: int,
    batch_size: int,
    workers: int,
    rank: int,
    world: int,
    seed: int,
    time_limit: float = TIME_LIMIT,
) -> ClipLoader:
    """`build_train_loader`, but for the cuts: `views` fixed ones of each clip."""
    dataset = ViewClips(clip, manifest.clips, seed, views)
    sampler = EpochSampler(dataset, batch_size, num_replicas=world, rank=rank, shuffle=True, seed=seed, drop_last=True)
    return ClipLoader(dataset, sampler, batch_size, workers, time_limit=time_limit, keep_last=False)


class AllViews(ViewClips):
    """The same views to be computed ahead: a video that cannot be read is left out, not replaced."""

    def replacement(self, item: Any, attempt: int) -> Any:
        """See Clips."""
        return None


@dataclass(frozen=True)
class Entry:
    """One sample of a batch to come."""

    item: Any
    """What to ask for; None where there is nothing to be had."""
    index: int
    row: Row | None
    """Where its vectors are; None where they must be computed."""
    failed: tuple[tuple[int, str], ...] = ()
    """What is known not to be readable, and was passed over for this one."""


class FeatureLoader:
    """A loader's batches with vectors for clips: [b, tubelets, width], or in evaluation [b, views * crops, tubelets,
    width].

    Labels, order, replacements and failures are those of the loader. What the store lacks is decoded, run through the
    tower and kept: a batch of which all is there starts no worker and no tower. Where ranks must run the tower together
    they do so as often as the one that lacks most.
    """

    def __init__(
        self,
        loader: ClipLoader,
        store: FeatureStore,
        tower: TowerPass,
        view: Callable[[Any], int],
        *,
        forecast: bool = False,
    ) -> None:
        """`view` numbers an item's view; with `forecast` the log says what the first epoch's cache will save."""
        self.loader, self.store, self.tower, self.view, self.forecast = loader, store, tower, view, forecast
        self.sampler, self.batch_size = loader.sampler, loader.batch_size
        self.broken: dict[int, str] = {}
        """Why a clip could not be read, by its position: it is not tried again."""
        self.computed, self.read = 0, 0
        """Clips."""
        self.compute_seconds: list[float] = []
        self.use_seconds: list[float] = []
        """Of each micro-batch that was computed: decoding with the tower, and what followed."""

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        self.loader.drop_pending()
        self.store.refresh()
        plan = [self.look_up(item) for item in self.loader.items()]
        ahead = iter([entry.item for entry in plan if entry.item is not None and entry.row is None])
        batches = [plan[start : start + self.batch_size] for start in range(0, len(plan), self.batch_size)]
        filling = self.tower.most(any(entry.row is None for entry in plan)) > 0
        for number in range(self.tower.most(len(batches)) if filling else len(batches)):
            started = time.perf_counter()
            entries = batches[number] if number < len(batches) else []
            fresh = self.compute(entries, ahead) if filling else NOTHING
            if number < len(batches):
                batch = self.join(entries, fresh)
                ready = time.perf_counter()
                yield batch
                if self.forecast and len(fresh.clips) == self.batch_size:
                    self.note_seconds(ready - started, time.perf_counter() - ready)

    def look_up(self, item: Any) -> Entry:
        """Where this item's vectors are, or those of what takes its place."""
        dataset = self.loader.dataset
        failed: list[tuple[int, str]] = []
        for attempt in itertools.count():
            asked = item if attempt == 0 else dataset.replacement(item, attempt - 1)
            index = dataset.index(item if asked is None else asked)
            if asked is None:
                break
            if index not in self.broken:
                row = self.store.find(dataset.clips[index], self.view(asked))
                # Where it has to be decoded, the loader finds its way to the replacement by itself.
                return Entry(item, index, None) if row is None else Entry(asked, index, row, tuple(failed))
            failed.append((index, self.broken[index]))
        return Entry(None, index, None, tuple(failed))

    def compute(self, entries: list[Entry], ahead: Iterator[Any]) -> Batch:
        """What the store lacks of these, decoded, through the tower, and kept: a batch whose clips are vectors."""
        count = sum(entry.item is not None and entry.row is None for entry in entries)
        batch = self.loader.read_batch(count, ahead)
        self.broken |= dict(batch.failed)
        most = self.tower.most(len(batch.clips))
        shape = self.store.shape
        if most == 0:
            return replace(batch, clips=torch.empty(0, *shape))
        clips = batch.clips.view(len(batch.clips), shape[0], *batch.clips.shape[-4:])
        lacking = clips.new_zeros(most - len(clips), *clips.shape[1:])
        views = (torch.cat([clips, lacking]) if len(lacking) else clips).unbind(1)
        vectors = torch.stack([self.tower(view).to(self.store.dtype) for view in views], 1)[: len(clips)]
        for index, item, own in zip(batch.indices.tolist(), batch.items, vectors, strict=True):
            self.store.append(self.loader.dataset.clips[index], self.view(item), own)
        self.computed += len(clips)
        return replace(batch, clips=vectors)

    def join(self, entries: list[Entry], fresh: Batch) -> Batch:
        """Rows that are there and those just computed, in the order in which they were asked for."""
        dataset = self.loader.dataset
        computed = iter(zip(fresh.clips, fresh.indices.tolist(), fresh.decoders, strict=True))
        # One for each that was asked for, some of them replacements; or without replacements those that could be read.
        whole = len(fresh.items) == sum(entry.item is not None and entry.row is None for entry in entries)
        found: list[tuple[Tensor, int, str]] = []
        failed = list(fresh.failed)
        for entry in entries:
            failed += entry.failed
            if entry.row is not None:
                found.append((self.store.read(entry.row), entry.index, CACHED))
                self.read += 1
            elif entry.item is not None and (whole or entry.item in fresh.items):
                found.append(next(computed))
        pinned = torch.cuda.is_initialized()
        shape = self.store.shape if len(dataset.shape) == 5 else self.store.shape[1:]
        vectors = torch.empty((len(found), *shape), dtype=self.store.dtype, pin_memory=pinned)
        for place, (own, _, _) in enumerate(found):
            vectors[place].copy_(own.view(shape))
        indices = [index for _, index, _ in found]
        labels, places = (
            torch.tensor(numbers, dtype=torch.int64, pin_memory=pinned)
            for numbers in ([dataset.clips[index].label for index in indices], indices)
        )
        return Batch(vectors, labels, places, tuple(failed), tuple(decoder for _, _, decoder in found))

    def note_seconds(self, computing: float, using: float) -> None:
        """Say what a kept epoch saves, once a few micro-batches are measured."""
        self.compute_seconds.append(computing)
        self.use_seconds.append(using)
        if len(self.compute_seconds) == min(MEASURED + 1, len(self)):
            compute, use = (statistics.mean(times[1:] or times) for times in (self.compute_seconds, self.use_seconds))
            log.info(describe_saving(compute, use, len(self)))
            self.forecast = False


def describe_saving(compute: float, use: float, batches: int) -> str:
    """One line: seconds that decoding and tower take of a micro-batch, and the rest of the step, over an epoch."""
    share = compute / (compute + use)
    line = (
        f"cache: decoding and tower take {compute:.3g} s of a micro-batch, all else {use:.3g} s (measured): an epoch "
        f"of {batches} takes about {batches * (compute + use):.3g} s while it is kept, then about {batches * use:.3g} s"
    )
    if share < WORTH:
        line += f". Not worth its disk: that saves {share:.0%}; leave --data.cache out"
    return line
