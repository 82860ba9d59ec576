"""Two networks and two optimizers that take turns (PyTorch's tutorial: DCGAN)."""

import torch
from torch import nn

generator = nn.Sequential(
    nn.ConvTranspose2d(100, 512, 4, 1, 0), nn.BatchNorm2d(512), nn.ReLU(True),
    nn.ConvTranspose2d(512, 256, 4, 2, 1), nn.BatchNorm2d(256), nn.ReLU(True),
    nn.ConvTranspose2d(256, 128, 4, 2, 1), nn.BatchNorm2d(128), nn.ReLU(True),
    nn.ConvTranspose2d(128, 3, 4, 2, 1), nn.Tanh(),
).cuda()  # fmt: skip
critic = nn.Sequential(
    nn.Conv2d(3, 128, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(128, 256, 4, 2, 1), nn.LeakyReLU(0.2),
    nn.Conv2d(256, 1, 8, 1, 0), nn.Flatten(0), nn.Sigmoid(),
).cuda()  # fmt: skip
criterion = nn.BCELoss()
of_critic = torch.optim.Adam(critic.parameters(), lr=2e-4, betas=(0.5, 0.999))
of_generator = torch.optim.Adam(generator.parameters(), lr=2e-4, betas=(0.5, 0.999))
real, fake = torch.ones(128, device="cuda"), torch.zeros(128, device="cuda")
for _ in range(50):
    critic.zero_grad()
    made = generator(torch.randn(128, 100, 1, 1, device="cuda"))
    criterion(critic(torch.randn(128, 3, 32, 32, device="cuda")), real).backward()
    criterion(critic(made.detach()), fake).backward()
    of_critic.step()
    generator.zero_grad()
    criterion(critic(made), real).backward()
    of_generator.step()
