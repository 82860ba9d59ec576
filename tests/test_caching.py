"""Runs over a cache of the tower's vectors, from their command lines: the same losses without videos and tower."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from bigvivit.assemble import open_tower
from bigvivit.caching import RunCache
from bigvivit.config import ClipConfig, ConfigError, ModelConfig
from bigvivit.data import loader
from bigvivit.data.demo import MOTIONS
from bigvivit.memory.plan import MemoryPlan
from bigvivit.memory.stream import FrozenTower
from tests.data.videos import write_video
from tests.launching import (
    BIN,
    LOSS_TOLERANCE,
    ROOT,
    ZERO3,
    Runs,
    call,
    environment,
    free_port,
    read_losses,
    start,
    train,
)

CLASSES = tuple(label for pair in MOTIONS for label in pair)[:4]
FIXED = [
    *("--stage", 2, "--clip.frames", 16, "--clip.stride", 2, "--clip.size", 48, "--clip.resize", 48),
    *("--clip.min-scale", 1, "--clip.max-scale", 1, "--clip.no-flip", "--data.workers", 0, "--log-every", 1),
    *("--optim.batch-size", 4, "--optim.epochs", 3, "--optim.warmup-epochs", 0.5, "--optim.lr", 0.02),
]
"""A clip has one cut only: videos are square, and shorter than a clip."""


def write_manifest(folder: Path, name: str, numbers: range) -> Path:
    rows = [f"{number}.mp4,{CLASSES[number % len(CLASSES)]}" for number in numbers]
    (folder / name).write_text("\n".join(["path,label", *rows]))
    return folder / name


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for number in range(12):
        write_video(folder / f"{number}.mp4", 12 + number, height=48, width=48)
    return folder


@pytest.fixture
def no_videos(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Have every use of a video, or of the tower, end the run."""

    def refuse(*_: object) -> None:
        raise AssertionError("a video was opened, or the tower ran")

    def arm() -> None:
        monkeypatch.setattr(loader, "open_video", refuse)
        monkeypatch.setattr(FrozenTower, "forward", refuse)

    return arm


def run(out: Path, runs: Runs, *arguments: object) -> str:
    done = call("train", "--out", out, *FIXED, "--init-from", runs["plain1"], *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def read_counts(out: Path) -> tuple[int, int]:
    cache = json.loads((out / "summary.json").read_text())["cache"]
    return cache["views_read"], cache["views_computed"]


@pytest.mark.parametrize("words", [(), ("--memory.compute", "bf16"), ("--model.patch-grid", 2)])
def test_losses_are_those_of_a_run_without_a_cache(
    words: tuple[object, ...], videos: Path, runs: Runs, tmp_path: Path, no_videos: Callable[[], None]
) -> None:
    """To the bit, while the cache is filled and after, in training and in validation; then with no video or tower."""
    data = ["--data.train", write_manifest(videos, "all.csv", range(12)), *words]
    data += ["--data.val", write_manifest(videos, "val.csv", range(2, 9)), "--save-every", 4]
    run(tmp_path / "without", runs, *data)
    run(tmp_path / "filling", runs, *data, "--data.cache", tmp_path / "cache")
    no_videos()
    run(tmp_path / "filled", runs, *data, "--data.cache", tmp_path / "cache")

    metrics = [read_metrics(tmp_path / name) for name in ("without", "filling", "filled")]
    assert metrics[0] == metrics[1] == metrics[2]
    assert len(metrics[0]) == 1 + 9 + 3
    losses = [record["loss"] for record in metrics[0] if "loss" in record]
    assert max(losses) - min(losses) > 100 * LOSS_TOLERANCE  # so much that agreement means something
    weights = [load_file(tmp_path / name / "trainables.safetensors") for name in ("without", "filling", "filled")]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name
        assert torch.equal(tensor, weights[2][name]), name
    assert read_counts(tmp_path / "filling") == (3 * 12 - 12 + 3 * 7 - 7, 12 + 7)
    assert read_counts(tmp_path / "filled") == (3 * 12 + 3 * 7, 0)


def read_metrics(out: Path) -> list[dict[str, float]]:
    """What training came to, without how long it took."""
    kept = ("step", "loss", "grad_norm", "val_top1", "val_loss")
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key in kept} for line in lines]


def test_folds_and_seeds_share_a_cache(
    videos: Path, runs: Runs, tmp_path: Path, no_videos: Callable[[], None], demo: Path
) -> None:
    """With augmentation and two views a clip: what a second fold lacks is computed, a third run finds all of it."""
    cache = ["--data.cache", tmp_path / "cache", "--data.cache-views", 2, "--clip.min-scale", 0.8, "--clip.flip"]
    first = ["--data.train", write_manifest(videos, "first.csv", range(8))]
    second = ["--data.train", write_manifest(videos, "second.csv", range(4, 12))]
    run(tmp_path / "1", runs, *first, *cache)
    assert read_counts(tmp_path / "1") == (8, 16)
    run(tmp_path / "2", runs, *second, *cache, "--seed", 5)
    assert read_counts(tmp_path / "2") == (16, 8)
    no_videos()
    run(tmp_path / "3", runs, *second, *cache, "--seed", 6, "--optim.lr", 0.05, "--optim.epochs", 5)
    assert read_counts(tmp_path / "3") == (40, 0)
    losses = read_losses(tmp_path / "3")
    assert len(set(losses)) == len(losses)


def test_evaluation_is_the_same(videos: Path, runs: Runs, tmp_path: Path, no_videos: Callable[[], None]) -> None:
    """All views of a clip, kept together; under the same key as training's, whose validation shares them."""
    manifest = write_manifest(videos, "all.csv", range(12))
    run(tmp_path / "run", runs, "--data.train", manifest, "--data.cache", tmp_path / "cache", "--data.val", manifest)
    evaluate = ["eval", tmp_path / "run", "--manifest", manifest, "--batch-size", 5, "--workers", 0]
    results, rows = [], []
    for words in ([], ["--cache", tmp_path / "cache"], ["--cache", tmp_path / "cache"]):
        assert call(*evaluate, *words).returncode == 0
        results.append(json.loads((tmp_path / "run" / "eval.json").read_text()))
        rows.append(len(list((tmp_path / "cache").glob("*/eval-4x3/*.safetensors"))))
        if len(results) == 2:
            no_videos()
    assert results[0] == results[1] == results[2]
    assert rows == [0, 1, 1]
    assert call(*evaluate, "--cache", tmp_path / "cache", "--views", 1, "--crops", 1).returncode == 0
    done = call(*evaluate, "--cache", tmp_path / "cache", "--shuffle-frames")
    assert done.returncode == 2
    assert "has one vector for 2 frames, whose order cannot be changed any more" in done.stderr


def test_vectors_of_single_frames_are_shuffled_as_frames_are(videos: Path, tmp_path: Path) -> None:
    manifest = write_manifest(videos, "all.csv", range(12))
    tower = ["--model.tower", "vit-demo", "--model.tower-init", "random", "--model.tubelet", 1]
    done = call("train", "--out", tmp_path / "run", *FIXED, *tower, "--data.train", manifest)
    assert done.returncode == 0, done.stderr
    evaluate = ["eval", tmp_path / "run", "--manifest", manifest, "--workers", 0, "--shuffle-frames", "--views", 2]
    results = []
    for words in ([], ["--cache", tmp_path / "cache"], ["--cache", tmp_path / "cache"]):
        assert call(*evaluate, *words).returncode == 0
        results.append([(tmp_path / "run" / f"eval.{kind}").read_bytes() for kind in ("json", "csv")])
    assert results[0] == results[1] == results[2]


def test_a_broken_video_costs_no_more_than_its_replacement(
    videos: Path, runs: Runs, tmp_path: Path, no_videos: Callable[[], None]
) -> None:
    """Losses, and the list of what failed, are those of a run without a cache."""
    for name in ("0.mp4", "1.mp4", "2.mp4", "3.mp4", "4.mp4", "5.mp4", "6.mp4"):
        (tmp_path / name).write_bytes((videos / name).read_bytes())
    (tmp_path / "7.mp4").write_bytes(b"no video")
    data = ["--data.train", write_manifest(tmp_path, "all.csv", range(8)), "--data.max-failed", 0.2]
    data += ["--optim.epochs", 5]
    run(tmp_path / "without", runs, *data)
    run(tmp_path / "with", runs, *data, "--data.cache", tmp_path / "cache")
    assert read_metrics(tmp_path / "without") == read_metrics(tmp_path / "with")
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("without", "with")]
    assert summaries[0]["failed_clips"] == summaries[1]["failed_clips"]
    assert summaries[0]["replaced_samples"] == summaries[1]["replaced_samples"] == 5
    assert read_counts(tmp_path / "with") == (5 * 8 - 8, 8)  # of which the replacement is one, computed twice


ENGINES = {
    "ddp": ("torchrun", ()),
    "fsdp2": ("torchrun", ("--fsdp",)),
    "zero2": ("deepspeed", ("--ds", "ds_configs/zero2.json")),
    "zero3": ("deepspeed", ZERO3),
}


@pytest.mark.parametrize(
    "engine", [name if name == "zero3" else pytest.param(name, marks=pytest.mark.slow) for name in ENGINES]
)
def test_on_two_ranks(engine: str, videos: Path, runs: Runs, tmp_path: Path) -> None:
    """Ranks lack different numbers of views, and of validation clips: they run the tower together, or not at all."""
    launcher, words = ENGINES[engine]
    some = ["--data.train", write_manifest(videos, "some.csv", range(5)), "--data.cache", tmp_path / "cache"]
    data = ["--data.train", write_manifest(videos, "all.csv", range(12))]
    data += ["--data.val", write_manifest(videos, "val.csv", range(2, 9))]
    run(tmp_path / "plain", runs, *data)
    run(tmp_path / "some", runs, *some)
    out = tmp_path / engine
    common = [*FIXED, *data, "--init-from", runs["plain1"], "--data.cache", tmp_path / "cache", *words]
    train(launcher, out, *common)
    assert read_counts(out) == (3 * 12 - 7 + 0, 7 + 7)
    for plain, own in zip(read_metrics(tmp_path / "plain"), read_metrics(out), strict=True):
        assert own.get("loss") == pytest.approx(plain.get("loss"), abs=LOSS_TOLERANCE)
        assert own.get("val_loss") == pytest.approx(plain.get("val_loss"), abs=10 * LOSS_TOLERANCE)


@pytest.mark.parametrize(("ranks", "words"), [(1, ()), (2, ()), pytest.param(2, ("--fsdp",), marks=pytest.mark.slow)])
def test_filled_ahead(
    ranks: int, words: tuple[str, ...], videos: Path, runs: Runs, tmp_path: Path, no_videos: Callable[[], None]
) -> None:
    """By `bigvivit cache` with the flags of training, which then needs no video; ranks share the views out."""
    data = ["--data.train", write_manifest(videos, "all.csv", range(11)), "--init-from", runs["plain1"]]
    data += ["--data.val", write_manifest(videos, "val.csv", range(2, 9)), "--data.cache", tmp_path / "cache"]
    data += ["--data.cache-views", 3, "--clip.flip"]
    line = ["cache", "--out", tmp_path / "run", *FIXED, *data]
    torchrun = [BIN / "torchrun", "--nproc_per_node", ranks, "--master_port", free_port(), "-m", "bigvivit.cli"]
    command = [str(word) for word in (*torchrun, *line, *words)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"computed {3 * 11 + 7} views" in done.stderr
    no_videos()
    assert call(*line).returncode == 0  # there is nothing left to compute
    assert not (tmp_path / "run").exists()
    run(tmp_path / "run", runs, *data)
    assert read_counts(tmp_path / "run") == (3 * 2 * 4 + 7, 0)


def test_a_killed_fill_goes_on(videos: Path, runs: Runs, tmp_path: Path) -> None:
    """SIGKILL in the first epoch: the next run reads what was kept, and ends with the losses of one left alone."""
    data = ["--data.train", write_manifest(videos, "all.csv", range(12)), "--init-from", runs["plain1"]]
    killer = tmp_path / "sitecustomize.py"
    killer.write_text(
        "import os, signal, bigvivit.data.features as features\n"
        "append, done = features.FeatureStore.append, []\n"
        "def append_or_die(*arguments):\n"
        "    append(*arguments)\n"
        "    done.append(1)\n"
        "    if len(done) == 7:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "features.FeatureStore.append = append_or_die\n"
    )
    words = ["--out", tmp_path / "killed", *FIXED, *data, "--data.cache", tmp_path / "cache"]
    done = start("python", *words, env={"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}"})
    assert done.returncode == -9, done.stderr
    run(tmp_path / "without", runs, *data)
    run(tmp_path / "after", runs, *data, "--data.cache", tmp_path / "cache")
    assert read_counts(tmp_path / "after") == (3 * 12 - 5, 5)
    assert read_metrics(tmp_path / "after") == read_metrics(tmp_path / "without")
    for shard in (tmp_path / "cache").rglob("*.safetensors"):
        with safe_open(shard, "pt") as file:  # the library reads them, cut to their rows or not
            assert list(file.keys()) == ["vectors"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", 1, "--model.tower", "vit-demo"], "keeps a frozen tower's vectors, and stage 1 trains it"),
        (["--stage", 2, "--init-from", "x", "--data.cache-views", 0], "data.cache_views=0 must be at least 1"),
        (
            ["--stage", 2, "--init-from", "x", "--data.cache", "README.md"],
            "data.cache=README.md: README.md is not a folder",
        ),
    ],
)
def test_wrong_settings(arguments: list[object], message: str, tmp_path: Path) -> None:
    cache = [] if "--data.cache" in arguments else ["--data.cache", tmp_path / "cache"]
    done = call("train", "--out", tmp_path / "run", "--data.train", "x.csv", "--clip.frames", 8, *cache, *arguments)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "cache").exists()


def test_vectors_belong_to_all_that_made_them(tmp_path: Path) -> None:
    """Any other tower, type or cut has a folder of its own; what does not touch vectors has not."""
    clip, model = ClipConfig(frames=8), ModelConfig(tower="vit-demo", tower_init="random", tubelet=2, temporal_depth=2)
    source, plan = open_tower(model, seed=0), MemoryPlan(storage="fp32", compute="fp32")
    known = replace(source, checksum="a" * 64)
    common: dict[str, Any] = {"source": known, "model": model, "clip": clip, "plan": plan, "seed": 0}

    def folder(**changes: Any) -> Path:
        return RunCache(tmp_path, device=torch.device("cpu"), **{**common, **changes}).folder

    same = [
        {"seed": 1},  # of the run: the weights are known by their checksum
        {"plan": replace(plan, placement="cpu", chunk=1, recompute=2)},
        {"model": replace(model, temporal_depth=4, droplayer=0.1)},
        {"by_content": True},
        {"dtype": "fp32"},
    ]
    spec = replace(source.spec, mean=(0.1, 0.2, 0.3))
    others = [
        {"source": replace(source, checksum="b" * 64)},
        {"source": replace(known, spec=spec)},
        {"source": source},
        {"source": source, "seed": 1},
        {"model": replace(model, tubelet=4)},
        {"plan": replace(plan, storage="bf16")},
        {"plan": replace(plan, compute="bf16")},
        {"dtype": "bf16"},
        *({"clip": replace(clip, **{name: value})} for name, value in
          {"frames": 16, "stride": 3, "size": 192, "resize": 280, "min_scale": 0.5, "flip": False}.items()),
    ]  # fmt: skip
    assert {folder(**changes) for changes in same} == {folder()}
    assert len({folder(), *(folder(**changes) for changes in others)}) == 1 + len(others)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    clip, model = ClipConfig(frames=8), ModelConfig(tower="vit-demo", tower_init="random", tubelet=2)
    source, plan = open_tower(model, seed=0), MemoryPlan(storage="fp32", compute="fp32")
    with pytest.raises(ConfigError, match=r"cannot be a folder \(Not a directory\): give another"):
        RunCache(
            tmp_path / "file" / "x",
            device=torch.device("cpu"),
            source=source,
            model=model,
            clip=clip,
            plan=plan,
            seed=0,
        )


def test_rounded_products_are_of_another_tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training's `--tf32` changes fp32 vectors on CUDA, and nothing else."""
    clip, model = ClipConfig(frames=8), ModelConfig(tower="vit-demo", tower_init="random", tubelet=2, temporal_depth=2)
    source, exact = open_tower(model, seed=0), MemoryPlan(storage="fp32", compute="fp32")

    def folders(precision: str) -> list[Path]:
        monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision=precision))
        on = [(exact, "cuda"), (replace(exact, compute="bf16"), "cuda"), (exact, "cpu")]
        return [RunCache(tmp_path, source, model, clip, p, seed=0, device=torch.device(d)).folder for p, d in on]

    rounded, same = folders("tf32"), folders("ieee")
    assert rounded[0] != same[0]
    assert rounded[1:] == same[1:]


@pytest.mark.slow
def test_real_clips_and_a_real_tower(shared: Callable[[str], Path], tmp_path: Path) -> None:
    """Filled ahead or while training: the same losses."""
    clips, tower = shared("data/egogestar"), shared("models/dinov2-small")
    rows = (clips / "clips.csv").read_text().splitlines()
    for name, lines in (("train.csv", rows[1:25]), ("val.csv", rows[25:35])):
        paths = "\n".join(f"{clips / line.split(',')[0]},{line.split(',')[1]}" for line in lines)
        (tmp_path / name).write_text(f"path,label\n{paths}\n")
    common = ["--data.train", tmp_path / "train.csv", "--clip.size", 56, "--clip.resize", 64, "--optim.batch-size", 8]
    common += ["--optim.warmup-epochs", 0, "--log-every", 1, "--optim.lr", 0.01]
    first = ["--stage", 1, "--model.tower", tower, "--model.temporal-depth", 1, "--clip.frames", 2]
    train("python", tmp_path / "1", *common, *first, "--optim.epochs", 1)
    second = [*common, "--stage", 2, "--clip.frames", 8, "--init-from", tmp_path / "1", "--optim.epochs", 4]
    second += ["--data.val", tmp_path / "val.csv", "--data.cache-views", 2, "--data.cache"]
    train("cache", tmp_path / "none", *second, tmp_path / "ahead")
    train("python", tmp_path / "filled", *second, tmp_path / "ahead")
    train("python", tmp_path / "filling", *second, tmp_path / "while")
    assert read_counts(tmp_path / "filled") == (4 * 24 + 10, 0)
    assert read_counts(tmp_path / "filling") == (2 * 24, 2 * 24 + 10)
    metrics = [read_metrics(tmp_path / name) for name in ("filled", "filling")]
    for ahead, filling in zip(*metrics, strict=True):  # ahead, other clips share a micro-batch
        assert ahead.keys() == filling.keys()
        for name, value in filling.items():
            assert ahead[name] == pytest.approx(value, abs=LOSS_TOLERANCE)


def test_a_fill_names_what_cannot_be_read(videos: Path, runs: Runs, tmp_path: Path) -> None:
    for number in range(7):
        (tmp_path / f"{number}.mp4").write_bytes((videos / f"{number}.mp4").read_bytes())
    (tmp_path / "7.mp4").write_bytes(b"no video")
    data = ["--data.train", write_manifest(tmp_path, "all.csv", range(8)), "--init-from", runs["plain1"]]
    line = ["cache", "--out", tmp_path / "run", *FIXED, *data, "--data.cache"]
    done = start("cache", *line[1:], tmp_path / "cache")
    assert done.returncode == 0
    assert f"not read: {tmp_path / '7.mp4'} cannot be opened as a video" in done.stderr
    assert "1 videos cannot be read: in training others take their places" in done.stderr
    assert "computed 7 views" in done.stderr
    done = call(*line[:-1])
    assert (done.returncode, "data.cache is not set" in done.stderr) == (2, True), done.stderr


def test_what_belongs_to_a_cache_needs_one(tmp_path: Path) -> None:
    words = ["--stage", 2, "--init-from", "x", "--data.cache-views", 3]
    done = call("train", "--out", tmp_path / "run", "--data.train", "x.csv", "--clip.frames", 8, *words)
    assert (done.returncode, "data.cache_views=3 is for a cache" in done.stderr) == (2, True), done.stderr
