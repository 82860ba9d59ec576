"""Batches: repeatable, whatever the workers and ranks."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bigvivit.config import ClipConfig
from bigvivit.data.errors import DecodeError
from bigvivit.data.loader import (
    Batch,
    ClipLoader,
    build_eval_loader,
    build_train_loader,
    sample_generator,
    shuffle_frames,
    shuffled_order,
    window,
)
from bigvivit.data.manifest import Clip, Manifest, read_manifest
from tests.data.videos import frame_numbers, write_video

CLIP = ClipConfig(frames=4, stride=2, size=24, resize=28, max_scale=1.1)
COUNT = 13


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("videos")
    rows = ["path,label"]
    for number in range(COUNT):
        write_video(folder / f"{number}.mp4", 20 + number)
        rows.append(f"{number}.mp4,{number % 3}")
    (folder / "clips.csv").write_text("\n".join(rows))
    return read_manifest(folder / "clips.csv")


def train_batches(manifest: Manifest, epoch: int, **options: Any) -> list[Batch]:
    loader = build_train_loader(CLIP, manifest, **{"workers": 0, "rank": 0, "world": 1, "seed": 7, **options})
    loader.sampler.set_epoch(epoch)
    return list(loader)


def as_table(batches: list[Batch]) -> dict[int, tuple[int, torch.Tensor]]:
    return {
        int(index): (int(label), clip)
        for batch in batches
        for index, label, clip in zip(batch.indices, batch.labels, batch.clips, strict=True)
    }


def same(first: list[Batch], second: list[Batch]) -> bool:
    pairs = itertools.zip_longest(first, second)
    return all(torch.equal(a.clips, b.clips) and torch.equal(a.indices, b.indices) for a, b in pairs)


def test_a_training_batch(manifest: Manifest) -> None:
    batches = train_batches(manifest, 0, batch_size=4)
    assert len(batches) == 3
    for index, (label, clip) in as_table(batches).items():
        assert clip.dtype == torch.uint8
        assert tuple(clip.shape) == (4, 3, 24, 24)
        assert label == index % 3
        numbers = frame_numbers(clip)
        assert numbers == list(range(numbers[0], numbers[0] + 7, 2))
        assert numbers[-1] < 20 + index


def test_epochs_differ_and_repeat(manifest: Manifest) -> None:
    assert same(train_batches(manifest, 3, batch_size=4), train_batches(manifest, 3, batch_size=4))
    assert not same(train_batches(manifest, 3, batch_size=4), train_batches(manifest, 4, batch_size=4))
    assert not same(train_batches(manifest, 3, batch_size=4), train_batches(manifest, 3, batch_size=4, seed=8))
    orders = [
        [int(index) for batch in train_batches(manifest, epoch, batch_size=4, seed=seed) for index in batch.indices]
        for epoch, seed in ((3, 7), (4, 7), (3, 8))
    ]
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]


def test_spawned_workers_change_nothing(manifest: Manifest) -> None:
    """Nor does it matter that they are kept from one epoch to the next."""
    loader = build_train_loader(CLIP, manifest, batch_size=4, workers=2, rank=0, world=1, seed=7)
    for epoch in (1, 2):
        loader.sampler.set_epoch(epoch)
        assert same(train_batches(manifest, epoch, batch_size=4), list(loader))


class Threads:
    """Says of the process it is read in how many threads it computes with, and which one it is."""

    shape: tuple[int, ...] = (1,)
    clips = ()

    def __getitem__(self, item: Any) -> tuple[torch.Tensor, int, int, str]:
        return torch.zeros(1), torch.get_num_threads(), os.getpid(), "none"

    def index(self, item: Any) -> int:
        return int(item)

    def replacement(self, item: Any, attempt: int) -> Any:
        return None


def test_a_worker_has_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # what a worker would start with
    (batch,) = ClipLoader(Threads(), range(1), 1, 1, keep_last=True)
    assert int(batch.labels) == 1
    assert int(batch.indices) != os.getpid()


def test_a_worker_imports_no_model() -> None:
    """Every one of them imports the loader again, and holds what that brings in."""
    code = "import sys, bigvivit.data.loader; sys.exit(' '.join({'transformers', 'deepspeed'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def with_broken(manifest: Manifest, folder: Path, broken: set[int]) -> Manifest:
    """The same manifest, whose videos at these positions cannot be read."""
    (folder / "broken.mp4").write_bytes(b"no video")
    clips = [replace(c, path=folder / "broken.mp4") if k in broken else c for k, c in enumerate(manifest.clips)]
    return Manifest(manifest.path, tuple(clips), manifest.classes)


def test_others_take_the_place_of_broken_videos(manifest: Manifest, tmp_path: Path) -> None:
    """The same ones whatever the workers and ranks, and each with its own label."""
    some = with_broken(manifest, tmp_path, {2, 5})
    whole, alone = (train_batches(clips, 0, batch_size=6) for clips in (manifest, some))
    assert same(alone, train_batches(some, 0, batch_size=6, workers=2))
    shares = [train_batches(some, 0, batch_size=3, rank=rank, world=2) for rank in range(2)]
    for step, (batch, before) in enumerate(zip(alone, whole, strict=True)):
        asked = set(before.indices.tolist())
        kept = [k for k, index in enumerate(before.indices.tolist()) if index not in (2, 5)]
        assert torch.equal(batch.clips[kept], before.clips[kept])
        assert batch.labels.tolist() == [index % 3 for index in batch.indices.tolist()]
        assert not {2, 5} & set(batch.indices.tolist())
        assert {2, 5} & asked <= {index for index, _ in batch.failed} <= {2, 5}
        assert all("broken.mp4 cannot be opened as a video" in reason for _, reason in batch.failed)
        together = [index for share in shares for index in share[step].indices.tolist()]
        assert sorted(together) == sorted(batch.indices.tolist())
        assert sorted(f for share in shares for f in share[step].failed) == sorted(batch.failed)
    assert sum(len(batch.failed) for batch in alone) >= 1


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_to_take_its_place(workers: int, manifest: Manifest, tmp_path: Path) -> None:
    none = with_broken(manifest, tmp_path, set(range(COUNT)))
    with pytest.raises(DecodeError, match=r"broken\.mp4 cannot be read, nor can 12 videos drawn in its place"):
        train_batches(none, 0, batch_size=2, workers=workers)
    only = Manifest(none.path, none.clips[:1], none.classes)
    with pytest.raises(DecodeError, match=r"nor can 0 videos"):
        train_batches(only, 0, batch_size=1, workers=workers)


def test_broken_videos_are_missing_from_evaluation(manifest: Manifest, tmp_path: Path) -> None:
    whole = as_table(eval_batches(manifest))
    batches = eval_batches(with_broken(manifest, tmp_path, {0, 4, 5, 6, 7}))
    assert [len(batch.clips) for batch in batches] == [3, 0, 4, 1]
    assert [[index for index, _ in batch.failed] for batch in batches] == [[0], [4, 5, 6, 7], [], []]
    table = as_table(batches)
    assert table.keys() == whole.keys() - {0, 4, 5, 6, 7}
    assert all(torch.equal(clip, whole[index][1]) for index, (_, clip) in table.items())


def test_an_epoch_left_in_the_middle(manifest: Manifest) -> None:
    """What was read ahead for it does not come with the next one."""
    loader = build_train_loader(CLIP, manifest, batch_size=2, workers=2, rank=0, world=1, seed=7)
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        next(iter(loader))
    loader.sampler.set_epoch(2, first_batch=1)
    assert same(train_batches(manifest, 2, batch_size=2)[1:], list(loader))


def test_clips_stay_between_start_and_end(manifest: Manifest) -> None:
    """At 10 frames a second, 0.5 to 1.4 s is frames 5 to 13; training and evaluation both keep to it."""
    part = Manifest(manifest.path, (Clip(manifest.clips[0].path, 0, 0.5, 1.4),), manifest.classes)
    starts = set()
    for epoch in range(20):
        (batch,) = train_batches(part, epoch, batch_size=1)
        numbers = frame_numbers(batch.clips[0])
        assert numbers == list(range(numbers[0], numbers[0] + 7, 2))
        starts.add(numbers[0])
    assert starts == {5, 6, 7}
    (batch,) = eval_batches(part, crops=1)
    assert [frame_numbers(view) for view in batch.clips[0]] == [[5, 7, 9, 11], [7, 9, 11, 13]]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_batch_of_one(world: int, manifest: Manifest) -> None:
    """Step k of several ranks sees the clips that step k of one rank sees, cut the same way."""
    alone = train_batches(manifest, 2, batch_size=6)
    shares = [train_batches(manifest, 2, batch_size=6 // world, rank=rank, world=world) for rank in range(world)]
    for step, batch in enumerate(alone):
        together = as_table([share[step] for share in shares])
        expected = as_table([batch])
        assert together.keys() == expected.keys()
        assert all(torch.equal(together[index][1], expected[index][1]) for index in expected)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_sees_every_clip_once(world: int, manifest: Manifest) -> None:
    seen: list[int] = []
    for rank in range(world):
        batches = eval_batches(manifest, rank=rank, world=world)
        seen += [int(index) for batch in batches for index in batch.indices]
    assert sorted(seen) == list(range(COUNT))


def eval_batches(manifest: Manifest, **options: Any) -> list[Batch]:
    defaults = {"views": 2, "crops": 3, "batch_size": 4, "workers": 0}
    return list(build_eval_loader(CLIP, manifest, **{**defaults, "rank": 0, "world": 1, **options}))


def test_views_and_crops(manifest: Manifest) -> None:
    for index, (_, clips) in as_table(eval_batches(manifest)).items():
        assert tuple(clips.shape) == (6, 4, 3, 24, 24)
        last = 20 + index - 7
        expected = [[start, start + 2, start + 4, start + 6] for start in (0, last)]
        assert [frame_numbers(view) for view in clips] == [expected[0]] * 3 + [expected[1]] * 3
        assert not torch.equal(clips[0], clips[2])


def test_shuffled_frames_are_the_same_frames(manifest: Manifest) -> None:
    ordered, shuffled = as_table(eval_batches(manifest)), as_table(reorder(eval_batches(manifest)))
    orders = set()
    for index, (_, clips) in ordered.items():
        assert len({tuple(frame_numbers(view)) for view in shuffled[index][1][:3]}) == 1  # alike in all crops of a view
        for before, after in zip(clips, shuffled[index][1], strict=True):
            numbers = frame_numbers(after)
            assert sorted(numbers) == frame_numbers(before)
            assert numbers != frame_numbers(before)
            orders.add(tuple(number - min(numbers) for number in numbers))
    assert len(orders) > 10
    again = as_table(reorder(eval_batches(manifest, workers=1, batch_size=3)))
    assert all(torch.equal(again[index][1], clips) for index, (_, clips) in shuffled.items())


def reorder(batches: list[Batch]) -> list[Batch]:
    return [replace(batch, clips=shuffle_frames(batch, crops=3, seed=7)) for batch in batches]


def test_a_shuffled_order_is_any_but_the_given_one() -> None:
    orders = [tuple(shuffled_order(3, sample_generator(seed)).tolist()) for seed in range(300)]
    assert set(orders) == set(itertools.permutations(range(3))) - {(0, 1, 2)}
    assert shuffled_order(1, sample_generator(0)).tolist() == [0]


def test_a_window_in_seconds(tmp_path: Path) -> None:
    def frames(start: float | None, end: float | None) -> range:
        return window(50, 10.0, Clip(tmp_path, 0, start, end))

    assert frames(None, None) == range(50)
    assert frames(1.2, 3.0) == range(12, 30)
    assert frames(4.0, 99.0) == range(40, 50)
    assert frames(80.0, 99.0) == range(49, 50)  # past the end: the last frame rather than none
    assert frames(1.0, 1.01) == range(10, 11)
