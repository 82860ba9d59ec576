"""Both stages of a method run, written down: `python bench/two_stages.py RUN [RUN ...]`, after training and evaluation.

Reads what the runs' folders hold (`./launch.sh` leaves `runs/demo/stage1`, `stage2` and `everything`) and writes a
report with a picture: clips it was evaluated on, losses, accuracy with frames in order and shuffled, and time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import tyro

from bigvivit.data.decode import open_video
from bigvivit.data.manifest import read_manifest
from bigvivit.training.report import format_cell, run_bench, write_report
from bigvivit.training.summary import read_json, read_metrics
from bigvivit.units import format_count


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Write down finished and evaluated runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, in order."""
    name: str = "two_stages"
    """Name of the report."""
    results: Path = Path(__file__).parent / "results"
    """Folder of reports."""


def main(arguments: Arguments) -> None:
    """Collect, write, draw."""
    rows = [collect(run) for run in arguments.runs]
    device = torch.device("cuda" if "CUDA" in rows[0]["peak_measured_by"] else "cpu")
    settings = {str(run): read_json(run / "run.json") for run in arguments.runs}
    stem = write_report(arguments.results, arguments.name, device=device, settings=settings, rows=rows)
    draw(arguments.runs, stem.with_name(f"{stem.name}.png"))
    print(f"wrote {stem}.json, .md and .png")


def collect(run: Path) -> dict[str, Any]:
    """One row of the report."""
    accuracy, record = (read_json(run / f"{name}.json") for name in ("eval", "run"))
    return {
        "run": str(run),
        **read_json(run / "summary.json"),
        "engine": record["engine"],
        "ranks": record["ranks"],
        "clips": accuracy["clips"],
        "top1": accuracy["top1"],
        "top5": accuracy["top5"],
        "top1_frames_shuffled": accuracy["shuffled"]["top1"],
        "evidence": "measured",
    }


def readme_table(rows: list[dict[str, Any]]) -> str:
    """The rows of a report as the README shows them: a column per stage. A test holds the README to it."""
    lines = [["", *(name_of(row["run"]) for row in rows)], ["---"] * (len(rows) + 1)]
    for heading, key in (
        ("frames per clip", "frames"),
        ("trainable parameters", "trainable_parameters"),
        ("frozen parameters", "frozen_parameters"),
        ("seconds per step", "seconds_per_step"),
        ("peak memory of a rank", "peak_bytes"),
        ("measured by", "peak_measured_by"),
        ("top-1", "top1"),
        ("top-5", "top5"),
        ("top-1, frames shuffled", "top1_frames_shuffled"),
    ):
        cells = [format_count(row[key]) if key.endswith("parameters") else format_cell(key, row[key]) for row in rows]
        lines.append([heading, *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def name_of(run: str | Path) -> str:
    """Of a run, as people know it."""
    return {"stage1": "stage 1", "stage2": "stage 2", "everything": "everything trained"}.get(
        Path(run).name, Path(run).name
    )


def draw(runs: tuple[Path, ...], path: Path) -> None:
    """Clips above, losses and accuracies below."""
    figure = plt.figure(figsize=(11, 6), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(1, 1.2))
    clips, plots = parts
    draw_clips(clips, Path(read_json(runs[0] / "eval.json")["manifest"]))
    losses, accuracies, seconds = plots.subplots(1, 3, width_ratios=(1.4, 1.3, 1))
    for run in runs:
        records = read_metrics(run / "metrics.jsonl")
        points = [(record["step"], record["loss"]) for record in records if "loss" in record]
        losses.plot(*zip(*points, strict=True), label=name_of(run))
    losses.set(xlabel="optimizer step", ylabel="loss", ylim=(0, None))
    losses.legend(frameon=False, fontsize=8)
    names = [f"{name_of(run)},\n{read_json(run / 'eval.json')['frames']} frames" for run in runs]
    results = [read_json(run / "eval.json") for run in runs]
    for offset, label in enumerate(("frames in order", "frames shuffled")):
        values = [100 * (result["shuffled"] if offset else result)["top1"] for result in results]
        bars = accuracies.bar([i + 0.4 * offset for i in range(len(runs))], values, width=0.38, label=label)
        accuracies.bar_label(bars, fmt="%.0f %%", fontsize=8)
    accuracies.set(ylabel="top-1 on held-out clips, %", ylim=(0, 128))
    accuracies.set_xticks([i + 0.2 for i in range(len(runs))], names, fontsize=8)
    accuracies.legend(frameon=False, loc="upper center", ncols=2, fontsize=8)
    bars = seconds.bar(names, [read_json(run / "summary.json")["seconds_per_step"] for run in runs], color="tab:gray")
    seconds.bar_label(bars, fmt="%.2f s", fontsize=8)
    seconds.set(ylabel="seconds per step")
    seconds.tick_params(axis="x", labelsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_clips(figure: Any, manifest_path: Path) -> None:
    """Eight frames of one clip of each of the first eight classes, in two columns."""
    manifest = read_manifest(manifest_path)
    axes = figure.subplots(4, 2)
    for label, axis in enumerate(axes.T.flat):
        axis.axis("off")
        clip = next((clip for clip in manifest.clips if clip.label == label), None)
        if clip is not None:
            video = open_video(clip.path)
            frames = video.read([round(i * (len(video) - 1) / 7) for i in range(8)])  # [8, 3, h, w]
            axis.imshow(torch.nn.functional.pad(frames, (1, 1), value=255).permute(2, 0, 3, 1).flatten(1, 2))
            axis.set_title(manifest.classes[label], fontsize=8, loc="left", pad=2)


if __name__ == "__main__":
    run_bench(main, Arguments, __doc__)
