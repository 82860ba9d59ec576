"""The demo's clips: only the order of frames tells how often, and in which direction, something went round."""

from __future__ import annotations

import csv
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bigvivit.config import ClipConfig, ConfigError
from bigvivit.data import demo
from bigvivit.data.demo import MARKER, MOTIONS, DemoConfig, main, write_demo
from bigvivit.data.manifest import read_manifest
from bigvivit.data.sampling import view_frames

CLASSES = sorted(sum(MOTIONS, ()))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DemoConfig:
    config = DemoConfig(folder=tmp_path_factory.mktemp("demo"), train_clips=480, val_clips=160, seed=3)
    write_demo(config)
    return config


def decode(path: Path) -> np.ndarray:
    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def saturation(frames: np.ndarray) -> np.ndarray:
    """[..., h, w, 3] → [..., h, w] of 0 to 1: how far from grey."""
    red, green, blue = np.moveaxis(frames, -1, 0)  # plane by plane: NumPy is slow along an axis of three
    most = np.maximum(np.maximum(red, green), blue)
    return (most - np.minimum(np.minimum(red, green), blue)).astype(np.float32) / 255


def find_object(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centre (x, y) [n, 2] and area [n] of what is saturated, in pixels."""
    mass = saturation(frames) > 0.5
    y, x = np.mgrid[: frames.shape[1], : frames.shape[2]]
    area = mass.sum((1, 2))
    return np.stack([(mass * x).sum((1, 2)) / area, (mass * y).sum((1, 2)) / area], axis=1), area


def test_a_clip_played_backwards_is_its_partner(config: DemoConfig) -> None:
    """Frame for frame and bit for bit after the codec."""
    for number in range(8):
        names = [label.replace(" ", "_") for label in MOTIONS[number % 4]]
        first, second = (decode(config.folder / f"clips/val_{number:04d}_{name}.mp4") for name in names)
        assert np.array_equal(first[::-1], second)


def angles(clip: Path) -> np.ndarray:
    """Of the object about the middle of its path, in each frame [n]; y points down: growing is clockwise."""
    centre, _ = find_object(decode(clip))
    x, y = (centre - centre.mean(0)).T
    return np.arctan2(y, x)


def turns_of(name: str) -> int:
    """With a sign: clockwise is positive."""
    turns, _, direction = name.split()
    return int(turns) * (1 if direction == "clockwise" else -1)


def test_each_class_shows_its_turns(config: DemoConfig) -> None:
    manifest = read_manifest(config.folder / "val.csv")
    for clip in manifest.clips:
        turned = np.unwrap(angles(clip.path))
        count = len(turned)
        assert (turned[-1] - turned[0]) / (2 * np.pi) * count / (count - 1) == pytest.approx(
            turns_of(manifest.classes[clip.label]), abs=0.15
        ), clip.path.name


def test_eight_frames_do_not_tell_three_turns_from_five_the_other_way(config: DemoConfig) -> None:
    """In the middle of 8 equal parts the object is where it would be of the other class; of 32 parts it is not."""
    manifest = read_manifest(config.folder / "val.csv")
    for clip in manifest.clips[:40]:
        where, turns = angles(clip.path), turns_of(manifest.classes[clip.label])
        for parts, alike in ((8, True), (32, False)):
            (chosen,) = view_frames(len(where), 30.0, ClipConfig(frames=parts), 1)
            other = turns - 8 * np.sign(turns)  # what 8 frames take it for
            expected = where[chosen[0]] + 2 * np.pi * other * (np.array(chosen) - chosen[0]) / len(where)
            off = np.abs(np.angle(np.exp(1j * (where[chosen] - expected))))
            assert (off.max() < 1.0) == alike, (clip.path.name, parts)


def test_splits_are_balanced_and_keep_partners_together(config: DemoConfig) -> None:
    pairs = {}
    for name, count in (("train", 480), ("val", 160)):
        manifest = read_manifest(config.folder / f"{name}.csv")
        assert manifest.classes == tuple(CLASSES)
        assert np.bincount([clip.label for clip in manifest.clips]).tolist() == [count // 8] * 8
        digests = [
            hashlib.sha256(np.sort(decode(clip.path), axis=0).tobytes()).digest() for clip in manifest.clips[:80]
        ]
        assert all(digests.count(digest) == 2 for digest in digests)
        pairs[name] = set(digests)
    assert not pairs["train"] & pairs["val"]


def test_clips_are_real_h264_of_many_lengths_and_rates(config: DemoConfig) -> None:
    lengths, rates = set(), set()
    for clip in read_manifest(config.folder / "val.csv").clips:
        with av.open(clip.path) as container:
            (stream,) = container.streams.video
            assert stream.codec_context.name == "h264"
            lengths.add(stream.frames)
            rates.add(float(stream.average_rate))
    assert rates == set(map(float, demo.FRAME_RATES))
    assert len(lengths) > 8
    assert min(lengths) >= 32


def fit_and_score(train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor]) -> float:
    """Accuracy of a small network on flat features."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(train[0].shape[1], 128), nn.GELU(), nn.Dropout(0.3), nn.Linear(128, 8))
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    for _ in range(60):
        for index in torch.randperm(len(train[0])).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(train[0][index]), train[1][index]).backward()
            optimizer.step()
    return (network.eval()(val[0]).argmax(-1) == val[1]).float().mean().item()


def maps_of(config: DemoConfig, name: str) -> tuple[list[np.ndarray], Tensor]:
    """Saturation maps [n, 16, 16] of each clip's frames, and the labels."""
    manifest = read_manifest(config.folder / f"{name}.csv")
    maps = [saturation(decode(clip.path)).reshape(-1, 16, 4, 16, 4).mean((2, 4)) for clip in manifest.clips]
    return maps, torch.tensor([clip.label for clip in manifest.clips])


def test_whoever_is_blind_to_order_stays_at_chance(config: DemoConfig) -> None:
    splits = {name: maps_of(config, name) for name in ("train", "val")}
    generator = np.random.default_rng(0)

    def features(kind: str, name: str) -> tuple[Tensor, Tensor]:
        maps, labels = splits[name]
        if kind == "one frame":
            rows = [clip[generator.integers(len(clip))] for clip in maps]
        elif kind == "mean over time":
            rows = [clip.mean(0) for clip in maps]
        else:  # the order: frames one after the other
            rows = [clip[np.linspace(0, len(clip) - 1, 24).round().astype(int)] for clip in maps]
        return torch.from_numpy(np.stack(rows)).flatten(1) * 4, labels

    scores = {
        kind: fit_and_score(features(kind, "train"), features(kind, "val"))
        for kind in ("one frame", "mean over time", "in order")
    }
    assert scores["one frame"] <= 0.25
    assert scores["mean over time"] <= 0.25
    assert scores["in order"] > 0.6  # the same network, when it is shown the order


def test_a_second_call_reuses_and_other_settings_do_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = DemoConfig(folder=tmp_path / "demo", train_clips=8, val_clips=8, seed=1)
    write_demo(config)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in config.folder.rglob("*.mp4")}
    assert len(before) == 16
    write_demo(config)
    assert "is there already" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == written for path, (written, _) in before.items())

    write_demo(replace(config, seed=2))
    after = {path: path.read_bytes() for path in config.folder.rglob("*.mp4")}
    assert after.keys() == before.keys()
    assert all(after[path] != content for path, (_, content) in before.items())

    main([str(config.folder), "--train-clips", "8", "--val-clips", "8", "--seed", "1"])
    again = {path: path.read_bytes() for path in config.folder.rglob("*.mp4")}
    assert again == {path: content for path, (_, content) in before.items()}  # the seed decides, bit for bit


def test_what_was_left_half_written_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DemoConfig(folder=tmp_path / "demo", train_clips=8, val_clips=8)
    encode = demo.encode

    def stop(path: Path, *rest: object) -> None:
        if "0002" in path.name:
            raise KeyboardInterrupt
        encode(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(demo, "encode", stop)
    with pytest.raises(KeyboardInterrupt):
        write_demo(config)
    monkeypatch.undo()
    write_demo(config)
    assert json.loads((config.folder / MARKER).read_text())["complete"] is True
    with (config.folder / "train.csv").open() as file:
        assert all((config.folder / row["path"]).is_file() for row in csv.DictReader(file))


def test_a_call_stopped_while_it_deletes_leaves_no_complete_marker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DemoConfig(folder=tmp_path / "demo", train_clips=8, val_clips=8)
    write_demo(config)
    unlink = Path.unlink

    def stop(path: Path) -> None:
        unlink(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "unlink", stop)
    with pytest.raises(KeyboardInterrupt):
        write_demo(replace(config, seed=1))
    monkeypatch.undo()
    write_demo(config)
    assert len(list(config.folder.rglob("*.mp4"))) == 16


@pytest.mark.parametrize("lost", ["val.csv", "clips/train_0001_3_turns_anticlockwise.mp4"])
def test_what_was_lost_is_written_again(tmp_path: Path, lost: str) -> None:
    config = DemoConfig(folder=tmp_path / "demo", train_clips=8, val_clips=8)
    write_demo(config)
    content = (config.folder / lost).read_bytes()
    (config.folder / lost).unlink()
    write_demo(config)
    assert (config.folder / lost).read_bytes() == content


@pytest.mark.parametrize("name", ["thesis.tex", MARKER])
@pytest.mark.parametrize("text", ["years of work", "[1]", '{"scene": 1}'])
def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path, name: str, text: str) -> None:
    """Also one that has files of the demo's names."""
    (tmp_path / "clips").mkdir()
    files = {tmp_path / name: text, tmp_path / "clips/train_holiday.mp4": "the sea"}
    for path, content in files.items():
        path.write_text(content)
    with pytest.raises(ConfigError, match="holds something that is not the demo"):
        write_demo(DemoConfig(folder=tmp_path, train_clips=8, val_clips=8))
    assert {path: path.read_text() for path in tmp_path.rglob("*.*")} == files


def test_a_new_demo_deletes_nothing_but_the_old_one(tmp_path: Path) -> None:
    config = DemoConfig(folder=tmp_path / "demo", train_clips=16, val_clips=8)
    write_demo(config)
    for note in ("notes.txt", "clips/notes.txt"):
        (config.folder / note).write_text("mine")
    write_demo(replace(config, train_clips=8))
    assert len(list(config.folder.rglob("*.mp4"))) == 16
    assert [path.read_text() for path in config.folder.rglob("notes.txt")] == ["mine", "mine"]


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"train_clips=10 is not a multiple of the 8 classes: try 8"):
        DemoConfig(folder=Path("x"), train_clips=10)
    with pytest.raises(ConfigError, match="seed=-1 must not be negative"):
        DemoConfig(folder=Path("x"), seed=-1)
