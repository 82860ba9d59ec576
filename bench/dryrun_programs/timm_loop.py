"""A loop of timm's parts: ViT-S/16 its optimizer factory, mixup, EMA, NativeScaler (its documentation: train)."""

import timm
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, NativeScaler

model = timm.create_model("vit_small_patch16_224", num_classes=1000, drop_path_rate=0.1).cuda()
ema = ModelEmaV3(model, decay=0.999)
optimizer = create_optimizer_v2(model, opt="lamb", lr=1e-3, weight_decay=0.05)
scaler, mixup, criterion = NativeScaler(), Mixup(mixup_alpha=0.8, num_classes=1000), SoftTargetCrossEntropy()
model.train()
for step in range(100):
    images, labels = torch.randn(32, 3, 224, 224).cuda(), torch.randint(0, 1000, (32,)).cuda()
    images, targets = mixup(images, labels)
    with torch.autocast("cuda", torch.float16):
        loss = criterion(model(images), targets)
    optimizer.zero_grad()
    scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
    ema.update(model, step=step)
