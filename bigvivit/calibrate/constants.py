"""From rows to the constants that forecasts take for this device."""

from __future__ import annotations

import statistics
from datetime import datetime, timezone
from typing import Any

from bigvivit.calibrate.calibration import Calibration
from bigvivit.calibrate.journal import Journal

TYPES = ("bf16", "fp16", "fp32", "tf32")


def distil(journal: Journal) -> Calibration:
    """What the device's rows say; None of what they do not."""
    identity = journal.identity
    link, products, disk = (journal.found(f"rates: {name}", "device") or {} for name in ("link", "products", "disk"))
    memory = journal.found("rates: memory", "device") or link
    works = journal.found("facts: workspaces", "device") or {}
    scratch = [works[name] for name in works if name.startswith("convolution") and name.endswith("scratch_bytes")]
    return Calibration(
        **{name: identity[name] for name in ("card", "device", "evidence", "torch", "cuda", "driver", "capability")},
        memory_bytes=identity["memory_bytes"],
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        context_bytes=context_of(journal) if identity["device"] == "cuda" else process_of(journal),
        workspace_bytes=works.get("product_fp32_kept_bytes"),
        scratch_bytes=max(scratch, default=None),
        rates={name: products[f"{name}_per_second"] for name in TYPES if f"{name}_per_second" in products},
        bandwidth=memory.get("memory_per_second"),
        host_bandwidth=link.get("to_gpu_pinned_per_second"),
        disk_bandwidth=disk.get("anew_per_second"),
    )


def context_of(journal: Journal) -> tuple[int, int, int] | None:
    """Least: after one tensor. Expected and most: the median and the greatest after steps, in which the driver has
    loaded kernels. None where nobody could tell this process's memory from other programs' after steps."""
    first = journal.found("facts: context", "device")
    if first is None:
        return None
    after = [
        row["outside_bytes"]
        for (_, side), row in journal.rows.items()
        if side == "device" and row.get("outside_bytes") is not None
    ]
    if not after:
        return None
    seen = sorted([first["context_bytes"], *after])
    return seen[0], int(statistics.median_high(seen)), seen[-1]


def process_of(journal: Journal) -> tuple[int, int, int] | None:
    """Of a CPU, where a limit counts data: what imports take, and with it what libraries take beside tensors."""
    found = journal.found("facts: process", "device")
    if found is None:
        return None
    imports, libraries = found["imports_data_bytes"], found["libraries_bytes"]
    return imports, imports + libraries, imports + libraries


def errors(journal: Journal) -> list[dict[str, Any]]:
    """A row for each memory cell and capacity that the device has answered, with how far the others are from it."""
    rows = []
    for (key, side), found in journal.rows.items():
        if side != "device" or found["group"] not in ("memory", "capacity") or "failed" in found:
            continue
        row = {name: found[name] for name in ("group", "name", "evidence")}
        for what in ("allocated_bytes", "reserved_bytes", "frames"):
            if what not in found:
                continue
            row[what] = found[what]
            for other in ("virtual", "forecast"):
                answer = journal.found(key, other)
                if answer is not None and what in answer:
                    row[f"{other}_{what}"] = answer[what]
                    if found[what]:
                        row[f"{other}_{what.removesuffix('_bytes')}_error"] = answer[what] / found[what] - 1
        rows.append(row)
    return rows
