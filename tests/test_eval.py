"""Evaluation against the same numbers taken by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bigvivit.assemble import load_run
from bigvivit.config import ConfigError, EvalConfig
from bigvivit.data.loader import build_eval_loader
from bigvivit.data.manifest import read_manifest
from bigvivit.eval import evaluate, evaluate_run
from bigvivit.training.checkpoint import TRAINABLES, read_header
from tests.launching import Runs

CPU = torch.device("cpu")


def test_mean_of_logits_and_top_k() -> None:
    """Two views whose mean decides otherwise than either view's vote or mean probability."""
    logits = {0: [[9.0, 0.0, 1.0], [-9.0, 0.0, 1.0]], 1: [[0.0, 5.0, 4.0], [2.0, 0.0, 2.0]]}

    def model(clips: torch.Tensor) -> torch.Tensor:
        return torch.tensor([logits[int(clip[0, 0, 0, 0])][int(clip[0, 1, 0, 0])] for clip in clips])

    clips = torch.zeros(2, 2, 1, 3, 1, 1)
    clips[1, :, 0, 0] = 1
    clips[:, 1, 0, 1] = 1
    batch = SimpleNamespace(clips=clips, labels=torch.tensor([2, 1]))
    result = evaluate(model, [batch], classes=3, device=CPU)  # type: ignore[arg-type]
    # Means: [0, 0, 1] is class 2; [1, 2.5, 3] is class 2, its label 1 second.
    assert result == {"top1": 0.5, "top5": 1.0}


@pytest.mark.parametrize("name", ["plain1", "zero2"])
def test_a_run_is_evaluated_as_its_model_says(name: str, runs: Runs, demo: Path) -> None:
    config = EvalConfig(run=runs[name], manifest=demo / "val.csv", views=2, crops=1, workers=0, device="cpu")
    result = evaluate_run(config)
    assert json.loads((runs[name] / "eval.json").read_text()) == result
    header = read_header(runs[name])
    model = load_run(runs[name], header, CPU)
    manifest = read_manifest(demo / "val.csv", header.classes)
    loader = build_eval_loader(
        header.clip, manifest, views=2, crops=1, batch_size=16, workers=0, shuffle_frames=False, seed=0, rank=0, world=1
    )
    (batch,) = loader
    with torch.no_grad():
        logits = sum(model(batch.clips[:, view]) for view in range(2))
    ranks = (logits > logits.gather(1, batch.labels[:, None])).sum(1)
    assert result["clips"] == 16
    assert result["top1"] == pytest.approx((ranks == 0).float().mean().item())
    assert result["top5"] == pytest.approx((ranks < 5).float().mean().item())


def test_shuffled_frames_are_kept_apart(runs: Runs, demo: Path) -> None:
    config = EvalConfig(
        run=runs["plain1"], manifest=demo / "val.csv", views=1, crops=1, workers=0, shuffle_frames=True, device="cpu"
    )
    result = evaluate_run(config)
    assert result["shuffle_frames"] is True
    assert json.loads((runs["plain1"] / "eval_shuffled.json").read_text()) == result


def test_a_first_stage_is_loaded_as_it_was_trained(runs: Runs) -> None:
    """The last loss of training cannot be had again, but its weights can: they are those in the files, in fp32."""
    model = load_run(runs["plain1"], read_header(runs["plain1"]), CPU)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    second = load_run(runs["plain2"], read_header(runs["plain2"]), CPU)
    assert {parameter.dtype for parameter in second.tower.parameters()} == {torch.bfloat16}


def test_a_header_of_another_model_is_refused(runs: Runs, demo: Path, tmp_path: Path) -> None:
    for name in ("checkpoint.json", TRAINABLES):
        (tmp_path / name).write_bytes((runs["plain1"] / name).read_bytes())
    (tmp_path / "tower").symlink_to(runs["plain1"] / "tower")
    record = json.loads((tmp_path / "checkpoint.json").read_text())
    record["model"]["temporal_depth"] = 3
    (tmp_path / "checkpoint.json").write_text(json.dumps(record))
    config = EvalConfig(run=tmp_path, manifest=demo / "val.csv", workers=0, device="cpu")
    with pytest.raises(ConfigError, match=r"does not hold the model its header describes \(temporal\.layers\.2"):
        evaluate_run(config)
