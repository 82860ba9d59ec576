"""Which frames: bounds, order and spread."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from bigvivit.data.sampling import random_clip, uniform_clips

SIZES = {
    "num_frames": st.integers(1, 300),
    "frames": st.integers(1, 64),
    "stride": st.integers(1, 8),
}


@given(**SIZES, seed=st.integers(0, 1000))
def test_a_random_clip_lies_in_the_video(num_frames: int, frames: int, stride: int, seed: int) -> None:
    clip = random_clip(num_frames, frames, stride, torch.Generator().manual_seed(seed))
    assert_in_order(clip, num_frames, frames, stride)


@given(**SIZES, views=st.integers(1, 10))
def test_uniform_clips_lie_in_the_video(num_frames: int, frames: int, stride: int, views: int) -> None:
    clips = uniform_clips(num_frames, frames, stride, views)
    assert len(clips) == views
    for clip in clips:
        assert_in_order(clip, num_frames, frames, stride)
    if views > 1:  # from the first frame to the last, whole steps apart by one at most
        assert (clips[0][0], clips[-1][-1]) == (0, num_frames - 1)
        gaps = [after[0] - before[0] for before, after in itertools.pairwise(clips)]
        assert min(gaps) >= 0
        assert max(gaps) - min(gaps) <= 1


def assert_in_order(clip: list[int], num_frames: int, frames: int, stride: int) -> None:
    assert len(clip) == frames
    assert clip[0] >= 0
    assert clip[-1] < num_frames
    steps = [after - before for before, after in itertools.pairwise(clip)]
    if (frames - 1) * stride < num_frames:
        assert set(steps) <= {stride}
    else:  # spread over the whole video, in order and even
        assert min(steps) >= 0
        assert max(steps) <= stride
        assert max(steps) - min(steps) <= 1
        assert (clip[0], clip[-1]) == (0, num_frames - 1)


def test_views_reach_from_end_to_end() -> None:
    assert uniform_clips(20, 4, 2, 1) == [[6, 8, 10, 12]]
    assert uniform_clips(20, 4, 2, 3) == [[0, 2, 4, 6], [6, 8, 10, 12], [13, 15, 17, 19]]


def test_random_starts_are_uniform() -> None:
    generator = torch.Generator().manual_seed(0)
    starts = [random_clip(13, 4, 2, generator)[0] for _ in range(7000)]
    counts = torch.bincount(torch.tensor(starts), minlength=7)
    assert len(counts) == 7
    assert ((counts - 1000).abs() < 150).all()


def test_a_short_video_is_spread() -> None:
    assert uniform_clips(5, 4, 2, 2) == [[0, 1, 3, 4]] * 2
    assert random_clip(3, 6, 1, torch.Generator()) == [0, 0, 1, 1, 2, 2]
