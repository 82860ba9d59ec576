"""Small videos whose every frame says its number, by PyAV's encoder, and ways to damage them."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from torch import Tensor

QUALITY = {"qp": "1", "g": "12"}


def write_video(
    path: Path,
    count: int,
    *,
    height: int = 48,
    width: int = 64,
    rate: int = 10,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    options: dict[str, str] | None = None,
    milliseconds: Sequence[int] | None = None,
) -> Path:
    """Frame k is grey of brightness 4 * k, brighter by 40 in its left half; coded without visible loss.

    `milliseconds` are the times of the frames, where they are not evenly spaced.
    """
    with kept_priority(), av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=rate, options=QUALITY | (options or {}))
        stream.height, stream.width, stream.pix_fmt = height, width, pixels
        if milliseconds is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(count):
            image = np.full((height, width, 3), 4 * number, np.uint8)
            image[:, : width // 2] += 40
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if milliseconds is not None:
                frame.pts, frame.time_base = milliseconds[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@contextmanager
def kept_priority() -> Iterator[None]:
    """SVT-AV1 gives the thread that calls it real-time priority where it may, and every process that is started from
    there later would inherit it and hold back all others."""
    if not hasattr(os, "sched_getscheduler"):  # of Linux alone
        yield
        return
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def rotate_video(path: Path) -> Path:
    """Say in an MP4 file's track header that it was filmed with the camera turned by a quarter."""
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 4 + 20 + 16  # ISO/IEC 14496-12, 8.3.2, version 0
    numbers = (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    content[matrix : matrix + 36] = b"".join(number.to_bytes(4, "big", signed=True) for number in numbers)
    path.write_bytes(content)
    return path


def frame_numbers(frames: Tensor) -> list[int]:
    """Which frames of `write_video` these are, [..., 3, h, w], from their right edge or, mirrored, their darker one."""
    left, right = frames[..., 2].float().mean((-1, -2)), frames[..., -3].float().mean((-1, -2))
    return [round(value / 4) for value in left.minimum(right).tolist()]


def flip_bits(content: bytearray, draw: random.Random) -> None:
    """A few bits anywhere: headers, index, pictures."""
    for _ in range(draw.choice((1, 4, 30))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)


def clear_bytes(content: bytearray, draw: random.Random) -> None:
    """A stretch of zeros, as a disk leaves it."""
    start, length = draw.randrange(len(content)), draw.choice((1, 50, 5000))
    content[start : start + length] = bytes(len(content[start : start + length]))


def cut_out(content: bytearray, draw: random.Random) -> None:
    """A stretch missing: all that follows has moved."""
    start = draw.randrange(len(content))
    del content[start : start + draw.choice((1, 100, 10000))]


def truncate(content: bytearray, draw: random.Random) -> None:
    """An end missing, as of a download."""
    del content[draw.randrange(len(content)) :]


def keep_header(content: bytearray, draw: random.Random) -> None:
    """Nothing but the beginning."""
    del content[draw.choice((0, 1, 8, 40, 200)) :]


def scramble(content: bytearray, draw: random.Random) -> None:
    """Noise after the first bytes, so that it is still taken for a video."""
    keep = draw.choice((0, 12, 48))
    content[keep:] = draw.randbytes(max(0, len(content) - keep))


def repeat_twice(content: bytearray, draw: random.Random) -> None:
    """Two files in one."""
    content += content[draw.randrange(len(content)) :]


MUTATIONS: tuple[Callable[[bytearray, random.Random], None], ...] = (
    flip_bits,
    clear_bytes,
    cut_out,
    truncate,
    keep_header,
    scramble,
    repeat_twice,
)


def write_mutant(source: Path, folder: Path, number: int) -> Path:
    """The `number`-th damaged copy of a video; now and then also under the extension of another container."""
    draw = random.Random(number)
    content = bytearray(source.read_bytes())
    MUTATIONS[number % len(MUTATIONS)](content, draw)
    path = folder / f"{number}{draw.choice((source.suffix, source.suffix, '.avi', '.webm', '.mpg', ''))}"
    path.write_bytes(content)
    return path
