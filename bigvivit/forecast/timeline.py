"""A picture of memory over the step: one HTML file that needs nothing else."""

from __future__ import annotations

import html
from collections import Counter
from pathlib import Path

from bigvivit.forecast.trace import Trace
from bigvivit.units import format_bytes

COLOURS = {
    "tower": "#4477aa",
    "fetched weights": "#66ccee",
    "hidden states": "#228833",
    "activations": "#ccbb44",
    "trained weights": "#aa3377",
    "weights": "#aa3377",
    "gradients": "#ee6677",
    "optimizer state": "#882255",
    "buckets": "#999933",
    "collectives": "#ddaa33",
    "input": "#44aa99",
    "workspace": "#bbbbbb",
}
"""By cause; the least restless at the bottom."""
POINTS, WIDTH, HEIGHT = 1500, 1400, 560


def write_timeline(trace: Trace, path: Path, title: str, limit_bytes: int | None = None, device: str = "cpu") -> None:
    """Live bytes by cause after each event, thinned to what a screen shows without losing peaks."""
    rows = sample(trace, device)
    causes = [cause for cause in COLOURS if any(row[1].get(cause) for row in rows)]
    top = max([sum(row[1].values()) for row in rows] + [limit_bytes or 0, 1]) * 1.05
    base = [0.0] * len(rows)
    shapes = []
    for cause in causes:
        upper = [below + row[1].get(cause, 0) for below, row in zip(base, rows, strict=True)]
        outline = [*enumerate(upper), *reversed(list(enumerate(base)))]
        points = " ".join(
            f"{index / max(len(rows) - 1, 1) * WIDTH:.1f},{HEIGHT - value / top * HEIGHT:.1f}"
            for index, value in outline
        )
        shapes.append(f'<polygon points="{points}" fill="{COLOURS[cause]}"><title>{cause}</title></polygon>')
        base = upper
    if limit_bytes is not None:
        y = HEIGHT - limit_bytes / top * HEIGHT
        shapes.append(f'<line x1="0" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#000" stroke-dasharray="6 4"/>')
        shapes.append(f'<text x="4" y="{y - 4:.1f}">{format_bytes(limit_bytes)} are there</text>')
    for index, (label, _) in enumerate(rows):
        if index == 0 or label != rows[index - 1][0]:
            x = index / max(len(rows) - 1, 1) * WIDTH
            shapes.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{HEIGHT}" stroke="#0004"/>')
            shapes.append(f'<text x="{x + 3:.1f}" y="12" font-size="10">{label}</text>')
    legend = "".join(f'<span style="background:{COLOURS[cause]}">&emsp;</span> {cause}&emsp;' for cause in causes)
    path.write_text(
        f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title>"
        f"<body style='font-family:sans-serif'><h3>{html.escape(title)}</h3>"
        f"<p>peak {format_bytes(trace.peak_bytes(device))}; from left to right every allocation and release</p>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="100%">{"".join(shapes)}</svg><p>{legend}</p>\n'
    )


def sample(trace: Trace, device: str) -> list[tuple[str, dict[str, int]]]:
    """(step and phase, bytes by cause) at so many places, each the fullest of its stretch."""
    states: list[tuple[int, str, dict[str, int]]] = []
    live: Counter[str] = Counter()
    total = 0
    events = [event for event in trace.events if event.allocation.device == device]
    stretch = max(1, len(events) // POINTS)
    for number, event in enumerate(events):
        live[event.allocation.cause] += event.change
        total += event.change
        label = f"step {event.step}, {event.phase}" if event.step else "build"
        if number % stretch == 0:
            states.append((total, label, dict(live)))
        elif total > states[-1][0]:
            states[-1] = (total, label, dict(live))
    return [(label, sizes) for _, label, sizes in states]
