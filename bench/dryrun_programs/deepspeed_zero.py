"""DeepSpeed: ZeRO of the stage given, bf16, around a GPT-2 (its documentation: Getting started)."""

import argparse

import deepspeed
import torch
from transformers import GPT2Config, GPT2LMHeadModel

parser = argparse.ArgumentParser()
parser.add_argument("--stage", type=int, default=2)
parser.add_argument("--local_rank", type=int, default=-1)
arguments = parser.parse_args()
settings = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": arguments.stage},
    "bf16": {"enabled": True},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
}
model = GPT2LMHeadModel(GPT2Config(n_layer=6))
engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
for _ in range(100):
    tokens = torch.randint(0, 50257, (2, 256)).to(engine.device)
    loss = engine(input_ids=tokens, labels=tokens).loss
    engine.backward(loss)
    engine.step()
