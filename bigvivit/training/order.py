"""Whether a model can tell a clip from its reversal: measured before a run's first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bigvivit.memory.engine import Engine
from bigvivit.memory.ranks import gather_over_ranks
from bigvivit.training.step import LabelledClips

BLIND = 0.05
"""Below this, order is too faint to be learnt: positions that are lost in the vectors give thousandths, those of the
vectors' size about 1 (bench/learning_choices.py has both, and what was learnt from them)."""


def measure_order(engine: Engine, batches: Sequence[LabelledClips]) -> float | None:
    """How much reversing its frames changes what leaves a clip's temporal transformer, over how much another clip does.

    Over the clips of these micro-batches on all ranks; every rank must call it. None where no two of them differ, or
    there is one only; 0 where nothing moves in any.
    """
    forward = [pool_clips(engine, batch.clips) for batch in batches]
    backward = [pool_clips(engine, batch.clips.flip(1)) for batch in batches]
    everyone = gather_over_ranks((torch.cat(forward), torch.cat(backward)))
    pooled, reversed_ = (torch.cat(part) for part in zip(*everyone, strict=True))
    change = float((pooled - reversed_).norm(dim=1).mean())
    others = float(torch.pdist(pooled).mean()) if len(pooled) > 1 else 0.0
    if others == 0:
        return 0.0 if change == 0 and len(pooled) > 1 else None
    return change / others


def pool_clips(engine: Engine, clips: Tensor) -> Tensor:
    """What leaves the temporal transformer [b, width], of a probe bank the first; fp32 on the CPU.

    Not logits, as heads start at zero; and through the engine, whose sharded weights are gathered from the root on.
    """
    caught: list[Tensor] = []

    def catch(module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
        caught.append(output.float().cpu())

    temporal = next(part for name, part in engine.module.named_modules() if name.rpartition(".")[2] == "temporal")
    hook = temporal.register_forward_hook(catch)
    engine.module.eval()
    try:
        with torch.no_grad():
            engine(clips)
    finally:
        hook.remove()
        engine.module.train()
    return caught[0]


def describe_order(change: float | None) -> str:
    """A line for the log; a warning where order is out of sight."""
    if change is None:
        return "order: not measured, as the first step does not hold two clips that differ"
    line = f"order: a clip's reversal changes the temporal output {change:.2g} times as much as another clip"
    if change >= BLIND:
        return line
    return (
        f"warning: {line}; below {BLIND} a run learns no more than what a clip's frames have in common. "
        f"Leave --model.temporal-input out, or give `centred`; check that clips are not of one repeated frame"
    )
