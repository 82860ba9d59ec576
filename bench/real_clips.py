"""Does it learn from real clips? `python bench/real_clips.py --data FOLDER --tower FOLDER`, resumable, about an hour.

Ten gestures that only the order of frames tells apart, in folds by recording: logistic regressions on a frozen tower's
vectors, stage 1, stage 2 on the published tower and after stage 1, and training of everything at the same number of
frames, each with its frames in order and shuffled. Every run is a command that a user would type, with `--preset
small`; its folder stays in `--out`, and one that is there already is not run again.

Fold 0 tests on the recordings that the data set itself keeps for validation: no setting was chosen by looking at them.
Settings of the preset were chosen inside the others, which `held_out` columns therefore leave out.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bigvivit.config import ConfigError
from bigvivit.training.report import run_bench, write_report

FOLDS: tuple[tuple[int, ...], ...] = ((14, 15, 16, 17), (1, 2, 3), (4, 5, 6), (7, 8, 9, 10), (11, 12, 13))
"""Serials of the recordings that each fold tests on."""
CLIP = ("--clip.size", "112", "--clip.resize", "128", "--clip.no-flip")  # left and right are classes
ONE_VIEW = ("--views", "1", "--crops", "1", "--shuffle-frames", "--workers", "0")
CHANCE, DRAWS = 0.1, 10_000
Correct = dict[tuple[str, int], tuple[np.ndarray, np.ndarray | None]]
"""By arm and frames: whether each clip was right [seeds, clips], in order and shuffled."""
PENALTIES = (0.01, 0.1, 1.0)
"""Of the logistic regressions: the best on the test clips counts, to their advantage."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Train and evaluate every arm on every fold, and write the report."""

    data: Path
    """Folder with clips.csv: path, label, serial."""
    tower: Path
    """Folder of the image tower."""
    out: Path = Path("runs/real_clips")
    """Folder of the runs."""
    seeds: int = 3
    """Seeds of each arm on the published tower."""
    tower_seeds: int = 1
    """Seeds of each arm that trains a tower, or starts from one: stage 1, stage 2 after it, and full training."""
    arms: tuple[str, ...] = ()
    """Ways of training, as the report names them, "stage 1, 8 frames" [default: all; those that train a tower take most
    of the time]."""
    jobs: int = 2
    """Runs at a time, each on one core."""
    results: Path = Path(__file__).parent / "results"
    """Folder of reports."""


@dataclass(frozen=True)
class Arm:
    """One way of training."""

    name: str
    frames: int
    stage: int
    after: str | None = None
    """The arm whose run it starts from."""

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.name}, {self.frames} frames"

    @property
    def trains_a_tower(self) -> bool:
        """Or starts from one that was trained."""
        return self.stage == 1 or self.after is not None


ARMS = (
    Arm("stage 2, published tower", 16, 2),
    Arm("stage 2, published tower", 32, 2),
    Arm("stage 1", 8, 1),
    Arm("stage 2, after stage 1", 16, 2, after="stage 1"),
    Arm("stage 2, after stage 1", 32, 2, after="stage 1"),
    Arm("everything trained", 16, 1),
)


def main(arguments: Arguments) -> None:
    """Folds, runs, rows, report."""
    wanted = [arm for arm in ARMS if arm.label in arguments.arms or not arguments.arms]
    if unknown := set(arguments.arms) - {arm.label for arm in ARMS}:
        raise ConfigError(f"arms={'; '.join(sorted(unknown))}: known are {'; '.join(arm.label for arm in ARMS)}")
    if not (arguments.data / "clips.csv").is_file():
        raise ConfigError(f"data={arguments.data} holds no clips.csv: give the folder of the data set")
    arguments.out.mkdir(parents=True, exist_ok=True)
    serials = write_folds(arguments)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(partial(fill_cache, arguments), sorted({arm.frames for arm in ARMS if not arm.trains_a_tower})))
    for later in (False, True):  # what starts from another arm comes after it
        run_all(arguments, [arm for arm in wanted if (arm.after is not None) == later])
    correct: Correct = {(arm.name, arm.frames): read_correct(arguments, arm) for arm in wanted}
    correct |= {key: (values[None], None) for key, values in regress(arguments).items()}
    rows = list(build_rows(correct, serials))
    left_out = "; ".join(arm.label for arm in ARMS if arm not in wanted)
    settings = {
        "not_run": left_out or "nothing",
        "folds": FOLDS,
        "clip": " ".join(CLIP),
        "preset": "small",
        "chance": CHANCE,
        "penalties": PENALTIES,
    }
    bench = "real_clips_chosen" if arguments.arms else "real_clips"  # beside the report of all
    stem = write_report(arguments.results, bench, device=torch.device("cpu"), settings=settings, rows=rows)
    draw(rows, stem.with_name(f"{stem.name}.png"))
    print(f"wrote {stem}.json, .md and .png")


def write_folds(arguments: Arguments) -> np.ndarray:
    """`train0.csv`, `test0.csv` … and `all.csv` in the runs' folder; returns the serial of each clip of `all.csv`."""
    with (arguments.data / "clips.csv").open() as file:
        clips = list(csv.DictReader(file))
    order = [clip for fold in FOLDS for clip in clips if int(clip["serial"]) in fold]
    for fold, tested in enumerate(FOLDS):
        write_manifest(arguments, f"train{fold}", [clip for clip in order if int(clip["serial"]) not in tested])
        write_manifest(arguments, f"test{fold}", [clip for clip in order if int(clip["serial"]) in tested])
    write_manifest(arguments, "all", order)
    return np.array([int(clip["serial"]) for clip in order])


def write_manifest(arguments: Arguments, name: str, clips: list[dict[str, str]]) -> None:
    """A manifest of some clips."""
    with (arguments.out / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label"])
        for clip in clips:
            writer.writerow([os.path.relpath(arguments.data / clip["path"], arguments.out), clip["label"]])


def words(arguments: Arguments, arm: Arm, fold: int | str, seed: int) -> list[str]:
    """What follows `bigvivit train`, or `bigvivit cache`, on the command line."""
    line = ["--preset", "small", "--stage", str(arm.stage), "--data.train", str(arguments.out / f"train{fold}.csv")]
    line += ["--clip.frames", str(arm.frames), *CLIP, "--memory.compute", "bf16", "--seed", str(seed)]
    line += ["--data.workers", "0", "--save-every", "0"]  # every core has a run, and a worker would import all anew
    if arm.stage == 2:
        # Of a tower that one run alone is above, four views cost more than they save: each is filled by this run.
        line += ["--data.cache", str(arguments.out / "cache"), "--data.cache-views", "4"]
    else:
        line += ["--memory.autocast", "bf16"]
    if arm.after is not None:
        return [*line, "--init-from", str(run_folder(arguments, ARMS[2], fold, seed))]
    return [*line, "--model.tower", str(arguments.tower)]


def fill_cache(arguments: Arguments, frames: int) -> None:
    """The published tower's vectors of all clips, which every fold and seed shares."""
    line = words(arguments, Arm("", frames, 2), 0, 0)
    line[line.index("--data.train") + 1] = str(arguments.out / "all.csv")
    call(["cache", *line, "--data.val", str(arguments.out / "all.csv"), "--out", str(arguments.out / "unused")])


def run_folder(arguments: Arguments, arm: Arm, fold: int | str, seed: int) -> Path:
    """Of one run of an arm."""
    return arguments.out / f"{arm.name} {arm.frames} fold{fold} seed{seed}".replace(", ", "-").replace(" ", "_")


def seeds_of(arguments: Arguments, arm: Arm) -> int:
    """How many seeds an arm has."""
    return arguments.tower_seeds if arm.trains_a_tower else arguments.seeds


def run_all(arguments: Arguments, arms: Sequence[Arm]) -> None:
    """Train and evaluate what is not there yet, `jobs` runs at a time, under a progress bar."""
    todo = [
        (arm, fold, seed)
        for arm in arms
        for seed in range(seeds_of(arguments, arm))
        for fold in range(len(FOLDS))
        if not (run_folder(arguments, arm, fold, seed) / "eval.csv").exists()
    ]
    bar = Progress(TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with bar, ThreadPoolExecutor(arguments.jobs) as pool:
        task = bar.add_task("runs", total=len(todo))
        for future in as_completed([pool.submit(train_and_evaluate, arguments, *what) for what in todo]):
            bar.update(task, advance=1, description=future.result())


def train_and_evaluate(arguments: Arguments, arm: Arm, fold: int, seed: int) -> str:
    """One run; returns its name."""
    run = run_folder(arguments, arm, fold, seed)
    if not (run / "checkpoint.json").exists():
        call(["train", *words(arguments, arm, fold, seed), "--out", str(run)])
    test = arguments.out / f"test{fold}.csv"
    call(["eval", str(run), "--manifest", str(test), *ONE_VIEW])
    return run.name


def call(line: list[str]) -> None:
    """A `bigvivit` command on one core. Raises ConfigError with what it said, where it failed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bigvivit.cli", *line]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise ConfigError(f"bigvivit {' '.join(line)} ended with {done.returncode}: {done.stderr[-2000:]}")


def read_correct(arguments: Arguments, arm: Arm) -> tuple[np.ndarray, np.ndarray]:
    """(in order, shuffled): whether each clip of `all.csv` was right in the fold that tested on it, [seeds, clips]."""
    ordered, shuffled = [], []
    for seed in range(seeds_of(arguments, arm)):
        rows: list[dict[str, str]] = []
        for fold in range(len(FOLDS)):
            with (run_folder(arguments, arm, fold, seed) / "eval.csv").open() as file:
                rows += csv.DictReader(file)
        ordered.append([row["top1"] == row["label"] for row in rows])
        shuffled.append([row["top1_shuffled"] == row["label"] for row in rows])
    return np.array(ordered, float), np.array(shuffled, float)


def regress(arguments: Arguments) -> dict[tuple[str, int], np.ndarray]:
    """Whether each clip was right, [clips], by logistic regressions on the vectors of the middle view."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    found = {}
    for arm in ARMS[:2]:
        vectors, labels = read_vectors(arguments, arm)
        forms = {
            "logistic, mean": vectors.mean(1),
            "logistic, concatenated": vectors.reshape(len(vectors), -1),
            "logistic, clip mean taken off": (vectors - vectors.mean(1, keepdims=True)).reshape(len(vectors), -1),
        }
        sizes = [len((arguments.out / f"test{fold}.csv").read_text().splitlines()) - 1 for fold in range(len(FOLDS))]
        fold_of = np.repeat(np.arange(len(FOLDS)), sizes)
        for name, values in forms.items():
            tries = []
            for penalty in PENALTIES:
                right = np.zeros(len(labels))
                for fold in range(len(FOLDS)):
                    model = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=1000))
                    model.fit(values[fold_of != fold], labels[fold_of != fold])
                    right[fold_of == fold] = model.predict(values[fold_of == fold]) == labels[fold_of == fold]
                tries.append(right)
            found[name, arm.frames] = max(tries, key=np.sum)
    return found


def read_vectors(arguments: Arguments, arm: Arm) -> tuple[np.ndarray, np.ndarray]:
    """(vectors [clips, tubelets, width], labels [clips]) of all clips, by the tower of the arm's first run."""
    from bigvivit.assemble import load_run
    from bigvivit.data.loader import build_eval_loader
    from bigvivit.data.manifest import read_manifest
    from bigvivit.training.checkpoint import read_header
    from bigvivit.training.tower_pass import TowerPass

    run = run_folder(arguments, arm, 0, 0)
    header, device = read_header(run), torch.device("cpu")
    manifest = read_manifest(arguments.out / "all.csv", header.classes)
    loader = build_eval_loader(header.clip, manifest, views=1, crops=1, batch_size=8, workers=1, rank=0, world=1)
    tower = TowerPass(load_run(run, header, device), device)
    vectors = torch.cat([tower(batch.clips[:, 0]) for batch in loader])
    return vectors.float().numpy(), np.array([clip.label for clip in manifest.clips])


def build_rows(correct: Correct, serials: np.ndarray) -> Iterator[dict[str, Any]]:
    """A row for each arm: accuracies with 95 % intervals, and the difference to the best logistic regression."""
    logistic = {key: right for key, (right, _) in correct.items() if key[0].startswith("logistic")}
    best = max(logistic.values(), key=np.mean)
    held_out = np.isin(serials, FOLDS[0])
    for (name, frames), (right, shuffled) in correct.items():
        low, high = interval(right.mean(0), serials)
        row: dict[str, Any] = {"arm": name, "frames": frames, "seeds": len(right), "clips": right.shape[1]}
        row |= {"top1": right.mean(), "top1_low": low, "top1_high": high, "top1_held_out": right[:, held_out].mean()}
        row["top1_shuffled"] = None if shuffled is None else shuffled.mean()
        low, high = interval(right.mean(0) - best.mean(0), serials)
        row["top1_over_logistic"] = right.mean() - best.mean()
        row |= {"top1_over_logistic_low": low, "top1_over_logistic_high": high}
        row["verdict"] = "better" if low > 0 else "worse" if high < 0 else "not resolved"
        yield {**row, "evidence": "measured"}


def interval(values: np.ndarray, serials: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of values [clips], by a bootstrap over recordings, whose clips are alike."""
    generator = np.random.default_rng(0)
    groups = [values[serials == serial] for serial in np.unique(serials)]
    sums, sizes = np.array([group.sum() for group in groups]), np.array([len(group) for group in groups])
    drawn = generator.integers(len(groups), size=(DRAWS, len(groups)))
    low, high = np.quantile(sums[drawn].sum(1) / sizes[drawn].sum(1), [0.025, 0.975])
    return float(low), float(high)


def docs_table(rows: list[dict[str, Any]]) -> str:
    """The rows of a report as docs/learning.md shows them; a test holds the page to it."""
    lines = ["| | frames | seeds | top-1 | held out | shuffled | over logistic |", "| --- " * 7 + "|"]
    for row in rows:
        shuffled = "" if row["top1_shuffled"] is None else f"{row['top1_shuffled']:.1%}"
        over = "" if row["arm"].startswith("logistic") else describe_difference(row)
        cells = [row["arm"], row["frames"], row["seeds"]]
        cells += [f"{row['top1']:.1%} ({row['top1_low']:.1%} to {row['top1_high']:.1%})"]
        cells += [f"{row['top1_held_out']:.1%}", shuffled, over]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def describe_difference(row: dict[str, Any]) -> str:
    """To the best logistic regression."""
    if row["verdict"] == "not resolved":
        return "not resolved"
    low, high = row["top1_over_logistic_low"], row["top1_over_logistic_high"]
    return f"{row['top1_over_logistic']:+.1%} ({low:+.1%} to {high:+.1%})"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy of each arm with its interval, and shuffled."""
    figure, axes = plt.subplots(figsize=(9, 0.45 * len(rows) + 1.2), layout="constrained")
    places = np.arange(len(rows))[::-1]
    values = np.array([[row["top1"], row["top1_low"], row["top1_high"]] for row in rows])
    errors = np.abs(values[:, 1:] - values[:, :1]).T
    axes.barh(places, values[:, 0], xerr=errors, height=0.6, color="tab:blue", capsize=3, label="frames in order")
    shuffled = [(place, row["top1_shuffled"]) for place, row in zip(places, rows, strict=True)]
    known = [(place, value) for place, value in shuffled if value is not None]
    axes.scatter([v for _, v in known], [p for p, _ in known], color="tab:orange", zorder=3, label="frames shuffled")
    axes.axvline(CHANCE, color="gray", linestyle=":", label="chance")
    axes.set_yticks(places, [f"{row['arm']}, {row['frames']} frames" for row in rows])
    axes.set(xlabel="top-1 on recordings that were not trained on, 95 % interval over recordings", xlim=(0, 1))
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    run_bench(main, Arguments, __doc__)
