"""All ranks stop after the same step, whoever is asked and whenever."""

from __future__ import annotations

import os
import random
import signal
import threading
import time

import pytest
import torch.distributed as dist

from bigvivit.memory.ranks import Board
from bigvivit.training.stop import StopSignal

RANKS = 3


@pytest.mark.parametrize("seed", range(20))
def test_ranks_agree_on_the_last_step(seed: int) -> None:
    """Threads stand for ranks, a barrier for the gradients they share: none ends a step before all have begun it."""
    random.seed(seed)
    store, gate = dist.HashStore(), threading.Barrier(RANKS)
    asked_at = {rank: random.randrange(1, 6) for rank in random.sample(range(RANKS), random.randint(1, RANKS))}
    last = {}

    def run(rank: int) -> None:
        stop = StopSignal()
        stop.serve(Board(store), RANKS)
        for step in range(1, 100):
            time.sleep(random.random() / 1000)
            gate.wait(5)
            time.sleep(random.random() / 1000)
            stop.asked |= asked_at.get(rank) == step
            if stop.after(step):
                last[rank] = step
                return

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(last) == RANKS
    assert len(set(last.values())) == 1
    assert min(asked_at.values()) <= last[0] <= min(asked_at.values()) + 1


def test_one_process_stops_at_once_and_a_second_interrupt_does_not_wait() -> None:
    with StopSignal() as stop:
        stop.serve(Board(dist.HashStore()), 1)
        assert not stop.after(1)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.after(2)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_before_training_there_is_nothing_to_wait_for(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), StopSignal():
        signal.raise_signal(number)
    assert signal.getsignal(number) == before
