"""The real train step over a list of cells, on one rank or two: `losses(engine, cells)` from a test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

from tests.launching import ROOT, environment, free_port

Cell = dict[str, Any]
"""`stage`, and if they differ from the defaults below `optimizer`, `plan`, `tower`, `size` and `image`."""
STEPS = 5
"""The head starts at zero: in the first nothing below it learns."""


def losses(engine: str, cells: list[Cell]) -> list[list[float]]:
    """Rank 0's losses of each cell, under `plain`, `ddp`, `zero1` … `zero3` or `fsdp`."""
    world, port = 1 if engine == "plain" else 2, str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.memory.walk", engine, json.dumps(cells)],
            cwd=ROOT,
            env=environment(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(world),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
                PYTHONPATH=str(ROOT),
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    outputs = [process.communicate(timeout=400) for process in ranks]
    assert [process.returncode for process in ranks] == [0] * world, outputs[0][1][-3000:]
    (line,) = (line for line in outputs[0][0].splitlines() if line.startswith("RESULT"))
    found: list[list[float]] = json.loads(line.removeprefix("RESULT"))
    return found


def main(engine: str, cells: list[Cell]) -> None:
    """One rank."""
    import torch

    from bigvivit.memory.ranks import rank_and_world, start_process_group

    rank, world = rank_and_world()
    ds = None
    if engine.startswith("zero"):
        ds = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 1.0,
            "steps_per_print": 10**9,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": int(engine[-1]), "stage3_param_persistence_threshold": 0},
        }
    start_process_group(torch.device("cpu"), world, deepspeed=ds is not None, fsdp=engine == "fsdp")
    found = [train(cell, ds, fsdp=engine == "fsdp", rank=rank, world=world) for cell in cells]
    if rank == 0:
        print("RESULT" + json.dumps(found), flush=True)
    if world > 1:
        torch.distributed.barrier()
    os._exit(0)


def train(cell: Cell, ds: dict[str, Any] | None, *, fsdp: bool, rank: int, world: int) -> list[float]:
    """Losses of a few steps on one batch."""
    import torch

    from bigvivit import assemble
    from bigvivit.config import ClipConfig, ModelConfig, OptimConfig
    from bigvivit.memory.apply import apply_plan
    from bigvivit.memory.parallel import build_engine, build_sharder
    from bigvivit.memory.plan import MemoryPlan
    from bigvivit.training.optim import build_optimizer, build_scheduler
    from bigvivit.training.step import train_step

    stage, image = cell["stage"], cell.get("image", 48)
    device = torch.device("cpu")
    model_config = ModelConfig(
        tower=cell.get("tower", "vit-demo"), tower_init="random", tubelet=2, temporal_depth=2, droplayer=0.5
    )
    clip = ClipConfig(frames=8, size=image, resize=image)
    generator = torch.Generator().manual_seed(rank)
    clips = torch.randint(256, (2, 8, 3, image, image), dtype=torch.uint8, generator=generator)
    batch = SimpleNamespace(clips=clips, labels=torch.tensor([rank, 2]), indices=torch.arange(2))
    torch.manual_seed(rank)
    optim = OptimConfig(name=cell.get("optimizer", "sgd"), lr=0.05, batch_size=2 * world, warmup_epochs=0)
    source = assemble.open_tower(model_config, seed=0)
    model = assemble.build_model(source, model_config, clip, classes=3, adapter=stage == 2, seed=0)
    sharder = build_sharder(ds, fsdp=fsdp, device=device)
    plan = MemoryPlan(**{"storage": "fp32", "compute": "fp32", **cell.get("plan", {})})
    apply_plan(model, plan, frozen=stage == 2, fill=source.fill, device=device, sharder=sharder)
    model.train()
    optimizer = build_optimizer(model, optim)
    scheduler = build_scheduler(optimizer, optim, 10)
    engine = build_engine(model, optimizer, scheduler, optim, ds=ds, fsdp=fsdp, world=world, device=device)
    return [float(train_step(engine, [batch]).loss) for _ in range(STEPS)]


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
