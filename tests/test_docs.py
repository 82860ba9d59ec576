"""docs/: tables are those of the reports they link, and links lead somewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bench.dryrun_programs import docs_table as dryrun_table
from bench.learning_choices import docs_table as choices_table
from bench.real_clips import docs_table
from bigvivit.versions import PACKAGES, minor
from tests.launching import ROOT
from tests.versions import ENVIRONMENTS, PAGE, fill

REPORTS = set(re.findall(r"bench/results/(versions_\S+?)\.md", PAGE.read_text()))


def read_rows() -> list[dict[str, Any]]:
    """Of the report that the page links."""
    rows: list[dict[str, Any]] = []
    for report in REPORTS:
        rows += json.loads((ROOT / "bench" / "results" / f"{report}.json").read_text())["rows"]
    return rows


def test_tables_of_versions_and_parts_are_as_they_should_be() -> None:
    assert fill(PAGE.read_text(), read_rows(), "".join(REPORTS)) == PAGE.read_text()


@pytest.mark.skipif(not REPORTS, reason="no report yet: tests/versions.sh lowest, shipped and newest, then table")
def test_what_is_called_tested_was() -> None:
    """By doctor, too; nothing failed there."""
    rows = {row["environment"]: row for row in read_rows()}
    assert tuple(rows) == ENVIRONMENTS
    assert all(row["failed"] == 0 and row["evidence"] == "measured" for row in rows.values())
    for name, package in PACKAGES.items():
        ran = sorted({minor(row[name]) for row in rows.values() if row[name] is not None})
        assert (ran[0], ran[-1]) == tuple(map(minor, package.tested)), name


def test_the_tables_of_real_clips_are_the_linked_reports() -> None:
    page = (ROOT / "docs" / "learning.md").read_text()
    reports = set(re.findall(r"bench/results/(real_clips_\S+?)\.md", page))
    assert len(reports) == 2
    for report in reports:
        rows = json.loads((ROOT / "bench" / "results" / f"{report}.json").read_text())["rows"]
        assert docs_table(rows) in page
        assert all(row["evidence"] == "measured" for row in rows)


def test_the_table_of_choices_is_the_linked_reports() -> None:
    page = (ROOT / "docs" / "learning.md").read_text()
    (report,) = set(re.findall(r"bench/results/(learning_choices_\S+?)\.md", page))
    assert choices_table(json.loads((ROOT / "bench" / "results" / f"{report}.json").read_text())["rows"]) in page


def test_the_table_of_dry_runs_is_the_linked_reports() -> None:
    page = (ROOT / "docs" / "dryrun.md").read_text()
    reports = sorted(set(re.findall(r"bench/results/(dryrun_programs_\S+?)\.md", page)))
    tables = [json.loads((ROOT / "bench" / "results" / f"{report}.json").read_text())["rows"] for report in reports]
    rows = list({row["program"]: row for table in tables for row in table}.values())  # the newer report's
    assert dryrun_table(rows) in page
    assert all(row["evidence"] == "virtual" for row in rows)
    fit = sum(row["verdict"] == "fits" for row in rows)
    assert f"{fit} of {len(rows)} ran" in page


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_every_linked_file_is_there(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []
