"""Training programs that come inside packages, unchanged, and the smallest data each of them starts from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

SENTENCE = "the cat sat on the mat . "
MODEL = ("--model_name_or_path", "model", "--output_dir", "out", "--report_to", "none", "--dataset_name", "data")


def nothing() -> None:
    """For a program that makes its own data."""


def write_lines(name: str, row: dict[str, Any]) -> None:
    """A data set of Hugging Face's `datasets`: 64 times the same row."""
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text((json.dumps(row) + "\n") * 64)


def language_model(**row: Any) -> Callable[[], None]:
    """A Qwen2 of 70 M parameters with random weights and its tokenizer in `model`, rows in `data`."""

    def prepare() -> None:
        from transformers import Qwen2Config, Qwen2ForCausalLM

        from bench.dryrun_programs.tokenizer import build_tokenizer

        tokenizer = build_tokenizer()
        tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
        tokenizer.save_pretrained("model")
        config = Qwen2Config(
            vocab_size=32000, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
            num_key_value_heads=2,
        )  # fmt: skip
        Qwen2ForCausalLM(config).save_pretrained("model")
        write_lines("data/train.jsonl", row)

    return prepare


def write_images(folder: str, count: int, suffix: str = "jpg", size: int = 256) -> None:
    """Noise."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    for number in range(count):
        pixels = draw.integers(0, 255, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"{folder}/{number}.{suffix}")


def classes() -> None:
    """Images by class, in the folders of a training and a validation split."""
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            write_images(f"data/{split}/{name}", 96)


def boxes(line: str) -> Callable[[], None]:
    """Images and a line of labels for each, as YOLO reads them."""

    def prepare() -> None:
        for split in ("train", "val"):
            write_images(f"data/images/{split}", 96)
            Path(f"data/labels/{split}").mkdir(parents=True)
            for number in range(96):
                Path(f"data/labels/{split}/{number}.txt").write_text(line)
        places = {"path": str(Path("data").resolve()), "train": "images/train", "val": "images/val"}
        Path("data.yaml").write_text(yaml.safe_dump({**places, "names": {0: "cat", 1: "dog"}}))

    return prepare
