"""Resizing, cropping and mirroring with torchvision: one draw for all frames of a clip, uint8 in and out."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F  # noqa: N812

from bigvivit.config import ClipConfig


def augment(frames: Tensor, clip: ClipConfig, generator: torch.Generator) -> Tensor:
    """A training view: uint8 [n, 3, h, w] → [n, 3, size, size].

    Short side to `resize`, then height and width each by a factor of its own, a crop anywhere, and a mirror
    (Scenic's pipeline, reference/vivit.md §1). torchvision's functions under our own draws: its random classes draw
    from the global generator, and a worker's draws must depend on the sample alone.
    """
    height, width = short_side(frames, clip.resize)
    factors = torch.empty(2).uniform_(clip.min_scale, clip.max_scale, generator=generator).tolist()
    height, width = (
        max(clip.size, round(side * factor)) for side, factor in zip((height, width), factors, strict=True)
    )
    frames = F.resize(frames, [height, width], antialias=True)
    top, left = (int(torch.randint(side - clip.size + 1, (), generator=generator)) for side in (height, width))
    frames = F.crop(frames, top, left, clip.size, clip.size)
    if clip.flip and torch.rand((), generator=generator) < 0.5:
        frames = F.horizontal_flip(frames)
    return frames


def crop_views(frames: Tensor, clip: ClipConfig, crops: int) -> Tensor:
    """Evaluation views: uint8 [n, 3, h, w] → [crops, n, 3, size, size].

    Short side to `resize`; one crop is the centre, three are start, centre and end of the longer side.
    """
    height, width = short_side(frames, clip.resize)
    frames = F.resize(frames, [height, width], antialias=True)
    room_y, room_x = height - clip.size, width - clip.size
    corners = [(room_y // 2, room_x // 2)]
    if crops == 3:
        along_x = width >= height
        corners = [
            (room_y // 2, part * room_x // 2) if along_x else (part * room_y // 2, room_x // 2) for part in (0, 1, 2)
        ]
    return torch.stack([F.crop(frames, top, left, clip.size, clip.size) for top, left in corners])


def short_side(frames: Tensor, length: int) -> tuple[int, int]:
    """(height, width) of these frames once their shorter side is `length`."""
    height, width = frames.shape[-2:]
    scale = length / min(height, width)
    return max(length, round(height * scale)), max(length, round(width * scale))
