"""Batches: repeatable, whatever the workers and ranks."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from bigvivit.config import ClipConfig
from bigvivit.data.loader import Batch, build_eval_loader, build_train_loader, window
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
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
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


def test_spawned_workers_change_nothing(manifest: Manifest) -> None:
    alone = train_batches(manifest, 1, batch_size=4)
    assert same(alone, train_batches(manifest, 1, batch_size=4, workers=2))


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
    defaults = {"views": 2, "crops": 3, "batch_size": 4, "workers": 0, "shuffle_frames": False, "seed": 7}
    return list(build_eval_loader(CLIP, manifest, **{**defaults, "rank": 0, "world": 1, **options}))


def test_views_and_crops(manifest: Manifest) -> None:
    for index, (_, clips) in as_table(eval_batches(manifest)).items():
        assert tuple(clips.shape) == (6, 4, 3, 24, 24)
        last = 20 + index - 7
        expected = [[start, start + 2, start + 4, start + 6] for start in (0, last)]
        assert [frame_numbers(view) for view in clips] == [expected[0]] * 3 + [expected[1]] * 3
        assert not torch.equal(clips[0], clips[2])


def test_shuffled_frames_are_the_same_frames(manifest: Manifest) -> None:
    ordered, shuffled = (as_table(eval_batches(manifest, shuffle_frames=flag)) for flag in (False, True))
    orders = set()
    for index, (_, clips) in ordered.items():
        for before, after in zip(clips, shuffled[index][1], strict=True):
            numbers = frame_numbers(after)
            assert sorted(numbers) == frame_numbers(before)
            orders.add(tuple(number - min(numbers) for number in numbers))
    assert len(orders) > 10
    again = as_table(eval_batches(manifest, shuffle_frames=True, workers=1, batch_size=3))
    assert all(torch.equal(again[index][1], clips) for index, (_, clips) in shuffled.items())


def test_a_window_in_seconds(tmp_path: Path) -> None:
    class Video:
        fps = 10.0

        def __len__(self) -> int:
            return 50

    def frames(start: float | None, end: float | None) -> range:
        return window(Video(), Clip(tmp_path, 0, start, end))  # type: ignore[arg-type]

    assert frames(None, None) == range(50)
    assert frames(1.2, 3.0) == range(12, 30)
    assert frames(4.0, 99.0) == range(40, 50)
    assert frames(80.0, 99.0) == range(49, 50)  # past the end: the last frame rather than none
    assert frames(1.0, 1.01) == range(10, 11)
