"""Videos without labels, one by one and by the folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from bigvivit.assemble import load_run
from bigvivit.config import ConfigError
from bigvivit.data.loader import build_eval_loader
from bigvivit.data.manifest import read_manifest
from bigvivit.predict import PredictConfig, find_videos, predict
from bigvivit.training.checkpoint import read_header
from tests.launching import Runs, call


@pytest.fixture
def videos(demo: Path, tmp_path: Path) -> Path:
    """Three of the demo's clips, one in a folder below, and two files that are none."""
    folder = tmp_path / "vidéos"
    (folder / "below").mkdir(parents=True)
    clips = read_manifest(demo / "val.csv").clips
    for clip, name in zip(clips, ("b.mp4", "a.MP4", "below/c.mp4"), strict=False):
        shutil.copy(clip.path, folder / name)
    (folder / "notes.txt").write_text("no video")
    (folder / "torn.mp4").write_bytes(b"no video either")
    return folder


def test_scores_are_those_of_evaluation(runs: Runs, demo: Path) -> None:
    header = read_header(runs["plain2"])
    manifest = read_manifest(demo / "val.csv", header.classes)
    paths = tuple(clip.path for clip in manifest.clips[:3])
    predictions = list(
        predict(PredictConfig(run=runs["plain2"], paths=paths, views=2, crops=1, workers=0, device="cpu"))
    )
    loader = build_eval_loader(header.clip, manifest, views=2, crops=1, batch_size=3, workers=0, rank=0, world=1)
    batch = next(iter(loader))
    model = load_run(runs["plain2"], header, torch.device("cpu"))
    with torch.no_grad():
        expected = torch.stack([model(batch.clips[:, view]) for view in range(2)]).mean(0).softmax(-1)
    for prediction, path, row in zip(predictions, paths, expected, strict=True):
        assert prediction.path == path
        scores, numbers = row.topk(5)
        assert [label for label, _ in prediction.labels] == [header.classes[number] for number in numbers]
        assert [score for _, score in prediction.labels] == pytest.approx(scores.tolist(), abs=1e-5)


def test_a_folder_with_a_torn_file(videos: Path, runs: Runs) -> None:
    options = ("--views", 1, "--crops", 1, "--workers", 0, "--device", "cpu")
    done = call("predict", runs["plain1"], videos, "--json", *options)
    assert done.returncode == 1, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [Path(line["path"]).name for line in lines] == ["a.MP4", "b.mp4", "c.mp4", "torn.mp4"]
    assert [len(line.get("predictions", [])) for line in lines] == [5, 5, 5, 0]
    assert "torn.mp4" in lines[3]["error"]
    done = call("predict", runs["plain1"], videos / "b.mp4", *options)
    assert done.returncode == 0, done.stderr
    assert lines[1]["predictions"][0]["label"] in done.stdout


def test_what_is_no_video_is_refused_before_torch_is_imported(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.mp4 is neither a file nor a folder"):
        find_videos((videos / "gone.mp4",))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty holds no video: files that end in \.3gp, \.avi"):
        find_videos((tmp_path / "empty",))
    assert find_videos((videos / "notes.txt",)) == [videos / "notes.txt"]  # by name, whatever its ending
    with pytest.raises(ConfigError, match="no videos are given"):
        PredictConfig(run=tmp_path, paths=())
