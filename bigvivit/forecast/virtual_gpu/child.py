"""The other end of `Child.call`: receives functions, calls them, sends back results and errors."""

from __future__ import annotations

import pickle
import traceback
from multiprocessing.connection import Connection
from typing import Any


def packed(fine: bool, value: Any) -> bytes:
    """A result or an error, and for an error what caused it: the traceback of this process, as text."""
    if fine:
        return pickle.dumps((True, value, None))
    text = "".join(traceback.format_exception(value))
    cause = RuntimeError(f"in the child process on virtual GPUs:\n{text}")
    try:
        pickle.loads(pickle.dumps(value))
    except Exception:  # an error of any kind may fail to pickle in any way
        value = RuntimeError(f"{type(value).__name__}: {value}")
    return pickle.dumps((False, value, cause))


def serve(file: int) -> None:
    """Call what comes through a file descriptor until nothing more can."""
    connection = Connection(file)
    while True:
        try:
            function, args, kwargs = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            message = packed(True, function(*args, **kwargs))
        except Exception as error:
            message = packed(False, error)
        connection.send_bytes(message)
