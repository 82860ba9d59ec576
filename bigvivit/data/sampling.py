"""Which frames of a video make a clip."""

from __future__ import annotations

import numpy as np
import torch


def random_clip(num_frames: int, frames: int, stride: int, generator: torch.Generator) -> list[int]:
    """`frames` frame numbers below `num_frames`, `stride` apart, from a start drawn uniformly; for training.

    Where the video is shorter than a clip, the frames are spread over all of it, as in `uniform_clips`.
    """
    room = num_frames - clip_span(frames, stride)
    if room < 0:
        return spread(num_frames, frames)
    start = int(torch.randint(room + 1, (), generator=generator))
    return list(range(start, start + clip_span(frames, stride), stride))


def uniform_clips(num_frames: int, frames: int, stride: int, views: int) -> list[list[int]]:
    """`views` clips of `frames` frame numbers, their starts evenly spread from first to last; one view is the middle.

    For evaluation (the original takes 4 views, reference/vivit.md §1). Where the video is shorter than a clip, the
    frames are spread evenly over all of it, some twice: the whole motion is kept, in order, at a smaller stride.
    """
    room = num_frames - clip_span(frames, stride)
    if room < 0:
        return [spread(num_frames, frames)] * views
    starts = np.linspace(0, room, views).round().astype(int) if views > 1 else [room // 2]
    return [list(range(start, start + clip_span(frames, stride), stride)) for start in map(int, starts)]


def clip_span(frames: int, stride: int) -> int:
    """Number of the video's frames from a clip's first to its last, both counted."""
    return (frames - 1) * stride + 1


def spread(num_frames: int, frames: int) -> list[int]:
    """`frames` numbers from the first to the last of the video, as even as they can be."""
    return [int(number) for number in np.linspace(0, num_frames - 1, frames).round()]
