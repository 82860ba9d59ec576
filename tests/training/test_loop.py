"""The loop: which batches, which records."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bigvivit.config import OptimConfig
from bigvivit.training.failed_clips import Failures
from bigvivit.training.loop import NonFiniteError, micro_batches, train
from bigvivit.training.metrics import MetricsLog
from bigvivit.training.patience import Patience
from tests.memory.test_engine import batches, build_engine


class Loader:
    """Seven micro-batches an epoch, remembering what it was told."""

    def __init__(self) -> None:
        self.data = [SimpleNamespace(**vars(batch), failed=(), decoders=("decord",) * 4) for batch in batches(7, 4)]
        self.epochs: list[int] = []
        self.sampler = SimpleNamespace(set_epoch=lambda epoch, first_batch: self.epochs.append(epoch))

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[SimpleNamespace]:
        return iter(self.data)


def no_failures() -> Failures:
    return Failures([], 0.0, None)


def test_epochs_are_cut_to_whole_steps() -> None:
    loader = Loader()
    stream = micro_batches(loader, accumulate=2)
    taken = [next(stream) for _ in range(7)]
    assert [epoch for epoch, _ in taken] == [0, 0, 0, 1, 1, 1, 2]
    assert loader.epochs == [0, 1, 2]
    assert [id(batch) for _, pair in taken[:3] for batch in pair] == [id(batch) for batch in loader.data[:6]]


def test_records_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    optim = OptimConfig(lr=0.5, batch_size=8, accumulate=2, epochs=4, warmup_epochs=0)
    engine = build_engine(optim, steps_per_epoch=3)
    metrics = MetricsLog(tmp_path / "metrics.jsonl", 12, "stage 1")
    result = train(engine, Loader(), optim, steps=12, log_every=5, metrics=metrics, failures=no_failures())
    metrics.close()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert records.pop(0) == {"step": 0, "order_change": 0.0}  # a mean colour is that of the reversed clip
    assert [record["step"] for record in records] == [5, 10, 12]
    assert [record["epoch"] for record in records] == [1, 3, 3]
    assert records[-1]["loss"] == result.loss
    assert records[0]["lr"] > records[1]["lr"] > records[2]["lr"] > 0
    assert all(record["peak_bytes"] > 0 and record["seconds_per_step"] > 0 for record in records)
    assert records[-1]["seconds_left"] == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("step 5/12  loss ")


def test_the_loss_of_a_record_is_the_mean_since_the_last(tmp_path: Path) -> None:
    def run(log_every: int) -> list[float]:
        optim = OptimConfig(lr=0.5, batch_size=8, accumulate=2, epochs=2, warmup_epochs=0)
        metrics = MetricsLog(tmp_path / "metrics.jsonl", 6, "")
        train(
            build_engine(optim, 3),
            Loader(),
            optim,
            steps=6,
            log_every=log_every,
            metrics=metrics,
            failures=no_failures(),
        )
        metrics.close()
        records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        return [record["loss"] for record in records if "loss" in record]

    each = torch.tensor(run(1))
    assert run(4) == pytest.approx([each[:4].mean().item(), each[4:].mean().item()], abs=1e-6)


def test_a_run_that_ends_early_has_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigvivit.training.loop.validate", lambda engine, loader: {"val_top1": 0.5, "val_loss": 1.0})
    optim = OptimConfig(lr=0.5, batch_size=8, accumulate=2, epochs=4, warmup_epochs=0)
    parts = {"metrics": None, "failures": no_failures(), "val_loader": Loader(), "patience": Patience(1)}
    result = train(build_engine(optim, 3), Loader(), optim, steps=12, log_every=50, save_every=2, **parts)
    assert result.steps == 4
    assert math.isfinite(result.loss)


def test_clips_of_the_ranks_whose_loss_is_no_number() -> None:
    error = NonFiniteError(7, float("nan"), [(1.5, [3, 4]), (float("nan"), [5, 6]), (float("inf"), [7])])
    assert (str(error), error.indices) == ("step 7: loss nan, gradient norm nan", [5, 6, 7])
    error = NonFiniteError(7, float("inf"), [(1.5, [3, 4]), (2.5, [5])])  # it was the backward: anybody's
    assert (str(error), error.indices) == ("step 7: loss 1.5, gradient norm inf", [3, 4, 5])
