"""torchvision's Faster R-CNN (its tutorial: object detection finetuning)."""

import torch
import torchvision

model = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=21).cuda()
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.005, momentum=0.9)
model.train()
for _ in range(100):
    images = [torch.rand(3, 400, 500).cuda() for _ in range(2)]
    boxes = torch.tensor([[10.0, 20.0, 200.0, 300.0], [50.0, 60.0, 150.0, 160.0]]).cuda()
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 2]).cuda()} for _ in images]
    losses = sum(model(images, targets).values())
    optimizer.zero_grad()
    losses.backward()
    optimizer.step()
