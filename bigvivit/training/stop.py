"""Ctrl-C and SIGTERM: finish the step, save, stop. Imports no torch."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType

from bigvivit.memory.ranks import Board

STOPPED = 75
"""Exit code of a run that stopped because it was asked to: the `try again later` of sysexits.h."""


class StopSignal:
    """Within its `with`, Ctrl-C and SIGTERM become a request that all ranks grant after the same step.

    Until `serve` is called there is nothing to save, and both raise KeyboardInterrupt. A second Ctrl-C always does.
    """

    def __init__(self) -> None:
        self.asked, self.world = False, 1
        self.board: Board | None = None
        self.previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # where Python allows handlers
            self.previous = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler. Launchers pass one Ctrl-C on as SIGINT and SIGTERM: only SIGINT counts twice."""
        if self.board is None or (self.asked and number == signal.SIGINT):
            raise KeyboardInterrupt
        if not self.asked:
            name = signal.Signals(number).name
            # Not print: the signal may have come in the middle of another one, which must not be entered twice.
            os.write(2, f"{name}: saving after this step, then stopping; Ctrl-C again stops at once\n".encode())
        self.asked = True

    def serve(self, board: Board, world: int) -> None:
        """From here on there is something to save."""
        self.board, self.world = board, world

    def after(self, step: int) -> bool:
        """Whether to stop after this step: the same answer on every rank, without a collective.

        Ranks share each step's gradients, so none can finish step k + 1 before all have begun it. Who was asked to stop
        posts k + 1 after step k: the note is there before anybody finishes that step.
        """
        assert self.board is not None
        if self.asked:
            self.board.post("last step", str(step + (self.world > 1)))
        last = self.board.read("last step")
        return last is not None and step >= int(last)
