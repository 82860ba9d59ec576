"""A language model of LSTM layers (PyTorch's examples: word_language_model)."""

import torch
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(10000, 650), nn.Linear(650, 10000)
        self.rnn = nn.LSTM(650, 650, 2, dropout=0.5)

    def forward(self, tokens, state):
        output, state = self.rnn(self.embed(tokens), state)
        return self.head(output), state


model, state = Model().cuda(), None
optimizer = torch.optim.SGD(model.parameters(), lr=20)
for _ in range(50):
    tokens = torch.randint(0, 10000, (36, 20), device="cuda")
    output, state = model(tokens[:-1], state and tuple(part.detach() for part in state))
    optimizer.zero_grad()
    nn.functional.cross_entropy(output.flatten(0, 1), tokens[1:].flatten()).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.25)
    optimizer.step()
