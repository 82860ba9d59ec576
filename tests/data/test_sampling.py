"""Which frames: bounds, order and spread."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bigvivit.config import ClipConfig
from bigvivit.data.sampling import clip_seconds, random_frames, view_frames

COUNTS = {"num_frames": st.integers(1, 300), "frames": st.integers(1, 64)}
DISTANCES = {"stride": st.integers(1, 8), "short": st.sampled_from(["spread", "loop"])}


def draw(num_frames: int, clip: ClipConfig, seed: int = 0, fps: float = 30.0) -> list[int]:
    return random_frames(num_frames, fps, clip, torch.Generator().manual_seed(seed))


@given(**COUNTS, **DISTANCES, seed=st.integers(0, 1000))
def test_a_random_clip_lies_in_the_video(num_frames: int, frames: int, stride: int, short: str, seed: int) -> None:
    clip = ClipConfig(frames=frames, stride=stride, short=short)  # type: ignore[arg-type]
    assert_strided(draw(num_frames, clip, seed), num_frames, clip)


@given(**COUNTS, **DISTANCES, views=st.integers(1, 10))
def test_views_lie_in_the_video(num_frames: int, frames: int, stride: int, short: str, views: int) -> None:
    clip = ClipConfig(frames=frames, stride=stride, short=short)  # type: ignore[arg-type]
    clips = view_frames(num_frames, 30.0, clip, views)
    assert len(clips) == views
    for chosen in clips:
        assert_strided(chosen, num_frames, clip)
    if views > 1 and (frames - 1) * stride < num_frames:  # from the first frame to the last, steps apart by one at most
        assert (clips[0][0], clips[-1][-1]) == (0, num_frames - 1)
        gaps = [after[0] - before[0] for before, after in itertools.pairwise(clips)]
        assert min(gaps) >= 0
        assert max(gaps) - min(gaps) <= 1


def assert_strided(chosen: list[int], num_frames: int, clip: ClipConfig) -> None:
    assert clip.stride is not None
    assert len(chosen) == clip.frames
    assert set(chosen) <= set(range(num_frames))
    steps = [after - before for before, after in itertools.pairwise(chosen)]
    if (clip.frames - 1) * clip.stride < num_frames:
        assert set(steps) <= {clip.stride}
    elif clip.short == "loop":
        assert chosen == [number * clip.stride % num_frames for number in range(clip.frames)]
    else:  # spread over the whole video, in order and even
        assert min(steps) >= 0
        assert max(steps) - min(steps) <= 1
        assert (chosen[0], chosen[-1]) == (0, num_frames - 1)


@given(**COUNTS, views=st.integers(1, 10), seed=st.integers(0, 1000))
def test_equal_parts_give_one_frame_each(num_frames: int, frames: int, views: int, seed: int) -> None:
    clip = ClipConfig(frames=frames)
    for chosen in (draw(num_frames, clip, seed), *view_frames(num_frames, 30.0, clip, views)):
        assert len(chosen) == frames
        for part, number in enumerate(chosen):  # whole frames that begin in the part, or the one that it begins in
            assert part * num_frames // frames <= number <= (part + 1) * num_frames / frames
            assert number < num_frames


def test_views_reach_from_end_to_end() -> None:
    clip = ClipConfig(frames=4, stride=2)
    assert view_frames(20, 30.0, clip, 1) == [[6, 8, 10, 12]]
    assert view_frames(20, 30.0, clip, 3) == [[0, 2, 4, 6], [6, 8, 10, 12], [13, 15, 17, 19]]


def test_views_of_equal_parts_share_each_part_out() -> None:
    clip = ClipConfig(frames=4)
    assert view_frames(40, 30.0, clip, 1) == [[5, 15, 25, 35]]
    assert view_frames(40, 30.0, clip, 2) == [[2, 12, 22, 32], [7, 17, 27, 37]]


def test_random_starts_are_uniform() -> None:
    generator = torch.Generator().manual_seed(0)
    starts = [random_frames(13, 30.0, ClipConfig(frames=4, stride=2), generator)[0] for _ in range(7000)]
    counts = torch.bincount(torch.tensor(starts), minlength=7)
    assert len(counts) == 7
    assert ((counts - 1000).abs() < 150).all()


def test_every_frame_of_a_part_is_drawn_as_often() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [random_frames(20, 30.0, ClipConfig(frames=4), generator)[2] for _ in range(5000)]
    counts = torch.bincount(torch.tensor(drawn), minlength=20)[10:15]
    assert counts.sum() == 5000
    assert ((counts - 1000).abs() < 150).all()


@pytest.mark.parametrize(("fps", "expected"), [(30.0, [0, 7, 15, 22]), (10.0, [0, 2, 5, 7]), (4.0, [0, 1, 2, 3])])
def test_frames_per_second_are_the_same_moments_at_any_rate(fps: float, expected: list[int]) -> None:
    clip = ClipConfig(frames=4, fps=4.0)
    assert view_frames(expected[-1] + 1, fps, clip, 1) == [expected]
    assert clip_seconds(1000, fps, clip) == pytest.approx(0.75 + 1 / fps, abs=1 / fps)  # to the end of the last


@pytest.mark.parametrize(
    ("clip", "seconds"),
    [
        (ClipConfig(frames=4), 3.0),
        (ClipConfig(frames=4, stride=10), 31 / 30),
        (ClipConfig(frames=8, stride=20), 3.0),
        (ClipConfig(frames=8, stride=20, short="loop"), 3.0),
    ],
)
def test_seconds_of_a_clip(clip: ClipConfig, seconds: float) -> None:
    assert clip_seconds(90, 30.0, clip) == pytest.approx(seconds)


def test_a_short_video_is_spread_or_begins_again() -> None:
    assert view_frames(5, 30.0, ClipConfig(frames=4, stride=2), 2) == [[0, 1, 3, 4]] * 2
    assert draw(3, ClipConfig(frames=6, stride=1)) == [0, 0, 1, 1, 2, 2]
    assert draw(3, ClipConfig(frames=6, stride=1, short="loop")) == [0, 1, 2, 0, 1, 2]
