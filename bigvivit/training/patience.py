"""When validation no longer improves."""

from __future__ import annotations

from pathlib import Path

from bigvivit.training.progress import best_checkpoint, checkpoint_step


class Patience:
    """Counts validations since the best one."""

    def __init__(self, patience: int, best: float | None = None, since: int = 0) -> None:
        self.patience, self.best, self.since = patience, best, since

    def runs_out(self, top1: float) -> bool:
        """Whether, after this validation, so many in a row were no better than the best before them."""
        if self.best is None or top1 > self.best:
            self.best, self.since = top1, 0
        else:
            self.since += 1
        return self.since >= self.patience > 0


def resume_patience(patience: int, run: Path, step: int, save_every: int) -> Patience:
    """As a run that has come to `step` left it: the best of its checkpoints is kept until its end."""
    best = best_checkpoint(run)
    if best is None:
        return Patience(patience)
    return Patience(patience, best[1], (step - checkpoint_step(best[0])) // save_every)
