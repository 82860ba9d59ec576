"""`bigvivit predict`: what a trained run takes videos for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from bigvivit.config import ConfigError
from bigvivit.data.manifest import Clip, Manifest
from bigvivit.training.checkpoint import read_header
from bigvivit.versions import require

VIDEOS = {".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".3gp", ".ogv"}
"""Endings of the files that are taken from a folder; a file given by name may have any."""
SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Say what videos show, by a trained run: the five likeliest classes with their probabilities."""

    run: Positional[Path]
    """Folder that training wrote."""
    paths: Positional[tuple[Path, ...]]
    """Videos, and folders of videos."""
    json: bool = False
    """One JSON object a line, for programs."""
    views: int = 4
    """Clips per video, their starts spread evenly."""
    crops: Literal[1, 3] = 3
    """1: centre. 3: start, centre and end of the longer side."""
    workers: int = 2
    """Processes that decode videos; 0 decodes in this process."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` is CUDA where there is one."""

    def __post_init__(self) -> None:
        if self.views < 1:
            raise ConfigError(f"views={self.views} must be at least 1")
        if self.workers < 0:
            raise ConfigError(f"workers={self.workers} must not be negative")
        if not self.paths:
            raise ConfigError("no videos are given: name files or folders after the run")


@dataclass(frozen=True)
class Prediction:
    """One video."""

    path: Path
    labels: list[tuple[str, float]]
    """The likeliest classes and their probabilities, the likeliest first."""
    error: str | None = None
    """Why there is none."""


def predict(config: PredictConfig) -> Iterator[Prediction]:
    """Softmax of the mean of logits over views and crops, for each file in turn. Raises ConfigError."""
    require("reading videos", "av", "torchvision")
    header = read_header(config.run)
    paths = find_videos(config.paths)

    from bigvivit.assemble import choose_device, load_run
    from bigvivit.data.loader import build_eval_loader
    from bigvivit.eval import mean_logits, show_progress

    device = choose_device(config.device)
    clips = tuple(Clip(path, label=-1) for path in paths)
    loader = build_eval_loader(
        header.clip,
        Manifest(config.run, clips, header.classes),
        views=config.views,
        crops=config.crops,
        batch_size=1,  # each is told as soon as it is known
        workers=min(config.workers, len(paths)),
        rank=0,
        world=1,
    )
    model = load_run(config.run, header, device)
    for batch in show_progress(loader, "predicting"):
        for index, reason in batch.failed:
            yield Prediction(paths[index], [], reason)
        if len(batch.clips) == 0:
            continue
        for index, row in zip(batch.indices.tolist(), mean_logits(model, batch.clips).softmax(-1), strict=True):
            if not row.isfinite().all():
                yield Prediction(paths[index], [], f"{paths[index]}: {config.run} gives scores that are not finite")
                continue
            scores, numbers = row.topk(min(SHOWN, len(header.classes)))
            labels = [
                (header.classes[number], score) for number, score in zip(numbers.tolist(), scores.tolist(), strict=True)
            ]
            yield Prediction(paths[index], labels)


def find_videos(given: tuple[Path, ...]) -> list[Path]:
    """Files as given, and all videos under folders, in the order of their names. Raises ConfigError."""
    found: list[Path] = []
    for path in given:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in VIDEOS and file.is_file())
            if not inside:
                raise ConfigError(
                    f"{path} holds no video: files that end in {', '.join(sorted(VIDEOS))} are looked for"
                )
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise ConfigError(f"{path} is neither a file nor a folder: check the path")
    return found


def as_json(prediction: Prediction) -> dict[str, Any]:
    """One line of `--json`."""
    if prediction.error is not None:
        return {"path": str(prediction.path), "error": prediction.error}
    labels = [{"label": label, "score": score} for label, score in prediction.labels]
    return {"path": str(prediction.path), "predictions": labels}
