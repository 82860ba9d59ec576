"""What is done in a program on virtual GPUs before its first line: called by startup/sitecustomize.py.

Nothing here imports torch: `when_imported` waits for the program to do so.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


class Waiting(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module as Python would, and calls back when it has been executed."""

    def __init__(self, name: str, callback: Callable[[ModuleType], None]) -> None:
        self._name, self._callback = name, callback
        self._loader: importlib.abc.Loader | None = None
        self._asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name or self._asking:
            return None
        self._asking = True  # of the other finders; whoever only asks whether the module is there changes nothing
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking = False
        if spec is None or spec.loader is None:
            return None
        self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        assert self._loader is not None
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert self._loader is not None
        assert module.__spec__ is not None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._callback(module)


def when_imported(name: str, callback: Callable[[ModuleType], None]) -> None:
    """Call back with a module as soon as the program has imported it; at once where it already has."""
    if name in sys.modules:
        callback(sys.modules[name])
    else:
        sys.meta_path.insert(0, Waiting(name, callback))


def install() -> None:
    """Run once at the start of every Python process on virtual GPUs."""
