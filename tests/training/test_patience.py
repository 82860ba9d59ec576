"""When training ends for want of progress."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigvivit.training.patience import Patience, resume_patience
from bigvivit.training.progress import PROGRESS, seal


@pytest.mark.parametrize(
    ("patience", "scores", "ends_at"),
    [
        (2, [0.1, 0.3, 0.2, 0.3, 0.9], 3),
        (2, [0.1, 0.3, 0.2, 0.4, 0.4, 0.1], 5),
        (1, [0.0, 0.0], 1),
        (3, [0.1, 0.2, 0.3], None),
        (0, [0.3, 0.2, 0.1, 0.0], None),
    ],
)
def test_it_runs_out_after_so_many_that_are_no_better(patience: int, scores: list[float], ends_at: int | None) -> None:
    counter = Patience(patience)
    ended = [number for number, score in enumerate(scores) if counter.runs_out(score)]
    assert (ended[0] if ended else None) == ends_at


def test_a_resumed_run_counts_on(tmp_path: Path) -> None:
    for step, top1 in ((100, 0.2), (300, 0.6), (400, 0.5)):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / PROGRESS).write_text(seal({"val_top1": top1}))
    counter = resume_patience(3, tmp_path, step=500, save_every=100)
    assert (counter.best, counter.since) == (0.6, 2)
    assert counter.runs_out(0.6)
    assert resume_patience(3, tmp_path / "new", step=0, save_every=100).best is None
