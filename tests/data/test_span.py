"""What a clip spans, and when two stages do not go together."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigvivit.config import ClipConfig
from bigvivit.data.manifest import Clip
from bigvivit.data.span import FACTOR, Span, describe_span, measure_span
from tests.data.videos import write_video


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of 40 frames at 10, 20 and 20 frames per second."""
    folder = tmp_path_factory.mktemp("videos")
    paths = []
    for number, rate in enumerate((10, 20, 20)):
        paths.append(folder / f"{number}.mp4")
        write_video(paths[-1], 40, rate=rate)
    return paths


@pytest.mark.parametrize(
    ("clip", "seconds"),
    [(ClipConfig(frames=8), 2.0), (ClipConfig(frames=8, stride=2), 0.75), (ClipConfig(frames=8, fps=5.0), 1.45)],
)
def test_medians_of_the_videos_that_can_be_read(clip: ClipConfig, seconds: float, videos: list[Path]) -> None:
    broken = videos[0].with_name("broken.mp4")
    broken.write_bytes(b"no video")
    span = measure_span(clip, [Clip(path, 0) for path in (*videos, broken)])
    assert span is not None
    assert (span.seconds, span.fps) == (pytest.approx(seconds), pytest.approx(20.0))
    assert measure_span(clip, [Clip(broken, 0)]) is None


def test_parts_of_videos_count_for_themselves(videos: list[Path]) -> None:
    span = measure_span(ClipConfig(frames=8), [Clip(videos[1], 0, start=0.5, end=1.0)])
    assert span is not None
    assert span.seconds == pytest.approx(0.5)


def test_stages_of_other_spans_are_told_with_the_stride_that_matches() -> None:
    clip = ClipConfig(frames=32, stride=1)
    assert "warning" not in describe_span(Span(1.0, 30.0), clip, before=None)
    assert "warning" not in describe_span(Span(1.0, 30.0), clip, before=FACTOR)
    slower = describe_span(Span(1.0, 30.0), clip, before=4.0)
    assert slower.startswith("warning: a clip spans 1.00 s (median): 32 frames, every frame of 30 frames per second")
    assert "4.0 times as slow" in slower
    assert "--clip.stride 4 would match" in slower
    assert "8.0 times as fast" in describe_span(Span(8.0, 30.0), clip, before=1.0)
