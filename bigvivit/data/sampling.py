"""Which frames of a video make a clip: one of each equal part of it, every n-th, or so many a second."""

from __future__ import annotations

import numpy as np
import torch

from bigvivit.config import ClipConfig


def random_frames(num_frames: int, fps: float, clip: ClipConfig, generator: torch.Generator) -> list[int]:
    """The numbers below `num_frames` of a training clip's frames, in order; `fps` is the video's rate.

    With neither `clip.stride` nor `clip.fps` the video is cut into `clip.frames` equal parts and one frame drawn from
    each (temporal segment networks, arXiv:1608.00859). With one of them the frames lie so far apart, from a start drawn
    uniformly (the original's way; reference/vivit.md §1).
    """
    step = frame_step(clip, fps)
    if step is None:
        within = torch.rand(clip.frames, generator=generator).numpy()
        return parts_of(num_frames, clip.frames, within)
    latest = num_frames - clip_span(clip.frames, step)
    if latest < 0:
        return short_clip(num_frames, clip, step)
    start = int(torch.randint(latest + 1, (), generator=generator))
    return every(start, clip.frames, step)


def view_frames(num_frames: int, fps: float, clip: ClipConfig, views: int) -> list[list[int]]:
    """The frame numbers of `views` clips for evaluation, spread evenly; one view is the middle one.

    Of equal parts, view v of n takes the frame at (v + 1/2) / n of each part; else starts go from the first possible to
    the last (the original takes 4 views, reference/vivit.md §1).
    """
    step = frame_step(clip, fps)
    if step is None:
        return [parts_of(num_frames, clip.frames, np.full(clip.frames, (v + 0.5) / views)) for v in range(views)]
    latest = num_frames - clip_span(clip.frames, step)
    if latest < 0:
        return [short_clip(num_frames, clip, step)] * views
    starts = np.linspace(0, latest, views).round().astype(int) if views > 1 else [latest // 2]
    return [every(start, clip.frames, step) for start in map(int, starts)]


def clip_seconds(num_frames: int, fps: float, clip: ClipConfig) -> float:
    """Seconds of the video from a clip's first frame to the end of its last."""
    step = frame_step(clip, fps)
    if step is None or (clip.short == "spread" and clip_span(clip.frames, step) > num_frames):
        return num_frames / fps
    return min(clip_span(clip.frames, step), num_frames) / fps


def frame_step(clip: ClipConfig, fps: float) -> float | None:
    """Distance between two frames of a clip, in frames of a video of this rate; None for equal parts of the video."""
    return fps / clip.fps if clip.fps is not None else clip.stride


def clip_span(frames: int, step: float) -> int:
    """Number of the video's frames from a clip's first to its last, both counted."""
    return int((frames - 1) * step) + 1


def every(start: int, frames: int, step: float) -> list[int]:
    """`frames` numbers from `start` on, `step` apart, rounded down."""
    return [start + int(number * step) for number in range(frames)]


def parts_of(num_frames: int, frames: int, within: np.ndarray) -> list[int]:
    """The frame at `within` (from 0 to below 1) of each of `frames` equal parts; of a short video some come twice."""
    places = (np.arange(frames) + within) * num_frames / frames
    return [int(place) for place in np.minimum(places.astype(int), num_frames - 1)]


def short_clip(num_frames: int, clip: ClipConfig, step: float) -> list[int]:
    """A clip of a video that is shorter: spread over all of it, in order, or from the beginning again as the original
    does."""
    if clip.short == "loop":
        return [number % num_frames for number in every(0, clip.frames, step)]
    return [int(number) for number in np.linspace(0, num_frames - 1, clip.frames).round()]
