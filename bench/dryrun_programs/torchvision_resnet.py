"""torchvision's ResNet-50, channels last, SGD (its references: classification)."""

import torch
import torchvision

model = torchvision.models.resnet50().cuda().to(memory_format=torch.channels_last)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
model.train()
for step in range(100):
    images = torch.randn(16, 3, 224, 224).cuda(non_blocking=True).to(memory_format=torch.channels_last)
    loss = criterion(model(images), torch.randint(0, 1000, (16,)).cuda())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(step, loss.item())
