"""Frames of video files: three decoders behind one interface, with the same frames.

PyAV reads every file's packets first, without decoding. Their timestamps number the frames, give the frame rate, and
say whether decord may be used: it finds frames by seeking, and where a container or a codec makes that inexact it
returns other frames than were asked for, silently; so does torchcodec. What decord may not or cannot open goes to
PyAV, then to torchcodec. tests/data/test_decoders.py holds all of this to frames decoded one after the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import av
import numpy as np
import torch
from torch import Tensor

from bigvivit.data.errors import DecodeError
from bigvivit.versions import minor

try:
    import decord
except (ImportError, OSError):  # it has no wheel for every machine, and may lack its libraries
    decord = None
else:
    decord.logging.set_level(decord.logging.QUIET)
av.logging.set_level(av.logging.PANIC)
LENIENT: dict[str, Any] = {"metadata_errors": "ignore"} if minor(av.__version__) < (19, 0) else {}
"""Titles and the like in another encoding are no reason not to read a file. PyAV 19 has no such setting any more."""

EXACT_SEEK = ("mov", "matroska", "flv")
"""Containers in which decord and torchcodec find frames by seeking; in AVI, ASF, MPEG-PS and -TS they do not always."""
MAX_BYTES = 8 << 30
"""Most that the frames of one clip may take: what says that it is larger is damaged, or would end the worker."""
MAX_RATIO = 50
"""Of the longer side to the shorter: resized to a height of 256, a line of pixels would fill the memory."""


class VideoReader(Protocol):
    """An open video, upright as players show it."""

    decoder: str
    """Name of the decoder."""
    fps: float
    """Mean frames per second."""

    def __len__(self) -> int:
        """Number of frames."""
        ...

    def read(self, indices: Sequence[int]) -> Tensor:
        """Frames uint8 [n, 3, height, width] in the order of `indices`, which may repeat. Raises DecodeError."""
        ...


@dataclass(frozen=True)
class FrameIndex:
    """What a file's packets say of its frames."""

    container: str
    fps: float
    pts: tuple[int, ...] | None
    """Timestamp of each frame in the order they are shown; None where packets have none, or the same twice."""
    closed: bool
    """No frame is coded after a key frame and shown before it; such frames cannot be had by seeking there."""
    count: int
    """Number of frames; where `pts` is None the number of packets, which may be another."""
    size: tuple[int, int]
    """Height and width as coded, before any rotation."""

    @property
    def exact_seek(self) -> bool:
        """Whether frames of this kind of container can be found by seeking."""
        return any(name in EXACT_SEEK for name in self.container.split(","))


def scan_frames(path: Path) -> FrameIndex:
    """Read a file's packets. Raises DecodeError for what is no video."""
    pts: list[int | None] = []
    closed, key = True, None
    with open_container(path) as container:
        stream = container.streams.video[0]
        for packet in container.demux(stream):
            if packet.size == 0 or packet.is_discard:  # the end, repeated frames of Theora, what edit lists cut away
                continue
            pts.append(packet.pts)
            if packet.pts is None:
                continue
            if packet.is_keyframe:
                key = packet.pts
            closed = closed and (key is None or packet.pts >= key)
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        size = (stream.height, stream.width)
        name = container.format.name
    if not pts:
        raise DecodeError(f"{path} holds no frames")
    known = sorted(number for number in pts if number is not None)
    exact = len(known) == len(pts) and all(first < second for first, second in pairwise(known))
    if fps <= 0:
        raise DecodeError(f"{path} cannot be opened as a video: it has no frame rate")
    if max(size) > MAX_RATIO * min(size):
        raise DecodeError(f"{path} cannot be used: its frames are {size[1]} x {size[0]} pixels")
    return FrameIndex(name, fps, tuple(known) if exact else None, closed, len(pts), size)


class open_container:  # noqa: N801
    """PyAV's container of a file that has a video stream, its errors as DecodeError."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Any:
        if not self.path.is_file():  # of a pipe, opening would wait for a writer
            raise DecodeError(f"{self.path} cannot be opened as a video: not a file")
        try:
            self.container = av.open(str(self.path), **LENIENT)
        except (av.FFmpegError, OSError, ValueError) as error:
            raise DecodeError(f"{self.path} cannot be opened as a video: {first_line(error)}") from None
        streams = self.container.streams.video
        lacks = "video stream" if not streams else "known codec" if streams[0].codec_context is None else None
        if lacks is not None:
            self.container.close()
            raise DecodeError(f"{self.path} cannot be opened as a video: it has no {lacks}")
        return self.container

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.container.close()
        # On damaged files PyAV also fails in ways of its own, with IndexError for one.
        if isinstance(error, Exception) and not isinstance(error, DecodeError):
            raise DecodeError(f"{self.path} cannot be decoded: {first_line(error)}") from None


class DecordReader:
    """decord with one thread, so that workers do not fight over cores."""

    decoder = "decord"

    def __init__(self, path: Path, index: FrameIndex) -> None:
        self.path, self.fps = path, index.fps
        check_seekable(path, index)
        try:
            self.reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
            height, width, channels = self.reader[0].shape  # it fails on some widths, and adds a channel on others
        except (decord.DECORDError, RuntimeError, OSError, IndexError) as error:
            raise DecodeError(f"{path} cannot be opened as a video: {first_line(error)}") from None
        if channels != 3:
            raise DecodeError(f"{path}: decord gives {channels} channels")
        if len(self.reader) != index.count:
            raise DecodeError(f"{path}: decord counts {len(self.reader)} frames of {index.count}")
        self.shape = (height, width)

    def __len__(self) -> int:
        return len(self.reader)

    def read(self, indices: Sequence[int]) -> Tensor:
        """See VideoReader."""
        check_read(self.path, indices, len(self), self.shape)
        try:
            frames = self.reader.get_batch(list(indices)).asnumpy()  # [n, h, w, 3]
        except (decord.DECORDError, RuntimeError, IndexError) as error:
            raise DecodeError(f"{self.path} cannot be decoded: {first_line(error)}") from None
        return torch.from_numpy(frames).permute(0, 3, 1, 2)


class PyAVReader:
    """PyAV: seeks by timestamp and knows each frame by its own; in other containers it decodes from the beginning."""

    decoder = "pyav"

    def __init__(self, path: Path, index: FrameIndex) -> None:
        self.path, self.fps, self.index = path, index.fps, index
        # Where timestamps cannot be relied on, only decoding tells how many frames there are: not every packet is one.
        self.pts = index.pts if index.exact_seek else None
        self.count = index.count if self.pts else sum(1 for _ in self.decode(None))
        if self.count == 0:
            raise DecodeError(f"{path} holds no frames")

    def __len__(self) -> int:
        return self.count

    def read(self, indices: Sequence[int]) -> Tensor:
        """See VideoReader."""
        check_read(self.path, indices, len(self), self.index.size)
        wanted = sorted(set(indices))
        found = self.collect(wanted)
        if found is None or len({frame.shape for frame in found.values()}) > 1:
            raise DecodeError(f"{self.path} cannot be decoded: frames are missing, or change their size")
        return torch.from_numpy(np.stack([found[number] for number in indices])).permute(0, 3, 1, 2)

    def collect(self, wanted: Sequence[int]) -> dict[int, np.ndarray] | None:
        """The wanted frames by number, found by timestamp or, without, by counting; None where one did not come."""
        found: dict[int, np.ndarray] = {}
        numbered: Iterable[tuple[int, Any]] = enumerate(self.decode(None))
        if self.pts is not None:
            order = {stamp: number for number, stamp in enumerate(self.pts)}
            numbered = ((order.get(frame.pts, -1), frame) for frame in self.decode(self.pts[wanted[0]]))
        for number, frame in numbered:
            if number == wanted[len(found)]:
                if frame.is_corrupt:
                    raise DecodeError(f"{self.path} cannot be decoded: frame {number} is damaged")
                image = frame.to_ndarray(format="rgb24")
                found[number] = np.rot90(image, round(frame.rotation / 90)) if frame.rotation else image
                if len(found) == len(wanted):
                    return found
            elif number > wanted[len(found)]:
                return None
        return None

    def decode(self, start: int | None) -> Iterator[Any]:
        """Frames from the key frame before this timestamp, or from the beginning."""
        with open_container(self.path) as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            if start is not None:
                container.seek(start, stream=stream, backward=True)
            for packet in container.demux(stream):
                if packet.size or packet.dts is None:  # the last one, empty, flushes the decoder
                    yield from packet.decode()


class TorchcodecReader:
    """torchcodec, where FFmpeg's shared libraries are installed."""

    decoder = "torchcodec"

    def __init__(self, path: Path, index: FrameIndex) -> None:
        self.path, self.fps, self.index = path, index.fps, index
        check_seekable(path, index)
        try:
            from torchcodec.decoders import VideoDecoder

            self.reader = VideoDecoder(str(path), num_ffmpeg_threads=1)
            self.count = len(self.reader)
        except (ImportError, RuntimeError, ValueError, OSError, TypeError) as error:
            raise DecodeError(f"{path} cannot be opened as a video: {first_line(error)}") from None
        if self.count != index.count:
            raise DecodeError(f"{path}: torchcodec counts {self.count} frames of {index.count}")

    def __len__(self) -> int:
        return self.count

    def read(self, indices: Sequence[int]) -> Tensor:
        """See VideoReader."""
        check_read(self.path, indices, len(self), self.index.size)
        try:
            return self.reader.get_frames_at(list(indices)).data
        except (RuntimeError, ValueError, IndexError) as error:
            raise DecodeError(f"{self.path} cannot be decoded: {first_line(error)}") from None


DECODERS: tuple[Callable[[Path, FrameIndex], VideoReader], ...] = (
    *((DecordReader,) if decord is not None else ()), PyAVReader, TorchcodecReader
)  # fmt: skip
"""In the order they are tried. PyAV comes before torchcodec, as it is always there. Frames are the same by all."""


def open_video(path: Path) -> VideoReader:
    """Open a video file with the first decoder that can. Raises DecodeError with what the last but torchcodec said."""
    index = scan_frames(path)
    reason: DecodeError | None = None
    for decoder in DECODERS:
        try:
            return decoder(path, index)
        except DecodeError as error:
            if decoder is not TorchcodecReader:  # which may only lack its libraries
                reason = error
    assert reason is not None
    raise reason


def check_seekable(path: Path, index: FrameIndex) -> None:
    """Raise DecodeError where a decoder that seeks would return other frames than asked for."""
    if not index.exact_seek or index.pts is None or not index.closed:
        raise DecodeError(f"{path} cannot be read by seeking: {index.container} with these timestamps is inexact")


def check_read(path: Path, indices: Sequence[int], count: int, size: tuple[int, int]) -> None:
    """Raise DecodeError for frames that are not there, or more than memory should hold."""
    outside = [number for number in indices if not 0 <= number < count]
    if outside:
        raise DecodeError(f"{path} cannot be decoded: it has {count} frames, not {outside}")
    nbytes = len(indices) * size[0] * size[1] * 3
    if nbytes > MAX_BYTES:
        what = f"{len(indices)} frames of {size[1]} x {size[0]} take {nbytes} bytes"
        raise DecodeError(f"{path} cannot be decoded: {what}")


def first_line(error: BaseException) -> str:
    """What a decoder's error says, without the time and source line before it and the stack of C++ frames after it."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ", "", line)
