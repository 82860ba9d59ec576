"""Seconds of one training step, side by side: `python -m bench.step_time`.

Full training (stage 1), the paper's stage 2 and stage 2 by each streamed plan, on the same number of frames in one
process, in turn. Beside them the tower alone: the streamed one against Hugging Face's plain forward of all frames at
once. Everything computes in fp32.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.progress import track
from torch import Tensor

from bench.timing import compare, ratio, spread, time_in_turn
from bigvivit.config import ModelConfig
from bigvivit.memory.stream import FrozenTower
from bigvivit.model.catalog import SIZES
from bigvivit.model.towers import TowerSpec, build_hf_model, hf_name
from bigvivit.model.tubelet import to_tubelets
from bigvivit.training.report import run_bench, write_report
from bigvivit.training.step import train_step
from bigvivit.trial import Trial, build_trial, open_source

FULL, PAPER, STREAMED = "stage 1: everything trains", "stage 2: the paper's way", "stage 2: streamed, replicated"
PLANS: dict[str, dict[str, Any]] = {
    PAPER: {"storage": "fp32", "group": "all", "chunk": "all"},
    STREAMED: {"storage": "fp32", "group": "chunk"},
    "stage 2: streamed, replicated in bf16": {"storage": "bf16"},
    "stage 2: streamed from memory": {"storage": "bf16", "placement": "cpu"},
    "stage 2: streamed from disk": {"storage": "bf16", "placement": "disk"},
    "stage 2: streamed, int8": {"storage": "int8"},
    "stage 2: streamed, nf4": {"storage": "nf4"},
}
"""Layer by layer in chunks of `--chunk`, but for the paper's way and, chunk by chunk, for layers that are ready as they
are: what `auto` would choose."""
TOWER, PEER = "tower alone: streamed, replicated", "tower alone: Hugging Face, all at once"
OF_FULL, OF_PEER = 0.40, 0.97
"""Targets: stage 2's time by the full step's, at most; the streamed tower's speed by Hugging Face's, at least."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Time steps, and write a report."""

    tower: Literal["vit-b", "vit-l", "vit-h", "vit-g", "vit-demo"] = "vit-b"
    """Size of the tower. Its weights are drawn."""
    layers: int | None = None
    """Use so many of the tower's layers only."""
    frames: int = 16
    """Frames of the clip."""
    chunk: int = 4
    """Tubelets that go through a layer at once."""
    repeats: int = 5
    """Rounds of timing."""
    results: Path = Path(__file__).parent / "results"
    """Folder of reports."""


def main(arguments: Arguments) -> None:
    """Time all in turn, compare, write."""
    steps: dict[str, Callable[[], object]] = {FULL: build_step(arguments, 1, {})}
    for name in PLANS:
        steps[name] = build_step(arguments, 2, plan_of(arguments, name))
    steps |= build_towers(arguments)
    for step in track(steps.values(), "first calls"):
        step()
    seconds = time_in_turn(steps, arguments.repeats)
    rows = [judge(name, seconds) for name in steps]
    settings = {"tower": arguments.tower, "layers": arguments.layers, "frames": arguments.frames, "tubelet": 2,
                "local_batch": 1, "chunk": arguments.chunk, "compute": "fp32", "temporal_depth": 4,
                "optimizer": "sgd with momentum", "repeats": arguments.repeats, "plans": PLANS,
                "threads": torch.get_num_threads()}  # fmt: skip
    stem = write_report(arguments.results, "step_time", device=torch.device("cpu"), settings=settings, rows=rows)
    for row in rows:
        print(f"{row['name']}: {row['seconds']:.3g} s " + row.get("target", ""))
    print(f"wrote {stem}.json and .md")


def plan_of(arguments: Arguments, name: str) -> dict[str, Any]:
    """A plan of stage 2."""
    plan = {"group": "all", "chunk": arguments.chunk, **PLANS[name]}
    return {**plan, "group": arguments.chunk} if plan["group"] == "chunk" else plan


def describe_trial(arguments: Arguments, stage: int, plan: dict[str, Any]) -> Trial:
    """One clip."""
    size = SIZES[arguments.tower].image_size
    values = {"stage": stage, "tower": arguments.tower, "layers": arguments.layers, "frames": arguments.frames,
              "size": size, "plan": {"compute": "fp32", "autocast": "fp32", **plan}}  # fmt: skip
    return Trial.from_json(json.dumps(values))


def build_step(arguments: Arguments, stage: int, plan: dict[str, Any]) -> Callable[[], object]:
    """The step that training runs."""
    engine, batch = build_trial(describe_trial(arguments, stage, plan), torch.device("cpu"))
    return lambda: train_step(engine, [batch])


def build_towers(arguments: Arguments) -> dict[str, Callable[[], object]]:
    """The streamed tower and Hugging Face's model with its weights, on the same tubelets; equal outputs are checked."""
    trial = describe_trial(arguments, 2, plan_of(arguments, STREAMED))
    engine, batch = build_trial(trial, torch.device("cpu"))
    tower, spec = engine.module.tower, open_source(trial, ModelConfig(tower=trial.tower), fake=True).spec
    assert isinstance(tower, FrozenTower)
    forward = build_peer(tower, spec)
    pixels = to_tubelets(batch.clips, trial.tubelet)
    torch.testing.assert_close(tower(pixels), forward(pixels), rtol=1e-4, atol=1e-4)
    return {TOWER: lambda: tower(pixels), PEER: lambda: forward(pixels)}


def build_peer(tower: FrozenTower, spec: TowerSpec) -> Callable[[Tensor], Tensor]:
    """Hugging Face's own model with a frozen tower's weights: tubelets to vectors, normalised and run all at once."""
    model: Any = build_hf_model(spec, tubelet=2).eval()
    pieces = ["embed", *(f"layers.{number}" for number in range(len(tower.layers))), "pool"]
    weights = {
        hf_name(spec, piece, name): weight
        for piece, unit in zip(pieces, tower.units(), strict=True)
        for name, weight in unit.layer.named_parameters()
    }
    model.load_state_dict(weights, assign=True)
    mean, std = (torch.tensor(rgb * 2).view(-1, 1, 1) for rgb in (spec.mean, spec.std))

    @torch.no_grad()
    def forward(pixels: Tensor) -> Tensor:
        vectors: Tensor = model((pixels / 255 - mean) / std).last_hidden_state[:, 0]
        return vectors

    return forward


def judge(name: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """A row: its time, and what it is compared with."""
    own = seconds[name]
    row: dict[str, Any] = {"name": name, "evidence": "measured", "seconds": statistics.median(own)}
    row |= {"spread_seconds": spread(own), "by_full_step": "" if name in (TOWER, PEER) else ratio(own, seconds[FULL])}
    if name == PAPER:
        row["target"] = f"{'met' if row['by_full_step'] <= OF_FULL else 'not met'}: at most {OF_FULL} of the full step"
    elif name in PLANS:
        row |= {"by_papers_way": ratio(own, seconds[PAPER]), "than_papers_way": compare(own, seconds[PAPER])}
    elif name == TOWER:
        row |= {"speed_by_peer": ratio(seconds[PEER], own), "than_peer": compare(own, seconds[PEER])}
        row["target"] = f"{'met' if row['speed_by_peer'] >= OF_PEER else 'not met'}: at least {OF_PEER} of its speed"
    return row


if __name__ == "__main__":
    run_bench(main, Arguments, __doc__)
