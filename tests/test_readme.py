"""The README's numbers are those of the reports it links."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bench.frame_capacity import Arguments as CapacityConfig
from bench.two_stages import readme_table
from bigvivit.commands.calibrate import CalibrateConfig
from bigvivit.commands.dryrun import DryRunConfig
from bigvivit.config import ClipConfig, DataConfig, EvalConfig, ModelConfig, TrainConfig
from bigvivit.data.check import CheckConfig
from bigvivit.drift import DriftConfig
from bigvivit.forecast.replay_report import ReplayConfig
from bigvivit.plan import PlanConfig
from bigvivit.predict import PredictConfig
from bigvivit.training.progress import flat_settings
from bigvivit.units import KiB, MiB
from tests.launching import ROOT

README = (ROOT / "README.md").read_text()
TRAIN = TrainConfig(
    stage=1,
    out=Path("run"),
    clip=ClipConfig(frames=8),
    data=DataConfig(train=Path("train.csv")),
    model=ModelConfig(tower="vit-b"),
)


def test_the_table_is_the_linked_reports() -> None:
    (report,) = set(re.findall(r"bench/results/(demo_\S+)\.md", README))
    record = json.loads((ROOT / "bench" / "results" / f"{report}.json").read_text())
    assert readme_table(record["rows"]) in README
    assert all(row["evidence"] == "measured" for row in record["rows"])


def test_what_the_allocator_was_held_to() -> None:
    (report,) = set(re.findall(r"bench/results/(allocator_\S+?)\.md", README))
    rows = json.loads((ROOT / "bench" / "results" / f"{report}.json").read_text())["rows"]
    traces = [row for row in rows if row["program"] != "synthetic"]
    assert all(row["exact"] for row in traces)
    placed = sum(row["blocks"] == row["blocks_at_recorded_address"] for row in traces)
    asked, freed = (sum(row[key] > 0 for row in traces) for key in ("segment_events", "segments_given_back"))
    text = " ".join(README.split())
    assert f"On {len(traces)} recordings that others published" in text
    assert f"in {placed} of them it also puts every block at its recorded address" in text
    assert (f"In {asked} of them segments are asked for at all, in three given back", freed) == (
        re.findall(r"In \d+ of them segments are asked for at all, in three given back", text)[0],
        3,
    )
    assert all(row["seconds"] <= 2 for row in rows)
    programs = rows_of("virtual_truth_allocator")
    assert f"no block of {len(programs)} random programs lies elsewhere" in text
    assert all(row["blocks_that_differ"] == 0 and row["target"] == "met" for row in programs)


def rows_of(name: str) -> list[dict[str, Any]]:
    """Of the one report of this bench that the README links."""
    (report,) = set(re.findall(rf"bench/results/({name}_\S+?)\.md", README))
    rows: list[dict[str, Any]] = json.loads((ROOT / "bench" / "results" / f"{report}.json").read_text())["rows"]
    return rows


def test_what_streaming_costs() -> None:
    text = " ".join(README.split())
    shares = [row["by_full_step"] for row in rows_of("step_time") if row["name"].startswith("stage 2")]
    assert f"takes {min(shares):.2f} to {max(shares):.2f} of a full training step" in text
    ours = [row for row in rows_of("relatives") if row["side"] == "ours"]
    theirs = [row for row in rows_of("relatives") if row["side"] != "ours"]
    assert {row["moved_by_tower"] for row in ours} == {1.0}
    assert f"theirs moves up to {max(row['moved_by_tower'] for row in theirs):.0f} times" in text
    times = [row["seconds_by_theirs"] for row in ours]
    assert f"the time is {min(times):.2f} to {max(times):.2f} of theirs" in text
    more = [(a["pass_bytes"] - b["pass_bytes"]) / MiB for a, b in zip(ours, theirs, strict=True)]
    assert f"memory {min(more):.0f} to {max(more):.0f} MiB more" in text
    assert {row["greatest_difference"] for row in ours} == {0.0}


def test_what_the_tower_takes() -> None:
    measured = [row for row in rows_of("stage2_memory") if row["evidence"] == "measured"]
    assert f"{len(measured)} cells (ViT-B and L whole, 8 layers of H and g, 8 to 512" in README
    assert {row["frames"] for row in measured} == {8, 32, 128, 512}
    assert {row["bound"] for row in measured} == {"met"}
    assert {row["growth"] for row in measured if "growth" in row} == {"met"}


def test_how_near_capacities_are() -> None:
    reports = sorted(set(re.findall(r"bench/results/(frame_capacity_\S+?)\.md", README)))
    rows = [
        row for name in reports for row in json.loads((ROOT / "bench/results" / f"{name}.json").read_text())["rows"]
    ]
    over = [row["forecast_frames"] - row["measured_frames"] for row in rows]
    assert set(over) <= {0, 2}
    counts = f"in {over.count(0)} of {len(rows)} cells and one tubelet more in {over.count(2)}"
    ends = f"{sum(row['more_may_fit'] for row in rows)} of them end where the search does, at 512 frames"
    assert f"{counts}; {ends}" in " ".join(README.split())


def test_the_papers_table() -> None:
    rows = rows_of("paper_table")

    def frames(tower: str, stage: int, plan: str, key: str = "most_frames") -> str:
        cell = {"hardware": "TPU v3", "tower": tower, "stage": stage, "plan": plan}
        (row,) = [row for row in rows if row.items() >= cell.items()]
        return f"{row[key]}+" if key == "most_frames" and row["more_may_fit"] else str(row[key])

    for tower in ("vit-h", "vit-g"):
        for stage, name, plan, other in (
            (1, "ViViT", "everything trains", "recompute"),
            (2, "SFA-ViViT", "paper", "layer-major"),
        ):
            cells = [frames(tower, stage, plan, "paper_most_frames"), *(frames(tower, stage, p) for p in (plan, other))]
            assert f"| {name}-{tower[-1].replace('h', 'H')} | {' | '.join(cells)} |" in README
    (one,) = [
        row for row in rows if row["ranks"] == 1 and row["hardware"] == "2080 Ti" and row["plan"] == "layer-major"
    ]
    (seven,) = [row for row in rows if "dinov3" in row["tower"]]
    text = " ".join(README.split())
    assert f"at {one['best_seconds']:.1f} to {one['worst_seconds']:.1f} s on one 2080 Ti" in text
    assert f"at {seven['best_seconds']:.0f} to {seven['worst_seconds']:.0f} s for DINOv3's" in text


def test_what_explains_the_papers_thresholds() -> None:
    rows = rows_of("paper_inference")
    explained = {row["value"]: row for row in rows if row["about"] == "thresholds explained"}
    best = max(count for count, row in explained.items() if row["points"])
    total, text = sum(row["points"] for row in explained.values()), " ".join(README.split())
    assert f"Of {total} combinations" in text
    assert f"none explains more than {best} of its six thresholds, and {explained[best]['share_of_grid']:.0%}" in (
        text.replace(" %", "%")
    )
    known = {(row["about"], row["value"]): row for row in rows}
    assert known["recompute", "True"]["share_of_best"] == known["threshold", "SFA-ViViT-g"]["points"] == 0


def test_how_near_one_rank_is() -> None:
    rows = rows_of("forecast_accuracy_one_rank")
    far = [row for row in rows if abs(row["error_percent"]) > 0.1]
    text = " ".join(README.split())
    assert f"{len(rows) - len(far)} of {len(rows)} peaks of ten families" in text
    assert f"the other five miss {far[0]['unseen_bytes'] // KiB} KiB" in text
    assert [row["unseen_bytes"] for row in far] == [far[0]["unseen_bytes"]] * 5
    assert all("bf16 masters" in row["cell"] for row in far)


def test_how_near_two_ranks_are() -> None:
    (report,) = set(re.findall(r"\[two\]\(bench/results/(forecast_accuracy_\S+?)\.md", README))
    rows = json.loads((ROOT / "bench" / "results" / f"{report}.json").read_text())["rows"]
    near = sum(abs(row["error_percent"]) <= 0.002 for row in rows)
    assert f"within 0.002 % in {near} of {len(rows)} cells" in README
    assert all("on 2 ranks" in row["cell"] for row in rows)


def test_what_others_forecast() -> None:
    rows, text = rows_of("forecast_rivals"), " ".join(README.split())
    errors = {row["method"]: [] for row in rows}
    for row in rows:
        if "error_percent" in row:
            errors[row["method"]].append(abs(row["error_percent"]))
    assert max(errors["bigvivit"]) == max(errors["MemTracker"]) == 0.0
    assert [row["cell"] for row in rows if row["method"] == "MemTracker" and "failed" in row] == ["stage 2"]
    low, high = sorted(errors["FSDPMemTracker"])
    assert f"FSDPMemTracker is {low:.1f} and {high:.1f} % off" in text
    for tool, name in (("DeepSpeed estimator", "DeepSpeed's estimate"), ("accelerate estimate-memory", "accelerate's")):
        assert f"{name} {min(errors[tool]):.0f} to {max(errors[tool]):.0f} %" in text
    big = [[row["seconds"] for row in rows if "round" in row["cell"] and row["method"] == name] for name in errors]
    ours, theirs = [times for times in big if times]
    assert f"takes our trace at most {max(ours):.1f} s and MemTracker at least {min(theirs):.0f} s" in text
    assert {row["target"] for row in rows if "64 ranks" in row["cell"]} == {"met: within 10 s"}


def test_killed_runs_ended_like_those_left_alone() -> None:
    for engine in ("plain", "zero3"):
        (report,) = set(re.findall(rf"bench/results/(kill_and_resume_{engine}_\S+?)\.md", README))
        record = json.loads((ROOT / "bench" / "results" / f"{report}.json").read_text())
        assert len(record["rows"]) == 20
        assert sum(row["aim"] == "while saving" for row in record["rows"]) == 10
        differences = [record["settings"][f"greatest_{what}_difference"] for what in ("loss", "weight")]
        assert differences == [0.0, 0.0]


def test_every_linked_file_is_there() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_every_setting_the_readme_names_exists() -> None:
    """Of our own commands; the other words with dashes belong to launchers."""
    known = {name.replace("_", "-") for name in flat_settings(TRAIN)}
    for other in (
        CalibrateConfig,
        CapacityConfig,
        CheckConfig,
        DriftConfig,
        DryRunConfig,
        EvalConfig,
        PlanConfig,
        PredictConfig,
        ReplayConfig,
    ):
        known |= {name.replace("_", "-") for name in other.__dataclass_fields__}
    launchers = {"help", "nproc_per_node", "num_gpus", "num_processes", "multi_gpu", "hostfile", "nnodes"}
    launchers |= {"rdzv_backend", "rdzv_id", "rdzv_endpoint", "nodes", "ntasks-per-node", "gpus-per-node"}
    launchers |= {"update-memory-goldens"}  # pytest's, of bigvivit.testing
    launchers |= {"memory.…", "memory.", "cpus-per-task", "signal", "requeue"}
    flags = set(re.findall(r"(?<![-\w])--([a-z][a-z._-]*)", README)) - launchers
    assert "clip.no-flip" in flags
    assert {flag for flag in flags if flag.replace(".no-", ".") not in known} == set()
