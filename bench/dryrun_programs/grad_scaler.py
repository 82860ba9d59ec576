"""Automatic mixed precision with GradScaler, unscaled and clipped (PyTorch's documentation: AMP examples)."""

import torch
from torch import nn

model = nn.Sequential(nn.Linear(2048, 8192), nn.GELU(), nn.Linear(8192, 2048), nn.GELU(), nn.Linear(2048, 100)).cuda()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
scaler = torch.amp.GradScaler()
for _ in range(100):
    optimizer.zero_grad()
    with torch.autocast("cuda", torch.float16):
        output = model(torch.randn(256, 2048, device="cuda"))
        loss = nn.functional.cross_entropy(output, torch.randint(0, 100, (256,), device="cuda"))
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
