"""Damaged videos through the whole of it: no crash, no hang, each counted in its place."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import iscc_samples
import numpy as np
import pytest

from bigvivit.config import ClipConfig
from bigvivit.data import check, decode, loader
from bigvivit.data.check import CheckConfig, Inspect
from bigvivit.data.errors import DecodeError
from bigvivit.data.manifest import Clip, Manifest
from tests.data.videos import write_mutant, write_video

CLIP = ClipConfig(frames=4, stride=2, size=24, resize=28)


def sources(folder: Path) -> list[Path]:
    """Real clips of several containers, short ones first."""
    samples = Path(iscc_samples.__file__).parent / "files" / "video"
    short = [write_video(folder / f"source.{kind}", 24) for kind in ("mp4", "mkv", "avi")]
    return short + [samples / f"demo.{kind}" for kind in ("mp4", "webm", "mpg", "wmv", "flv", "3gp")]


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_mutants(count: int, tmp_path: Path) -> None:
    """The evaluation loader and `bigvivit check` agree with each other, over mutants that lie between whole videos."""
    whole = sources(tmp_path)
    folder = tmp_path / "mutants"
    folder.mkdir()
    mutants = [write_mutant(whole[number % len(whole)], folder, number) for number in range(count)]
    (folder / "sound.mp4").write_bytes((Path(iscc_samples.__file__).parent / "files/audio/demo.mp3").read_bytes())
    (folder / "text.mp4").write_text("not a video")
    paths = [*mutants, folder / "sound.mp4", folder / "text.mp4", *whole]
    rows = "".join(f"{path},x\n" for path in paths)
    (tmp_path / "all.csv").write_text(f"path,label\n{rows}")
    report = check.check(CheckConfig(manifest=tmp_path / "all.csv", jobs=2, decode="ends", time_limit=60))
    unreadable = {Path(entry["path"]) for entry in report["unreadable"]}
    assert unreadable.isdisjoint(whole)
    assert {folder / "sound.mp4", folder / "text.mp4"} <= unreadable
    assert count / 3 < len(unreadable) < count + 2
    assert report["clips"] == len(paths) == report["kept"] + len(unreadable) + len(report["duplicates"])
    assert not [entry for entry in report["unreadable"] if "the process that" in entry["reason"]], "a crash"

    manifest = Manifest(tmp_path, tuple(Clip(path, 0) for path in paths), ("x",))
    arguments = {"views": 1, "crops": 1, "batch_size": 8, "rank": 0, "world": 1}
    batches = list(loader.build_eval_loader(CLIP, manifest, workers=2, **arguments))
    failed = {paths[index] for batch in batches for index, _ in batch.failed}
    read = {paths[int(index)] for batch in batches for index in batch.indices}
    assert failed | read == set(paths)
    assert not failed & read
    assert not failed & set(whole)
    # The middle of a video may be whole where an end is not, and the other way round; what cannot be opened is neither.
    assert {folder / "sound.mp4", folder / "text.mp4"} <= failed
    assert len(failed ^ unreadable) < count / 5


def test_what_is_read_of_a_mutant_is_a_frame_of_some_size(tmp_path: Path) -> None:
    """Not an empty one, and not one more than asked for."""
    source = write_video(tmp_path / "source.mp4", 24)
    for number in range(40):
        path = write_mutant(source, tmp_path, number)
        with contextlib.suppress(DecodeError):
            video = decode.open_video(path)
            frames = video.read([0, len(video) - 1])
            assert frames.shape[:2] == (2, 3)
            assert frames.shape[2] * frames.shape[3] > 0


class Misbehave(loader.TrainClips):
    """Clips of which some make the decoder hang or crash, by their names."""

    def __getitem__(self, item: Any) -> Any:
        import ctypes

        name = self.clips[item[1]].path.name
        if name.startswith("hang"):
            ctypes.PyDLL(None).sleep(1000)
        if name.startswith("crash"):
            ctypes.string_at(0)
        return super().__getitem__(item)


def test_a_decoder_that_hangs_and_crashes(tmp_path: Path) -> None:
    """Others come in their places, and every other clip is the one that a sound decoder gives."""
    names = ["a", "hang", "b", "crash", "c", "d", "e", "f"]
    clips = [Clip(write_video(tmp_path / f"{name}.mp4", 20), number) for number, name in enumerate(names)]

    def batches(kind: type[loader.TrainClips], workers: int) -> list[loader.Batch]:
        dataset = kind(CLIP, clips, 3)
        sampler = loader.EpochSampler(dataset, 4, num_replicas=1, rank=0, shuffle=True, seed=3, drop_last=True)
        return list(loader.ClipLoader(dataset, sampler, 4, workers, time_limit=3, keep_last=False))

    sound, mistreated = batches(loader.TrainClips, 0), batches(Misbehave, 2)
    failed = {index: reason for batch in mistreated for index, reason in batch.failed}
    assert failed.keys() == {1, 3}
    assert failed[1] == f"{tmp_path}/hang.mp4: not decoded after 3 s: its process was killed"
    assert failed[3] == f"{tmp_path}/crash.mp4: the process that decoded it was ended by SIGSEGV"
    for ours, expected in zip(mistreated, sound, strict=True):
        kept = [row for row, index in enumerate(expected.indices.tolist()) if index not in failed]
        assert (ours.clips[kept] == expected.clips[kept]).all()
        assert not set(ours.indices.tolist()) & failed.keys()


class InspectAndCrash(Inspect):
    """What `bigvivit check` does, with a decoder that crashes on some names."""

    def __call__(self, path: Path, slot: np.ndarray | None) -> dict[str, Any]:
        if "crash" in path.name:
            os.abort()
        return super().__call__(path, slot)


def test_check_survives_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "Inspect", InspectAndCrash)
    good = write_video(tmp_path / "good.mp4", 20)
    for name in ("crash1", "crash2"):
        shutil.copy(good, tmp_path / f"{name}.mp4")
    (tmp_path / "v.csv").write_text("path,label\ncrash1.mp4,x\ngood.mp4,x\ncrash2.mp4,y\n")
    report = check.check(CheckConfig(manifest=tmp_path / "v.csv", jobs=1))
    assert [entry["reason"] for entry in report["unreadable"]] == [
        "the process that decoded it was ended by SIGABRT"
    ] * 2
    assert report["kept"] == 1
    assert report["classes_lost"] == ["y"]
