"""fastai: a Learner with mixed precision (its documentation: Learner)."""

import torch
from fastai.basics import CrossEntropyLossFlat, DataLoader, DataLoaders, Learner
from fastai.callback.fp16 import MixedPrecision
from torch import nn

data = list(zip(torch.randn(2048, 256), torch.randint(0, 10, (2048,)), strict=True))
loaders = DataLoaders(DataLoader(data, bs=64), DataLoader(data[:64], bs=64)).cuda()
model = nn.Sequential(nn.Linear(256, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 10))
Learner(loaders, model, loss_func=CrossEntropyLossFlat(), cbs=MixedPrecision()).fit(1)
