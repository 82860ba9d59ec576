"""What is left of a weight in each form, by the forms' definitions and without bitsandbytes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

# fmt: off
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])
# fmt: on
"""The sixteen values of QLoRA, appendix E (arXiv:2305.14314)."""


def round_to(weight: Tensor, storage: str) -> Tensor:
    """A matrix [out, in] in fp32 as its form keeps it: bf16, int8 with a scale for each row, or nf4 with one for each
    64 values in the order of memory."""
    if storage == "bf16":
        return weight.bfloat16().float()
    if storage == "int8":
        largest = weight.abs().amax(1, keepdim=True)
        return (weight * (127 / largest)).round() * (largest / 127)
    blocks = pad(weight.reshape(-1), (0, -weight.numel() % 64)).view(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks / scale).unsqueeze(-1).sub(NF4).abs().argmin(-1)
    return (NF4[nearest] * scale).view(-1)[: weight.numel()].view(weight.shape)
