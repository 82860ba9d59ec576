"""DistributedDataParallel around torchvision's ViT-B/16 (PyTorch's tutorial: Distributed Data Parallel)."""

import os

import torch
import torch.distributed as dist
import torchvision
from torch.nn.parallel import DistributedDataParallel

device = int(os.environ["LOCAL_RANK"])
torch.cuda.set_device(device)
dist.init_process_group("nccl")
model = DistributedDataParallel(torchvision.models.vit_b_16().cuda(), device_ids=[device])
optimizer = torch.optim.AdamW(model.parameters())
for _ in range(100):
    images, labels = torch.randn(8, 3, 224, 224, device="cuda"), torch.randint(0, 1000, (8,), device="cuda")
    optimizer.zero_grad()
    with torch.autocast("cuda", torch.bfloat16):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
dist.destroy_process_group()
