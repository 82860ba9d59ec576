"""Batches of vectors: which views, in which order, and what of them is computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bigvivit.config import ClipConfig
from bigvivit.data.cached import CACHED, FeatureLoader, ViewClips, build_view_loader, describe_saving
from bigvivit.data.features import FeatureStore
from bigvivit.data.loader import build_eval_loader
from bigvivit.data.manifest import Clip, Manifest
from tests.data.videos import write_video

CLIP = ClipConfig(frames=4, stride=1, size=24, resize=28, max_scale=1.1)
COUNT, VIEWS, WIDTH = 9, 3, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for number in range(COUNT):
        write_video(folder / f"{number}.mp4", 20 + number)
    return folder


def manifest_of(folder: Path, numbers: range) -> Manifest:
    clips = tuple(Clip(folder / f"{number}.mp4", number % 2) for number in numbers)
    return Manifest(folder / "clips.csv", clips, ("a", "b"))


class CountingTower:
    """Vectors that are sums over the pixels of two frames; counts the clips that went through."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def most(self, value: int) -> int:
        return value

    def __call__(self, clips: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(clips))
        means = clips.float().mean((-1, -2)).reshape(len(clips), 2, WIDTH)  # 2 frames of 3 colours
        return means + torch.arange(WIDTH)


def build(
    folder: Path, numbers: range, cache: Path, *, seed: int = 0, rank: int = 0, world: int = 1
) -> tuple[FeatureLoader, CountingTower]:
    tower = CountingTower()
    manifest = manifest_of(folder, numbers)
    loader = build_view_loader(CLIP, manifest, views=VIEWS, batch_size=2, workers=0, rank=rank, world=world, seed=seed)
    store = FeatureStore(cache, "key", (1, 2, WIDTH), torch.float32)
    assert isinstance(loader.dataset, ViewClips)
    return FeatureLoader(loader, store, tower, loader.dataset.view), tower


def test_each_view_comes_once_in_as_many_epochs(folder: Path) -> None:
    dataset = ViewClips(CLIP, manifest_of(folder, range(COUNT)).clips, 3, 5)
    orders = [[dataset.view((epoch, index)) for epoch in range(10)] for index in range(COUNT)]
    for order in orders:
        assert sorted(order[:5]) == sorted(order[5:]) == [0, 1, 2, 3, 4]
    assert len({tuple(order) for order in orders}) == COUNT
    other = ViewClips(CLIP, dataset.clips, 4, 5)
    assert [other.view((epoch, 0)) for epoch in range(10)] != orders[0]


def test_a_view_is_the_same_clip_for_every_seed_and_place(folder: Path) -> None:
    """And differs from the other views."""
    first = ViewClips(CLIP, manifest_of(folder, range(COUNT)).clips, 3, VIEWS)
    other = ViewClips(CLIP, manifest_of(folder, range(4, COUNT)).clips, 8, VIEWS)
    clips = {first.view((epoch, 5)): first[epoch, 5][0] for epoch in range(VIEWS)}
    others = {other.view((epoch, 1)): other[epoch, 1][0] for epoch in range(VIEWS)}
    assert sorted(clips) == sorted(others) == [0, 1, 2]
    assert all(torch.equal(clips[view], others[view]) for view in range(VIEWS))
    assert not torch.equal(clips[0], clips[1])
    assert not torch.equal(clips[1], clips[2])


def test_a_mixed_batch_computes_what_is_missing_and_keeps_the_order(folder: Path, tmp_path: Path) -> None:
    """The second manifest shares some clips with the first, at other places."""
    some, _ = build(folder, range(4), tmp_path / "shared")
    for epoch in range(VIEWS):
        some.sampler.set_epoch(epoch)
        list(some)
    for epoch in range(VIEWS):
        mixed, tower = build(folder, range(2, COUNT), tmp_path / "shared", seed=1)
        whole, _ = build(folder, range(2, COUNT), tmp_path / "own", seed=1)
        for loader in (mixed, whole):
            loader.sampler.set_epoch(epoch)
        batches, expected = list(mixed), list(whole)
        assert len(batches) == len(expected) == 3
        for ours, theirs in zip(batches, expected, strict=True):
            assert torch.equal(ours.clips, theirs.clips)
            assert torch.equal(ours.labels, theirs.labels)
            assert torch.equal(ours.indices, theirs.indices)
        known = [index for batch in batches for index in batch.indices.tolist() if index < 2]
        assert sum(tower.calls) == mixed.computed == 6 - len(known)
        decoders = [decoder for batch in batches for decoder in batch.decoders]
        assert decoders.count(CACHED) == mixed.read == len(known)
        assert {len(batch.clips) for batch in batches} == {2}


def test_an_epoch_that_is_there_reads_no_video(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader, tower = build(folder, range(COUNT), tmp_path)
    loader.sampler.set_epoch(0)
    first = list(loader)
    assert sum(tower.calls) == 8
    again, tower = build(folder, range(COUNT), tmp_path)
    monkeypatch.setattr("bigvivit.data.loader.open_video", None)
    again.sampler.set_epoch(0)
    for ours, theirs in zip(again, first, strict=True):
        assert torch.equal(ours.clips, theirs.clips)
    assert tower.calls == []


def test_ranks_find_what_others_computed(folder: Path, tmp_path: Path) -> None:
    """In later epochs clips change ranks."""
    ranks = [build(folder, range(8), tmp_path, rank=rank, world=2) for rank in range(2)]
    for epoch in range(VIEWS):
        for loader, _ in ranks:
            loader.sampler.set_epoch(epoch)
            list(loader)
    for loader, tower in ranks:
        loader.sampler.set_epoch(VIEWS)  # the views in another order
        list(loader)
        assert sum(tower.calls) == VIEWS * 4


def test_evaluation_leaves_out_what_cannot_be_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    clips = [*manifest_of(folder, range(4)).clips]
    clips.insert(1, Clip(tmp_path / "broken.mp4", 0))
    manifest = Manifest(folder / "clips.csv", tuple(clips), ("a", "b"))
    options = {"views": 2, "crops": 1, "batch_size": 3, "workers": 0, "rank": 0, "world": 1}
    plain = build_eval_loader(CLIP, manifest, **options)  # type: ignore[arg-type]
    store = FeatureStore(tmp_path / "cache", "key", (2, 2, WIDTH), torch.float32)
    tower = CountingTower()
    loader = FeatureLoader(plain, store, tower, lambda item: 0)
    for _ in range(3):
        batches = list(loader)
        assert [batch.indices.tolist() for batch in batches] == [[0, 2], [3, 4]]
        assert [[index for index, _ in batch.failed] for batch in batches] == [[1], []]
        for batch, original in zip(batches, plain, strict=True):
            expected = torch.stack([CountingTower()(view) for view in original.clips.unbind(1)], 1)
            assert torch.equal(batch.clips, expected)
    assert sum(tower.calls) == 2 * 4


def test_what_is_said_of_the_saving() -> None:
    line = describe_saving(0.9, 0.1, 50)
    assert "an epoch of 50 takes about 50 s while it is kept, then about 5 s" in line
    assert "Not worth" not in line
    assert "Not worth its disk: that saves 5%" in describe_saving(0.05, 0.95, 50)
