"""Child processes on virtual GPUs: the environment that makes one, and functions called in one."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import ParamSpec, TypeVar

from bigvivit.config import ConfigError
from bigvivit.forecast.virtual_gpu.build import Library, build_library
from bigvivit.forecast.virtual_gpu.cards import describe, find_card
from bigvivit.forecast.virtual_gpu.inside import VARIABLE

P = ParamSpec("P")
R = TypeVar("R")
START = """
import json, sys
sys.path[:] = json.loads(sys.argv.pop())
from bigvivit.forecast.virtual_gpu.child import serve
serve(int(sys.argv.pop()))
"""
STARTUP = Path(__file__).parent / "startup"


class VirtualGpuError(RuntimeError):
    """The child process ended before it answered."""


def environment(
    gpu: str, *, gpus: int = 1, memory_bytes: int | None = None, context_bytes: int | None = None
) -> dict[str, str]:
    """Variables, in addition to the present ones, with which a program started as a child runs on virtual GPUs.

    `gpu` is a card of the table, `gpus` how many of it the node has (1 to 64), `memory_bytes` another memory than the
    card's, `context_bytes` another context than is expected of it. Builds the library where it is not built. Raises
    ConfigError for what cannot be: no such card, no CUDA build of PyTorch, no compiler, no Linux.
    """
    described = describe(gpu, gpus, memory_bytes, context_bytes)
    library = build_library()
    check_architecture(gpu, library)
    folder = str(library.path.parent)
    return {
        VARIABLE: described,
        "LD_PRELOAD": joined(str(library.path), "LD_PRELOAD", " :"),
        "LD_LIBRARY_PATH": joined(folder, "LD_LIBRARY_PATH", ":"),
        "TRITON_LIBCUDA_PATH": folder,
        "PYTHONPATH": joined(str(STARTUP), "PYTHONPATH", ":"),
        "PYTHONFAULTHANDLER": "1",  # what is not answered ends the process: the lines that asked are shown
        "PYTORCH_NVML_BASED_CUDA_CHECK": "0",
        # What is tuned by time here must not be taken on a real GPU of the same name.
        "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
        "TRITON_CACHE_DIR": f"{folder}/triton",
    }


def every_gpu(gpus: int) -> dict[str, str]:
    """The variable that shows a process all virtual GPUs of its node, where its parent's chooses among real ones."""
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(gpus)))}


def check_architecture(gpu: str, library: Library) -> None:
    """Code runs on its own compute capability and later ones of the same first digit. Raises ConfigError where PyTorch
    has none for a card: a real one would not run it either."""
    capability = find_card(gpu).capability
    assert capability is not None
    if not any(code <= capability and code // 10 == capability // 10 for code in library.architectures):
        has = ", ".join(f"{code / 10:.1f}" for code in library.architectures)
        raise ConfigError(
            f"gpu={gpu!r} has compute capability {capability / 10:.1f}, for which torch {library.torch} has no code "
            f"(it has {has}): choose another card, or a build of PyTorch for it"
        )


def joined(first: str, variable: str, separators: str) -> str:
    """`first` before what a variable of the environment holds, once."""
    parts = os.environ.get(variable, "")
    for separator in separators:
        parts = parts.replace(separator, ":")
    return ":".join([first, *(part for part in parts.split(":") if part and part != first)])


class Child:
    """A process in which functions are called, one after another; it is started by the first call.

    `env` are variables in addition to the present ones, those of `environment` for virtual GPUs; `name` is for
    messages.
    """

    def __init__(self, env: dict[str, str], name: str = "the child process on virtual GPUs") -> None:
        self._env, self._name = env, name
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._shown = 0

    def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """What `function` returns in the child. Function, arguments and result cross by pickle, so the function must be
        importable by its name.

        Raises what the function raises, caused by an error that holds the child's traceback; VirtualGpuError where the
        child ends; ConfigError for what cannot cross.
        """
        try:
            message = pickle.dumps((function, args, kwargs))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ConfigError(
                f"function={function!r} or its arguments cannot be sent to the child ({error}): give a function "
                "defined at the top of an importable module"
            ) from None
        if getattr(function, "__module__", None) == "__main__":
            raise ConfigError(
                f"function={function.__qualname__!r} is defined in the program itself, which the child does not run: "
                "move it into a module"
            )
        connection = self._start()
        try:
            connection.send_bytes(message)
            fine, value, cause = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            raise VirtualGpuError(self._how_it_ended()) from None
        self._show_errors()
        if fine:
            return value
        raise value from cause

    def _start(self) -> Connection:
        if self._connection is None:
            self._connection, theirs = Pipe()
            command = [sys.executable, "-c", START, str(theirs.fileno()), json.dumps(sys.path)]
            env = {**os.environ, **self._env}
            self._process = subprocess.Popen(
                command, env=env, pass_fds=[theirs.fileno()], stderr=self._errors, stdin=subprocess.DEVNULL
            )
            theirs.close()
        return self._connection

    def _show_errors(self) -> str:
        """Pass on what the child has written to its standard error since the last call."""
        self._errors.seek(self._shown)
        text = self._errors.read().decode(errors="replace")
        self._shown = self._errors.tell()
        sys.stderr.write(text)
        return text

    def _how_it_ended(self) -> str:
        assert self._process is not None
        code = self._process.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        text = self._show_errors().partition("Current thread's C stack trace")[0].strip()  # which Python 3.14 adds
        return f"{self._name} ended ({how}): {text[-2000:] or 'it wrote nothing'}"

    def kill(self) -> None:
        """End the process at once, from another thread: the call that waits for it raises VirtualGpuError."""
        if self._process is not None:
            self._process.kill()

    def close(self) -> None:
        if self._connection is not None and self._process is not None:
            self._connection.close()  # the child ends when nothing more can come
            self._process.wait()
        self._show_errors()
        self._errors.close()


@contextmanager
def virtual_gpu(
    gpu: str, *, gpus: int = 1, memory_bytes: int | None = None, context_bytes: int | None = None
) -> Iterator[Child]:
    """A child process on virtual GPUs for the length of a block: `with virtual_gpu("A100 80GB") as gpu: gpu.call(f)`.

    Arguments and errors are those of `environment`. The child sees all of them, whichever real GPUs this process may.
    """
    env = environment(gpu, gpus=gpus, memory_bytes=memory_bytes, context_bytes=context_bytes)
    child = Child({**env, **every_gpu(gpus)})
    try:
        yield child
    finally:
        child.close()
