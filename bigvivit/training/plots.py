"""Pictures of runs: curves of training, and who is taken for whom."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")  # into files, whatever display there is
import matplotlib.pyplot as plt

from bigvivit.units import GiB

mpl.rcParams["text.parse_math"] = False  # classes and folders may have dollar signs in their names

READABLE = 40
"""Classes up to which their names fit along an axis."""


def draw_confusion(path: Path, counts: np.ndarray, classes: Sequence[str]) -> None:
    """Shares of each class's clips, by what they were taken for: `counts` is [label, guess]."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = min(5 + 0.2 * len(classes), 14)
    figure, axes = plt.subplots(figsize=(size, size), layout="constrained")
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    figure.colorbar(image, ax=axes, shrink=0.7, label="share of the class's clips")
    axes.set(
        xlabel="taken for", ylabel="class", title=f"{int(np.trace(counts))} of {int(counts.sum())} clips are right"
    )
    if len(classes) <= READABLE:
        names = [name if len(name) <= 24 else f"{name[:23]}…" for name in classes]
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_curves(path: Path, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Loss, validation, learning rate and memory by step: the records of `metrics.jsonl` of each run, by its name."""
    panels = (
        ("loss", "loss", 1.0),
        ("val_top1", "validation top-1", 1.0),
        ("lr", "learning rate", 1.0),
        ("peak_bytes", "peak memory of a rank, GiB", GiB),
    )
    shown = [panel for panel in panels if any(panel[0] in record for records in runs.values() for record in records)]
    figure, axes = plt.subplots(1, len(shown), figsize=(4.2 * len(shown), 3.4), layout="constrained", squeeze=False)
    for axis, (key, title, unit) in zip(axes[0], shown, strict=True):
        for name, records in runs.items():
            points = [(record["step"], record[key] / unit) for record in records if key in record]
            if points:
                axis.plot(
                    *zip(*points, strict=True), label=name, marker="o" if len(points) < 20 else None, markersize=3
                )
        axis.set(xlabel="step", title=title)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    if len(runs) > 1:
        axes[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)
