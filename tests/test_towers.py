"""The table of known towers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bigvivit.assemble import check_types, open_tower
from bigvivit.config import ConfigError, ModelConfig
from bigvivit.memory.plan import MemoryPlan
from bigvivit.model.catalog import PUBLISHED, SIZES, TIMM
from bigvivit.towers import list_towers
from tests.launching import call
from tests.model.reference import MODELS


def test_rows_are_what_they_say() -> None:
    rows = {row.name: row for row in list_towers()}
    assert rows.keys() == SIZES.keys() | PUBLISHED.keys() | set(TIMM)
    assert rows["timm/vit_large_r50_s32_224.augreg_in21k"].tokens == 1 + (224 // 32) ** 2
    assert rows["timm/eva_giant_patch14_clip_224.merged2b"].normalisation == "OpenAI"
    g = rows["vit-g"]
    assert (g.dimensions, g.tokens, g.vector) == ("40/1408/16/6144", 257, "CLS")
    assert g.bf16_bytes == 2 * g.parameters
    assert rows["facebook/dinov3-vit7b16-pretrain-lvd1689m"].tokens == 1 + 4 + 196
    assert rows["facebook/dinov3-vit7b16-pretrain-lvd1689m"].fp16 == "no"
    assert rows["google/siglip2-giant-opt-patch16-256"].vector == "pooler"
    assert rows["facebook/vit-mae-huge"].normalisation == "ImageNet"


def test_the_command_prints_them() -> None:
    done = call("towers")
    assert done.returncode == 0, done.stderr
    assert "laion/CLIP-ViT-g-14" in done.stdout
    assert "6.72 B" in done.stdout


def test_a_pipe_gets_a_line_for_each_and_json_all_of_it() -> None:
    lines = call("towers").stdout.splitlines()
    rows = json.loads(call("towers", "--json").stdout)
    assert [row["name"] for row in rows] == [line.split()[0] for line in lines[1 : len(rows) + 1]]
    assert {"parameters", "tokens", "source"} < rows[0].keys()


@pytest.mark.parametrize("width", [60, 200])
def test_names_are_whole_at_any_width(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folded at the worst; what is left out is said."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    shown = re.sub("\x1b[^m]*m", "", call("towers", columns=width).stdout)
    assert all(len(line) <= width for line in shown.splitlines())
    names = "".join(line.split("│")[1].strip() for line in shown.splitlines() if line.startswith("│"))
    assert names == "".join([*SIZES, *PUBLISHED, *TIMM])
    assert ("also:" in shown) == (width < 200)


def test_a_tower_that_overflows_in_fp16_is_refused(tmp_path: Path) -> None:
    MODELS["dinov3"]().config.save_pretrained(tmp_path)
    source = open_tower(ModelConfig(tower=str(tmp_path), tower_init="random", tubelet=2), seed=0)
    with pytest.raises(ConfigError, match=r"memory\.compute=fp16: tower .* overflows in fp16"):
        check_types(source, MemoryPlan(compute="fp16"))
    check_types(source, MemoryPlan(compute="bf16"))
