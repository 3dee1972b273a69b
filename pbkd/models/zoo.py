"""Networks by name: the CIFAR-sized VGG and ResNet families, each with a width factor."""

from __future__ import annotations

import difflib

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn import functional as F

from pbkd.errors import TeacherError

# Output channels of the 3x3 convolutions; "M": 2x2 max pooling (Simonyan & Zisserman, 1409.1556).
_VGG_LAYOUTS: dict[str, tuple[int | str, ...]] = {
    "vgg_small": (32, 32, "M", 64, 64, "M", 128, 128),
    "vgg11": (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512),
    "vgg13": (64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512),
    "vgg16": (64, 64, "M", 128, 128, "M", *[256] * 3, "M", *[512] * 3, "M", *[512] * 3),
    "vgg19": (64, 64, "M", 128, 128, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4),
}
# Residual blocks per group of the three-group CIFAR ResNets (He et al., 1512.03385, section 4.2).
_RESNET_GROUPS = {"resnet20": 3, "resnet56": 9}


class NetworkSpec(BaseModel):
    """All that is needed to build a network again, without its weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    num_classes: int
    in_channels: int
    width: float = 1.0


def network_names() -> list[str]:
    """Names that ``build_network`` knows."""
    return [*_VGG_LAYOUTS, *_RESNET_GROUPS]


def build_network(spec: NetworkSpec) -> nn.Module:
    """A network with fresh weights: (N, in_channels, H, W) float32 to (N, num_classes) logits.

    Raises:
        TeacherError: unknown name.
    """
    if spec.name in _VGG_LAYOUTS:
        return Vgg(_VGG_LAYOUTS[spec.name], spec)
    if spec.name in _RESNET_GROUPS:
        return CifarResNet(_RESNET_GROUPS[spec.name], spec)
    known = network_names()
    nearest = difflib.get_close_matches(spec.name, known, n=1)
    hint = f"did you mean `{nearest[0]}`?" if nearest else f"known are {', '.join(known)}"
    raise TeacherError(f"teacher.model: unknown network `{spec.name}`; {hint}")


def _scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))


class Vgg(nn.Module):
    """VGG with batch norm, global average pooling and one linear layer."""

    def __init__(self, layout: tuple[int | str, ...], spec: NetworkSpec) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = spec.in_channels
        for item in layout:
            if isinstance(item, str):
                layers.append(nn.MaxPool2d(2))
                continue
            width = _scaled(item, spec.width)
            layers += [
                nn.Conv2d(channels, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, spec.num_classes)

    def forward(self, x_nchw: Tensor) -> Tensor:
        """(N, C, H, W) to (N, K) logits."""
        return self.classifier(self.features(x_nchw).mean((2, 3)))  # type: ignore[no-any-return]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a skip; the projection is a strided 1x1 convolution."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x_nchw: Tensor) -> Tensor:
        """(N, C, H, W) to (N, channels, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x_nchw)))
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x_nchw))


class CifarResNet(nn.Module):
    """ResNet for small images: three groups of 16, 32 and 64 channels."""

    def __init__(self, blocks_per_group: int, spec: NetworkSpec) -> None:
        super().__init__()
        widths = [_scaled(channels, spec.width) for channels in (16, 32, 64)]
        self.conv1 = nn.Conv2d(spec.in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        channels = widths[0]
        for group, width in enumerate(widths, start=1):
            blocks = []
            for index in range(blocks_per_group):
                stride = 2 if group > 1 and index == 0 else 1
                blocks.append(BasicBlock(channels, width, stride))
                channels = width
            self.add_module(f"layer{group}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, spec.num_classes)

    def forward(self, x_nchw: Tensor) -> Tensor:
        """(N, C, H, W) to (N, K) logits."""
        x = F.relu(self.bn1(self.conv1(x_nchw)))
        for group in (1, 2, 3):
            x = self.get_submodule(f"layer{group}")(x)
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


class Classifier(nn.Module):
    """A network with its normalisation: takes float32 NCHW in [0, 1], gives (N, K) logits."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(1, -1, 1, 1))

    def forward(self, x_nchw: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] to (N, K) logits."""
        return self.net((x_nchw - self.mean) / self.std)  # type: ignore[no-any-return]
