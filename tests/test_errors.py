"""Wrong settings: one message with name, value, rule and fix, before torch is imported, never a library's traceback."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import tyro
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bigvivit.config import ClipConfig, ConfigError, ModelConfig, TrainConfig
from bigvivit.memory.ranks import OTHERS_WAIT_S
from bigvivit.train import main, prepare
from tests.launching import STAGE1, STAGE2, Runs, environment, start

BASE = ["--out", "out", *STAGE1, "--data.train", "good.csv"]
SECOND = ["--out", "out", *STAGE2, "--data.train", "good.csv"]

FILES = {
    "good.csv": "path,label\n" + "clip.mp4,a\nclip.mp4,b\n" * 16,
    "clip.mp4": "",
    "ending.txt": "",
    "empty.csv": "",
    "no_rows.csv": "path,label\n",
    "columns.csv": "file,label\nclip.mp4,a\n",
    "missing.csv": "path,label\nnone.mp4,a\n",
    "unlabelled.csv": "path,label\nclip.mp4,\n",
    "backwards.csv": "path,label,start,end\nclip.mp4,a,5,2\n",
    "times.csv": "path,label,start,end\nclip.mp4,a,soon,\n",
    "below.csv": "path,label\nclip.mp4,-1\n",
    "bad.jsonl": '{"path": "clip.mp4"\n',
    "other_class.csv": "path,label\nclip.mp4,zebra\n",
    "not.json": "{",
    "list.json": "[]",
    "said_twice.json": '{"gradient_clipping": 3, "train_batch_size": 64}',
    "unknown.json": '{"zero_optimisation": {"stage": 3}}',
    "unknown_zero.json": '{"zero_optimization": {"stage": 3, "reduce_bucket": 5}}',
    "stage5.json": '{"zero_optimization": {"stage": 5}}',
    "stage_text.json": '{"zero_optimization": {"stage": "three"}}',
    "bucket.json": '{"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}}',
    "optimizer.json": '{"optimizer": {"type": "AdamW"}}',
    "bf16.json": '{"bf16": {"enabled": true}}',
    "offload.json": '{"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}',
    "nvme.json": '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}',
    "auto.json": '{"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}',
    "done/checkpoint.json": "{}",
    "damaged/checkpoint.json": "{",
    "stopped/checkpoints/step-00000004/checkpoint.json": "{",
    "file": "",
}

WRONG: list[tuple[list[object], dict[str, str], str]] = [
    # What a clip is.
    (["--clip.frames", 7], {}, "clip.frames=7 is not a multiple of model.tubelet=2; try 6 or 8"),
    (["--clip.frames", 0], {}, "clip.frames=0 must be at least 1"),
    (["--clip.stride", 0], {}, "clip.stride=0 must be at least 1"),
    (["--clip.size", -48], {}, "clip.size=-48 must be at least 1"),
    (["--clip.resize", 40], {}, "clip.resize=40 is below clip.size=48: the crop would not fit; give --clip.resize 48"),
    (["--clip.min-scale", 3], {}, "clip.min_scale=3.0, clip.max_scale=1.33: need 0 < min_scale <= max_scale"),
    (["--clip.max-scale", "inf"], {}, "clip.max_scale=inf"),
    # The model.
    (["--model.tubelet", 0], {}, "model.tubelet=0 must be at least 1"),
    (["--model.temporal-depth", 0], {}, "model.temporal_depth=0 must be at least 1"),
    (["--model.droplayer", 1], {}, "model.droplayer=1.0 is a probability: give a number from 0 to below 1"),
    # Optimisation.
    (["--optim.lr", 0], {}, "optim.lr=0.0 must be a number above 0"),
    (["--optim.lr", "nan"], {}, "optim.lr=nan must be a number above 0"),
    (["--optim.epochs", "inf"], {}, "optim.epochs=inf must be a number above 0"),
    (["--optim.batch-size", 0], {}, "optim.batch_size=0 must be at least 1"),
    (["--optim.batch-size", 7], {}, "optim.batch_size=7 does not divide over 1 ranks * optim.accumulate=2; try 8"),
    (["--optim.batch-size", 66], {}, "optim.batch_size=66 is more than the 32 clips of good.csv: give a smaller one"),
    (["--optim.accumulate", -1], {}, "optim.accumulate=-1 must be at least 1"),
    (["--optim.weight-decay", -1], {}, "optim.weight_decay=-1.0 must be a number from 0"),
    (["--optim.warmup-epochs", 9], {}, "optim.warmup_epochs=9.0 leaves nothing of optim.epochs=2.0: give fewer"),
    (["--optim.label-smoothing", 1.5], {}, "optim.label_smoothing=1.5 must be from 0 to below 1"),
    (["--optim.clip-norm", "nan"], {}, "optim.clip_norm=nan must be a number from 0"),
    (["--optim.name", "adamw8bit", "--fsdp"], {}, "optim.name=adamw8bit under fsdp: bitsandbytes cannot update"),
    # Memory.
    (["--memory.chunk", 0], {}, "memory.chunk=0 must be at least 1, or all, or auto"),
    (["--memory.group", 4, "--memory.chunk", 8], {}, "memory.chunk=8 is more than memory.group=4: a chunk is a part"),
    (["--memory.placement", "disk"], {}, "memory.placement=disk is for a frozen tower, and stage 1 trains it"),
    (["--memory.storage", "nf4"], {}, "memory.storage=nf4 is for a frozen tower: stage 1 trains it in fp32"),
    # The run.
    (["--log-every", 0], {}, "log_every=0 must be at least 1"),
    (["--keep", 0], {}, "keep=0 must be at least 1"),
    (["--save-every", -5], {}, "save_every=-5 must be at least 0"),
    (["--seed", 2**40], {}, "seed=1099511627776 must be from 0 to 4294967295"),
    (["--out", "file"], {}, "out=file: file is not a folder; give another"),
    (["--out", "file/run"], {}, "/file is not a folder; give another"),
    (["--out", "done"], {}, "out=done holds a finished run: give another folder, or delete that one"),
    (["--out", "stopped"], {}, "out=stopped holds a run that stopped at step-00000004: add --resume, or give another"),
    (
        ["--out", "stopped", "--resume"],
        {},
        "checkpoint stopped/checkpoints/step-00000004: progress.json cannot be read",
    ),
    (["--init-from", "done"], {}, "init_from=done is for stage 2: leave it out, or give --stage 2"),
    # The data.
    (["--data.workers", -1], {}, "data.workers=-1 must not be negative"),
    (["--data.train", "none.csv"], {}, "manifest none.csv cannot be read (No such file or directory): check the path"),
    (["--data.train", "ending.txt"], {}, "manifest ending.txt ends in .txt: give a .csv or a .jsonl file"),
    (["--data.train", "empty.csv"], {}, "manifest empty.csv has no column label and no column path"),
    (["--data.train", "no_rows.csv"], {}, "manifest no_rows.csv cannot be used:\n  - it holds no clips"),
    (["--data.train", "columns.csv"], {}, "manifest columns.csv has no column path in its first line"),
    (["--data.train", "missing.csv"], {}, "line 2: none.mp4 is not a file"),
    (["--data.train", "unlabelled.csv"], {}, "line 2: no label"),
    (["--data.train", "backwards.csv"], {}, "line 2: end=2.0 is not after start=5.0"),
    (["--data.train", "times.csv"], {}, "line 2: start='soon' is not a time in seconds from 0"),
    (["--data.train", "below.csv"], {}, "line 2: label '-1' is below 0: number classes from 0"),
    (["--data.train", "bad.jsonl"], {}, "line 1: not JSON"),
    (["--data.val", "none.csv"], {}, "manifest none.csv cannot be read"),
    (["--data.val", "other_class.csv"], {}, "label 'zebra' is none of the 2 classes trained with (a, b)"),
    (
        ["--data.val", "one.csv"],
        {"WORLD_SIZE": "2"},
        "data.val=one.csv holds 1 clips for 2 ranks: give each at least one",
    ),
    # DeepSpeed's file.
    (["--ds", "none.json"], {}, "ds=none.json cannot be read (No such file or directory): give the path"),
    (["--ds", "not.json"], {}, "ds=not.json is not JSON"),
    (["--ds", "list.json"], {}, "ds=list.json holds a list: a DeepSpeed configuration is one JSON object"),
    (["--ds", "said_twice.json"], {}, "train_batch_size is 64, but --optim.batch-size says 8"),
    (["--ds", "said_twice.json"], {}, "gradient_clipping is 3, but --optim.clip-norm says 1.0"),
    (["--ds", "unknown.json"], {}, "zero_optimisation is no key that is read here: zero_optimization?"),
    (
        ["--ds", "unknown_zero.json"],
        {},
        "zero_optimization.reduce_bucket is no key that is read here: reduce_bucket_size?",
    ),
    (["--ds", "stage5.json"], {}, "zero_optimization.stage is 5: ZeRO has the stages 0 to 3"),
    (["--ds", "stage_text.json"], {}, "zero_optimization.stage is 'three': it must be a whole number from 0"),
    (["--ds", "offload.json"], {}, "zero_optimization.offload_param is for stage 3, and stage is 2: remove the block"),
    (["--ds", "nvme.json"], {}, "zero_optimization.offload_optimizer.device is 'nvme': cpu, or none"),
    (["--ds", "bucket.json"], {}, "zero_optimization.reduce_bucket_size is -1: it must be a whole number from 0"),
    (["--ds", "optimizer.json"], {}, "optimizer is a block here, but --optim.name, --optim.lr"),
    (
        ["--ds", "bf16.json"],
        {},
        "bf16 is a block here, but --memory.autocast and --memory.storage say it: remove the block",
    ),
    (
        ["--ds", "auto.json"],
        {},
        'zero_optimization.reduce_bucket_size is "auto", which nothing here fills: give a number',
    ),
    (["--ds", "auto.json", "--fsdp"], {}, "fsdp and ds=auto.json are two ways to shard: leave one out"),
    # The ranks.
    ([], {"WORLD_SIZE": "3"}, "optim.batch_size=8 does not divide over 3 ranks * optim.accumulate=2; try 12"),
    ([], {"RANK": "first"}, "environment variable RANK='first' is not a number: launchers set it, or unset it"),
    ([], {"RANK": "4", "WORLD_SIZE": "4"}, "environment variable RANK=4 is not below WORLD_SIZE=4"),
]
WRONG_SECOND: list[tuple[list[object], str]] = [
    ([], "stage=2 needs init_from: give --init-from the run folder of a finished stage 1, or --model.tower"),
    (["--init-from", "none"], "none holds no checkpoint.json: give the folder that a finished training run was told"),
    (["--init-from", "damaged"], "damaged/checkpoint.json is damaged"),
    (["--init-from", "done"], "done/checkpoint.json is damaged (it holds no sha256 of itself"),
    (["--init-from", "STAGE2"], "is a run of stage 2: stage 2 starts from stage 1"),
    (["--init-from", "STAGE1"], "label 'a' is none of the 8 classes trained with"),
    (["--init-from", "STAGE1", "--model.tubelet", 4], "model.tubelet=4, but stage 1 was trained with 2"),
    (["--init-from", "STAGE1", "--clip.frames", 9], "clip.frames=9 is not a multiple of model.tubelet=2; try 8 or 10"),
]
WALK = """
import contextlib, io, json, os, sys
from bigvivit.train import main
before, results = dict(os.environ), []
for argv, env in json.load(sys.stdin):
    os.environ.update(env)
    errors, code = io.StringIO(), 0
    with contextlib.redirect_stderr(errors):
        try:
            main(argv)
        except SystemExit as end:
            code = end.code
    results.append((code, errors.getvalue(), "torch" in sys.modules))
    os.environ.clear()
    os.environ.update(before)
json.dump(results, sys.stdout)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in {**FILES, "one.csv": "path,label\nclip.mp4,a\n"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_each_wrong_setting_is_one_message_before_torch_is_imported(folder: Path, runs: Runs) -> None:
    stages = {"STAGE1": str(runs["plain1"]), "STAGE2": str(runs["plain2"])}
    cases = [([*BASE, *arguments], env, message) for arguments, env, message in WRONG]
    cases += [([*SECOND, *arguments], {}, message) for arguments, message in WRONG_SECOND]
    assert len(cases) >= 40
    walk = [([stages.get(str(word), str(word)) for word in argv], env) for argv, env, _ in cases]
    before = sorted(folder.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-c", WALK],
        check=True,
        cwd=folder,
        input=json.dumps(walk),
        capture_output=True,
        text=True,
        env=environment(PYTHONPATH=str(Path(__file__).parents[1])),
    )
    wrong = []
    for (argv, _, message), (code, printed, torch_imported) in zip(cases, json.loads(done.stdout), strict=True):
        if code != 2 or not printed.startswith("error: ") or message not in printed or torch_imported:
            wrong.append(f"{argv[-3:]}: wanted {message!r}, got {code} {printed!r}, torch imported: {torch_imported}")
    assert not wrong, "\n".join(wrong)
    assert sorted(folder.rglob("*")) == before  # and nothing was written


def test_ranks_tell_it_once_though_their_launcher_ends_all_at_the_first(folder: Path) -> None:
    late = 'import os, time\nif os.environ.get("LOCAL_RANK") == "0":\n    time.sleep(4)\n'
    (folder / "sitecustomize.py").write_text(late)  # the rank that speaks comes last
    settings = [*BASE[:-1], folder / "good.csv", "--optim.batch-size", 7]
    done = start("torchrun", *settings, env={"PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}"})
    assert done.stderr.count("error: optim.batch_size=7 does not divide over 2 ranks") == 1, done.stderr


def test_a_rank_whose_fault_is_its_own_speaks_in_the_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in (*BASE, "--keep", 0)])
    assert (end.value.code, slept) == (2, [OTHERS_WAIT_S])
    assert capsys.readouterr().err == "error: keep=0 must be at least 1\n"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--clip.frames", "many"], "--clip.frames"),
        (["--optim.name", "lion"], "--optim.name"),
        (["--clip.framse", "8"], "--clip.framse"),
        (["--stage", "3"], "--stage"),
    ],
)
def test_what_the_command_line_cannot_mean(
    arguments: list[str], named: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        tyro.cli(TrainConfig, args=[str(word) for word in (*BASE, *arguments)])
    assert end.value.code == 2
    assert named in capsys.readouterr().err


T = TypeVar("T")
NUMBERS = st.one_of(
    st.integers(-3, 300), st.integers(), st.floats(), st.sampled_from([0, 1, 2, 8, 48, 0.5, math.nan, math.inf])
)
WORDS = st.sampled_from(
    ["good.csv", "bad.jsonl", "none.csv", "done", "file", "stopped", "auto.json", "stage5.json", "", "/"]
)
FLAGS = {
    "--stage": st.sampled_from([1, 2, 3]),
    "--fsdp": st.none(),
    "--resume": st.none(),
    "--clip.no-flip": st.none(),
    "--optim.name": st.sampled_from(["sgd", "adamw", "sgd8bit", "adamw8bit"]),
    "--model.tower": st.sampled_from(["vit-demo", "vit-g", "none/none", "done"]),
    "--memory.storage": st.sampled_from(["fp32", "bf16", "fp16"]),
    **dict.fromkeys(("--out", "--init-from", "--data.train", "--data.val", "--ds"), WORDS),
    **dict.fromkeys(
        [
            *("--clip.frames", "--clip.stride", "--clip.size", "--clip.resize", "--clip.min-scale", "--clip.max-scale"),
            *("--model.tubelet", "--model.temporal-depth", "--model.droplayer", "--data.workers", "--optim.lr"),
            *("--optim.weight-decay", "--optim.epochs", "--optim.warmup-epochs", "--optim.batch-size"),
            *("--optim.accumulate", "--optim.clip-norm", "--optim.label-smoothing", "--seed", "--log-every"),
            *("--save-every", "--keep"),
        ],
        NUMBERS,
    ),
}
ARGUMENTS = st.lists(st.sampled_from(list(FLAGS)), max_size=5, unique=True).flatmap(
    lambda names: st.tuples(*(st.tuples(st.just(name), FLAGS[name]) for name in names))
)
FIXTURE_IS_FINE = [HealthCheck.function_scoped_fixture]


def attempt(call: Callable[[], T]) -> tuple[T | None, str]:
    """What it returns, or the message it is refused with."""
    try:
        return call(), ""
    except ConfigError as error:
        return None, str(error)


@settings(max_examples=400, deadline=None, suppress_health_check=FIXTURE_IS_FINE)
@given(chosen=ARGUMENTS)
def test_random_settings_are_accepted_or_refused(folder: Path, chosen: tuple[tuple[str, Any], ...]) -> None:
    words = [str(word) for word in BASE]
    for name, value in chosen:
        words += [name] if value is None else [name, str(value)]
    try:
        job, message = attempt(lambda: prepare(tyro.cli(TrainConfig, args=words, console_outputs=False)))
    except SystemExit:  # tyro's own refusal, of a value that is of no such type; it has told the user
        return
    if job is None:
        names = [name.removeprefix("--").replace("no-", "").replace("-", "_").split(".")[-1] for name, _ in chosen]
        values = [str(Path(value)) for _, value in chosen if isinstance(value, str)]
        assert any(word in message for word in names + values), message  # it is about something that was given
    else:
        assert job.micro_batch * job.config.optim.accumulate == job.config.optim.batch_size


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 130),
    tubelet=st.integers(1, 5),
    tubelets=st.integers(1, 9),
    depth=st.integers(1, 3),
    classes=st.integers(1, 5),
)
def test_random_models_are_built_or_refused(size: int, tubelet: int, tubelets: int, depth: int, classes: int) -> None:
    from bigvivit import assemble

    model = ModelConfig(
        tower="vit-demo", tower_init="random", tubelet=tubelet, temporal_depth=depth, temporal_input="centred"
    )
    clip = ClipConfig(frames=tubelet * tubelets, size=size, resize=200)
    source = assemble.open_tower(model, seed=0)
    built, message = attempt(lambda: assemble.build_model(source, model, clip, classes=classes, adapter=True, seed=0))
    if size % 12:
        assert f"clip.size={size}" in message
    else:
        assert built is not None
        assert built.head.out_features == classes


@settings(max_examples=200, deadline=None, suppress_health_check=FIXTURE_IS_FINE)
@given(
    content=st.one_of(
        st.binary(max_size=40),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=3),
            lambda inner: (
                st.dictionaries(
                    st.sampled_from(
                        ["zero_optimization", "stage", "bf16", "gradient_clipping", "reduce_bucket_size", "x"]
                    ),
                    inner,
                    max_size=4,
                )
                | st.lists(inner, max_size=2)
            ),
            max_leaves=6,
        ),
    )
)
def test_random_deepspeed_files_are_accepted_or_refused(folder: Path, content: Any) -> None:
    from bigvivit.memory.ds_json import read_ds_json, zero_stage

    path = folder / "random.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    config = tyro.cli(TrainConfig, args=[str(word) for word in BASE])
    ds, message = attempt(lambda: read_ds_json(path, config.optim, 1))
    if ds is None:
        assert str(path) in message
    else:
        assert zero_stage(ds) in range(4)
        assert ds["train_batch_size"] == 8
