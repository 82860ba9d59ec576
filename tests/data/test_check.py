"""`bigvivit check`: what it finds, what it writes, and its exit code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from bigvivit.data.manifest import read_manifest
from tests.data.videos import write_video
from tests.launching import call


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return call("check", *arguments)


def test_a_clean_manifest(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 20, height=64, width=80)
    (tmp_path / "clips.csv").write_text("path,label\na.mp4,x\n")
    done = run(tmp_path / "clips.csv", "--frames", 8)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "clips.clean.csv").read_text() == (tmp_path / "clips.csv").read_text()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_everything_that_can_be_found(suffix: str, tmp_path: Path) -> None:
    videos = tmp_path / "vidéos"
    videos.mkdir()
    good = write_video(videos / "gut ☃.mp4", 20, height=64, width=80)
    shutil.copy(good, videos / "copy.mp4")
    write_video(videos / "short.mp4", 5, height=64, width=80)
    write_video(videos / "odd.mp4", 20, height=49, width=67, pixels="yuv444p")
    (videos / "broken.mp4").write_bytes(good.read_bytes()[:300])
    (videos / "folder.mp4").mkdir()
    os.mkfifo(videos / "pipe.mp4")
    os.symlink("loop.mp4", videos / "loop.mp4")
    names = ["gut ☃", "broken", "copy", "short", "folder", "odd", "pipe", "loop", "missing"]
    rows = [{"path": f"vidéos/{name}.mp4", "label": "none" if name == "pipe" else "x", "note": "n"} for name in names]
    manifest = tmp_path / f"clips{suffix}"
    if suffix == ".csv":
        manifest.write_text("path,label,note\n" + "".join(",".join(row.values()) + "\n" for row in rows))
    else:
        manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(manifest, "--frames", 4, "--stride", 2, "--out", tmp_path / "found", "--jobs", 1)
    assert done.returncode == 1, done.stderr
    report = json.loads((tmp_path / "found" / "clips.check.json").read_text())

    def found(kind: str) -> list[str]:
        return [Path(entry["path"]).stem for entry in report[kind]]

    assert found("unreadable") == ["broken", "folder", "pipe", "loop", "missing"]
    assert found("duplicates") == ["copy"]
    assert found("shorter") == ["short"]
    assert found("odd_sizes") == ["odd"]
    assert report["classes_lost"] == ["none"]
    assert report["decoders"] == {"decord": 4}
    assert done.stdout == (tmp_path / "found" / "clips.check.txt").read_text()
    assert "5 unreadable, left out" in done.stdout
    clean = read_manifest(tmp_path / "found" / f"clips.clean{suffix}")
    assert [clip.path.stem for clip in clean.clips] == ["gut ☃", "short", "odd"]
    assert '"note"' in (tmp_path / "found" / "clips.clean.jsonl").read_text() if suffix == ".jsonl" else True


def test_wrong_settings(tmp_path: Path) -> None:
    (tmp_path / "clips.csv").write_text("path,label\na.mp4,\n")
    (tmp_path / "file").touch()
    for words, message in (
        ((tmp_path / "none.csv",), "cannot be read (No such file"),
        ((tmp_path / "clips.csv",), "line 2: no label"),
        ((tmp_path / "clips.csv", "--jobs", 0), "jobs=0 must be at least 1"),
    ):
        done = run(*words)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    (tmp_path / "clips.csv").write_text("path,label\na.mp4,x\n")
    done = run(tmp_path / "clips.csv", "--out", tmp_path / "file")
    assert done.returncode == 2
    assert "cannot be written" in done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 20, height=64, width=80).chmod(0)
    (tmp_path / "clips.csv").write_text("path,label\na.mp4,x\n")
    done = run(tmp_path / "clips.csv")
    assert done.returncode == 1
    assert "Permission denied" in done.stdout
