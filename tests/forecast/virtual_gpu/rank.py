"""A rank of a training run on virtual GPUs, started by torchrun: prints one line of JSON."""

from __future__ import annotations

import json
import os
import sys

import torch
import torch.distributed as dist
from torch import nn


def blocks() -> nn.Sequential:
    return nn.Sequential(*[nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256)) for _ in range(4)])


def train(engine: str, rank: int) -> None:
    """Two steps."""
    data = torch.randn(8, 256, device="cuda")
    if engine == "zero3":
        import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": 8,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 300_000},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        }
        model = blocks()
        engine_, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
        for _ in range(2):
            engine_.backward(engine_(data).square().mean())
            engine_.step()
        return
    module: nn.Module = blocks().cuda()
    if engine == "ddp":
        module = nn.parallel.DistributedDataParallel(module, device_ids=[rank])
    else:
        from torch.distributed.fsdp import fully_shard

        for block in module.children():
            fully_shard(block)
        fully_shard(module)
    optimizer = torch.optim.AdamW(module.parameters())
    for _ in range(2):
        module(data).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    engine, rank = sys.argv[1], int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    objects: list[object] = [None, None]
    dist.all_gather_object(objects, "x" * (5 + 100 * rank))
    told: list[object] = ["from rank 0" if rank == 0 else None]
    dist.broadcast_object_list(told, 0)
    count = torch.tensor([rank + 1], device="cuda")
    dist.all_reduce(count)
    evens = dist.new_group([rank])  # a group of one, beside the other's
    assert dist.get_world_size(evens) == 1
    train(engine, rank)
    dist.barrier()
    found = {
        "rank": rank,
        "lengths": [len(str(each)) for each in objects],
        "told": told,
        "count": count.item(),
        "device": torch.cuda.current_device(),
        "peak": torch.cuda.max_memory_allocated(),
        "other": torch.cuda.memory_allocated(1 - rank),
    }
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
