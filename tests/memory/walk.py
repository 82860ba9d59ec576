"""The real train step over a list of cells, on one rank or two: `losses(engine, cells)` from a test or a bench."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bigvivit.config import ClipConfig, DataConfig, ModelConfig, OptimConfig, TrainConfig
from bigvivit.memory.ds_json import read_ds_json
from bigvivit.memory.plan import MemoryPlan
from tests.launching import ROOT, environment, free_port

Cell = dict[str, Any]
"""`stage`, and if they differ from the defaults below `optimizer`, `plan`, `tower`, `tubelet`, `image` and `zero`, what
is to be added to DeepSpeed's block `zero_optimization`."""
ENGINES = ("plain", "ddp", "zero1", "zero2", "zero3", "fsdp")
STEPS = 5
"""The head starts at zero: in the first nothing below it learns."""


def losses(engine: str, cells: list[Cell]) -> list[list[float]]:
    """Rank 0's losses of each cell, none of which may be refused, under one of ENGINES."""
    found = walk(engine, cells)
    refused = [result for result in found if isinstance(result, str)]
    assert not refused, refused
    return [result for result in found if not isinstance(result, str)]


def walk(engine: str, cells: list[Cell], timeout: float = 400) -> list[list[float] | str]:
    """The same, with the message in the place of what is refused."""
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
    outputs = [process.communicate(timeout=timeout) for process in ranks]
    codes = [process.returncode for process in ranks]
    assert codes == [0] * world, f"{codes}\n" + "\n".join(stderr[-3000:] for _, stderr in outputs)
    (line,) = (line for line in outputs[0][0].splitlines() if line.startswith("RESULT"))
    found: list[list[float] | str] = json.loads(line.removeprefix("RESULT"))
    return found


def main(engine: str, cells: list[Cell]) -> None:
    """One rank."""
    import torch

    from bigvivit.config import ConfigError
    from bigvivit.memory.ranks import rank_and_world, start_process_group

    rank, world = rank_and_world()
    start_process_group(torch.device("cpu"), world, deepspeed=engine.startswith("zero"), fsdp=engine == "fsdp")
    found: list[list[float] | str] = []
    with tempfile.TemporaryDirectory() as scratch:
        for cell in cells:
            try:
                config, ds = configure(engine, cell, Path(scratch), world)
            except ConfigError as error:
                found.append(str(error).replace(scratch, ""))
            else:
                found.append(train(cell, config, ds, rank, world))
            gc.collect()  # engines hold themselves in circles
    if rank == 0:
        print("RESULT" + json.dumps(found), flush=True)
    if world > 1:
        torch.distributed.barrier()
    os._exit(0)


def configure(engine: str, cell: Cell, scratch: Path, world: int) -> tuple[TrainConfig, dict[str, Any] | None]:
    """What `bigvivit train` would be told for a cell. Raises ConfigError where that is refused."""
    stage, image, ds, path = cell["stage"], cell.get("image", 48), None, None
    zero: dict[str, Any] = {}
    if engine.startswith("zero"):
        zero = {"stage": int(engine[-1]), "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 10**6}
    zero |= cell.get("zero", {})
    if zero:
        path = scratch / "ds.json"
        path.write_text(json.dumps({"steps_per_print": 10**9, "zero_optimization": zero}))
    # What is frozen is kept and computes in fp32, unless the cell says otherwise.
    plan = {**({"storage": "fp32", "compute": "fp32"} if stage == 2 else {}), **cell.get("plan", {})}
    config = TrainConfig(
        stage=stage,
        out=scratch / "run",
        clip=ClipConfig(frames=8, size=image, resize=image),
        data=DataConfig(train=scratch / "train.csv"),
        model=ModelConfig(
            tower=cell.get("tower", "vit-demo"),
            tower_init="random",
            tubelet=cell.get("tubelet", 2),
            temporal_depth=2,
            temporal_input="centred",
            droplayer=0.5,
        ),
        optim=OptimConfig(name=cell.get("optimizer", "sgd"), lr=0.05, batch_size=2 * world, warmup_epochs=0),
        memory=MemoryPlan(**plan),
        init_from=scratch / "before" if stage == 2 else None,
        ds=path,
        fsdp=engine == "fsdp",
    )
    if path is not None:
        ds = read_ds_json(path, config.optim, world)
    return config, ds


def train(cell: Cell, config: TrainConfig, ds: dict[str, Any] | None, rank: int, world: int) -> list[float]:
    """Losses of a few steps on one batch."""
    import torch

    from bigvivit import assemble
    from bigvivit.memory.apply import apply_plan
    from bigvivit.memory.parallel import build_engine, build_sharder
    from bigvivit.training.optim import build_optimizer, build_scheduler
    from bigvivit.training.step import train_step

    device, image = torch.device("cpu"), config.clip.size
    generator = torch.Generator().manual_seed(rank)
    clips = torch.randint(256, (2, 8, 3, image, image), dtype=torch.uint8, generator=generator)
    batch = SimpleNamespace(clips=clips, labels=torch.tensor([rank, 2]), indices=torch.arange(2))
    torch.manual_seed(rank)
    source = assemble.open_tower(config.model, seed=0)
    model = assemble.build_model(source, config.model, config.clip, classes=3, adapter=config.stage == 2, seed=0)
    sharder = build_sharder(ds, fsdp=config.fsdp, device=device)
    apply_plan(model, config.memory, frozen=config.stage == 2, fill=source.fill, device=device, sharder=sharder)
    model.train()
    optimizer = build_optimizer(model, config.optim)
    scheduler = build_scheduler(optimizer, config.optim, 10)
    engine = build_engine(
        model, optimizer, scheduler, config.optim, ds=ds, fsdp=config.fsdp, world=world, device=device
    )
    return [float(train_step(engine, [batch]).loss) for _ in range(STEPS)]


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
