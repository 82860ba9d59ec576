"""transformers' Trainer, BERT-base for sequence classification, bf16 (its documentation: Fine-tuning)."""

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments


class Sentences(torch.utils.data.Dataset):
    def __len__(self):
        return 4096

    def __getitem__(self, index):
        return {
            "input_ids": torch.randint(0, 30000, (128,)),
            "attention_mask": torch.ones(128, dtype=torch.long),
            "labels": torch.tensor(index % 2),
        }


model = BertForSequenceClassification(BertConfig(num_labels=2))
arguments = TrainingArguments(
    output_dir="bert_trainer", per_device_train_batch_size=16, bf16=True, report_to="none", save_strategy="no"
)
Trainer(model=model, args=arguments, train_dataset=Sentences()).train()
