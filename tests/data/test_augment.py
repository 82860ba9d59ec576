"""Views of clips against NumPy and PyTorch's own interpolation."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from bigvivit.config import ClipConfig
from bigvivit.data.augment import augment, crop_views

CLIP = ClipConfig(frames=4, size=24, resize=32, min_scale=0.9, max_scale=1.33)


def gradient(height: int, width: int, count: int = 4) -> Tensor:
    """Brightness grows to the right in red and downwards in green."""
    frame = torch.zeros(3, height, width)
    frame[0] = torch.linspace(0, 200, width)
    frame[1] = torch.linspace(0, 200, height)[:, None]
    return frame.round().byte().expand(count, 3, height, width)


@pytest.mark.parametrize(("height", "width"), [(48, 64), (64, 48), (20, 90), (32, 32)])
def test_the_centre_of_a_resized_clip(height: int, width: int) -> None:
    frames = torch.randint(256, (2, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scale = 32 / min(height, width)
    resized = F.interpolate(
        frames.float(), (round(height * scale), round(width * scale)), mode="bilinear", antialias=True
    )
    top, left = ((side - 24) // 2 for side in resized.shape[-2:])
    expected = resized[..., top : top + 24, left : left + 24]
    (view,) = crop_views(frames, CLIP, 1)
    assert view.dtype == torch.uint8
    assert (view.float() - expected).abs().max() <= 1  # rounding


@pytest.mark.parametrize("turned", [False, True])
def test_three_crops_lie_along_the_longer_side(turned: bool) -> None:
    height, width = (96, 32) if turned else (32, 96)
    views = crop_views(gradient(height, width), CLIP, 3)
    assert tuple(views.shape) == (3, 4, 3, 24, 24)
    along = views[:, 0, 1 if turned else 0].float().mean((-1, -2))
    across = views[:, 0, 0 if turned else 1].float().mean((-1, -2))
    torch.testing.assert_close(along, torch.tensor([24.2, 100.0, 175.8]), rtol=0, atol=2.5)
    torch.testing.assert_close(across, torch.full((3,), 100.0), rtol=0, atol=2.0)


def test_one_draw_for_all_frames_of_a_clip() -> None:
    for seed in range(20):
        view = augment(gradient(40, 60), CLIP, torch.Generator().manual_seed(seed))
        assert tuple(view.shape) == (4, 3, 24, 24)
        assert torch.equal(view, view[:1].expand_as(view))


def test_draws_come_from_the_generator_alone() -> None:
    frames = gradient(40, 60)
    before = torch.get_rng_state()
    first = augment(frames, CLIP, torch.Generator().manual_seed(5))
    assert torch.equal(torch.get_rng_state(), before)  # nothing was drawn from the global generator
    assert torch.equal(augment(frames, CLIP, torch.Generator().manual_seed(5)), first)
    assert not torch.equal(augment(frames, CLIP, torch.Generator().manual_seed(6)), first)


def test_height_and_width_are_scaled_apart_and_places_vary() -> None:
    """From slopes and means of the gradients: 40 x 60 at a short side of 32 is 32 x 48 before its factors."""
    factors_y, factors_x, places = [], [], []
    for seed in range(300):
        view = augment(gradient(40, 60), CLIP, torch.Generator().manual_seed(seed))[0].float()
        slope_x = (view[0, :, -3] - view[0, :, 2]).abs().mean() / 19
        slope_y = (view[1, -3] - view[1, 2]).mean() / 19
        factors_x.append(200 / 48 / slope_x.item())
        factors_y.append(200 / 32 / slope_y.item())
        places.append(view[0].mean().item())
    y, x = torch.tensor(factors_y), torch.tensor(factors_x)
    for factor in (y, x):
        assert 0.87 < factor.min() < 0.95
        assert 1.27 < factor.max() < 1.38
    assert torch.corrcoef(torch.stack([y, x]))[0, 1].abs() < 0.2
    assert max(places) - min(places) > 50


def test_half_the_clips_are_mirrored_only_where_asked() -> None:
    def rises(flip: bool) -> list[bool]:
        clip = dataclasses.replace(CLIP, flip=flip)
        views = [augment(gradient(40, 60), clip, torch.Generator().manual_seed(seed)) for seed in range(200)]
        return [bool(view[0, 0, 0, -1] > view[0, 0, 0, 0]) for view in views]

    assert all(rises(flip=False))
    assert 70 < sum(rises(flip=True)) < 130


def test_a_scale_below_one_never_goes_below_the_crop() -> None:
    clip = dataclasses.replace(CLIP, resize=24, min_scale=0.5, max_scale=0.5)
    assert tuple(augment(gradient(40, 60), clip, torch.Generator().manual_seed(0)).shape[-2:]) == (24, 24)
