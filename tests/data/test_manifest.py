"""Manifests: what is read, and what is refused with its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bigvivit.config import ConfigError
from bigvivit.data.manifest import Clip, read_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.mp4", "b.mp4", "sub/c.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def write(folder: Path, text: str, name: str = "clips.csv") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_names_are_numbered_in_alphabetical_order(folder: Path) -> None:
    manifest = read_manifest(write(folder, "path,label,serial\na.mp4,wave,7\nb.mp4,clap,8\nsub/c.mp4,wave,9\n"))
    assert manifest.classes == ("clap", "wave")
    assert manifest.clips == tuple(
        Clip(folder / name, label) for name, label in (("a.mp4", 1), ("b.mp4", 0), ("sub/c.mp4", 1))
    )


def test_numbers_are_taken_as_they_are(folder: Path) -> None:
    manifest = read_manifest(write(folder, "label,path\n2,a.mp4\n0,b.mp4\n"))
    assert [clip.label for clip in manifest.clips] == [2, 0]
    assert manifest.classes == ("0", "1", "2")


def test_padded_numbers_are_numbers(folder: Path) -> None:
    manifest = read_manifest(write(folder, "path,label\na.mp4,00\nb.mp4,01\nsub/c.mp4,1\n"))
    assert [clip.label for clip in manifest.clips] == [0, 1, 1]
    assert manifest.classes == ("0", "1")


def test_a_part_of_a_video(folder: Path) -> None:
    manifest = read_manifest(write(folder, "path,label,start,end\na.mp4,x,1.5,3\nb.mp4,y,,2\n"))
    assert [(clip.start, clip.end) for clip in manifest.clips] == [(1.5, 3.0), (None, 2.0)]


def test_jsonl_says_the_same_as_csv(folder: Path) -> None:
    rows = [{"path": "a.mp4", "label": "x", "start": 1, "end": None}, {"path": "b.mp4", "label": "y", "other": [1]}]
    jsonl = write(folder, "\n".join(json.dumps(row) for row in rows) + "\n\n", "clips.jsonl")
    csv = write(folder, "path,label,start\na.mp4,x,1\nb.mp4,y,\n")
    assert read_manifest(jsonl).clips == read_manifest(csv).clips


def test_numbers_in_jsonl_start_at_zero(folder: Path) -> None:
    rows = [{"path": "a.mp4", "label": 0}, {"path": "b.mp4", "label": 1}]
    manifest = read_manifest(write(folder, "\n".join(map(json.dumps, rows)), "clips.jsonl"))
    assert [clip.label for clip in manifest.clips] == [0, 1]


def test_lines_end_where_the_format_ends_them(folder: Path) -> None:
    jsonl = write(folder, '{"path": "a.mp4", "label": "x\u2028y"}\n', "clips.jsonl")
    assert read_manifest(jsonl).classes == ("x\u2028y",)
    csv = write(folder, 'path,label,note\na.mp4,"push, left","two\nlines"\nb.mp4,x,\n')
    assert read_manifest(csv).classes == ("push, left", "x")


def test_a_byte_order_mark_and_umlauts(folder: Path) -> None:
    (folder / "ä.mp4").touch()
    path = write(folder, "\ufeffpath,label\nä.mp4,Grüßen\n")
    assert read_manifest(path).classes == ("Grüßen",)


def test_labels_of_an_earlier_training(folder: Path) -> None:
    classes = ("clap", "jump", "wave")
    by_name = read_manifest(write(folder, "path,label\na.mp4,wave\n"), classes)
    by_number = read_manifest(write(folder, "path,label\na.mp4,2\n"), classes)
    assert by_name.clips == by_number.clips == (Clip(folder / "a.mp4", 2),)
    assert by_name.classes == classes
    with pytest.raises(
        ConfigError, match=r"line 2: label 'run' is none of the 3 classes trained with \(clap, jump, wave\)"
    ):
        read_manifest(write(folder, "path,label\na.mp4,run\n"), classes)


FAULTY = [
    ("", r"no column label and no column path in its first line"),
    ("path,label\n", r"it holds no clips"),
    ("path\na.mp4\n", r"no column label in its first line"),
    ("path,label\nnone.mp4,x\n", r"line 2: none\.mp4 is not a file"),
    ("path,label\na.mp4,\n", r"line 2: no label"),
    ("path,label\n,x\n", r"line 2: no path"),
    ("path,label\na.mp4\n", r"line 2: no label"),
    ("path,label,start\na.mp4,x,soon\n", r"line 2: start='soon' is not a time in seconds from 0"),
    ("path,label,start\na.mp4,x,-1\n", r"line 2: start='-1' is not a time"),
    ("path,label,start\na.mp4,x,nan\n", r"line 2: start='nan' is not a time"),
    ("path,label,start,end\na.mp4,x,3,2\n", r"line 2: end=2\.0 is not after start=3\.0"),
    ("path,label\na.mp4,push, left\n", r"line 2: more values than columns: put a value that holds a comma in quotes"),
    ('path,label\n"a.mp4,x\nb.mp4,y\n', r"line 2: not CSV .*: is a quotation mark left open"),
    ("path,label\n" + "a" * 5000 + ".mp4,x\n", r"line 2: a{119}… is not a file"),
    ("path,label\na.mp4,-1\nb.mp4,0\n", r"line 2: label '-1' is below 0"),
    (f"path,label\na.mp4,{10**15}\n", r"labels go up to 10{15}, but 10{15} numbers below have no clip"),
    ("path,label\na.mp4,1999\n", r"labels go up to 1999, but 1999 numbers below have no clip"),
]


@pytest.mark.parametrize(("text", "message"), FAULTY, ids=[message[:30] for _, message in FAULTY])
def test_faults_are_named(text: str, message: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        read_manifest(write(folder, text))


def test_all_faults_come_in_one_message_and_many_are_cut(folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_manifest(write(folder, "path,label\n" + "".join(f"{i}.mp4,x\n" for i in range(30))))
    lines = str(caught.value).splitlines()
    assert lines[1:] == [f"  - line {i + 2}: {i}.mp4 is not a file" for i in range(10)] + ["  - and 20 more"]


def test_faults_of_every_kind_come_in_the_order_of_lines(folder: Path) -> None:
    lines = ["{bad", '{"path": "a.mp4", "label": 1.5}', '{"path": "none.mp4", "label": "x"}', "[1]"]
    lines += ['{"path": "a.mp4", "label": "x", "start": true}', '{"path": "b.mp4", "label": "x"}', '{"label": "x"}']
    with pytest.raises(ConfigError) as caught:
        read_manifest(write(folder, "\n".join(lines), "clips.jsonl"))
    assert [line.split(":")[0] for line in str(caught.value).splitlines()[1:]] == [
        f"  - line {number}" for number in (1, 2, 3, 4, 5, 7)
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("clips.txt", b"path,label\n", r"ends in \.txt: give a \.csv or a \.jsonl"),
        ("clips.csv", b"path,label\n\xff\xfe,x\n", r"is not UTF-8 text"),
        ("clips.jsonl", b'{"path": \n', r"line 1: not JSON \(Expecting value at character 10\)"),
        ("clips.jsonl", b"[1]\n", r"line 1: not a JSON object"),
        ("clips.csv", None, r"cannot be read \(No such file"),
    ],
)
def test_unreadable_files(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_manifest(tmp_path / name)
