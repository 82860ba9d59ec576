"""Tubelets: how frames reach an image tower a few at a time (ViViT, arXiv:2103.15691, "Tubelet embedding")."""

from __future__ import annotations

import torch
from torch import Tensor


def to_tubelets(clips: Tensor, tubelet: int) -> Tensor:
    """Clips [b, T, c, h, w] as images of t * c channels, [b * T / t, t * c, h, w]; a view where they are contiguous.

    A convolution over (t, patch, patch) with a stride of the same size sees each tubelet once: it is a 2-D
    convolution over channels in (time, colour) order.
    """
    batch, frames, channels, height, width = clips.shape
    if frames % tubelet:
        raise ValueError(f"clips of {frames} frames do not divide into tubelets of {tubelet}")
    return clips.reshape(batch * (frames // tubelet), tubelet * channels, height, width)


def inflate_kernel(kernel: Tensor, tubelet: int) -> Tensor:
    """An image's patch kernel [d, c, p, p] as one over tubelets [d, t * c, p, p], by central-frame initialisation.

    Zero everywhere but at time t // 2, for t = 2 the second frame: before any training a tubelet is that frame
    (`central_frame_initializer` of the original implementation; reference/vivit.md §1).
    """
    width, channels, height, breadth = kernel.shape
    inflated = torch.zeros(width, tubelet, channels, height, breadth, dtype=kernel.dtype)
    inflated[:, tubelet // 2] = kernel
    return inflated.flatten(1, 2)
