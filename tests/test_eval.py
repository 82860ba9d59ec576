"""Evaluation against the same numbers taken by hand."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bigvivit.assemble import load_run
from bigvivit.cli import describe_result
from bigvivit.config import ConfigError, EvalConfig
from bigvivit.data.loader import build_eval_loader, shuffle_frames
from bigvivit.data.manifest import Clip, Manifest, read_manifest
from bigvivit.eval import Outputs, collect, confusion, evaluate_runs, score, write_result
from bigvivit.predict import PredictConfig, predict
from bigvivit.training.checkpoint import TRAINABLES, read_header, read_sealed, read_trainables, seal, write_checkpoint
from tests.launching import BIN, ROOT, Runs, environment, free_port

CPU = torch.device("cpu")


def make_manifest(labels: list[int], classes: int) -> Manifest:
    clips = tuple(Clip(Path(f"{index}.mp4"), label) for index, label in enumerate(labels))
    return Manifest(Path("val.csv"), clips, tuple(f"class {number}" for number in range(classes)))


def test_mean_of_logits_and_top_k() -> None:
    """Two views whose mean decides otherwise than either view's vote or mean probability."""
    logits = {0: [[9.0, 0.0, 1.0], [-9.0, 0.0, 1.0]], 1: [[0.0, 5.0, 4.0], [2.0, 0.0, 2.0]]}

    def model(clips: torch.Tensor) -> torch.Tensor:
        return torch.tensor([logits[int(clip[0, 0, 0, 0])][int(clip[0, 1, 0, 0])] for clip in clips])

    clips = torch.zeros(2, 2, 1, 3, 1, 1)
    clips[1, :, 0, 0] = 1
    clips[:, 1, 0, 1] = 1
    batch = SimpleNamespace(clips=clips, indices=torch.tensor([0, 1]), failed=((2, "2.mp4 is no video"),))
    outputs = collect(model, [batch], classes=3)  # type: ignore[arg-type]
    # Means: [0, 0, 1] is class 2; [1, 2.5, 3] is class 2, its label 1 second.
    result = score(outputs, make_manifest([2, 1, 0], 3))
    assert (result["top1"], result["top5"], result["clips"]) == (0.5, 1.0, 2)
    assert result["failed"] == [{"path": "2.mp4", "reason": "2.mp4 is no video"}]


@pytest.mark.parametrize("classes", [1, 2, 7, 600])
def test_scores_against_a_count_by_hand(classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(max(classes // 2, 1), (50,), generator=generator).tolist()  # half have no clip
    logits = torch.randn(50, classes, generator=generator)
    manifest = make_manifest(labels, classes)
    result = score(Outputs(list(range(50)), logits, []), manifest)
    ranks = [sorted(row, reverse=True).index(row[label]) for row, label in zip(logits.tolist(), labels, strict=True)]
    assert result["top1"] == pytest.approx(sum(rank == 0 for rank in ranks) / 50)
    assert result["top5"] == pytest.approx(sum(rank < 5 for rank in ranks) / 50)
    for number, entry in enumerate(result["per_class"]):
        own = [rank for rank, label in zip(ranks, labels, strict=True) if label == number]
        assert (entry["clips"], entry["correct"]) == (len(own), own.count(0))
        assert entry["accuracy"] == (pytest.approx(own.count(0) / len(own)) if own else None)
    counts = confusion(Outputs(list(range(50)), logits, []), manifest)
    assert counts.sum() == 50
    assert int(counts.trace()) == ranks.count(0)
    assert sum(entry["clips"] for entry in result["most_confused"]) <= 50 - ranks.count(0)


def test_nothing_that_can_be_read_is_an_error_not_a_zero() -> None:
    with pytest.raises(ConfigError, match=r"none of its 1 videos can be read:\n  - 0\.mp4 is empty"):
        score(Outputs([], torch.empty(0, 3), [(0, "0.mp4 is empty")]), make_manifest([1], 3))


def test_a_class_may_have_any_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither rich nor matplotlib reads anything into it."""
    names = ("[red]", "a[/b]", r"$\bad{$")
    manifest = Manifest(Path("val.csv"), make_manifest([0, 1, 2], 3).clips, names)
    outputs = Outputs([0, 1, 2], torch.eye(3), [])
    result = {"run": "[/exp]", "frames": 8, **score(outputs, manifest)}
    describe_result(result)
    printed = capsys.readouterr().out
    assert [name for name in (*names, "[/exp]: class") if name not in printed] == []
    write_result(tmp_path, result, outputs, manifest)
    assert (tmp_path / "eval.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def diverged(runs: Runs, tmp_path: Path) -> Path:
    """A whole checkpoint whose head holds a NaN."""
    run = shutil.copytree(runs["plain1"], tmp_path / "diverged", ignore=shutil.ignore_patterns("eval*"))
    header = read_header(run)
    trainables = read_trainables(run, header)
    trainables["head.bias"][0] = float("nan")
    write_checkpoint(run, header, trainables)
    return run


def test_logits_that_are_no_numbers_give_no_accuracy(diverged: Path, demo: Path) -> None:
    options: dict[str, Any] = {"views": 1, "crops": 1, "workers": 0, "device": "cpu"}
    with pytest.raises(ConfigError, match=r"diverged gives logits that are not finite for 16 of 16 clips \(.*\.mp4"):
        evaluate_runs(EvalConfig(runs=(diverged,), manifest=demo / "val.csv", **options))
    assert not (diverged / "eval.json").exists()
    video = read_manifest(demo / "val.csv").clips[0].path
    (prediction,) = predict(PredictConfig(run=diverged, paths=(video,), **options))
    assert prediction.labels == []
    assert "scores that are not finite" in str(prediction.error)


@pytest.mark.parametrize("name", ["plain1", "zero2"])
def test_a_run_is_evaluated_as_its_model_says(name: str, runs: Runs, demo: Path) -> None:
    config = EvalConfig(runs=(runs[name],), manifest=demo / "val.csv", views=2, crops=1, workers=0, device="cpu")
    (result,) = evaluate_runs(config)
    assert json.loads((runs[name] / "eval.json").read_text()) == result
    assert (runs[name] / "eval.png").read_bytes().startswith(b"\x89PNG")
    header = read_header(runs[name])
    model = load_run(runs[name], header, CPU)
    manifest = read_manifest(demo / "val.csv", header.classes)
    loader = build_eval_loader(header.clip, manifest, views=2, crops=1, batch_size=16, workers=0, rank=0, world=1)
    (batch,) = loader
    with torch.no_grad():
        logits = sum(model(batch.clips[:, view]) for view in range(2))
    ranks = (logits > logits.gather(1, batch.labels[:, None])).sum(1)
    assert result["clips"] == 16
    assert result["top1"] == pytest.approx((ranks == 0).float().mean().item())
    assert result["top5"] == pytest.approx((ranks < 5).float().mean().item())


def test_two_ranks_count_each_clip_once_and_failures_too(runs: Runs, demo: Path, tmp_path: Path) -> None:
    """15 clips and 2 that cannot be read, over two ranks; two runs at once. The same as one process, to the clip."""
    lines = (demo / "val.csv").read_text().replace("clips/", f"{demo}/clips/").splitlines()
    (tmp_path / "cut.mp4").write_bytes(b"not a video")
    lines[3:3] = [f"{tmp_path}/cut.mp4,{line.split(',')[1]}" for line in lines[1:3]]
    (tmp_path / "val.csv").write_text("\n".join(lines[:18]) + "\n")
    names = ("plain1", "plain2")
    config = EvalConfig(
        runs=tuple(runs[name] for name in names), manifest=tmp_path / "val.csv", views=1, crops=1, batch_size=4,
        workers=0, device="cpu",
    )  # fmt: skip
    alone = evaluate_runs(config)
    assert [(result["clips"], len(result["failed"])) for result in alone] == [(15, 2)] * 2
    assert all(str(tmp_path / "cut.mp4") in entry["reason"] for entry in alone[0]["failed"])
    words = [BIN / "torchrun", "--nproc_per_node", 2, "--master_port", free_port(), "-m", "bigvivit.cli", "eval"]
    words += [*config.runs, "--manifest", config.manifest, "--views", 1, "--crops", 1, "--batch-size", 4]
    done = subprocess.run(
        [str(word) for word in (*words, "--workers", 0, "--device", "cpu")],
        check=False, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name, expected in zip(names, alone, strict=True):
        assert json.loads((runs[name] / "eval.json").read_text()) == expected
    assert done.stdout.count("of 15 clips; 2 videos could not be read and are not counted") == 2


def test_shuffled_frames_are_a_column_of_the_same_pass(runs: Runs, demo: Path) -> None:
    config = EvalConfig(
        runs=(runs["plain1"],), manifest=demo / "val.csv", views=1, crops=1, workers=0, shuffle_frames=True,
        device="cpu",
    )  # fmt: skip
    (result,) = evaluate_runs(config)
    assert json.loads((runs["plain1"] / "eval.json").read_text()) == result
    header = read_header(runs["plain1"])
    model, manifest = load_run(runs["plain1"], header, CPU), read_manifest(demo / "val.csv", header.classes)
    loader = build_eval_loader(header.clip, manifest, views=1, crops=1, batch_size=16, workers=0, rank=0, world=1)
    (batch,) = loader
    with torch.no_grad():
        right = {
            name: float((model(clips[:, 0]).argmax(1) == batch.labels).float().mean())
            for name, clips in (("ordered", batch.clips), ("shuffled", shuffle_frames(batch, 1, header.seed)))
        }
    assert (result["top1"], result["shuffled"]["top1"]) == (
        pytest.approx(right["ordered"]),
        pytest.approx(right["shuffled"]),
    )
    with (runs["plain1"] / "eval.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == [manifest.classes[clip.label] for clip in manifest.clips]
    for column, expected in (("top1", result["top1"]), ("top1_shuffled", result["shuffled"]["top1"])):
        assert sum(row[column] == row["label"] for row in rows) / len(rows) == pytest.approx(expected)


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
    record = read_sealed(tmp_path / "checkpoint.json")
    record["model"]["temporal_depth"] = 3
    (tmp_path / "checkpoint.json").write_text(seal(record))
    config = EvalConfig(runs=(tmp_path,), manifest=demo / "val.csv", workers=0, device="cpu")
    with pytest.raises(ConfigError, match=r"does not hold the model its header describes \(temporal\.layers\.2"):
        evaluate_runs(config)


def test_all_runs_are_looked_at_before_the_first_starts(runs: Runs, demo: Path, tmp_path: Path) -> None:
    (runs["plain1"] / "eval.json").unlink(missing_ok=True)
    with pytest.raises(ConfigError, match=r"holds no checkpoint\.json"):
        evaluate_runs(EvalConfig(runs=(runs["plain1"], tmp_path), manifest=demo / "val.csv", device="cpu"))
    assert not (runs["plain1"] / "eval.json").exists()


def test_where_nothing_can_be_written_nothing_is_evaluated(
    runs: Runs, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # tests may run as root, who may write anywhere
    with pytest.raises(ConfigError, match="plain1: no permission to write there"):
        evaluate_runs(EvalConfig(runs=(runs["plain1"],), manifest=demo / "val.csv", device="cpu"))
