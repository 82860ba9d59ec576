"""One rank of many in a process of its own, on a virtual GPU: nobody else runs, whatever the number of ranks."""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist

from bigvivit.forecast.virtual_gpu.inside import be_alone

ANSWER = bytes(128)
"""To whatever another rank would have written; long enough for the name of an NCCL communicator."""

_stores: list[dist.Store] = []
"""PyTorch refers to the C++ half of a store only, which calls nothing once the other half is gone."""


class AnsweringStore(dist.Store):
    """A store that never waits: what nobody has written is there, and whoever counts arrivals finds all of them."""

    def __init__(self, world: int) -> None:
        super().__init__()
        self._world = world
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: str | bytes) -> None:
        self._values[key] = value.encode() if isinstance(value, str) else bytes(value)

    def get(self, key: str) -> bytes:
        return self._values.get(key, ANSWER)

    def add(self, key: str, value: int) -> int:
        """This rank's arrivals are everybody's."""
        total = int(self._values.get(key, b"0")) + value * self._world
        self._values[key] = str(total).encode()
        return total

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        if self._values.get(key, b"").decode() == expected:
            self.set(key, value)
        return self._values.get(key, expected.encode())

    def check(self, keys: list[str]) -> bool:
        """Whether somebody has really written: NCCL's watchdog looks for the others' alarms."""
        return all(key in self._values for key in keys)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        return None

    def append(self, key: str, value: bytes) -> None:
        self._values[key] = self._values.get(key, b"") + bytes(value)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.get(key) for key in keys]

    def multi_set(self, keys: list[str], values: list[bytes]) -> None:
        self._values.update(zip(keys, map(bytes, values), strict=True))

    # What C++ calls without another name for Python.

    def deleteKey(self, key: str) -> bool:  # noqa: N802
        return self._values.pop(key, None) is not None

    def getNumKeys(self) -> int:  # noqa: N802
        return len(self._values)

    def hasExtendedApi(self) -> bool:  # noqa: N802
        return True


def start_alone(rank: int, world: int) -> None:
    """torch.distributed for rank `rank` of `world`, through NCCL, in a process on a virtual GPU; no other is started.

    Every buffer has its real size, and every collective returns at once: each other rank is taken to give what this
    one gives, and a larger value is not known. Raises RuntimeError where the process is on no virtual GPU.
    """
    be_alone()
    place = {
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    os.environ.update(place)  # DeepSpeed reads them, and asks MPI where they are missing
    _stores.append(AnsweringStore(world))
    dist.init_process_group("nccl", store=_stores[-1], rank=rank, world_size=world)
