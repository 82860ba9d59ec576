"""TRL: SFTTrainer on a Qwen2 (its documentation: SFT Trainer)."""

from datasets import Dataset
from tokenizer import build_tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl import SFTConfig, SFTTrainer

data = Dataset.from_dict({"text": ["the cat sat on the mat and a dog ran under the tree . " * 12] * 256})
config = Qwen2Config(hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
                     num_key_value_heads=2)  # fmt: skip
trainer = SFTTrainer(
    model=Qwen2ForCausalLM(config),
    args=SFTConfig(output_dir="trl_sft", per_device_train_batch_size=4, max_length=256, bf16=True, report_to="none",
                   save_strategy="no"),
    train_dataset=data,
    processing_class=build_tokenizer(),
)  # fmt: skip
trainer.train()
