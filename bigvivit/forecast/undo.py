"""What a step does to the Python objects around it, undone: a trace calls it, and nothing of that may be left.

Fake tensors that stay in an optimizer, a buffer, a list of losses or a scheduler would make later real steps wrong.
"""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

MOST = 1_000_000
"""Objects that are looked at; what lies behind more of them is left as it is."""
PLAIN = (str, bytes, int, float, complex, bool, type(None), type, types.ModuleType, types.BuiltinFunctionType)


@contextmanager
def undone(*roots: Any) -> Iterator[None]:
    """Afterwards all that can be reached from these holds what it held: dicts, lists, sets, attributes, variables of
    functions, gradients of leaves. What only C code, generators or slots hold is not seen."""
    actions = [action for thing in reach(roots) for action in remember(thing)]
    try:
        yield
    finally:
        for action in actions:
            action()


def reach(roots: Iterable[Any]) -> Iterator[Any]:
    """These, and all that they lead to, each once."""
    seen: dict[int, Any] = {}
    waiting = deque(roots)
    while waiting and len(seen) < MOST:
        thing = waiting.popleft()
        if id(thing) not in seen and not isinstance(thing, PLAIN):
            seen[id(thing)] = thing  # kept, so that no other object gets its id
            yield thing
            waiting.extend(lead_on(thing))


def lead_on(thing: Any) -> Iterable[Any]:
    """What this refers to."""
    if isinstance(thing, Tensor):
        return ()
    found: list[Any] = []
    if isinstance(thing, dict):
        found += thing.values()
    elif isinstance(thing, list | tuple | set | frozenset | deque):
        found += thing
    elif isinstance(thing, types.MethodType):
        found += [thing.__self__, thing.__func__]
    elif isinstance(thing, functools.partial):
        found += [thing.func, thing.args, thing.keywords]
    elif isinstance(thing, types.CellType):
        found += read_cell(thing)
    elif isinstance(thing, types.FunctionType):
        if not (thing.__module__ or "").startswith("torch."):
            found += [*(thing.__closure__ or ()), thing.__defaults__, thing.__kwdefaults__]
            found += [thing.__globals__[name] for name in global_names(thing)]
        return found
    found += [vars(thing)] if hasattr(thing, "__dict__") else []
    return found


def remember(thing: Any) -> Iterator[Callable[[], None]]:
    """What brings this back to what it is now."""
    if isinstance(thing, Tensor):
        if thing.is_leaf and thing.requires_grad:
            yield functools.partial(put_gradient, thing, thing.grad)
    elif isinstance(thing, dict):
        yield functools.partial(put_items, thing, dict(thing))
    elif isinstance(thing, list | deque):
        yield functools.partial(put_elements, thing, list(thing))
    elif isinstance(thing, set):
        yield functools.partial(put_members, thing, set(thing))
    elif isinstance(thing, types.CellType):
        yield functools.partial(put_cell, thing, read_cell(thing))
    elif isinstance(thing, types.FunctionType) and not (thing.__module__ or "").startswith("torch."):
        for name in global_names(thing):
            yield functools.partial(thing.__globals__.__setitem__, name, thing.__globals__[name])


def global_names(function: types.FunctionType) -> list[str]:
    """Of the variables of its module that it, or a function in it, names."""
    codes, names = [function.__code__], []
    for code in codes:
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        names += [name for name in code.co_names if name in function.__globals__]
    return names


def read_cell(cell: types.CellType) -> list[Any]:
    """What a variable of an outer function holds, if anything."""
    try:
        return [cell.cell_contents]
    except ValueError:
        return []


def put_gradient(tensor: Tensor, gradient: Tensor | None) -> None:
    """The one that it had, whatever that holds now."""
    if tensor.grad is not gradient:
        tensor.grad = gradient


def put_items(table: dict[Any, Any], items: dict[Any, Any]) -> None:
    """These, in this order; a table that holds the very same is not touched."""
    if list(map(id, table)) != list(map(id, items)) or list(map(id, table.values())) != list(map(id, items.values())):
        table.clear()
        table.update(items)


def put_elements(things: list[Any] | deque[Any], elements: list[Any]) -> None:
    """These, in this order; a list that holds the very same is not touched."""
    if list(map(id, things)) != list(map(id, elements)):
        things.clear()
        things.extend(elements)


def put_members(things: set[Any], members: set[Any]) -> None:
    """These and no others."""
    if things != members:
        things.clear()
        things.update(members)


def put_cell(cell: types.CellType, contents: list[Any]) -> None:
    """What `read_cell` gave; a variable that had no value has none again."""
    if contents:
        cell.cell_contents = contents[0]
    elif read_cell(cell):
        del cell.cell_contents
