"""`bigvivit eval`: accuracy of a finished run over uniform views and crops."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigvivit.config import EvalConfig
from bigvivit.data.manifest import read_manifest
from bigvivit.training.checkpoint import read_header

if TYPE_CHECKING:
    import torch
    from torch import nn


def evaluate_run(config: EvalConfig) -> dict[str, Any]:
    """Evaluate, write `eval.json` (with shuffled frames `eval_shuffled.json`) into the run's folder, and return it."""
    header = read_header(config.run)
    manifest = read_manifest(config.manifest, header.classes)

    from bigvivit.assemble import choose_device, load_run
    from bigvivit.data.loader import build_eval_loader

    device = choose_device(config.device)
    loader = build_eval_loader(
        header.clip,
        manifest,
        views=config.views,
        crops=config.crops,
        batch_size=config.batch_size,
        workers=config.workers,
        shuffle_frames=config.shuffle_frames,
        seed=header.seed,
        rank=0,
        world=1,
    )
    model = load_run(config.run, header, device)
    result = {
        **evaluate(model, loader, classes=len(header.classes), device=device),
        "clips": len(manifest.clips),
        "views": config.views,
        "crops": config.crops,
        "shuffle_frames": config.shuffle_frames,
        "manifest": str(config.manifest),
    }
    path = result_path(config.run, config.shuffle_frames)
    path.write_text(json.dumps(result, indent=2) + "\n")
    return result


def result_path(run: Path, shuffle_frames: bool) -> Path:
    """Where the accuracy of a run is kept."""
    return run / ("eval_shuffled.json" if shuffle_frames else "eval.json")


def evaluate(model: nn.Module, loader: Any, *, classes: int, device: torch.device) -> dict[str, float]:
    """Top-1 and top-5 of each video's logits, averaged over its views (the original does not average probabilities)."""
    import torch
    from rich.progress import track
    from torchmetrics.classification import MulticlassAccuracy

    top1, top5 = (MulticlassAccuracy(classes, top_k=min(k, classes), average="micro").to(device) for k in (1, 5))
    with torch.inference_mode():
        for batch in track(loader, description="evaluating", disable=not sys.stdout.isatty()):
            views = batch.clips.unbind(1)  # one after the other: memory is that of one view
            logits = torch.stack([model(view.to(device, non_blocking=True)).float() for view in views]).mean(0)
            labels = batch.labels.to(device)
            top1.update(logits, labels)
            top5.update(logits, labels)
    return {"top1": float(top1.compute()), "top5": float(top5.compute())}
