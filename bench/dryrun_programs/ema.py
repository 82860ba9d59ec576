"""An exponential moving average of the weights (PyTorch's documentation: torch.optim.swa_utils)."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

model = nn.TransformerEncoder(nn.TransformerEncoderLayer(512, 8, batch_first=True), 6).cuda()
averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
optimizer = torch.optim.RAdam(model.parameters())
for _ in range(100):
    optimizer.zero_grad()
    model(torch.randn(16, 128, 512, device="cuda")).square().mean().backward()
    optimizer.step()
    averaged.update_parameters(model)
