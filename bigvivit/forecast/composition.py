"""What a peak is made of, for people."""

from __future__ import annotations

from collections.abc import Iterator

from bigvivit.forecast.trace import Part, Trace
from bigvivit.units import format_bytes

BAR, LARGEST = 40, 8


def describe_peak(trace: Trace, device: str = "cpu") -> Iterator[str]:
    """Bars by cause, then the largest tensors with the modules that made them; alike ones in one line."""
    causes = trace.composition(device)
    most = max(causes.values(), default=1)
    yield "at the peak:"
    for cause, size in causes.items():
        yield f"  {cause:<16} {format_bytes(size):>9}  {'█' * max(1, round(size / most * BAR))}"
    yield "largest tensors:"
    alike: dict[tuple[str, ...], list[Part]] = {}
    for part in trace.at_peak(device):
        alike.setdefault((part.cause, part.dtype, "x".join(map(str, part.shape))), []).append(part)
    for (cause, dtype, shape), parts in list(alike.items())[:LARGEST]:
        count = f"{len(parts)} x " if len(parts) > 1 else ""
        yield f"  {count}{format_bytes(parts[0].nbytes)}  {cause}, {dtype} {shape}: {parts[0].module or '-'}"
