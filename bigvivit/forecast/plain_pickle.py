"""A pickle of plain data, read as a stream of which only what is asked for stays in memory.

A snapshot recorded with stacks is gigabytes of frames that no replay looks at. `pickle.Unpickler` builds them all, and
keeps each to the end, since later ones may refer to it; it has no hook between objects, and no way to forget. So the
few instructions that plain data consists of are run here, by hand: of dicts only the keys asked for are kept, and of
what may be referred to again only texts that were asked for, and tuples. Instructions that name, call or build anything
else are not known here, so nothing in a file can run. The file is read in pieces and not mapped: pages of a mapped file
count as memory of the process.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Iterable
from struct import Struct
from typing import Any, BinaryIO

from bigvivit.config import ConfigError
from bigvivit.units import MiB

CODES = {each.name: ord(each.code) for each in pickletools.opcodes}
NAMES = {code: name for name, code in CODES.items()}
MEMOIZE, BININT1, LONG1, TUPLE2 = CODES["MEMOIZE"], CODES["BININT1"], CODES["LONG1"], CODES["TUPLE2"]
MARK, STOP, APPENDS, SETITEMS = CODES["MARK"], CODES["STOP"], CODES["APPENDS"], CODES["SETITEMS"]
TUPLE = CODES["TUPLE"]
ABOVE_MARK = {APPENDS, SETITEMS, TUPLE}
EMPTY = {CODES["EMPTY_DICT"]: dict, CODES["EMPTY_LIST"]: list}
BYTE, INT = Struct("<B"), Struct("<I")
NUMBERS = {CODES["BININT2"]: Struct("<H"), CODES["BININT"]: Struct("<i"), CODES["BINFLOAT"]: Struct(">d")}
TEXTS = {CODES["SHORT_BINUNICODE"]: BYTE, CODES["BINUNICODE"]: INT, CODES["BINUNICODE8"]: Struct("<Q")}
GETS = {CODES["BINGET"]: BYTE, CODES["LONG_BINGET"]: INT}
PUTS = {CODES["BINPUT"]: BYTE, CODES["LONG_BINPUT"]: INT}
CONSTANTS = {CODES["NONE"]: None, CODES["NEWTRUE"]: True, CODES["NEWFALSE"]: False, CODES["EMPTY_TUPLE"]: ()}
FEW = {
    **{CODES["APPEND"]: (1, APPENDS), CODES["SETITEM"]: (2, SETITEMS)},
    **{CODES[f"TUPLE{count}"]: (count, TUPLE) for count in (1, 3)},
}
"""How many items these take, and the instruction that does the same with all above the last mark."""
SKIPPED = {CODES["PROTO"]: 1, CODES["FRAME"]: 8}
"""What says nothing about the data, and how many bytes of argument it has."""

MARGIN = MiB // 16
"""More than any instruction takes, or a list of references; only texts may be longer."""
REFERENCES = re.compile(rb"(?:j....|h.){1,1000}e", re.DOTALL)
"""The rest of a list that consists of references, as most stacks do. Picklers write at most 1000 items at once."""


class Forgotten:
    """In the place of what occurred before and was not kept."""


FORGOTTEN = Forgotten()


def load(file: BinaryIO, words: Iterable[str]) -> Any:
    """What a pickle of protocol 2 or later holds: of dicts only those keys that are among `words`, and FORGOTTEN for
    what occurs again and is neither one of `words` nor a tuple, and for all such items that a list ends with. Raises
    ConfigError for instructions that plain data does without; EOFError, IndexError, TypeError, struct.error and others
    where the file is broken."""
    keys = frozenset(words)
    memo: dict[int, Any] = {}
    memoized = 0
    stack, below = list[Any](), list[list[Any]]()  # what lies above the last mark, and above those before
    # A piece of the file, a place in it, and the last place from which a whole instruction is in it.
    window, at, last = b"", 0, -1
    while True:  # cases are ordered by how often they occur: a million events are thirty million turns
        if at > last:
            window, at, last = read_on(file, window[at:])
        code = window[at]
        at += 1
        if code in GETS:
            (index,), at = GETS[code].unpack_from(window, at), at + GETS[code].size
            stack.append(memo.get(index, FORGOTTEN))
            if index >= memoized:
                raise IndexError(f"it refers to object {index} of {memoized}")
        elif code == BININT1:
            stack.append(window[at])
            at += 1
        elif code in EMPTY:
            stack.append(EMPTY[code]())
            if window[at] == MEMOIZE:  # as almost always; neither is kept
                memoized += 1
                at += 1
        elif code == LONG1:
            end = at + 1 + window[at]
            stack.append(int.from_bytes(window[at + 1 : end], "little", signed=True))
            at = end
        elif code == MARK and (references := REFERENCES.match(window, at)):  # a stack without new frames
            stack[-1].append(FORGOTTEN)
            at = references.end()
        elif code == MARK:
            below.append(stack)
            stack = []
        elif code in ABOVE_MARK:
            items, stack = stack, below.pop()
            combine(stack, items, keys, code)
            if code == SETITEMS and (references := REFERENCES.match(window, at)):  # frames behind a new one
                stack.append(FORGOTTEN)
                at = references.end() - 1
        elif code == TUPLE2:
            second = stack.pop()
            stack[-1] = (stack[-1], second)
        elif code == MEMOIZE or code in PUTS:  # what is on top may be referred to from here on
            shape = PUTS.get(code)
            place, at = (shape.unpack_from(window, at)[0], at + shape.size) if shape else (memoized, at)
            memoized = max(memoized, place + 1)
            if type(stack[-1]) is tuple or (type(stack[-1]) is str and stack[-1] in keys):
                memo[place] = stack[-1]
        elif code == STOP:
            return stack.pop()
        else:
            window, at = seldom(code, file, window, at, stack, keys)


def read_on(file: BinaryIO, rest: bytes) -> tuple[bytes, int, int]:
    """The `rest` of a piece of the file and the next, the place to go on in it, and the last before it is short."""
    more = file.read(MiB)
    if not rest and not more:
        raise EOFError(f"it ends after {file.tell()} bytes")
    return rest + more, 0, len(rest) + len(more) - (MARGIN if more else 1)


def combine(stack: list[Any], items: list[Any], keys: frozenset[str], code: int) -> None:
    """Put what was collected into the list or dict on top, or on top as a tuple."""
    if code == SETITEMS and type(stack[-1]) is dict:
        for key, value in zip(items[::2], items[1::2], strict=True):
            if key in keys:
                stack[-1][key] = value
    elif code == APPENDS and type(stack[-1]) is list:
        stack[-1].extend(items)
    elif code == TUPLE:
        stack.append(tuple(items))
    else:
        raise TypeError(f"{NAMES[code]} on {type(stack[-1]).__name__}")


def seldom(
    code: int, file: BinaryIO, window: bytes, at: int, stack: list[Any], keys: frozenset[str]
) -> tuple[bytes, int]:
    """Run one of the other instructions. Returns the piece of the file, longer where a text needs it, and a place."""
    if code in TEXTS:
        start = at + TEXTS[code].size
        end = start + TEXTS[code].unpack_from(window, at)[0]
        if end > len(window):
            window += file.read(end - len(window))
        stack.append(window[start:end].decode())
        return window, end
    if code in NUMBERS:
        stack.append(NUMBERS[code].unpack_from(window, at)[0])
        return window, at + NUMBERS[code].size
    if code in SKIPPED:
        return window, at + SKIPPED[code]
    if code in CONSTANTS:
        stack.append(CONSTANTS[code])
    elif code in FEW:
        count, like = FEW[code]
        items = stack[-count:]
        del stack[-count:]
        combine(stack, items, keys, like)
    elif code not in NAMES:
        raise ValueError(f"byte {code:#x} is no instruction of a pickle")
    else:
        raise ConfigError(f"it holds {NAMES[code]}, which a memory snapshot never does: nothing of it was run")
    return window, at
