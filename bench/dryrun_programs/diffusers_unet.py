"""diffusers: a UNet learns to predict noise, with accelerate (its tutorial: Train a diffusion model)."""

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel

accelerator = Accelerator(mixed_precision="fp16")
model = UNet2DModel(sample_size=64, in_channels=3, out_channels=3, block_out_channels=(128, 256, 512),
                    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
                    up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"))  # fmt: skip
noises = DDPMScheduler(num_train_timesteps=1000)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
loader = torch.utils.data.DataLoader(torch.rand(64, 3, 64, 64), batch_size=8)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for clean in loader:
    noise = torch.randn(clean.shape, device=clean.device)
    times = torch.randint(0, 1000, (clean.shape[0],), device=clean.device)
    with accelerator.accumulate(model):
        predicted = model(noises.add_noise(clean, noise, times), times, return_dict=False)[0]
        accelerator.backward(torch.nn.functional.mse_loss(predicted, noise))
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
