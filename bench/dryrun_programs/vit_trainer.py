"""transformers' Trainer, ViT-B/16, fp16, gradient checkpointing and accumulation (its documentation: GPU memory)."""

import torch
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 1024

    def __getitem__(self, index):
        return {"pixel_values": torch.rand(3, 224, 224), "labels": torch.tensor(index % 10)}


model = ViTForImageClassification(ViTConfig(num_labels=10))
arguments = TrainingArguments(
    output_dir="vit_trainer",
    per_device_train_batch_size=16,
    gradient_accumulation_steps=2,
    gradient_checkpointing=True,
    fp16=True,
    optim="adafactor",
    report_to="none",
    save_strategy="no",
)
Trainer(model=model, args=arguments, train_dataset=Images()).train()
