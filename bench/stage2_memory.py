"""Memory of a step of stage 2 against frames, for each way through the frozen tower: `python bench/stage2_memory.py`.

Each cell is a fresh process that runs one real step: the peak by PyTorch's CPU allocator's own count, with the tower's
part of the step apart, and the process's peak. Fewer frames come first; rows are kept as they come, and an interrupted
run goes on. `--report` writes the report of the rows that are there.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import torch
from rich.progress import BarColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from transformers import ViTConfig
from transformers.models.vit.modeling_vit import ViTLayer

from bigvivit.model.towers import resolve_tower
from bigvivit.processes import RankFailed, run_ranks
from bigvivit.training.report import read_commit, run_bench, write_report
from bigvivit.trial import Trial
from bigvivit.units import KiB, MiB, format_bytes

mpl.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(64 * KiB),
    "MALLOC_TRIM_THRESHOLD_": str(64 * KiB),
    "OMP_NUM_THREADS": str(os.cpu_count()),
}
"""Of a cell's process: glibc gives what is freed back at once, so that the process's peak is what was live."""
CHUNK = 4
PLANS: dict[str, dict[str, Any]] = {
    "paper's way": {"group": "all", "chunk": "all"},
    "chunk-major": {"group": CHUNK, "chunk": CHUNK},
    "layer-major, memory": {"group": "all", "chunk": CHUNK, "placement": "cpu"},
    "layer-major, disk": {"group": "all", "chunk": CHUNK, "placement": "disk"},
    "layer-major, nf4": {"group": "all", "chunk": CHUNK, "storage": "nf4"},
}
"""Storage is bf16 but for nf4, and every tower computes in bf16."""
TOWERS: dict[str, int | None] = {"vit-b": None, "vit-l": None, "vit-h": 8, "vit-g": 8}
"""And how many of their layers; None for all."""
TOKENS = {14: 257, 16: 197}
"""Of an image of 224 pixels, by the side of its patches."""
SLACK, GROWTH = 1.25, 1.05
"""Targets: the tower's pass against hidden states + fetched layers + one chunk's work, and its growth per tubelet
against the hidden states of one, layer by layer; chunk by chunk it may not grow."""
NOISE_BYTES = 64
"""Per frame, what growth is taken for none: the allocator rounds sizes up."""

COLUMNS = """
`peak_bytes` is all that PyTorch's CPU allocator had handed out at the step's peak; `pass_bytes` is what the tower's
part of the step adds to what is there when it begins, at that part's own peak (`tower_peak_bytes`).
`trainable_bytes`: weights, gradients and optimizer state of what is trained; `tower_at_home_bytes`: the stored tower,
where it is kept in memory; `temporal_bytes`: what the forward leaves for the backward; `vectors_bytes`: the tower's
output. By the plan: `hidden_bytes` of a group, `fetched_bytes` of layers on their way or cast, `work_bytes` of one
chunk in a layer; `bound_bytes` is 1.25 times their sum. `rest_bytes` is the pass, chunk by chunk without the vectors;
`bound` judges it, and `growth` what it grew from the next fewer frames. `beyond_bytes` is the step's peak less
trainable state, clip and stored tower, negative where the gradients are not there yet at the peak; `whole_step_bound`
judges it by the same bound. RSS has the profiler's records in it.
"""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure stage 2's memory."""

    frames: tuple[int, ...] = (8, 32, 128, 512)
    """Frames of the clip."""
    towers: tuple[Literal["vit-b", "vit-l", "vit-h", "vit-g"], ...] = ("vit-b", "vit-l", "vit-h", "vit-g")
    """Image towers."""
    report: bool = False
    """Measure nothing, write the report of what was measured."""
    results: Path = ROOT / "bench" / "results"
    """Folder of reports."""


@dataclass(frozen=True)
class Cell:
    """One process."""

    tower: str
    plan: str
    frames: int

    @property
    def layers(self) -> int:
        """Of the tower, that are used."""
        return TOWERS[self.tower] or int(resolve_tower(self.tower, random=True).config.num_hidden_layers)

    @property
    def trial(self) -> Trial:
        """What the process runs."""
        plan = {"storage": "bf16", "compute": "bf16", **PLANS[self.plan]}
        values = {"stage": 2, "tower": self.tower, "layers": TOWERS[self.tower], "frames": self.frames, "plan": plan}
        return Trial.from_json(json.dumps(values))

    @property
    def operations(self) -> int:
        """Floating-point operations of the tower's matrix products, about."""
        spec = resolve_tower(self.tower, random=True)
        weights = self.layers * (4 * spec.width**2 + 2 * spec.width * spec.mlp)
        return 2 * weights * TOKENS[int(spec.config.patch_size)] * self.frames // 2


def list_cells(arguments: Arguments) -> list[Cell]:
    """In the order in which they run."""
    return [
        Cell(tower, plan, frames) for frames in sorted(arguments.frames) for tower in arguments.towers for plan in PLANS
    ]


def main(arguments: Arguments) -> None:
    """Measure the cells that are missing, then judge all of them and write the report."""
    arguments.results.mkdir(parents=True, exist_ok=True)
    kept = arguments.results / "stage2_memory.partial.jsonl"
    lines = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    found = {(line["tower"], line["plan"], line["frames"]): line for line in lines}
    cells = list_cells(arguments)
    if not arguments.report:
        missing = [cell for cell in cells if (cell.tower, cell.plan, cell.frames) not in found]
        measure_cells(missing, kept, found)
    rows = []
    for cell in cells:
        row = {"tower": cell.tower, "layers": cell.layers, "plan": cell.plan, "frames": cell.frames}
        fewer = [frames for frames in arguments.frames if (cell.tower, cell.plan, frames) in found]
        fewer = [frames for frames in fewer if frames < cell.frames]
        before = found[cell.tower, cell.plan, max(fewer)] if fewer else None
        rows.append(judge(row, found.get((cell.tower, cell.plan, cell.frames)), before))
    commits = sorted({line["commit"] for line in found.values()})
    settings = {"plans": PLANS, "storage": "bf16 or nf4", "compute": "bf16", "temporal_depth": 4, "local_batch": 1,
                "tubelet": 2, "size": 224, "optimizer": "sgd with momentum, its state made before the step",
                "steps": 1, "environment": ENVIRONMENT, "commits_of_rows": commits}  # fmt: skip
    stem = write_report(arguments.results, "stage2_memory", device=torch.device("cpu"), settings=settings, rows=rows)
    with stem.with_name(f"{stem.name}.md").open("a") as file:
        file.write(f"\n{COLUMNS}\n![Memory against frames]({stem.name}.png)\n")
    draw(stem.with_name(f"{stem.name}.png"), [row for row in rows if "peak_bytes" in row])
    if len(found) == len(cells) and not arguments.report:
        kept.unlink()
    for target in ("bound", "whole_step_bound", "growth"):
        verdicts = [row.get(target, "not judged" if "peak_bytes" in row else "not run") for row in rows]
        print(f"{target}: " + ", ".join(f"{word} {verdicts.count(word)}" for word in sorted(set(verdicts))))
    print(f"wrote {stem}.json, .md and .png")


def measure_cells(cells: list[Cell], kept: Path, found: dict[tuple[str, str, int], dict[str, Any]]) -> None:
    """Run each cell; its row goes into the file at once, and into `found`."""
    work = sum(cell.operations for cell in cells)
    print(f"{len(cells)} cells, {work / 1e12:.0f} T operations: "
          f"about {work / calibrate() / 60:.0f} min at the speed of now", flush=True)  # fmt: skip
    bars = "{task.description}", BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*bars, speed_estimate_period=3600) as progress:
        task = progress.add_task("cells", total=work)
        for cell in cells:
            progress.update(task, description=f"{cell.tower}, {cell.plan}, {cell.frames} frames")
            try:
                words = ["-m", "bigvivit.trial_run", cell.trial.to_json(), "parts"]
                (answer,) = run_ranks(words, environment=ENVIRONMENT)
            except RankFailed as error:  # the machine's memory may be others'; the next run tries again
                progress.print(f"{cell} failed: {error}")
                continue
            line = {"tower": cell.tower, "plan": cell.plan, "frames": cell.frames, "commit": read_commit(), **answer}
            found[cell.tower, cell.plan, cell.frames] = line
            with kept.open("a") as file:
                file.write(json.dumps(line) + "\n")
            progress.print(f"{cell.tower}, {cell.plan}, {cell.frames} frames: {answer['seconds_per_step']:.0f} s, "
                           f"{format_bytes(int(answer['peak_bytes']))}")  # fmt: skip
            progress.advance(task, cell.operations)


def calibrate() -> float:
    """Operations a second of one ViT-B layer on a chunk."""
    layer = ViTLayer(ViTConfig(attn_implementation="sdpa")).eval().to(torch.bfloat16)
    hidden = torch.randn(CHUNK, TOKENS[16], 768, dtype=torch.bfloat16)
    with torch.no_grad():
        layer(hidden)
        start = time.perf_counter()
        for _ in range(20):
            layer(hidden)
    operations = 2 * 12 * 768**2 * TOKENS[16] * CHUNK
    return 20 * operations / (time.perf_counter() - start)


def judge(row: dict[str, Any], found: dict[str, Any] | None, fewer: dict[str, Any] | None) -> dict[str, Any]:
    """A cell's row: what was measured, what the plan allows, and whether the targets are met.

    `rest` is what the tower's pass adds to what was there before it. Chunk by chunk the vectors of the frames that are
    through are taken off: they are the temporal transformer's input. `beyond` is the same of the whole step's peak,
    as far as trainable state, clip and the tower where it lives do not explain it.
    """
    if found is None:
        return row | {"evidence": "not run"}
    row |= {"evidence": "measured"}
    # Seconds neither: cells may run, or wait, beside other work. bench/step_time.py times steps.
    left_out = {"commit", "data_bytes_before", "seconds_per_step", *row}
    row |= {key: value for key, value in found.items() if key not in left_out}
    layer_major = row["plan"].startswith("layer-major")
    row["rest_bytes"] = rest_bytes(found)
    home = found["trainable_bytes"] + found["clip_bytes"] + found["tower_at_home_bytes"]
    row["beyond_bytes"] = found["peak_bytes"] - home
    row["bound_bytes"] = int(SLACK * (found["hidden_bytes"] + found["fetched_bytes"] + found["work_bytes"]))
    row["bound"] = met(row["rest_bytes"] <= row["bound_bytes"])
    row["whole_step_bound"] = met(row["beyond_bytes"] <= row["bound_bytes"])
    if fewer is not None:
        grown = (row["rest_bytes"] - rest_bytes(fewer)) / (row["frames"] - fewer["frames"])
        row["growth_per_frame_bytes"] = round(grown)
        if row["plan"] != "paper's way":
            per_frame = found["hidden_bytes"] / found["tubelets_per_group"] / 2
            row["growth_allowed_bytes"] = round(GROWTH * per_frame) if layer_major else 0
            row["growth"] = met(grown <= row["growth_allowed_bytes"] + NOISE_BYTES)
    return row


def rest_bytes(found: dict[str, Any]) -> int:
    """See `judge`."""
    return int(found["pass_bytes"]) - (found["vectors_bytes"] if found["plan"] == "chunk-major" else 0)


def met(holds: bool) -> str:
    """For people."""
    return "met" if holds else "not met"


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """A picture for each tower: what its pass adds, measured, against frames; and the whole step's peak, dashed."""
    towers = list(dict.fromkeys(row["tower"] for row in rows))
    figure, grid = plt.subplots(1, max(len(towers), 1), figsize=(4 * max(len(towers), 1), 4.5), squeeze=False)
    for tower, axes in zip(towers, grid[0], strict=False):
        for number, plan in enumerate(PLANS):
            own = [row for row in rows if row["tower"] == tower and row["plan"] == plan]
            frames = [row["frames"] for row in own]
            color = f"C{number}"
            axes.plot(frames, [row["pass_bytes"] / MiB for row in own], marker="o", color=color, label=plan)
            axes.plot(frames, [row["peak_bytes"] / MiB for row in own], linestyle="--", color=color, linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="frames", title=tower)
        frames = sorted({row["frames"] for row in rows})
        axes.set_xticks(frames, [str(count) for count in frames])
        axes.minorticks_off()
    grid[0][0].set_ylabel("MiB by the CPU allocator: the tower's pass\n(dashed: all of the step at its peak)")
    grid[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    run_bench(main, Arguments, __doc__)
