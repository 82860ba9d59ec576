"""What carries clips between processes, how fast, and who survives a killed worker: `python bench/decode_pool.py`.

Workers hand over clips of [32, 3, 224, 224] bytes that cost nothing to make, so that only the way between processes is
measured: bigvivit's pool, torch's DataLoader, and pebble and loky where they are installed.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bigvivit.data.loader import ClipLoader
from bigvivit.data.manifest import Clip
from bigvivit.training.report import run_bench, write_report

SHAPE = (32, 3, 224, 224)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure and write a report."""

    clips: int = 300
    """Clips for each row, after the workers have started."""
    workers: int = 2
    repeats: int = 3
    batch_size: int = 4
    results: Path = Path(__file__).parent / "results"
    """Folder of reports."""


def ready_clip() -> torch.Tensor:
    """A clip that takes no decoding."""
    return torch.full(SHAPE, 1, dtype=torch.uint8)


class ReadyClips(torch.utils.data.Dataset[Any]):
    """Clips for both loaders."""

    shape: tuple[int, ...] = SHAPE
    clips: Sequence[Clip] = ()

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, item: Any) -> tuple[torch.Tensor, int, int, str]:
        return ready_clip(), 0, int(item), "none"

    def index(self, item: Any) -> int:
        """See Clips."""
        return int(item)

    def replacement(self, item: Any, attempt: int) -> Any:
        """See Clips."""
        return None


def clips_of(item: int) -> np.ndarray:
    """One clip, for the executors."""
    return ready_clip().numpy()


def own_pid(item: int) -> int:
    """The worker's."""
    return os.getpid()


def with_bigvivit(arguments: Arguments) -> Callable[[], Iterator[Any]]:
    """bigvivit's pool: shared memory."""
    loader = ClipLoader(
        ReadyClips(arguments.clips), range(arguments.clips), arguments.batch_size, arguments.workers, keep_last=True
    )
    return lambda: iter(loader)


def with_dataloader(arguments: Arguments) -> Callable[[], Iterator[Any]]:
    """torch's DataLoader: shared memory, a file for each batch."""
    loader = torch.utils.data.DataLoader(
        ReadyClips(arguments.clips),
        arguments.batch_size,
        num_workers=arguments.workers,
        multiprocessing_context="spawn",
        persistent_workers=True,
    )
    return lambda: iter(loader)


def through_executor(submit: Callable[[int], Any], arguments: Arguments) -> Callable[[], Iterator[Any]]:
    """Batches of what an executor returns, read two batches ahead."""

    def batches() -> Iterator[Any]:
        depth, waiting = 2 * max(arguments.batch_size, arguments.workers), []
        clips: list[torch.Tensor] = []
        for number in range(arguments.clips + depth):
            if number < arguments.clips:
                waiting.append(submit(number))
            if number >= depth or number >= arguments.clips:
                if not waiting:
                    break
                clips.append(torch.from_numpy(waiting.pop(0).result()))
                if len(clips) == arguments.batch_size:
                    yield torch.stack(clips)
                    clips = []

    return batches


def build_pebble(workers: int) -> Any:
    """pebble's pool of spawned processes."""
    from pebble import ProcessPool

    return ProcessPool(max_workers=workers, context=multiprocessing.get_context("spawn"))


def build_loky(workers: int) -> Any:
    """loky's executor."""
    from loky import ProcessPoolExecutor

    return ProcessPoolExecutor(max_workers=workers)


def measure_speed(batches: Callable[[], Iterator[Any]], arguments: Arguments) -> list[float]:
    """Clips per second of each repetition; the first epoch, in which workers start, is left out."""
    for _ in batches():
        pass
    speeds = []
    for _ in range(arguments.repeats):
        before = time.perf_counter()
        for _ in batches():
            pass
        speeds.append(arguments.clips / (time.perf_counter() - before))
    return speeds


def survives_kill(submit: Callable[[], concurrent.futures.Future[int]]) -> bool:
    """Whether ten more tasks come through after a worker was killed while nothing ran."""
    os.kill(submit().result(), signal.SIGKILL)
    time.sleep(2)
    try:
        return all(submit().result(timeout=60) > 0 for _ in range(10))
    except Exception:
        return False


def main(arguments: Arguments) -> None:
    """Measure each, and write the report."""
    from bigvivit.data.pool import Pool

    builders: dict[str, Callable[[], tuple[Callable[[], Iterator[Any]], bool | None]]] = {}

    def ours() -> tuple[Callable[[], Iterator[Any]], bool | None]:
        pool = Pool(OwnPid(), 1, time_limit=60)
        survived = survives_kill(lambda: pool.submit(0))
        pool.close()
        return with_bigvivit(arguments), survived

    def executor(build: Callable[[int], Any], schedule: Callable[..., Any]) -> Any:
        one = build(1)
        survived = survives_kill(lambda: schedule(one, own_pid, 0))
        many = build(arguments.workers)
        return through_executor(lambda number: schedule(many, clips_of, number), arguments), survived

    builders["bigvivit"] = ours
    builders["torch DataLoader"] = lambda: (with_dataloader(arguments), None)
    builders["pebble"] = lambda: executor(build_pebble, lambda pool, task, item: pool.schedule(task, args=(item,)))
    builders["loky"] = lambda: executor(build_loky, lambda pool, task, item: pool.submit(task, item))
    rows = []
    for name, build in builders.items():
        try:
            batches, survived = build()
        except ImportError:
            print(f"{name} is not installed")
            continue
        speeds = measure_speed(batches, arguments)
        clip_bytes = int(np.prod(SHAPE))
        rows.append(
            {
                "pool": name,
                "clips_per_second": statistics.median(speeds),
                "slowest_clips_per_second": min(speeds),
                "fastest_clips_per_second": max(speeds),
                "clip_bytes": clip_bytes,
                "survives_kill_of_idle_worker": survived,
                "evidence": "measured",
            }
        )
        print(rows[-1], flush=True)
    settings = {"clips": arguments.clips, "workers": arguments.workers, "batch_size": arguments.batch_size}
    stem = write_report(arguments.results, "decode_pool", device=torch.device("cpu"), settings=settings, rows=rows)
    print(f"wrote {stem}.json and .md")


class OwnPid:
    """The worker's, for the pool here."""

    def __call__(self, argument: Any, slot: np.ndarray | None) -> int:
        return os.getpid()


if __name__ == "__main__":
    run_bench(main, Arguments, __doc__)
    os._exit(0)  # pools that were broken on purpose do not end by themselves
