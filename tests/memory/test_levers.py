"""Every lever of the plan under every engine, in both stages: the losses of plain fp32 training, and a finite peak."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launching import ROOT, environment, free_port

PROGRAM = """
import json, os, sys, torch
from types import SimpleNamespace
from bigvivit import assemble
from bigvivit.config import ClipConfig, ModelConfig, OptimConfig
from bigvivit.memory.apply import apply_plan
from bigvivit.memory.parallel import build_engine, build_sharder
from bigvivit.memory.plan import MemoryPlan
from bigvivit.memory.ranks import rank_and_world, start_process_group
from bigvivit.training.optim import build_optimizer, build_scheduler
from bigvivit.training.step import train_step

name, cells = sys.argv[1], json.loads(sys.argv[2])
device, (rank, world) = torch.device("cpu"), rank_and_world()
fsdp, ds = name == "fsdp", None
if name.startswith("zero"):
    zero = {"stage": int(name[-1]), "stage3_param_persistence_threshold": 0}
    ds = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0,
          "steps_per_print": 10**9, "zero_allow_untested_optimizer": True, "zero_optimization": zero}
start_process_group(device, world, deepspeed=ds is not None, fsdp=fsdp)
model_config = ModelConfig(tower="vit-demo", tower_init="random", tubelet=2, temporal_depth=2, droplayer=0.5)
clip = ClipConfig(frames=8, size=48, resize=48)
generator = torch.Generator().manual_seed(rank)
clips = torch.randint(256, (2, 8, 3, 48, 48), dtype=torch.uint8, generator=generator)
batch = SimpleNamespace(clips=clips, labels=torch.tensor([rank, 2]), indices=torch.arange(2))
losses = []
for stage, optimizer_name, plan in cells:
    torch.manual_seed(rank)
    optim = OptimConfig(name=optimizer_name, lr=0.05, batch_size=2 * world, warmup_epochs=0)
    source = assemble.open_tower(model_config, seed=0)
    model = assemble.build_model(source, model_config, clip, classes=3, adapter=stage == 2, seed=0)
    sharder = build_sharder(ds, fsdp=fsdp, device=device)
    plan = MemoryPlan(**{"storage": "fp32", "compute": "fp32", **plan})
    apply_plan(model, plan, frozen=stage == 2, fill=source.fill, device=device, sharder=sharder)
    model.train()
    optimizer = build_optimizer(model, optim)
    scheduler = build_scheduler(optimizer, optim, 10)
    engine = build_engine(model, optimizer, scheduler, optim, ds=ds, fsdp=fsdp, world=world, device=device)
    # Five: the head starts at zero, so in the first step nothing below it learns.
    own = [float(train_step(engine, [batch]).loss) for _ in range(5)]
    losses.append(own)
if rank == 0:
    print("RESULT" + json.dumps(losses))
sys.stdout.flush()
if world > 1:
    torch.distributed.barrier()
os._exit(0)
"""
EXACT = [  # levers that change where and when, not what
    {},
    {"recompute": 1},
    {"recompute": 2},
    {"offload_activations": True},
    {"recompute": 2, "offload_activations": True},
]
EXACT_FROZEN = [
    {"placement": "cpu"},
    {"placement": "disk", "chunk": 1},
    {"placement": "disk", "chunk": 2, "recompute": 1, "offload_activations": True},
    {"group": 2, "chunk": 2},
]
ROUGH = [{"masters": "bf16"}, {"masters": "bf16", "recompute": 1, "offload_activations": True}]
ROUGH_FROZEN = [
    *({"storage": storage, "placement": where} for storage in ("int8", "nf4") for where in ("device", "disk")),
    {"storage": "bf16"},
    {"storage": "nf4", "placement": "disk", "masters": "bf16", "recompute": 1, "chunk": 1},
]
EIGHT_BIT = [{}, {"recompute": 1}]


def cells(engine: str) -> list[tuple[int, str, dict[str, Any]]]:
    """(stage, optimizer, plan); the first of each stage is what the others are held to."""
    found: list[tuple[int, str, dict[str, Any]]] = []
    for stage in (1, 2):
        for plan in [*EXACT, *(EXACT_FROZEN if stage == 2 else []), *ROUGH, *(ROUGH_FROZEN if stage == 2 else [])]:
            found.append((stage, "sgd", plan))
        if engine != "fsdp":  # refused there: tests/test_errors.py
            found += [(stage, "sgd8bit", plan) for plan in EIGHT_BIT]
    return found


@pytest.mark.parametrize("engine", ["plain", "ddp", "zero1", "zero2", "zero3", "fsdp"])
def test_levers(engine: str, tmp_path: Path) -> None:
    world = 1 if engine == "plain" else 2
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    port = str(free_port())
    asked = cells(engine)
    ranks = [
        subprocess.Popen(
            [sys.executable, program, engine, json.dumps(asked)],
            cwd=ROOT,
            env=environment(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port, PYTHONPATH=str(ROOT),
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=400) for process in ranks]
    assert [process.returncode for process in ranks] == [0] * world, outputs[0][1][-3000:]
    (line,) = (line for line in outputs[0][0].splitlines() if line.startswith("RESULT"))
    losses = json.loads(line.removeprefix("RESULT"))
    expected: dict[int, list[float]] = {}
    wrong = []
    for (stage, optimizer, plan), own in zip(asked, losses, strict=True):
        first = expected.setdefault(stage, own)
        exact = plan in (*EXACT, *EXACT_FROZEN) and optimizer == "sgd"
        if own != pytest.approx(first, abs=2e-5 if exact else 0.15):
            wrong.append(f"stage {stage}, {optimizer}, {plan}: {own}, not {first}")
        if not exact and own == first:
            wrong.append(f"stage {stage}, {optimizer}, {plan} changed nothing")
    assert max(abs(first[4] - first[0]) for first in expected.values()) > 0.01  # they do learn something
    assert not wrong, "\n".join(wrong)
