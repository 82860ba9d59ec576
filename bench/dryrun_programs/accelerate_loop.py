"""accelerate's loop around a GPT-2 (its documentation: Quicktour)."""

import torch
from accelerate import Accelerator
from transformers import GPT2Config, GPT2LMHeadModel, get_scheduler

accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2)
model = GPT2LMHeadModel(GPT2Config(n_layer=6))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
loader = torch.utils.data.DataLoader(torch.randint(0, 50257, (512, 256)), batch_size=8, num_workers=2)
scheduler = get_scheduler("linear", optimizer, num_warmup_steps=10, num_training_steps=len(loader))
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

model.train()
for batch in loader:
    with accelerator.accumulate(model):
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
accelerator.print("done")
