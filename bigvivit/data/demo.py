"""The clips of the embedded default: something goes round, so often and in this direction, in real H.264 files.

The frames of all classes are alike: who does not look at their order stays at chance. Eight frames of a video are too
few: three turns one way then look like five the other way, as the spokes of a wheel in a film do, so whoever sees eight
cannot pass a half; 32 frames are enough. Each video comes with its partner, the same frames in reversed order, and the
codec must not tell either: every frame is coded by itself at a constant quantiser.
"""

from __future__ import annotations

import colorsys
import csv
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track

from bigvivit import __version__
from bigvivit.config import ConfigError
from bigvivit.versions import require

if TYPE_CHECKING:
    import av

TURNS = (1, 3, 4, 5)
"""Of 8 frames over n turns each is n / 8 of a turn further: 3 turns look like 5 the other way, and 4 like 4."""
MOTIONS = tuple((f"{turns} turns clockwise", f"{turns} turns anticlockwise") for turns in TURNS)
"""A motion as it is drawn, and what the same frames show in reversed order."""
SIDE = 64
"""Height and width of a video, in pixels."""
SHAPES = ("disc", "square", "diamond", "ring")
FRAME_RATES = (15, 24, 25, 30)
CODEC = {"qp": "24", "g": "1", "preset": "veryfast", "threads": "1"}
MARKER = "demo.json"


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Write the demo's clips, with a manifest for training and one for evaluation. A second call reuses them."""

    folder: tyro.conf.Positional[Path] = Path("data/demo")
    """Where to; made if it is not there."""
    train_clips: int = 800
    """Clips to train on, a multiple of the eight classes."""
    val_clips: int = 240
    """Held-out clips, a multiple of the eight classes."""
    seed: int = 0
    """Draws every clip."""

    def __post_init__(self) -> None:
        for name in ("train_clips", "val_clips"):
            value = getattr(self, name)
            if value < 8 or value % 8:
                raise ConfigError(f"{name}={value} is not a multiple of the 8 classes: try {max(8, value // 8 * 8)}")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed} must not be negative")


def main(argv: list[str]) -> None:
    """`bigvivit demo FOLDER`."""
    write_demo(tyro.cli(DemoConfig, args=argv, prog="bigvivit demo"))


def write_demo(config: DemoConfig) -> None:
    """`train.csv`, `val.csv` and the videos they name, unless the folder holds all of them already.

    Raises ConfigError for a folder with anything else in it, which is left as it is.
    """
    require("writing videos", "av")
    folder, marker = config.folder, config.folder / MARKER
    settings = {**asdict(config), "folder": None, "version": __version__}
    splits = {"train": config.train_clips, "val": config.val_clips}
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        found = read_marker(marker)
        if found is None:
            raise ConfigError(f"{folder} holds something that is not the demo: give a new folder, or empty that one")
        if found == {"complete": True, "settings": settings} and holds_clips(folder, splits):
            print(f"{folder} is there already")
            return
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    # Before anything is deleted: a call stopped half-way must not leave a marker that says complete.
    marker.write_text(json.dumps({"complete": False, "settings": settings}))
    console = Console()
    for number, (name, clips) in enumerate(splits.items()):
        for path in (folder / "clips").glob(f"{name}_*.mp4"):
            path.unlink()
        with (folder / f"{name}.csv").open("w", newline="") as file:
            manifest = csv.writer(file)
            manifest.writerow(["path", "label"])
            pairs = range(clips // 2)
            for pair in track(pairs, f"drawing {name} clips", console=console, disable=not console.is_terminal):
                motion = MOTIONS[pair % len(MOTIONS)]
                generator = np.random.default_rng([config.seed, number, pair])
                frames, rate = draw_video(TURNS[pair % len(TURNS)], generator)
                for label, ordered in zip(motion, (frames, frames[::-1]), strict=True):
                    path = Path("clips") / f"{name}_{pair:04d}_{label.replace(' ', '_')}.mp4"
                    encode(folder / path, ordered, rate)
                    manifest.writerow([path, label])
    marker.write_text(json.dumps({"complete": True, "settings": settings}))
    print(f"wrote {config.train_clips} clips to train on and {config.val_clips} held-out ones to {folder}")


def read_marker(path: Path) -> dict[str, object] | None:
    """What `write_demo` noted about a folder; None where the file is missing or not of its making."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.keys() == {"complete", "settings"} else None


def holds_clips(folder: Path, splits: dict[str, int]) -> bool:
    """Whether every split has its manifest and as many videos as it should."""
    return all(
        (folder / f"{name}.csv").is_file() and len(list((folder / "clips").glob(f"{name}_*.mp4"))) == clips
        for name, clips in splits.items()
    )


def draw_video(turns: int, generator: np.random.Generator) -> tuple[np.ndarray, int]:
    """Frames uint8 [n, SIDE, SIDE, 3] of something that goes round so often, clockwise, and their rate per second."""
    count = int(generator.integers(64, 81))
    place = draw_path(turns, count, generator)
    hue = generator.uniform(-0.12, 0.15) % 1  # magenta over red to yellow: one linear feature finds them all
    colour = np.array(colorsys.hsv_to_rgb(hue, 1.0, generator.uniform(0.8, 1.0)), np.float32) * 255
    cover = cover_of(str(generator.choice(SHAPES)), place, np.full(count, generator.uniform(6, 9)))[..., None]
    frames = draw_background(generator) * (1 - cover) + colour * cover
    return frames.round().astype(np.uint8), int(generator.choice(FRAME_RATES))


def draw_path(turns: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """Where the object is, (x, y) [count, 2] in pixels: round a centre at an even speed, from about the top."""
    angle = np.deg2rad(-90 + generator.uniform(-20, 20)) + 2 * np.pi * turns * np.arange(count) / count
    centre = SIDE / 2 + generator.uniform(-4, 4, 2)
    # y points down, so a growing angle turns clockwise.
    return centre + generator.uniform(15, 19) * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def cover_of(shape: str, place: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Share of each pixel that the object covers, [n, SIDE, SIDE]: its signed distance, cut to one pixel's width."""
    at = np.arange(SIDE, dtype=np.float32)
    x = at[None, None, :] - place[:, 0, None, None].astype(np.float32)
    y = at[None, :, None] - place[:, 1, None, None].astype(np.float32)
    size = radius[:, None, None].astype(np.float32)
    if shape == "disc":
        distance = np.hypot(x, y) - size
    elif shape == "square":
        distance = np.maximum(abs(x), abs(y)) - 0.9 * size
    elif shape == "diamond":
        distance = (abs(x) + abs(y) - 1.25 * size) / np.sqrt(2, dtype=np.float32)
    else:
        distance = abs(np.hypot(x, y) - 0.8 * size) - 0.35 * size
    return np.clip(0.5 - distance, 0, 1)


def draw_background(generator: np.random.Generator) -> np.ndarray:
    """A grey texture of patches of several sizes, [SIDE, SIDE, 1]."""
    texture = np.full((SIDE, SIDE), generator.uniform(80, 170), np.float32)
    for cell in (32, 16, 8, 4):
        grid = generator.normal(scale=generator.uniform(2, 10), size=(SIDE // cell, SIDE // cell))
        texture += np.kron(grid, np.ones((cell, cell))).astype(np.float32)
    return np.clip(texture, 0, 255)[..., None]


def encode(path: Path, frames: np.ndarray, rate: int) -> None:
    """Write frames uint8 [n, h, w, 3] as H.264, each coded by itself."""
    import av

    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=rate, options=CODEC)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for packet in packets(stream, frames):
            container.mux(packet)


def packets(stream: av.VideoStream, frames: np.ndarray) -> Iterator[av.Packet]:
    """Every packet of a stream, with what the encoder still holds at the end."""
    import av

    for frame in frames:
        yield from stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24"))
    yield from stream.encode(None)
