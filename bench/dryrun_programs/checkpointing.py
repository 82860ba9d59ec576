"""Activation checkpointing of each block (PyTorch's documentation: torch.utils.checkpoint)."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

blocks = nn.ModuleList(nn.TransformerEncoderLayer(1024, 16, 4096, batch_first=True) for _ in range(8)).cuda()
optimizer = torch.optim.Adam(blocks.parameters())
for _ in range(100):
    hidden = torch.randn(8, 512, 1024, device="cuda")
    for block in blocks:
        hidden = checkpoint(block, hidden, use_reentrant=False)
    hidden.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
