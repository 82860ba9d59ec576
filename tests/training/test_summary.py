"""Pages of runs: finished, stopped, never evaluated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from bigvivit.config import ConfigError
from bigvivit.training import plots
from bigvivit.training.summary import build_table, draw_comparison, write_page
from tests.launching import Runs, read_losses


@pytest.fixture
def run(runs: Runs, tmp_path: Path) -> Path:
    """A copy of a run as training left it."""
    shutil.copytree(runs["plain2"], tmp_path / "run", ignore=shutil.ignore_patterns("eval*", "report*"))
    return tmp_path / "run"


def read_rows(page: Path) -> dict[str, str]:
    cells = [line.strip("| ").split(" | ") for line in page.read_text().splitlines() if line.startswith("| ")]
    return {row[0]: row[1] for row in cells if len(row) == 2}


def test_a_finished_run_that_was_not_evaluated(run: Path) -> None:
    page = write_page(run)
    text, rows = page.read_text(), read_rows(page)
    assert "Not evaluated: `bigvivit eval`" in text
    assert "Not finished" not in text
    summary = json.loads((run / "summary.json").read_text())
    assert rows["seconds per step"] == f"{summary['seconds_per_step']:.3f}"
    assert rows["top-1"] == "-"
    order = rows["output changed by reversing a clip, over another clip, at step 0"]
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert float(order) == pytest.approx(first["order_change"], rel=0.06)
    assert rows["clip.frames"] == "16"
    assert rows["versions.torch"]
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_was_killed_while_it_wrote(run: Path) -> None:
    (run / "checkpoint.json").unlink()  # summary.json may be there: it is written before
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:6]) + "\n" + lines[6][:20])
    text = write_page(run).read_text()
    assert "Not finished: 5 steps are logged." in text


def test_accuracies_classes_and_failures(run: Path) -> None:
    per_class = [{"class": "a", "clips": 2, "correct": 1, "accuracy": 0.5}]
    per_class.append({"class": "b", "clips": 0, "correct": 0, "accuracy": None})
    failed = [{"path": "x.mp4", "reason": "x.mp4 is cut"}]
    accuracy = {
        "top1": 0.5,
        "top5": 1.0,
        "clips": 2,
        "failed": failed,
        "per_class": per_class,
        "shuffled": {"top1": 0.25},
    }
    (run / "eval.json").write_text(json.dumps(accuracy))
    page = write_page(run)
    rows, text = read_rows(page), page.read_text()
    assert (rows["top-1"], rows["top-1, frames shuffled"], rows["videos not read"]) == ("50.0%", "25.0%", "1")
    assert "| a | 2 | 1 | 50.0% |" in text
    assert "| b | 0 | 0 | - |" in text
    assert "- x.mp4: x.mp4 is cut" in text


def test_a_table_of_runs_side_by_side(runs: Runs, run: Path) -> None:
    console = Console(width=200, record=True)
    console.print(build_table([runs["zero1"], run]))
    (frames,) = (line for line in console.export_text().splitlines() if "frames per clip" in line)
    assert [cell.strip() for cell in frames.split("│")[2:4]] == ["8", "16"]


def test_names_are_text_on_the_terminal_and_in_markdown(run: Path) -> None:
    odd = run.with_name("[") / "exp] $a_{"  # a folder in a folder, which rich would read as a closing tag
    odd.parent.mkdir()
    run.rename(odd)
    per_class = [{"class": "a|b", "clips": 1, "correct": 1, "accuracy": 1.0}]
    (odd / "eval.json").write_text(json.dumps({"top1": 1.0, "top5": 1.0, "failed": [], "per_class": per_class}))
    console = Console(width=300, record=True)
    console.print(build_table([odd, odd]))
    assert console.export_text().count("[/exp] $a_{") == 2
    assert "| a&#124;b | 1 | 1 | 100.0% |" in write_page(odd).read_text()
    assert draw_comparison([odd, odd]) == [odd / "comparison.png"]


def test_curves_of_several_runs_lie_over_each_other(runs: Runs, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(plots.plt, "close", drawn.append)
    first = shutil.copytree(runs["plain1"], run.with_name("first"))
    (picture,) = draw_comparison([first, run])
    assert picture == run / "comparison.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    (loss, *_) = drawn[0].axes
    assert [line.get_label() for line in loss.lines] == [str(first), str(run)]
    for line, folder in zip(loss.lines, (first, run), strict=True):
        assert list(line.get_ydata()) == read_losses(folder)
    for folder in (first, run):
        (folder / "metrics.jsonl").unlink()
    assert draw_comparison([first, run]) == []


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.json is not there: give the folder"):
        write_page(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ConfigError, match=r"run\.json cannot be read"):
        write_page(tmp_path)
