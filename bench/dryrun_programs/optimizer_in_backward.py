"""An optimizer per parameter, stepped within the backward pass (PyTorch's tutorial: optimizer step in backward)."""

import torch
import torchvision

model = torchvision.models.vit_b_16().cuda()
optimizers = {parameter: torch.optim.Adam([parameter], foreach=False) for parameter in model.parameters()}


def step(parameter):
    optimizers[parameter].step()
    optimizers[parameter].zero_grad()


for parameter in model.parameters():
    parameter.register_post_accumulate_grad_hook(step)
for _ in range(20):
    model(torch.randn(4, 3, 224, 224, device="cuda")).sum().backward()
