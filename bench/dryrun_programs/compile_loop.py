"""torch.compile of a small transformer (PyTorch's tutorial: torch.compile)."""

import torch
from torch import nn

layer = nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True, dropout=0.0)
model = torch.compile(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).cuda())
optimizer = torch.optim.AdamW(model.parameters())
for _ in range(100):
    loss = model(torch.randn(8, 128, 256, device="cuda")).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
