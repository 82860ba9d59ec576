"""How many seconds of a video a clip spans, and whether two stages look at spans that go together."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from bigvivit.config import ClipConfig
from bigvivit.data.decode import scan_frames
from bigvivit.data.errors import DecodeError
from bigvivit.data.loader import window
from bigvivit.data.manifest import Clip
from bigvivit.data.sampling import clip_seconds

SAMPLE = 9
"""Videos that are looked at, evenly chosen from the manifest: reading packets takes milliseconds for each."""
FACTOR = 2.0
"""Most that spans of two stages may differ by without a warning. What stage 1 learnt, stage 2 sees that many times
faster or slower, as its positions are stretched to the clip; actors themselves differ by about a factor of 2."""


@dataclass(frozen=True)
class Span:
    """Of a clip: medians over some videos."""

    seconds: float
    fps: float
    """Frames per second of the videos."""


def measure_span(clip: ClipConfig, clips: Sequence[Clip]) -> Span | None:
    """What a clip of this manifest spans; None where none of the videos can be read."""
    spans = []
    for number in range(min(SAMPLE, len(clips))):
        source = clips[number * len(clips) // min(SAMPLE, len(clips))]
        try:
            index = scan_frames(source.path)
        except DecodeError:
            continue  # what cannot be read is told, and counted, by who trains on it
        frames = window(index.count, index.fps, source)
        spans.append((clip_seconds(len(frames), index.fps, clip), index.fps))
    if not spans:
        return None
    seconds, fps = (statistics.median(values) for values in zip(*spans, strict=True))
    return Span(seconds, fps)


def describe_span(span: Span, clip: ClipConfig, before: float | None) -> str:
    """A line for the log. `before` is what the clips of the stage before span, in seconds."""
    how = "one frame of each equal part of a video"
    if clip.stride is not None:
        how = f"one in {clip.stride} frames" if clip.stride > 1 else "every frame"
    if clip.fps is not None:
        how = f"{clip.fps:g} a second"
    line = (
        f"a clip spans {span.seconds:.2f} s (median): {clip.frames} frames, {how} of {span.fps:.3g} frames per second"
    )
    if before is None or max(span.seconds, before) <= FACTOR * min(span.seconds, before):
        return line
    stride = max(1, round(before * span.fps / clip.frames))
    faster = span.seconds > before
    factor = span.seconds / before if faster else before / span.seconds
    return (
        f"warning: {line}, but {before:.2f} s in stage 1, whose positions are stretched to it: motion now looks "
        f"{factor:.1f} times as {'fast' if faster else 'slow'}. --clip.stride {stride} would match"
    )
