"""Virtual GPUs for the tests: skipped, with a reason, where they cannot be had."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from bigvivit.config import ConfigError
from bigvivit.forecast.virtual_gpu import virtual_gpu
from bigvivit.forecast.virtual_gpu.build import build_library


@pytest.fixture(scope="session")
def library() -> str:
    """The compiled library."""
    try:
        return str(build_library().path)
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def card(library: str) -> Iterator[Callable[[str], Any]]:
    """Children on a card, two of it, each started once for all tests: for what leaves nothing behind."""
    children: dict[str, Any] = {}
    with ExitStack() as stack:

        def child(name: str) -> Any:
            if name not in children:
                children[name] = stack.enter_context(virtual_gpu(name, gpus=2))
            return children[name]

        yield child
