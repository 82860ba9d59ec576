"""sentence-transformers: its Trainer with a contrastive loss (its documentation: Training overview)."""

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, losses, models
from sentence_transformers.training_args import SentenceTransformerTrainingArguments
from tokenizer import build_tokenizer
from transformers import BertConfig, BertModel

folder = "sentence_transformers_model"
BertModel(BertConfig(num_hidden_layers=6, vocab_size=64)).save_pretrained(folder)
build_tokenizer().save_pretrained(folder)
words = models.Transformer(folder, max_seq_length=64)
model = SentenceTransformer(modules=[words, models.Pooling(words.get_word_embedding_dimension())])
pairs = Dataset.from_dict(
    {"anchor": ["the cat sat on the mat ."] * 256, "positive": ["a dog ran under a tree ."] * 256}
)
arguments = SentenceTransformerTrainingArguments(
    output_dir="sentence_transformers", per_device_train_batch_size=32, bf16=True, report_to="none", save_strategy="no"
)
loss = losses.MultipleNegativesRankingLoss(model)
SentenceTransformerTrainer(model=model, args=arguments, train_dataset=pairs, loss=loss).train()
