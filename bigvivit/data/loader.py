"""Manifests to batches: the same clips, cut the same way, whatever the number of workers and ranks."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler, Sampler

from bigvivit.config import ClipConfig
from bigvivit.data.augment import augment, crop_views
from bigvivit.data.decode import DecodeError, VideoReader, open_video
from bigvivit.data.manifest import Clip, Manifest
from bigvivit.data.pool import Pool
from bigvivit.data.sampling import random_clip, uniform_clips


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


def window(video: VideoReader, clip: Clip) -> range:
    """The frame numbers between a clip's start and end, by the video's mean frame rate.

    Annotations often run a little past their video: an end is cut to it, and a start past it leaves the last frame.
    """
    first = 0 if clip.start is None else min(round(clip.start * video.fps), len(video) - 1)
    last = len(video) if clip.end is None else min(round(clip.end * video.fps), len(video))
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


class TrainClips(Dataset[tuple[Tensor, int, int]]):
    """A random clip of each video, asked for as (epoch, index)."""

    def __init__(self, clip: ClipConfig, clips: Sequence[Clip], seed: int) -> None:
        self.clip, self.clips, self.seed = clip, clips, seed

    def __getitem__(self, item: Any) -> tuple[Tensor, int, int]:
        epoch, index = item
        source = self.clips[index]
        generator = sample_generator(self.seed, epoch, index)
        video = open_video(source.path)  # here, in the worker: decord's readers do not cross processes
        frames = window(video, source)
        chosen = random_clip(len(frames), self.clip.frames, self.clip.stride, generator)
        return augment(video.read([frames[i] for i in chosen]), self.clip, generator), source.label, index

    def __len__(self) -> int:
        return len(self.clips)


class EvalClips(Dataset[tuple[Tensor, int, int]]):
    """All views of each video."""

    def __init__(
        self, clip: ClipConfig, clips: Sequence[Clip], *, views: int, crops: int, shuffle_frames: bool, seed: int
    ) -> None:
        self.clip, self.clips = clip, clips
        self.views, self.crops, self.shuffle_frames, self.seed = views, crops, shuffle_frames, seed

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        source = self.clips[index]
        video = open_video(source.path)
        frames = window(video, source)
        views = []
        for number, chosen in enumerate(uniform_clips(len(frames), self.clip.frames, self.clip.stride, self.views)):
            view = crop_views(video.read([frames[i] for i in chosen]), self.clip, self.crops)
            if self.shuffle_frames:
                view = view[:, shuffled_order(len(chosen), sample_generator(self.seed, index, number))]
            views.append(view)
        return torch.cat(views), source.label, index

    def __len__(self) -> int:
        return len(self.clips)


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


def build_train_loader(
    clip: ClipConfig, manifest: Manifest, *, batch_size: int, workers: int, rank: int, world: int, seed: int
) -> DataLoader[Any]:
    """This rank's micro-batches of `batch_size` random clips; `loader.sampler.set_epoch` before each epoch.

    What does not fill a batch is left out. Iterating raises DecodeError for a video that cannot be read.
    """
    dataset = TrainClips(clip, manifest.clips, seed)
    sampler = EpochSampler(dataset, batch_size, num_replicas=world, rank=rank, shuffle=True, seed=seed, drop_last=True)
    return build_loader(dataset, sampler, batch_size, workers, drop_last=True)


def build_eval_loader(
    clip: ClipConfig,
    manifest: Manifest,
    *,
    views: int,
    crops: int,
    batch_size: int,
    workers: int,
    shuffle_frames: bool,
    seed: int,
    rank: int,
    world: int,
) -> DataLoader[Any]:
    """This rank's share of the videos, each once, all views and crops of a video together: a view's crops in a row.

    `shuffle_frames` permutes the frames of each view, alike in its crops. Iterating raises DecodeError.
    """
    dataset = EvalClips(clip, manifest.clips, views=views, crops=crops, shuffle_frames=shuffle_frames, seed=seed)
    return build_loader(dataset, ShareOfRank(len(dataset), rank, world), batch_size, workers, drop_last=False)


def build_loader(
    dataset: Dataset[Any], sampler: Sampler[Any], batch_size: int, workers: int, *, drop_last: bool
) -> DataLoader[Any]:
    """Workers are spawned, since decord and CUDA do not survive a fork, and kept over epochs.

    PyTorch gives each of them a single thread.
    """
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        drop_last=drop_last,
        generator=torch.Generator(),  # of its own: the global one, which training draws from, must not move with epochs
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context="spawn" if workers else None,
        persistent_workers=workers > 0,
    )
