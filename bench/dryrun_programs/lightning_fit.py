"""Lightning's Trainer around a transformer of PyTorch's (its documentation: Lightning in 15 minutes)."""

import lightning as L  # noqa: N812
import torch
from torch import nn


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10000, 512)
        layer = nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 6)
        self.head = nn.Linear(512, 20)

    def training_step(self, batch, batch_index):
        tokens, labels = batch
        logits = self.head(self.encoder(self.embed(tokens)).mean(1))
        loss = nn.functional.cross_entropy(logits, labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


data = torch.utils.data.TensorDataset(torch.randint(0, 10000, (512, 256)), torch.randint(0, 20, (512,)))
trainer = L.Trainer(max_epochs=1, accelerator="gpu", devices=1, precision="16-mixed", logger=False,
                    enable_checkpointing=False, gradient_clip_val=1.0)  # fmt: skip
trainer.fit(Classifier(), torch.utils.data.DataLoader(data, batch_size=16))
