"""Tubelets against a 3-D convolution and NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from bigvivit.model.tubelet import inflate_kernel, to_tubelets


@pytest.mark.parametrize("tubelet", [1, 2, 4])
def test_folded_tubelets_are_a_3d_convolution(tubelet: int) -> None:
    clips = torch.randn(2, 8, 3, 16, 16, dtype=torch.float64)
    kernel = torch.randn(5, 3, tubelet, 4, 4, dtype=torch.float64)
    expected = F.conv3d(clips.transpose(1, 2), kernel, stride=(tubelet, 4, 4))  # [b, d, T / t, 4, 4]
    folded = F.conv2d(to_tubelets(clips, tubelet), kernel.transpose(1, 2).flatten(1, 2), stride=4)
    torch.testing.assert_close(folded.view(2, 8 // tubelet, 5, 4, 4).transpose(1, 2), expected)


def test_tubelets_are_a_view() -> None:
    clips = torch.zeros(2, 8, 3, 4, 4, dtype=torch.uint8)
    assert to_tubelets(clips, 2).data_ptr() == clips.data_ptr()


def test_frames_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="7 frames do not divide into tubelets of 2"):
        to_tubelets(torch.zeros(1, 7, 3, 4, 4), 2)


@pytest.mark.parametrize(("tubelet", "central"), [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2)])
def test_central_frame_inflation(tubelet: int, central: int) -> None:
    kernel = np.random.default_rng(0).normal(size=(4, 3, 2, 2)).astype(np.float32)
    expected = np.zeros((4, tubelet, 3, 2, 2), np.float32)
    for output in range(4):
        for channel in range(3):
            expected[output, central, channel] = kernel[output, channel]
    inflated = inflate_kernel(torch.from_numpy(kernel), tubelet)
    np.testing.assert_array_equal(inflated.numpy(), expected.reshape(4, tubelet * 3, 2, 2))
