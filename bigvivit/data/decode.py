"""Frames of video files, behind an interface small enough for any decoder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import decord
import torch
from torch import Tensor

decord.logging.set_level(decord.logging.QUIET)


class DecodeError(RuntimeError):
    """A video that cannot be opened or read; names the file."""


class VideoReader(Protocol):
    """An open video."""

    fps: float
    """Frames per second."""

    def __len__(self) -> int:
        """Number of frames."""
        ...

    def read(self, indices: Sequence[int]) -> Tensor:
        """Frames uint8 [n, 3, height, width] in the order of `indices`, which may repeat. Raises DecodeError."""
        ...


class DecordReader:
    """A video read by decord with one thread, so that workers do not fight over cores."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
            self.fps = float(self.reader.get_avg_fps())
        except (decord.DECORDError, RuntimeError, OSError) as error:
            raise DecodeError(f"{path} cannot be opened as a video: {first_line(error)}") from None
        if len(self.reader) == 0:
            raise DecodeError(f"{path} holds no frames")

    def __len__(self) -> int:
        return len(self.reader)

    def read(self, indices: Sequence[int]) -> Tensor:
        """See VideoReader."""
        try:
            frames = self.reader.get_batch(list(indices)).asnumpy()  # [n, h, w, 3]
        except (decord.DECORDError, RuntimeError, IndexError) as error:
            raise DecodeError(f"{self.path} cannot be decoded: {first_line(error)}") from None
        return torch.from_numpy(frames).permute(0, 3, 1, 2)


def open_video(path: Path) -> VideoReader:
    """Open a video file. Raises DecodeError."""
    return DecordReader(path)


def first_line(error: Exception) -> str:
    """What decord's error says, without the time and source line before it and the stack of C++ frames after it."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ", "", line)
