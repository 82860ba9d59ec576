"""One rank's failure told once, with its cause, and before what it brings about on the others."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable

import torch.distributed as dist

from bigvivit.config import ConfigError
from bigvivit.memory.ranks import Board
from bigvivit.training.stop import STOPPED

WAIT_FOR_CAUSE_S = 5.0
"""A rank that raises posts its note within milliseconds; one that was killed never does."""
WAIT_FOR_PAGE_S = 300.0
HANG_UP_S = 2.0
SILENT = (
    "a rank ended without a word: killed, out of memory, or crashed in a library. The launcher's lines say which; "
    "--resume goes on from the last checkpoint"
)


def tell_failure(error: BaseException, board: Board, rank: int, page: Callable[[], str] | None = None) -> int:
    """Print what ended this rank, unless another rank has told it. Returns this process's exit code.

    `page` makes what is printed in the place of the traceback; it may take a minute.
    """
    if isinstance(error, KeyboardInterrupt):
        return STOPPED
    if page is None and is_lost_rank(error):
        cause = read_note(board, "failure", WAIT_FOR_CAUSE_S) or post_note(board, "failure", SILENT)
        print(f"error: rank {rank} stops: {cause}", file=sys.stderr, flush=True)
        return 1
    own = f"rank {rank}: {type(error).__name__}: {error}"
    if post_note(board, "failure", own) == own:  # else every rank has met the same, and this one was not the first
        if page is not None:
            print(f"error: {page()}", file=sys.stderr, flush=True)
            post_note(board, "told", own)
        elif isinstance(error, ConfigError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            print(f"error: rank {rank} failed:", file=sys.stderr)
            traceback.print_exception(error)
    elif page is not None:
        # The other rank is still writing its page, and launchers end all ranks when one has ended.
        read_note(board, "told", WAIT_FOR_PAGE_S)
    # Rank 0 keeps the notes: it hangs up, so that nobody waits for it, and stays for those who then come to read.
    threading.Thread(target=dist.destroy_process_group, daemon=True).start()
    time.sleep(HANG_UP_S)
    return 2 if isinstance(error, ConfigError) else 1


def is_lost_rank(error: BaseException) -> bool:
    """Whether a collective failed because its other side is gone. Gloo has no exception class of its own for that."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError):
        return True
    return isinstance(error, RuntimeError) and ("/gloo/" in str(error) or "gloo" in str(error).lower())


def read_note(board: Board, key: str, wait_s: float) -> str | None:
    """What another rank said; None where nobody did, or where the rank that kept the notes is gone."""
    try:
        return board.read(key, wait_s)
    except dist.DistError:
        return None


def post_note(board: Board, key: str, text: str) -> str:
    """Post unless somebody has; what is there now."""
    try:
        return board.post(key, text)
    except dist.DistError:
        return text
