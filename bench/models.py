"""Networks: (N, C, H, W) in [0, 1] to (N, K) logits. Normalisation is inside, so that attacks work on the pixels themselves."""

from __future__ import annotations

import torch
from torch import Tensor, nn

NAMES = ("cnn", "resnet18")


class SmallCNN(nn.Module):
    """Two strided convolutions and two dense layers: enough for digits, and fast to attack on a CPU."""

    def __init__(self, shape: tuple[int, int, int], classes: int, width: int = 16) -> None:
        super().__init__()
        channels, height, width_in = shape
        self.features = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride=1 + (height > 16), padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
        )
        with torch.no_grad():
            flat = self.features(torch.zeros(1, channels, height, width_in)).shape[1]
        self.head = nn.Sequential(nn.Linear(flat, 8 * width), nn.ReLU(), nn.Linear(8 * width, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(2 * x - 1))


class ResNet18(nn.Module):
    """ResNet-18 with CIFAR's stem (3x3, no pooling), from torchvision or timm, without pretrained weights."""

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        try:
            from torchvision.models import resnet18

            self.net = resnet18(num_classes=classes)
        except ImportError:
            try:
                from timm import create_model

                self.net = create_model("resnet18", num_classes=classes)
            except ImportError:
                raise SystemExit("model 'resnet18' needs torchvision or timm: pip install torchvision") from None
        self.net.conv1 = nn.Conv2d(shape[0], 64, 3, padding=1, bias=False)
        self.net.maxpool = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(4 * x - 2)


def build(name: str, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """A fresh network; its weights come from PyTorch's default generator."""
    if name not in NAMES:
        raise SystemExit(f"model must be one of {', '.join(NAMES)}, got {name!r}")
    return SmallCNN(shape, classes) if name == "cnn" else ResNet18(shape, classes)
