"""Memory as a test: a pytest plugin for any project, `pytest_plugins = ["bigvivit.testing"]` in its conftest.py.

    def test_a_step_fits(memory_budget):
        model = Net()                       # tensors made in this test have shapes and no memory
        optimizer = torch.optim.AdamW(model.parameters())

        def step():
            optimizer.zero_grad()
            model(torch.empty(8, 512)).mean().backward()
            optimizer.step()

        memory_budget(step, peak="3.2 GiB")
        memory_budget(step, peak="3.4 GiB", gpu="L4")  # PyTorch's own CUDA allocator, on a virtual GPU

Whoever wants it names it: an entry point would load it, with its option, wherever this package is installed.

A peak when it was last good, and the most of each cause, stand in `memory_goldens.json` beside the test, under the
versions that change bytes; only `--update-memory-goldens` writes it.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from bigvivit.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from bigvivit.forecast.trace import Trace

PACKAGES = ("torch", "transformers", "deepspeed", "bitsandbytes")
"""Whose code decides which tensors a step makes."""
NAMED = 8
"""Causes that a failure names."""
STEPS = 3
"""Steps that run on a virtual GPU, as many as are traced."""
NEVER = 1 << 62
"""Steps after which a dry run would end by itself."""
IN_CHILD = "BIGVIVIT_MEMORY_BUDGET"
"""Set where a test runs once more, on a virtual GPU."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """The one way to write goldens."""
    parser.addoption(
        "--update-memory-goldens", action="store_true", help="record peaks of memory as they are now, and of what"
    )


def name_versions() -> str:
    """`torch 2.14, transformers 5.23, …` of what is installed: minor versions, as fixes change no tensors."""
    found = []
    for package in PACKAGES:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        found.append(f"{package} {'.'.join(version.split('.')[:2])}")
    return ", ".join(found)


class Goldens:
    """What one test's peak was when it was last good."""

    def __init__(self, node: pytest.Item, update: bool) -> None:
        self.path = node.path.with_name("memory_goldens.json")
        self.name, self.update, self.versions = f"{node.path.name}::{node.name}", update, name_versions()

    def read_all(self) -> dict[str, dict[str, Any]]:
        """By versions, then by test."""
        found: dict[str, dict[str, Any]] = json.loads(self.path.read_text()) if self.path.exists() else {}
        return found

    def read(self) -> dict[str, Any] | None:
        """This test's, under these versions."""
        return self.read_all().get(self.versions, {}).get(self.name)

    def write(self, peak_bytes: int, most: dict[str, int]) -> None:
        """One test per line, so that a diff shows which changed."""
        everything = self.read_all()
        everything.setdefault(self.versions, {})[self.name] = {"peak_bytes": peak_bytes, "most_bytes": most}
        blocks = []
        for versions, tests in sorted(everything.items()):
            lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(found)}" for name, found in sorted(tests.items()))
            blocks.append(f"{json.dumps(versions)}: {{\n{lines}\n}}")
        self.path.write_text("{\n" + ",\n".join(blocks) + "\n}\n")

    def give_up(self) -> None:
        """There is nothing to compare with: a skip where the versions are new, for which nobody has looked yet; in CI a
        failure where the test is, since whoever added it forgot to record it."""
        known = ", ".join(f"({versions})" for versions, tests in self.read_all().items() if self.name in tests)
        reason = (
            f"{self.path.name} has no peak of {self.name} for {self.versions}, only for {known or 'nothing'}: "
            "look at the peaks, then run pytest with --update-memory-goldens"
        )
        if os.environ.get("CI") and not known:
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)


def most_by_cause(trace: Trace, device: str = "cpu") -> dict[str, int]:
    """The most bytes that each cause and module had alive over the steps, down to the numbered layer: `activations of
    net.layers.3`. Each by itself, so that one that grows shows, wherever the peak then lies."""
    live: Counter[str] = Counter()
    most: dict[str, int] = {}
    for event in trace.events:
        if event.allocation.device == device:
            name = name_group(event.allocation.cause, event.allocation.module)
            live[name] += event.change
            if event.step and live[name] > most.get(name, 0):
                most[name] = live[name]
    for name, size in live.items():
        most[name] = max(most.get(name, 0), size)  # what was there all the time
    return dict(Counter({name: size for name, size in most.items() if size}).most_common())


def name_group(cause: str, module: str) -> str:
    """A cause, and the module or the numbered layer that it belongs to."""
    match = re.match(r".*?\.[0-9]+(?=\.|$)", module)
    return f"{cause} of {match[0] if match else module or 'no module'}"


def explain_growth(before: dict[str, int], trace: Trace, device: str = "cpu") -> list[str]:
    """Whose most grew since then, the largest first, with its largest tensor; then whose shrank."""
    now = most_by_cause(trace, device)
    changes = {name: now.get(name, 0) - before.get(name, 0) for name in {**now, **before}}
    changed = sorted((change < 0, -abs(change), name) for name, change in changes.items() if change)
    lines = []
    for _, _, name in changed[:NAMED]:
        line = (
            f"  {changes[name]:+,} B  {name} ({format_bytes(before.get(name, 0))} → {format_bytes(now.get(name, 0))})"
        )
        if changes[name] > 0:
            taken = (event.allocation for event in trace.events if event.change > 0)
            made = (tensor for tensor in taken if tensor.device == device)
            own = [tensor for tensor in made if name_group(tensor.cause, tensor.module) == name]
            # Of those that are still there at the end first: what grew was perhaps kept.
            largest = max(own, key=lambda t: (t.nbytes > 0, math.prod(t.shape) * t.dtype.itemsize))
            shape = "x".join(map(str, largest.shape))
            line += f", such as {str(largest.dtype).removeprefix('torch.')} {shape} by {largest.op or 'its owner'}"
        lines.append(line)
    return lines or ["  no cause by itself: more of them are alive at once"]


@pytest.fixture
def memory_golden(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`memory_golden(trace)`: its peak is to the byte what it was. `memory_golden(peak_bytes, tolerance=0.02)`: real
    ones, nearly; `on="NVIDIA T4"` says whose they are. Fails with the causes that changed; skips where
    nothing was recorded for these versions (in CI it fails where nothing ever was)."""
    goldens = Goldens(request.node, request.config.getoption("update_memory_goldens"))

    def check(found: Trace | int, *, tolerance: float = 0.0, on: str = "") -> None:
        goldens.name += f" on {on}" if on else ""
        peak = found if isinstance(found, int) else found.peak_bytes()
        if goldens.update:
            goldens.write(peak, {} if isinstance(found, int) else most_by_cause(found))
            return
        golden = goldens.read()
        if golden is None:
            goldens.give_up()
            return
        before = golden["peak_bytes"]
        if abs(peak - before) <= tolerance * before:
            return
        lines = [] if isinstance(found, int) else explain_growth(golden["most_bytes"], found)
        word = "more" if peak > before else "less"
        head = (
            f"peak {peak:,} B is {abs(peak - before):,} B {word} than the {before:,} B it was; if that is meant, run "
        )
        pytest.fail("\n".join([head + "pytest with --update-memory-goldens", *lines]), pytrace=False)

    return check


@dataclass(frozen=True)
class OnGpu:
    """What a test took on a virtual GPU, until three steps had run."""

    gpu: str
    peak_bytes: int
    reserved_bytes: int


@pytest.fixture
def memory_budget(request: pytest.FixtureRequest) -> Iterator[Callable[..., Trace | OnGpu | None]]:
    """`memory_budget(step, peak="3.2 GiB")`: three steps, traced on fake tensors, never have more alive at once.

    Build model and optimizer in the test: tensors made while this fixture is in use are fake. Modules and the optimizer
    are those that `step` refers to; name them with `modules={"net": net}` and `optimizer=` where it does not do so
    itself. Returns the trace.

    With `gpu="L4"` the test is run once more from its beginning, in a process on a virtual GPU, where tensors that name
    no device are made on it and the steps are real: the peak is that of PyTorch's CUDA allocator over all of the test
    until then. Returns an `OnGpu`.
    """
    if IN_CHILD in os.environ:
        import torch

        with torch.device("cuda"):
            yield run_and_leave
        return

    from bigvivit.forecast import fake_tensors, trace_step

    goldens = Goldens(request.node, request.config.getoption("update_memory_goldens"))
    with fake_tensors():

        def check(
            step: Callable[[], Any], *, peak: str | int, modules: Any = None, optimizer: Any = None, gpu: str = ""
        ) -> Trace | OnGpu:
            budget = parse_bytes(peak) if isinstance(peak, str) else peak
            if gpu:
                return check_on_gpu(request.node, gpu, budget)
            seen, optimizers = find_parts(step)
            modules, optimizer = modules or seen, optimizer or optimizers
            if not modules:
                raise pytest.UsageError("memory_budget: step refers to no nn.Module; give modules={'net': net}")
            trace = trace_step(step, modules=modules, optimizer=optimizer)
            found = trace.peak_bytes()
            if found > budget:
                golden = goldens.read()
                head = f"peak {format_bytes(found)} ({found:,} B) is {found - budget:,} B above the budget of {peak}"
                if golden is None:
                    lines = [f"  {size:,} B  {name}" for name, size in list(most_by_cause(trace).items())[:NAMED]]
                    head += "; what it was made of before is not recorded (--update-memory-goldens), now it is"
                else:
                    lines = explain_growth(golden["most_bytes"], trace)
                    head += f"; since {golden['peak_bytes']:,} B"
                pytest.fail("\n".join([head, *lines]), pytrace=False)
            if goldens.update:
                goldens.write(found, most_by_cause(trace))
            return trace

        yield check


def run_and_leave(step: Callable[[], Any], **others: Any) -> None:
    """In the process on a virtual GPU: the steps, and nothing of the test after them."""
    if not others.get("gpu"):
        return
    for _ in range(STEPS):
        step()
    pytest.skip("the steps have run")


def check_on_gpu(item: pytest.Item, gpu: str, budget: int) -> OnGpu:
    """Run the test on a virtual GPU and compare its peak; fails with the lines that made the largest tensors."""
    from bigvivit.forecast.dryrun.launch import Request, dry_run, scratch_folder

    command = (
        *("env", f"{IN_CHILD}=1", sys.executable, "-m", "pytest", item.nodeid, "--rootdir", str(item.config.rootpath)),
        *("-o", "addopts=", "-p", "no:cacheprovider"),
    )
    with scratch_folder() as folder, pytest.MonkeyPatch.context() as patch:
        patch.chdir(item.config.rootpath)
        outcome = dry_run(Request(command=command, gpu=gpu, gpus=1, steps=NEVER), folder)
    if outcome.word == "out of memory":
        pytest.fail(f"out of memory on a virtual {gpu}: {outcome.error_text}", pytrace=False)
    if outcome.word != "fits":
        pytest.fail(f"on a virtual {gpu} ({outcome.word}):\n{outcome.tail}", pytrace=False)
    found = OnGpu(gpu, outcome.peak("peak_allocated_bytes"), outcome.peak("peak_reserved_bytes"))
    if found.peak_bytes > budget:
        over = found.peak_bytes - budget
        lines = [
            f"  {row['bytes']:,} B  {row['phase']} at {row['line'] or 'no line of the test'} {row['inside']}".rstrip()
            for row in outcome.records[0]["devices"][0]["largest"][:NAMED]
        ]
        head = f"peak {found.peak_bytes:,} B on a virtual {gpu} is {over:,} B above the budget of {budget:,} B"
        pytest.fail("\n".join([head, *lines]), pytrace=False)
    return found


def find_parts(step: Callable[[], Any]) -> tuple[dict[str, Any], list[Any]]:
    """Modules by name, and optimizers, among what a function refers to."""
    from torch import nn
    from torch.optim import Optimizer

    if not inspect.isfunction(step):
        return {}, []
    seen = inspect.getclosurevars(step)
    values = {**seen.globals, **seen.nonlocals}
    modules = {name: value for name, value in values.items() if isinstance(value, nn.Module)}
    return modules, [value for value in values.values() if isinstance(value, Optimizer)]
