"""TRL: DPOTrainer on a Qwen2 with its reference model (its documentation: DPO Trainer)."""

from datasets import Dataset
from tokenizer import build_tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl import DPOConfig, DPOTrainer

pairs = {"prompt": ["the cat sat on"] * 128, "chosen": [" the mat ."] * 128, "rejected": [" under a tree ."] * 128}
config = Qwen2Config(hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
                     num_key_value_heads=2)  # fmt: skip
trainer = DPOTrainer(
    model=Qwen2ForCausalLM(config),
    ref_model=Qwen2ForCausalLM(config),
    args=DPOConfig(output_dir="trl_dpo", per_device_train_batch_size=4, bf16=True, report_to="none",
                   save_strategy="no"),
    train_dataset=Dataset.from_dict(pairs),
    processing_class=build_tokenizer(),
)  # fmt: skip
trainer.train()
