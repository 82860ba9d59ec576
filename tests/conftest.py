"""What tests of several packages share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture
def shared() -> Callable[[str], Path]:
    """Finds real models and clips beside the checkout; the test is skipped where they are not."""

    def find(name: str) -> Path:
        if not (SHARED / name).exists():
            pytest.skip(f"needs {name} beside the checkout, in ../shared")
        return SHARED / name

    return find
