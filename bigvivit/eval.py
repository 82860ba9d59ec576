"""`bigvivit eval`: accuracy of trained runs over uniform views and crops, on one process or on several.

`torchrun --nproc_per_node 8 -m bigvivit.cli eval RUN …` shares the videos out: each rank holds the whole model.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigvivit.config import ConfigError, EvalConfig
from bigvivit.data.manifest import Manifest, read_manifest
from bigvivit.memory.ranks import gather_over_ranks, rank_and_world, start_process_group
from bigvivit.training.checkpoint import Header, read_header
from bigvivit.versions import require

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from bigvivit.data.loader import Batch

CONFUSIONS = 20
"""Of the pairs of classes that are mixed up, this many are written down: the most frequent ones."""


@dataclass(frozen=True)
class Outputs:
    """What a model made of some clips of a manifest, each once."""

    indices: list[int]
    """Positions in the manifest."""
    logits: Tensor
    """fp32 [clips, classes] on the CPU, the mean over views and crops."""
    failed: list[tuple[int, str]]
    """(position, reason) of each video that could not be read."""
    shuffled: Tensor | None = None
    """The logits of the same clips with their frames in another order, if that was asked for."""


def evaluate_runs(config: EvalConfig) -> list[dict[str, Any]]:
    """Evaluate each run, write `eval.json`, `eval.csv` and `eval.png` into its folder.

    Returns what was written, on rank 0; elsewhere nothing. Raises ConfigError, for all runs before the first starts.
    """
    require("reading videos", "av", "torchvision")
    require("evaluating", "torchmetrics", "matplotlib")
    runs = [(run, header := read_header(run), read_manifest(config.manifest, header.classes)) for run in config.runs]
    for run, header, _ in runs:
        if config.cache is not None and config.shuffle_frames and header.model.tubelet != 1:
            raise ConfigError(
                f"cache={config.cache} with shuffle_frames: {run} has one vector for {header.model.tubelet} frames, "
                f"whose order cannot be changed any more; leave one of them out"
            )
        if not os.access(run, os.W_OK):
            raise ConfigError(f"{run}: no permission to write there, where the result goes; evaluate a copy of it")
    rank, world = rank_and_world()

    from bigvivit.assemble import choose_device

    device = choose_device(config.device)
    start_process_group(device, world, deepspeed=False, fsdp=False)
    results = []
    for run, header, manifest in runs:
        outputs = gather_outputs(evaluate_run(run, header, manifest, config, device))
        if rank == 0:
            check_finite(run, outputs, manifest)
            result = {"run": str(run), "frames": header.clip.frames, **describe(config), **score(outputs, manifest)}
            write_result(run, result, outputs, manifest)
            results.append(result)
    return results


def evaluate_run(run: Path, header: Header, manifest: Manifest, config: EvalConfig, device: torch.device) -> Outputs:
    """This rank's share of the videos through one run's model."""
    from bigvivit.assemble import load_run
    from bigvivit.data.loader import build_eval_loader, shuffle_frames

    rank, world = rank_and_world()
    loader = build_eval_loader(
        header.clip,
        manifest,
        views=config.views,
        crops=config.crops,
        batch_size=config.batch_size,
        workers=config.workers,
        rank=rank,
        world=world,
    )
    model = load_run(run, header, device)
    with ExitStack() as stack:
        cached: Iterable[Any] = loader
        if config.cache is not None:
            from bigvivit.caching import open_run_cache
            from bigvivit.training.tower_pass import TowerPass

            cache = stack.enter_context(closing(open_run_cache(run, header, config, device)))
            cached = cache.evaluation(loader, TowerPass(model, device), views=config.views, crops=config.crops)
        reorder = partial(shuffle_frames, crops=config.crops, seed=header.seed) if config.shuffle_frames else None
        return collect(model, cached, classes=len(header.classes), reorder=reorder)


def collect(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    classes: int,
    reorder: Callable[[Batch], Tensor] | None = None,
    description: str = "evaluating",
) -> Outputs:
    """All that a loader gives, through a model; with `reorder` also its clips in another order of their frames."""
    import torch

    indices: list[int] = []
    failed: list[tuple[int, str]] = []
    logits, shuffled = [torch.empty(0, classes)], [torch.empty(0, classes)]
    for batch in show_progress(loader, description):
        indices += batch.indices.tolist()
        failed += batch.failed
        if len(batch.clips):
            logits.append(mean_logits(model, batch.clips))
            if reorder is not None:
                shuffled.append(mean_logits(model, reorder(batch)))
    return Outputs(indices, torch.cat(logits), failed, torch.cat(shuffled) if reorder is not None else None)


def show_progress(loader: Iterable[Any], description: str) -> Iterable[Any]:
    """A bar on a terminal, nothing elsewhere."""
    from rich.progress import track

    return track(loader, description=description, disable=not sys.stdout.isatty())


def mean_logits(model: nn.Module, clips: Tensor) -> Tensor:
    """The mean of the views' logits, fp32 [b, classes] on the CPU, of clips [b, views, ...] (as in the original, not of
    probabilities)."""
    import torch

    with torch.inference_mode():  # view after view: memory is that of one
        return torch.stack([model(view).float() for view in clips.unbind(1)]).mean(0).cpu()


def gather_outputs(own: Outputs) -> Outputs:
    """Those of all ranks on rank 0, in the manifest's order. Every rank must call it."""
    import torch

    everyone = gather_over_ranks(own)
    indices = [index for outputs in everyone for index in outputs.indices]
    order = sorted(range(len(indices)), key=indices.__getitem__)
    logits = torch.cat([outputs.logits for outputs in everyone])
    failed = sorted(entry for outputs in everyone for entry in outputs.failed)
    parts = [outputs.shuffled for outputs in everyone if outputs.shuffled is not None]
    shuffled = torch.cat(parts)[order] if parts else None
    return Outputs([indices[place] for place in order], logits[order], failed, shuffled)


def check_finite(run: Path, outputs: Outputs, manifest: Manifest) -> None:
    """Raise ConfigError for logits that are no numbers: sorted, they would still give an accuracy."""
    bad = [index for index, row in zip(outputs.indices, outputs.logits, strict=True) if not row.isfinite().all()]
    if bad:
        raise ConfigError(
            f"{run} gives logits that are not finite for {len(bad)} of {len(outputs.indices)} clips "
            f"({manifest.clips[bad[0]].path} is the first): its training diverged, or its compute type overflows; "
            f"evaluate an earlier checkpoint"
        )


def describe(config: EvalConfig) -> dict[str, Any]:
    """How it was evaluated."""
    return {"manifest": str(config.manifest), "views": config.views, "crops": config.crops}


def score(outputs: Outputs, manifest: Manifest) -> dict[str, Any]:
    """Top-1 and top-5 over the clips that could be read, under `shuffled` the same of the clips with their frames in
    another order, top-1 per class, and who is taken for whom.

    Raises ConfigError where no clip could be read.
    """
    failed = [{"path": str(manifest.clips[index].path), "reason": reason} for index, reason in outputs.failed]
    if not outputs.indices:
        reasons = "".join(f"\n  - {entry['reason']}" for entry in failed[:5])
        raise ConfigError(f"manifest={manifest.path}: none of its {len(failed)} videos can be read:{reasons}")
    accuracies: dict[str, Any] = {**measure_accuracy(outputs.logits, outputs.indices, manifest)}
    if outputs.shuffled is not None:
        accuracies["shuffled"] = measure_accuracy(outputs.shuffled, outputs.indices, manifest)
    counts = confusion(outputs, manifest)
    per_class = [
        {"class": name, "clips": int(row.sum()), "correct": int(row[number]), "accuracy": share(row[number], row.sum())}
        for number, (name, row) in enumerate(zip(manifest.classes, counts, strict=True))
    ]
    mixed = sorted(
        (
            {"class": manifest.classes[label], "taken_for": manifest.classes[guess], "clips": int(counts[label, guess])}
            for label, guess in counts.nonzero().tolist()
            if label != guess
        ),
        key=lambda entry: -entry["clips"],
    )
    return {
        "clips": len(outputs.indices),
        "failed": failed,
        **accuracies,
        "per_class": per_class,
        "most_confused": mixed[:CONFUSIONS],
    }


def measure_accuracy(logits: Tensor, indices: list[int], manifest: Manifest) -> dict[str, float]:
    """Top-1 and top-5 of logits [clips, classes]."""
    import torch
    from torchmetrics.functional.classification import multiclass_accuracy

    classes = len(manifest.classes)
    if classes == 1:  # torchmetrics knows no single class; there everybody is right
        return {"top1": 1.0, "top5": 1.0}
    labels = torch.tensor([manifest.clips[index].label for index in indices])
    return {
        f"top{k}": float(multiclass_accuracy(logits, labels, classes, top_k=min(k, classes), average="micro"))
        for k in (1, 5)
    }


def share(part: Tensor, whole: Tensor) -> float | None:
    """None for a class that has no clip."""
    return float(part / whole) if whole else None


def confusion(outputs: Outputs, manifest: Manifest) -> Tensor:
    """int64 [label, guess]."""
    import torch

    classes = len(manifest.classes)
    labels = torch.tensor([manifest.clips[index].label for index in outputs.indices])
    places = labels * classes + outputs.logits.argmax(1)
    return torch.bincount(places, minlength=classes**2).view(classes, classes)


def write_result(run: Path, result: dict[str, Any], outputs: Outputs, manifest: Manifest) -> None:
    """The numbers, what each clip was taken for, and the picture of the confusion."""
    from bigvivit.training.plots import draw_confusion

    names = ["path", "label", "top1"] + ["top1_shuffled"] * (outputs.shuffled is not None)
    with (run / "eval.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        guesses = [logits.argmax(1).tolist() for logits in (outputs.logits, outputs.shuffled) if logits is not None]
        for index, *guessed in zip(outputs.indices, *guesses, strict=True):
            clip = manifest.clips[index]
            writer.writerow([clip.path, *(manifest.classes[number] for number in (clip.label, *guessed))])
    (run / "eval.json").write_text(json.dumps(result, indent=2) + "\n")
    draw_confusion(run / "eval.png", confusion(outputs, manifest).numpy(), manifest.classes)
