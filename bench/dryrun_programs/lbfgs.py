"""L-BFGS, which calls the step itself (PyTorch's documentation: torch.optim)."""

import torch
from torch import nn

model = nn.Sequential(nn.Linear(784, 2000), nn.Tanh(), nn.Linear(2000, 10)).cuda()
optimizer = torch.optim.LBFGS(model.parameters(), history_size=10, max_iter=4)
inputs, labels = torch.randn(512, 784, device="cuda"), torch.randint(0, 10, (512,), device="cuda")


def closure():
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(inputs), labels)
    loss.backward()
    return loss


for _ in range(50):
    optimizer.step(closure)
