"""Manifests to batches: the same clips, cut the same way, whatever the number of workers and ranks."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler, Sampler

from bigvivit.config import TIME_LIMIT, ClipConfig
from bigvivit.data.augment import augment, crop_views
from bigvivit.data.decode import open_video
from bigvivit.data.errors import DecodeError, WorkerLostError
from bigvivit.data.manifest import Clip, Manifest
from bigvivit.data.pool import Pool
from bigvivit.data.sampling import random_frames, view_frames

MAX_REPLACEMENTS = 100
"""Videos tried in place of one that cannot be read: when all of these fail too, something else is wrong."""
Sample = tuple[Tensor, int, int, str]
"""Clip, label, position in the manifest, decoder."""


@dataclass
class Batch:
    """Clips still as bytes; they become numbers on the device."""

    clips: Tensor
    """uint8 [b, T, 3, h, w]; in evaluation [b, views * crops, T, 3, h, w]."""
    labels: Tensor
    """int64 [b]."""
    indices: Tensor
    """int64 [b], positions in the manifest."""

    failed: tuple[tuple[int, str], ...] = ()
    """(position in the manifest, reason) of each video that could not be read for this batch. In training others take
    their places; in evaluation they are missing from the tensors, which may then hold no clip at all."""
    decoders: tuple[str, ...] = ()
    """Which decoder read each clip."""
    items: tuple[Any, ...] = ()
    """What each clip was asked for as: a sampler's item, or its replacement."""


def window(count: int, fps: float, clip: Clip) -> range:
    """The frame numbers between a clip's start and end, of a video of so many frames, by its mean frame rate.

    Annotations often run a little past their video: an end is cut to it, and a start past it leaves the last frame.
    """
    first = 0 if clip.start is None else min(round(clip.start * fps), count - 1)
    last = count if clip.end is None else min(round(clip.end * fps), count)
    return range(first, max(last, first + 1))


def sample_generator(*key: int) -> torch.Generator:
    """Random numbers of one sample: from its key, not from the worker or from what came before."""
    seed = 0
    for number in key:
        seed = (seed * 1_000_003 + number + 1) % 2**63
    return torch.Generator().manual_seed(seed)


def shuffled_order(count: int, generator: torch.Generator) -> Tensor:
    """A random order of `count` frames, int64 [count], never the one they are in; a single frame has no other."""
    while True:
        order = torch.randperm(count, generator=generator)
        if count == 1 or not torch.equal(order, torch.arange(count)):
            return order


def shuffle_frames(batch: Batch, crops: int, seed: int) -> Tensor:
    """An evaluation batch's clips with the frames of each view permuted in time, alike in its crops."""
    shuffled = batch.clips.clone()
    for clip, index in zip(shuffled, batch.indices.tolist(), strict=True):
        for place in range(0, len(clip), crops):
            order = shuffled_order(clip.shape[1], sample_generator(seed, index, place // crops))
            clip[place : place + crops] = clip[place : place + crops, order]
    return shuffled


class Clips(Protocol):
    """Samples by what a sampler yields."""

    shape: tuple[int, ...]
    """Of one sample's clip, uint8."""
    clips: Sequence[Clip]

    def __getitem__(self, item: Any) -> Sample:
        """Raises DecodeError."""
        ...

    def index(self, item: Any) -> int:
        """The position in the manifest of what is asked for."""
        ...

    def replacement(self, item: Any, attempt: int) -> Any:
        """What to ask for in place of an item that cannot be read; None to do without. Raises DecodeError."""
        ...


class TrainClips(Dataset[Sample]):
    """A random clip of each video, asked for as (epoch, index)."""

    def __init__(self, clip: ClipConfig, clips: Sequence[Clip], seed: int) -> None:
        self.clip, self.clips, self.seed = clip, clips, seed
        self.shape: tuple[int, ...] = (clip.frames, 3, clip.size, clip.size)

    def __getitem__(self, item: Any) -> Sample:
        _, index = item
        source = self.clips[index]
        generator = self.generator(item)
        video = open_video(source.path)  # here, in the worker: decord's readers do not cross processes
        frames = window(len(video), video.fps, source)
        chosen = random_frames(len(frames), video.fps, self.clip, generator)
        clip = augment(video.read([frames[i] for i in chosen]), self.clip, generator)
        return clip, source.label, index, video.decoder

    def __len__(self) -> int:
        return len(self.clips)

    def generator(self, item: Any) -> torch.Generator:
        """Random numbers of an item's cut."""
        return sample_generator(self.seed, *item)

    def index(self, item: Any) -> int:
        """See Clips."""
        return int(item[1])

    def replacement(self, item: Any, attempt: int) -> Any:
        """Other videos in an order that depends on seed, epoch and index only: the same for any workers and ranks."""
        epoch, index = item
        if attempt >= min(MAX_REPLACEMENTS, len(self.clips) - 1):
            path = self.clips[index].path
            raise DecodeError(f"{path} cannot be read, nor can {attempt} videos drawn in its place")
        order = torch.randperm(len(self.clips), generator=sample_generator(self.seed, epoch, index, 0))
        return epoch, int(order[order != index][attempt])


class EvalClips(Dataset[Sample]):
    """All views of each video."""

    def __init__(self, clip: ClipConfig, clips: Sequence[Clip], *, views: int, crops: int) -> None:
        self.clip, self.clips, self.views, self.crops = clip, clips, views, crops
        self.shape: tuple[int, ...] = (views * crops, clip.frames, 3, clip.size, clip.size)

    def __getitem__(self, index: int) -> Sample:
        source = self.clips[index]
        video = open_video(source.path)
        frames = window(len(video), video.fps, source)
        views = [
            crop_views(video.read([frames[i] for i in chosen]), self.clip, self.crops)
            for chosen in view_frames(len(frames), video.fps, self.clip, self.views)
        ]
        return torch.cat(views), source.label, index, video.decoder

    def __len__(self) -> int:
        return len(self.clips)

    def index(self, item: Any) -> int:
        """See Clips."""
        return int(item)

    def replacement(self, item: Any, attempt: int) -> Any:
        """None: a video put in place of another would be counted as that one."""
        return None


class EpochSampler(DistributedSampler[Any]):
    """PyTorch's DistributedSampler, whose indices carry their epoch into the worker.

    Rank r of n takes every n-th of one shuffled order, so step k of any number of ranks sees the same clips.
    """

    def __init__(self, dataset: TrainClips, batch_size: int, **options: Any) -> None:
        super().__init__(dataset, **options)
        self.batch_size, self.first_batch = batch_size, 0

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Shuffle anew, and leave out the batches before the first: training goes on in the middle of an epoch."""
        super().set_epoch(epoch)
        self.first_batch = first_batch

    def __iter__(self) -> Iterator[Any]:
        order = itertools.islice(super().__iter__(), self.first_batch * self.batch_size, None)
        return ((self.epoch, index) for index in order)


class ShareOfRank(Sampler[int]):
    """Every index once over all ranks: no padding, so no clip counts twice."""

    def __init__(self, length: int, rank: int, world: int) -> None:
        self.indices = range(rank, length, world)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class ReadSample:
    """What a worker does: a sample's clip into its slot, and what else there is to know of it back."""

    def __init__(self, dataset: Clips) -> None:
        self.dataset = dataset

    def __call__(self, item: Any, slot: np.ndarray | None) -> tuple[int, int, str]:
        assert slot is not None
        clip, label, index, decoder = self.dataset[item]
        as_clip(slot, self.dataset.shape).copy_(clip)
        return label, index, decoder


def as_clip(slot: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    """A slot's bytes as the clip that they are."""
    return torch.from_numpy(slot).view(shape)


class ClipLoader:
    """Batches of a dataset in the order of a sampler, read ahead by workers that are kept over epochs.

    Two batches are read ahead, and at least two clips for each worker. Iterating again ends the iteration before.
    """

    def __init__(
        self,
        dataset: Clips,
        sampler: Any,
        batch_size: int,
        workers: int,
        *,
        time_limit: float = TIME_LIMIT,
        keep_last: bool,
    ) -> None:
        self.dataset, self.sampler, self.batch_size, self.keep_last = dataset, sampler, batch_size, keep_last
        depth = 2 * max(batch_size, workers) if workers else 1
        slot_bytes = int(np.prod(dataset.shape))
        self.pool = Pool(ReadSample(dataset), workers, time_limit=time_limit, slots=depth, slot_bytes=slot_bytes)
        self.free = deque(range(depth))
        self.pending: deque[tuple[Any, Future[Any], int]] = deque()
        """What was asked of the pool, in order: item, result, slot."""
        weakref.finalize(self, self.pool.close)

    def __len__(self) -> int:
        whole, rest = divmod(len(self.sampler), self.batch_size)
        return whole + (self.keep_last and rest > 0)

    def __iter__(self) -> Iterator[Batch]:
        self.drop_pending()
        items = self.items()
        ahead = iter(items)
        for start in range(0, len(items), self.batch_size):
            yield self.read_batch(min(self.batch_size, len(items) - start), ahead)

    def items(self) -> list[Any]:
        """What one iteration asks for, in order."""
        items = list(self.sampler)
        return items if self.keep_last else items[: len(items) // self.batch_size * self.batch_size]

    def read_batch(self, count: int, ahead: Iterator[Any]) -> Batch:
        """The next `count` samples. Raises DecodeError where nothing can be read in place of one."""
        pinned = torch.cuda.is_initialized()  # from where a GPU, where this process uses one, copies while it computes
        clips = torch.empty((count, *self.dataset.shape), dtype=torch.uint8, pin_memory=pinned)
        known: list[tuple[int, int, str]] = []
        items: list[Any] = []
        failed: list[tuple[int, str]] = []
        for _ in range(count):
            self.read_ahead(ahead)
            item, future, slot = self.pending.popleft()
            asked, sample = self.settle(item, future, slot, failed)
            if sample is not None:
                source = self.pool.read_slot(slot)
                assert source is not None
                clips[len(known)].copy_(as_clip(source, self.dataset.shape))
                known.append(sample)
                items.append(asked)
            self.free.append(slot)
        self.read_ahead(ahead)
        labels, indices = (
            torch.tensor([sample[column] for sample in known], dtype=torch.int64, pin_memory=pinned)
            for column in (0, 1)
        )
        decoders = tuple(sample[2] for sample in known)
        return Batch(clips[: len(known)], labels, indices, tuple(failed), decoders, tuple(items))

    def read_ahead(self, items: Iterator[Any]) -> None:
        """Ask for what comes next, as far as there is room."""
        while self.free:
            item = next(items, None)
            if item is None:
                return
            slot = self.free.popleft()
            self.pending.append((item, self.pool.submit(item, slot), slot))

    def settle(self, item: Any, future: Future[Any], slot: int, failed: list[tuple[int, str]]) -> Any:
        """This item, or the one that takes its place, and what is known of its sample; (None, None) where none does."""
        for attempt in itertools.count():
            asked = item if attempt == 0 else self.dataset.replacement(item, attempt - 1)
            if asked is None:
                return None, None
            try:
                return asked, (future if attempt == 0 else self.pool.submit(asked, slot)).result()
            except DecodeError as error:
                index = self.dataset.index(asked)
                lost = isinstance(error, WorkerLostError)
                failed.append((index, f"{self.dataset.clips[index].path}: {error}" if lost else str(error)))

    def drop_pending(self) -> None:
        """Forget what was read ahead; a slot is free once nobody writes to it any more."""
        for _, future, slot in self.pending:
            if not future.cancel():
                with contextlib.suppress(DecodeError):
                    future.result()
            self.free.append(slot)
        self.pending.clear()


def build_train_loader(
    clip: ClipConfig,
    manifest: Manifest,
    *,
    batch_size: int,
    workers: int,
    rank: int,
    world: int,
    seed: int,
    time_limit: float = TIME_LIMIT,
) -> ClipLoader:
    """This rank's micro-batches of `batch_size` random clips; `loader.sampler.set_epoch` before each epoch.

    What does not fill a batch is left out. For a video that cannot be read, or not within `time_limit` seconds, another
    takes its place and `Batch.failed` names it; iterating raises DecodeError where a long row of others fails too.
    """
    dataset = TrainClips(clip, manifest.clips, seed)
    sampler = EpochSampler(dataset, batch_size, num_replicas=world, rank=rank, shuffle=True, seed=seed, drop_last=True)
    return ClipLoader(dataset, sampler, batch_size, workers, time_limit=time_limit, keep_last=False)


def build_eval_loader(
    clip: ClipConfig,
    manifest: Manifest,
    *,
    views: int,
    crops: int,
    batch_size: int,
    workers: int,
    rank: int,
    world: int,
    time_limit: float = TIME_LIMIT,
) -> ClipLoader:
    """This rank's share of the videos, each once, all views and crops of a video together: a view's crops in a row.

    A video that cannot be read is missing from its batch, and `Batch.failed` names it.
    """
    dataset = EvalClips(clip, manifest.clips, views=views, crops=crops)
    sampler = ShareOfRank(len(dataset), rank, world)
    return ClipLoader(dataset, sampler, batch_size, workers, time_limit=time_limit, keep_last=True)
