"""FSDP2 around the blocks of a transformer, as torchtitan wraps them (PyTorch's tutorial: FSDP2)."""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("nccl")
mesh = init_device_mesh("cuda", (dist.get_world_size(),))
blocks = nn.ModuleList(nn.TransformerEncoderLayer(768, 12, 3072, batch_first=True, dropout=0.0) for _ in range(6))
model = nn.Sequential(nn.Embedding(32000, 768), *blocks, nn.Linear(768, 32000)).cuda()
policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
for block in blocks:
    fully_shard(block, mesh=mesh, mp_policy=policy)
fully_shard(model, mesh=mesh, mp_policy=policy)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
for _ in range(100):
    tokens = torch.randint(0, 32000, (4, 256), device="cuda")
    loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
dist.destroy_process_group()
