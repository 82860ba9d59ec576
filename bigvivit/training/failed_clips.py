"""Videos that could not be read in training: counted over ranks, named in the log and the run's folder."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from bigvivit.memory.ranks import gather_over_ranks

log = logging.getLogger("bigvivit")
FAILED = "failed_clips.jsonl"
SHOWN = 5


class TooManyFailuresError(Exception):
    """More videos cannot be read than the run allows. All ranks raise it at the same step, with the same message."""


class Failures:
    """What each rank met, and what all of them met together.

    A rank notes its failures in every step; `gather` joins them where ranks meet anyway, to log. So no step waits for
    others, and ranks always agree on whether to stop.
    """

    def __init__(self, clips: Sequence[Path], max_share: float, out: Path | None, *, resume: bool = False) -> None:
        """`clips` are the manifest's; `out` is the run's folder on rank 0, whose list a resumed run goes on with."""
        self.clips, self.max_share = clips, max_share
        self.pending: list[tuple[int, int, str]] = []
        """(epoch, position in the manifest, reason) on this rank since the last gathering."""
        self.reasons: dict[int, str] = {}
        """Why each clip failed, of all ranks."""
        self.times: set[tuple[int, int]] = set()
        """(epoch, position) of each failure: a step that is done again after a stop counts once."""
        self.file = out / FAILED if out is not None else None
        known: list[Any] = [[]]
        if self.file is not None and resume and self.file.exists():
            # A line that was being written when the run was killed has no end.
            known = [[json.loads(line) for line in self.file.read_text().splitlines() if line.endswith("}")]]
        elif self.file is not None:
            self.file.unlink(missing_ok=True)  # of a run that never came to a checkpoint
        if dist.is_initialized():
            dist.broadcast_object_list(known)
        self.lines: list[dict[str, Any]] = []
        """All that is in the file."""
        self.decoders: Counter[str] = Counter()
        """Clips that each decoder read on this rank, since the training was started or gone on with."""
        self.add([(line["epoch"], line["index"], line["reason"]) for line in known[0]])

    def note(self, epoch: int, failed: Sequence[tuple[int, str]], decoders: Sequence[str]) -> None:
        """Failures of one batch of this rank, and who read the clips that it holds."""
        self.pending += [(epoch, index, reason) for index, reason in failed]
        self.decoders.update(decoders)

    def add(self, failures: Sequence[tuple[int, int, str]]) -> list[str]:
        """Count failures and write them down; returns the reasons of those not counted before."""
        new = []
        for epoch, index, reason in failures:
            if (epoch, index) not in self.times:
                self.times.add((epoch, index))
                self.reasons.setdefault(index, reason)
                new.append({"epoch": epoch, "index": index, "path": str(self.clips[index]), "reason": reason})
        self.lines += new
        if self.file is not None and new:
            whole = self.file.with_suffix(".new")
            whole.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
            os.replace(whole, self.file)  # a run that is killed here loses none
        return [str(line["reason"]) for line in new]

    def gather(self) -> None:
        """Join those of all ranks, log them, and raise TooManyFailuresError where they are too many.

        Every rank must call it, after it is known that some rank has any.
        """
        shares = gather_over_ranks(self.pending)
        self.pending = []
        for reason in self.add([failure for share in shares for failure in share]):
            log.warning("replaced: %s", reason)
        if len(self.reasons) > self.max_share * len(self.clips):
            shown = "".join(f"\n  - {reason}" for reason in list(self.reasons.values())[:SHOWN])
            raise TooManyFailuresError(
                f"{len(self.reasons)} of {len(self.clips)} clips cannot be read, more than the share of "
                f"data.max_failed={self.max_share}:{shown}\n  clean the manifest with `bigvivit check`, or allow more"
            )

    def summary(self) -> dict[str, Any]:
        """For the run's report: who read how many clips, how often another was taken, and instead of which.

        Every rank must call it.
        """
        counters = gather_over_ranks(self.decoders)
        clips = [
            {"index": index, "path": str(self.clips[index]), "reason": reason}
            for index, reason in sorted(self.reasons.items())
        ]
        decoded_by = dict(sum(counters, Counter()).most_common())
        return {"decoded_by": decoded_by, "replaced_samples": len(self.times), "failed_clips": clips}
