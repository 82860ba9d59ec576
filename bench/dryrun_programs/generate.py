"""Generation with a cache, no training (transformers' documentation: Text generation)."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

model = GPT2LMHeadModel(GPT2Config(n_layer=6)).half().cuda().eval()
tokens = torch.randint(0, 50257, (4, 64), device="cuda")
output = model.generate(tokens, max_new_tokens=32, do_sample=False, pad_token_id=50256)
print(output.shape)
