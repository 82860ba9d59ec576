"""decord against PyAV."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from bigvivit.data.decode import open_video
from bigvivit.data.errors import DecodeError
from tests.data.videos import frame_numbers, write_video


def test_any_frames_in_any_order(tmp_path: Path) -> None:
    video = open_video(write_video(tmp_path / "v.mp4", 30))
    assert (len(video), video.fps) == (30, 10.0)
    frames = video.read([0, 29, 13, 13, 12, 1])
    assert tuple(frames.shape) == (6, 3, 48, 64)
    assert frame_numbers(frames) == [0, 29, 13, 13, 12, 1]


def test_a_real_recording(shared: Callable[[str], Path]) -> None:
    path = shared("data/egogestar/clips/carret_01.mp4")
    with av.open(path) as container:
        expected = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    video = open_video(path)
    assert len(video) == len(expected)
    frames = video.read(range(len(video))).permute(0, 2, 3, 1).numpy()
    # The same decoder inside, another conversion of colours outside.
    assert np.abs(frames.astype(int) - expected).mean() < 1.5
    nearest = [np.abs(expected.astype(int) - frame).mean((1, 2, 3)).argmin() for frame in frames[::10]]
    assert nearest == list(range(0, len(frames), 10))


@pytest.mark.parametrize("content", [b"", b"not a video" * 100])
def test_what_is_no_video_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.mp4"
    path.write_bytes(content)
    with pytest.raises(DecodeError, match=r"broken\.mp4 cannot be opened as a video"):
        open_video(path)


def test_a_torn_video_is_named(tmp_path: Path) -> None:
    path = write_video(tmp_path / "torn.mp4", 30)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DecodeError, match=r"torn\.mp4 cannot be opened as a video"):
        open_video(path)


def test_a_damaged_video_is_named_in_words(tmp_path: Path) -> None:
    path = write_video(tmp_path / "damaged.mp4", 30)
    content = bytearray(path.read_bytes())
    frames, index = content.index(b"mdat"), content.index(b"moov")
    middle = (frames + index) // 2
    content[middle : middle + 300] = bytes(300)
    path.write_bytes(content)
    with pytest.raises(DecodeError, match=r"damaged\.mp4 cannot be decoded") as caught:
        open_video(path).read(range(30))
    assert "\n" not in str(caught.value)
    assert ".cc:" not in str(caught.value)


def test_a_frame_past_the_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DecodeError, match=r"v\.mp4 cannot be decoded: .*\[30\]"):
        open_video(write_video(tmp_path / "v.mp4", 30)).read([29, 30])
