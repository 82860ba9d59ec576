"""Training programs that come inside packages, unchanged, and the smallest data each of them starts from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

SENTENCE = "the cat sat on the mat . "


def nothing() -> None:
    """For a program that makes its own data."""


def write_lines(name: str, row: dict[str, Any]) -> None:
    """A data set of Hugging Face's `datasets`: 64 times the same row."""
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text((json.dumps(row) + "\n") * 64)


def language_model(**row: Any) -> Callable[[], None]:
    """A Qwen2 of 70 M parameters with random weights and its tokenizer in `model`, rows in `data`."""

    def prepare() -> None:
        words = {word: index for index, word in enumerate(["<pad>", "<eos>", *sorted(set(SENTENCE.split()))])}
        model = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
        model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="<eos>")
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
        Path("data.yaml").write_text(json.dumps({**places, "names": {0: "cat", 1: "dog"}}))

    return prepare


def molecules() -> None:
    """Alcohols and a number for each."""
    rows = [f"{'C' * (1 + number % 20)}O,{number / 10}" for number in range(256)]
    Path("data.csv").write_text("\n".join(["smiles,y", *rows]))


@dataclass(frozen=True, kw_only=True)
class Stranger:
    """A program that comes inside a package."""

    package: str
    command: str
    prepare: Callable[[], None] = nothing
    """Writes what it starts from into the folder in which it runs."""


TRL = "--model_name_or_path model --dataset_name data --output_dir out --report_to none"
REWARDED = f"{TRL} --reward_funcs think_format_reward --max_completion_length 32"
ASKED = language_model(prompt=[{"role": "user", "content": SENTENCE}])
COMPARED = language_model(prompt=SENTENCE, chosen=SENTENCE * 6, rejected="the cat . " * 12)
YOLO = "amp=False workers=0 epochs=3 plots=False"
ZOO = "python -m rl_zoo3.train --device cuda"
STRANGERS = {
    "trl_sft_program": Stranger(package="trl", command=f"trl sft {TRL}", prepare=language_model(text=SENTENCE * 12)),
    "trl_dpo_program": Stranger(package="trl", command=f"trl dpo {TRL}", prepare=COMPARED),
    "trl_kto_program": Stranger(
        package="trl",
        command=f"trl kto {TRL}",
        prepare=language_model(prompt=SENTENCE, completion=SENTENCE * 6, label=True),
    ),
    "trl_reward_program": Stranger(package="trl", command=f"trl reward {TRL}", prepare=COMPARED),
    "trl_grpo_program": Stranger(package="trl", command=f"trl grpo {REWARDED}", prepare=ASKED),
    "trl_rloo_program": Stranger(package="trl", command=f"trl rloo {REWARDED}", prepare=ASKED),
    "open_clip": Stranger(
        package="open_clip_torch",
        command="python -m open_clip_train.main --dataset-type synthetic --train-num-samples 256 --batch-size 16 "
        "--model ViT-B-32 --workers 0 --epochs 1 --precision amp_bf16",
    ),
    "yolo_classify": Stranger(
        package="ultralytics",
        command=f"yolo classify train model=yolo11n-cls.yaml data=data {YOLO} batch=64",
        prepare=classes,
    ),
    "yolo_detect": Stranger(
        package="ultralytics",
        command=f"yolo detect train model=yolo11n.yaml data=data.yaml {YOLO} batch=32",
        prepare=boxes("0 0.5 0.5 0.3 0.3\n1 0.3 0.4 0.2 0.2\n"),
    ),
    "yolo_segment": Stranger(
        package="ultralytics",
        command=f"yolo segment train model=yolo11n-seg.yaml data=data.yaml {YOLO} batch=16",
        prepare=boxes("0 0.2 0.2 0.6 0.2 0.6 0.6 0.2 0.6\n"),
    ),
    "rtdetr": Stranger(
        package="ultralytics",
        command=f"yolo detect train model=rtdetr-resnet50.yaml data=data.yaml {YOLO} batch=8 nbs=8",
        prepare=boxes("0 0.5 0.5 0.3 0.3\n1 0.3 0.4 0.2 0.2\n"),
    ),
    **{
        f"zoo_{algorithm}": Stranger(package="rl_zoo3", command=f"{ZOO} --algo {algorithm} --env {game}")
        for algorithm, game in {
            "ppo": "CartPole-v1", "dqn": "CartPole-v1", "trpo": "CartPole-v1",
            "sac": "Pendulum-v1", "td3": "Pendulum-v1", "tqc": "Pendulum-v1",
        }.items()
    },
    "chemprop": Stranger(
        package="chemprop",
        command="chemprop train -i data.csv --task-type regression -o out --epochs 3 --accelerator gpu",
        prepare=molecules,
    ),
    "pykeen_transe": Stranger(package="pykeen", command="pykeen train transe --dataset nations --device cuda"),
    "pykeen_conve": Stranger(package="pykeen", command="pykeen train conve --dataset nations --device cuda"),
    "pykeen_rgcn": Stranger(package="pykeen", command="pykeen train rgcn --dataset nations --device cuda"),
    "stylegan2": Stranger(
        package="stylegan2_pytorch",
        command="stylegan2_pytorch --data data --image-size 64 --num-train-steps 10",
        prepare=lambda: write_images("data", 128),
    ),
    "lightweight_gan": Stranger(
        package="lightweight-gan",
        command="lightweight_gan --data data --image-size 64 --num-train-steps 10",
        prepare=lambda: write_images("data", 128),
    ),
}  # fmt: skip
"""Those that nobody here wrote, by name."""
