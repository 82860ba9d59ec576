"""PEFT: LoRA on a Llama with transformers' Trainer (its documentation: Quicktour)."""

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return 512

    def __getitem__(self, index):
        tokens = torch.randint(0, 32000, (512,))
        return {"input_ids": tokens, "labels": tokens}


config = LlamaConfig(hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=16)
model = LlamaForCausalLM(config)
lora = LoraConfig(task_type=TaskType.CAUSAL_LM, r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"])
model = get_peft_model(model, lora)
model.print_trainable_parameters()
arguments = TrainingArguments(
    output_dir="peft_lora", per_device_train_batch_size=4, bf16=True, report_to="none", save_strategy="no"
)
Trainer(model=model, args=arguments, train_dataset=Texts()).train()
