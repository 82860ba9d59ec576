"""Vectors on disk: whole, or not used."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from bigvivit.config import ConfigError
from bigvivit.data import features
from bigvivit.data.features import FeatureStore
from bigvivit.data.manifest import Clip

SHAPE = (2, 3, 4)
COUNT = 5


@pytest.fixture
def clips(tmp_path: Path) -> list[Clip]:
    for number in range(COUNT):
        (tmp_path / f"{number}.mp4").write_bytes(bytes([number]) * (number + 1))
    return [Clip(tmp_path / f"{number}.mp4", 0) for number in range(COUNT)]


def vectors(number: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(number)).to(dtype)


def open_store(folder: Path, key: str = "key", dtype: torch.dtype = torch.bfloat16, **options: bool) -> FeatureStore:
    return FeatureStore(folder / "cache", key, SHAPE, dtype, **options)


def fill(folder: Path, clips: list[Clip], **options: bool) -> FeatureStore:
    store = open_store(folder, **options)
    for number, clip in enumerate(clips):
        store.append(clip, 0, vectors(number))
    return store


def there(store: FeatureStore, clips: list[Clip]) -> list[bool]:
    """Which clips the store has; what it has must be right."""
    found = [store.find(clip, 0) for clip in clips]
    for number, row in enumerate(found):
        assert row is None or torch.equal(store.read(row), vectors(number)), number
    return [row is not None for row in found]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_come_back_and_the_library_reads_them(dtype: torch.dtype, tmp_path: Path, clips: list[Clip]) -> None:
    store = open_store(tmp_path, dtype=dtype)
    for number, clip in enumerate(clips):
        store.append(clip, 7, vectors(number, dtype))
    for closed in (False, True):
        other = open_store(tmp_path, dtype=dtype)
        for number, clip in enumerate(clips):
            row = other.find(clip, 7)
            assert row is not None
            assert torch.equal(other.read(row), vectors(number, dtype))
            assert other.find(clip, 6) is None
        (shard,) = (tmp_path / "cache").glob("*.safetensors")
        with safe_open(shard, "pt") as file:
            kept = file.get_slice("vectors")[:COUNT]
            assert torch.equal(kept[3], vectors(3, dtype))
            rows = file.get_slice("vectors").get_shape()[0]
        assert (rows == COUNT) is closed
        assert (shard.stat().st_blocks * 512 < 2 * features.HEADER_BYTES + 4096) is True  # holes take nothing
        store.close()


def test_what_another_process_writes_is_learnt_of(tmp_path: Path, clips: list[Clip]) -> None:
    reader = open_store(tmp_path)
    writer = fill(tmp_path, clips[:2])
    assert there(reader, clips) == [False] * 5
    reader.refresh()
    assert there(reader, clips) == [True, True, False, False, False]
    writer.append(clips[2], 0, vectors(2))
    writer.close()
    writer.append(clips[3], 0, vectors(3))  # a shard of its own
    reader.refresh()
    assert there(reader, clips) == [True, True, True, True, False]
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2


def test_a_full_shard_is_followed_by_another(
    tmp_path: Path, clips: list[Clip], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "SHARD_BYTES", 2 * vectors(0).nbytes)
    store = fill(tmp_path, clips)
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 3
    assert all(there(store, clips))
    assert all(there(open_store(tmp_path), clips))


def test_a_changed_file_is_named_and_computed_again(
    tmp_path: Path, clips: list[Clip], caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, clips).close()
    with clips[1].path.open("ab") as file:
        file.write(b"more")
    os.utime(clips[3].path, ns=(1, 1))
    store = open_store(tmp_path)
    assert [store.holds(clip, 0) for clip in clips] == [True, False, True, False, True]
    assert there(store, clips) == [True, False, True, False, True]
    assert [str(clip.path) in caplog.text for clip in clips] == [False, True, False, True, False]
    store.append(clips[1], 0, vectors(1))
    store.close()
    assert there(open_store(tmp_path), clips) == [True, True, True, False, True]


def test_by_content_files_may_move(tmp_path: Path, clips: list[Clip]) -> None:
    fill(tmp_path, clips, by_content=True).close()
    (tmp_path / "elsewhere").mkdir()
    moved = [Clip(shutil.copy(clip.path, tmp_path / "elsewhere" / f"x{clip.path.name}"), 0) for clip in clips]
    moved = [Clip(Path(clip.path), 0) for clip in moved]
    assert all(there(open_store(tmp_path, by_content=True), moved))
    assert not any(there(open_store(tmp_path), moved))
    moved[2].path.write_bytes(b"other")
    assert there(open_store(tmp_path, by_content=True), moved) == [True, True, False, True, True]


def test_parts_of_a_video_are_clips_of_their_own(tmp_path: Path, clips: list[Clip]) -> None:
    store = open_store(tmp_path)
    parts = [Clip(clips[0].path, 0, start, end) for start, end in ((None, 1.5), (1.5, 3.0), (1.5, None))]
    for number, part in enumerate(parts):
        store.append(part, 0, vectors(number))
    assert there(open_store(tmp_path), parts) == [True] * 3
    assert there(open_store(tmp_path), [clips[0]]) == [False]


def flip_a_byte(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[features.HEADER_BYTES + 2 * vectors(0).nbytes + 5] ^= 1
    shard.write_bytes(content)


def edit_a_line(shard: Path) -> None:
    journal = shard.with_suffix(".jsonl")
    journal.write_text(journal.read_text().replace('"row": 2', '"row": 1'))


def cut_the_journal(shard: Path) -> None:
    lines = shard.with_suffix(".jsonl").read_text().splitlines(keepends=True)
    shard.with_suffix(".jsonl").write_text("".join([*lines[:3], lines[3][:-20]]))


def cut_the_shard(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size - 1)


def lose_the_shard(shard: Path) -> None:
    shard.unlink()


def spoil_the_header(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[8:20] = b"x" * 12
    shard.write_bytes(content)


ALL, NONE = [True] * COUNT, [False] * COUNT
ONE_LESS = [True, True, False, True, True]


@pytest.mark.parametrize(
    ("damage", "left", "said"),
    [
        (flip_a_byte, ONE_LESS, "row 2 of {shard} is torn: its CRC-32 differs"),
        (edit_a_line, ONE_LESS, "row 1 of {shard} is torn: its CRC-32 differs"),
        (cut_the_journal, [True, True, False, False, False], ""),  # as a killed process leaves it
        (cut_the_shard, NONE, "{journal} is not used, its vectors are computed again: it is torn"),
        (lose_the_shard, NONE, "{journal} is not used, its vectors are computed again: it is torn"),
        (spoil_the_header, NONE, "{journal} is not used, its vectors are computed again: it is torn"),
    ],
)
def test_torn_rows_and_shards_are_refused_by_name_and_filled_again(
    damage: Callable[[Path], None],
    left: list[bool],
    said: str,
    tmp_path: Path,
    clips: list[Clip],
    caplog: pytest.LogCaptureFixture,
) -> None:
    fill(tmp_path, clips).close()
    (shard,) = (tmp_path / "cache").glob("*.safetensors")
    damage(shard)
    with caplog.at_level(logging.WARNING):
        store = open_store(tmp_path)
        assert there(store, clips) == left
    assert said.format(shard=shard, journal=shard.with_suffix(".jsonl")) in caplog.text
    assert bool(caplog.text) is bool(said)
    for number, clip in enumerate(clips):
        if not left[number]:
            store.append(clip, 0, vectors(number))
    store.close()
    assert there(open_store(tmp_path), clips) == ALL


def test_foreign_shards_are_refused_by_name(
    tmp_path: Path, clips: list[Clip], caplog: pytest.LogCaptureFixture
) -> None:
    """Copied from the folder of another key, or of another shape or type."""
    fill(tmp_path, clips).close()
    for key, dtype in (("other", torch.bfloat16), ("key", torch.float16)):
        caplog.clear()
        assert there(open_store(tmp_path, key, dtype), clips) == NONE
        (journal,) = (tmp_path / "cache").glob("*.jsonl")
        assert f"shard {journal} is not used, its vectors are computed again: it is foreign" in caplog.text
    other = FeatureStore(tmp_path / "cache", "key", (1, 3, 4), torch.bfloat16)
    assert there(other, clips) == NONE


@pytest.mark.parametrize("room", [0, 10, vectors(0).nbytes, vectors(0).nbytes + 30])
def test_a_full_disk_is_one_message_and_costs_nothing_that_was_kept(
    room: int, tmp_path: Path, clips: list[Clip], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system writes what there is room for, in the row or in its line, then says ENOSPC."""
    store = fill(tmp_path, clips[:3])
    left, pwrite = room, os.pwrite

    def write_until_full(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal left
        if left == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = pwrite(descriptor, data[:left], offset)
        left -= count
        return count

    monkeypatch.setattr(os, "pwrite", write_until_full)
    with pytest.raises(ConfigError, match=r"frame vectors could not be written into .*cache.*No space left.*make room"):
        store.append(clips[3], 0, vectors(3))
    monkeypatch.undo()
    store.close()
    again = open_store(tmp_path)
    assert there(again, clips) == [True, True, True, False, False]
    again.append(clips[3], 0, vectors(3))
    assert there(open_store(tmp_path), clips) == [True, True, True, True, False]


def test_a_disk_that_is_full_from_the_beginning(
    tmp_path: Path, clips: list[Clip], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leaves no shard: neither one that is torn, nor one without rows."""
    store = open_store(tmp_path)

    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(features.Writer, "append", refuse)
    with pytest.raises(ConfigError, match="could not be written"):
        store.append(clips[0], 0, vectors(0))
    store.close()
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_line_says_what_its_row_is(tmp_path: Path, clips: list[Clip]) -> None:
    fill(tmp_path, clips[:1]).close()
    (journal,) = (tmp_path / "cache").glob("*.jsonl")
    header, row = map(json.loads, journal.read_text().splitlines())
    assert header == {"format": 1, "key": "key", "shape": [2, 3, 4], "dtype": "BF16"}
    assert (row["row"], row["file"], row["view"]) == (0, str(clips[0].path), 0)
