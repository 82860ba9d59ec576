"""Rows kept as they come: a file of JSON lines, of which a cut at any moment leaves all that was whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from bigvivit.config import ConfigError

Side = Literal["device", "virtual", "forecast"]
"""Who said it: the device, a virtual card of its name, or a trace on fake tensors."""


class Journal:
    """The rows of one device, those of earlier runs included. Safe to be added to by several threads."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        """Read what is there, without a last line that was cut. Raises ConfigError where it is of another device, no
        journal, or cannot be written."""
        self.path, self.identity = path, identity
        self.rows: dict[tuple[str, Side], dict[str, Any]] = {}
        lines = read_lines(path)
        if lines and lines[0] != identity:
            differ = [
                f"{name} {lines[0].get(name)}, now {value}"
                for name, value in identity.items()
                if lines[0].get(name) != value
            ]
            raise ConfigError(f"{path} was measured with {'; '.join(differ)}: give another --out, or remove it")
        for row in lines[1:]:
            self.rows[row["key"], row["side"]] = row
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a"):  # before anything is measured
                pass
        except OSError as error:
            raise ConfigError(f"out={path.parent} cannot be written ({error.strerror}): give another folder") from None
        if not lines:
            self.append(identity)

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row, which has a `key` and a `side`."""
        self.rows[row["key"], row["side"]] = row
        self.append(row)

    def append(self, value: dict[str, Any]) -> None:
        """One line, written whole or, where the process is killed meanwhile, dropped by the next run."""
        with self.path.open("a") as file:
            file.write(json.dumps(value) + "\n")

    def found(self, key: str, side: Side) -> dict[str, Any] | None:
        """A row that was answered; None where there is none, or one that says why not."""
        row = self.rows.get((key, side))
        return None if row is None or "failed" in row else row


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What is whole. A last line without its end is cut off the file, so that the next one does not continue it.

    Raises ConfigError for what is no journal.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
        if all(isinstance(line, dict) for line in lines) and all(
            "key" in line and "side" in line for line in lines[1:]
        ):
            return lines
    except (ValueError, TypeError):
        pass
    raise ConfigError(f"{path} holds no rows of bigvivit calibrate: give another --out, or remove it")
