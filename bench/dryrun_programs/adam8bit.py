"""bitsandbytes: 8-bit Adam (its documentation: Optimizers)."""

import bitsandbytes as bnb
import torch
from torch import nn

model = nn.TransformerEncoder(nn.TransformerEncoderLayer(1024, 16, 4096, batch_first=True), 6).cuda()
optimizer = bnb.optim.Adam8bit(model.parameters(), lr=1e-4)
for _ in range(100):
    optimizer.zero_grad()
    model(torch.randn(4, 128, 1024, device="cuda")).square().mean().backward()
    optimizer.step()
