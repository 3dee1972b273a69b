"""Networks by name: CIFAR-sized VGG and ResNet families of our own, torchvision's, and the user's.

Our own have a width factor. A network of the user's is named by the function that builds it.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import warnings
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn import functional as F

from pbkd.artifacts import file_digest
from pbkd.devices import channels_last
from pbkd.errors import TeacherError, did_you_mean

# Output channels of the 3x3 convolutions; "M": 2x2 max pooling (Simonyan & Zisserman, 1409.1556).
_VGG_LAYOUTS: dict[str, tuple[int | str, ...]] = {
    "vgg_small": (32, 32, "M", 64, 64, "M", 128, 128),
    "cifar_vgg11": (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512),
    "cifar_vgg13": (64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512),
    "cifar_vgg16": (64, 64, "M", 128, 128, "M", *[256] * 3, "M", *[512] * 3, "M", *[512] * 3),
    "cifar_vgg19": (64, 64, "M", 128, 128, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4),
}
# Channels of each group and residual blocks per group: the three-group CIFAR ResNets (He et al.,
# 1512.03385, section 4.2), and ResNet-18's four groups behind a 3x3 stem without pooling.
_RESNETS = {
    "cifar_resnet20": ((16, 32, 64), 3),
    "cifar_resnet56": ((16, 32, 64), 9),
    "cifar_resnet18": ((64, 128, 256, 512), 2),
}
_OWN = (*_VGG_LAYOUTS, *_RESNETS)


class NetworkSpec(BaseModel):
    """All that is needed to build a network again, without its weights.

    ``code`` is a digest of the file of the user's function; empty for other networks.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    num_classes: int
    in_channels: int
    width: float = 1.0
    code: str = ""


def network_names() -> list[str]:
    """Names of our own networks and of torchvision's classification models."""
    return [*_OWN, *_torchvision_names()]


def build_network(spec: NetworkSpec, *, allow_code: bool = False) -> nn.Module:
    """A network with fresh weights: (N, in_channels, H, W) float32 to (N, num_classes) logits.

    Args:
        allow_code: whether a name `package.module:function` may be imported and called, with the
            keyword arguments ``num_classes`` and ``in_channels``.

    Raises:
        TeacherError: unknown name, or the network does not take such settings.
    """
    if spec.name in _VGG_LAYOUTS:
        return Vgg(_VGG_LAYOUTS[spec.name], spec)
    if spec.name in _RESNETS:
        return CifarResNet(*_RESNETS[spec.name], spec)
    if spec.width != 1:
        raise TeacherError(
            f"teacher.width: got {spec.width:g}; only {', '.join(_OWN)} have "
            f"a width factor, `{spec.name}` has none; leave it at 1"
        )
    if ":" in spec.name:
        return _user_network(spec, allow_code)
    check_name(spec.name)
    return _torchvision_network(spec)


def network_code(name: str) -> str:
    """Digest of the file that a network `package.module:function` comes from; else empty."""
    if ":" not in name:
        return ""
    try:
        found = importlib.util.find_spec(name.partition(":")[0])
    except Exception:  # noqa: BLE001  told where the network is built
        return ""
    origin = Path(found.origin) if found is not None and found.origin else None
    return file_digest(origin) if origin is not None and origin.is_file() else ""


def check_name(name: str) -> None:
    """Raise TeacherError if no network has this name; of a function, the package is looked for."""
    if ":" in name:
        module = name.partition(":")[0].partition(".")[0]
        try:
            found = importlib.util.find_spec(module) is not None
        except (ImportError, ValueError):
            found = False
        if not found:
            raise TeacherError(
                f"teacher.model: {name}: there is no module {module} beside params.yaml or on the "
                "Python path"
            )
        return
    if name in _OWN:  # torchvision, which takes a second to import, need not be asked
        return
    known = network_names()
    if name in known:
        return
    hint = did_you_mean(
        name,
        known,
        f"known are {', '.join(_OWN)}, torchvision's classification models, and "
        "package.module:function",
    )
    raise TeacherError(f"teacher.model: unknown network `{name}`; {hint}")


def check_network(net: nn.Module, spec: NetworkSpec, image_size: tuple[int, int]) -> None:
    """Run two images through a copy of the network in training mode.

    Raises:
        TeacherError: it cannot take them, or does not give one tensor of logits.
    """
    shape = "x".join(map(str, (spec.in_channels, *image_size)))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            images_nchw = torch.rand(2, spec.in_channels, *image_size)
            logits = copy.deepcopy(net).train()(images_nchw)
    except Exception as error:  # whatever a user's network raises
        raise TeacherError(
            f"teacher.model: {spec.name} cannot take images of {shape}: {error}; change "
            "prepare.image_size or prepare.channels, or the network"
        ) from error
    expected = (2, spec.num_classes)
    got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if got != expected:
        raise TeacherError(
            f"teacher.model: {spec.name} gives {got} in training mode for two images, expected "
            f"one tensor of logits {expected}; take a network without auxiliary outputs"
        )


def _torchvision_names() -> list[str]:
    from torchvision import models

    return models.list_models(module=models)  # type: ignore[no-any-return]


def _torchvision_network(spec: NetworkSpec) -> nn.Module:
    from torchvision import models

    if spec.in_channels != 3:
        raise TeacherError(
            f"teacher.model: torchvision's {spec.name} takes 3 channels, the prepared images have "
            f"{spec.in_channels}; set prepare.channels: rgb"
        )
    with warnings.catch_warnings():  # two models warn of their initialisation
        warnings.simplefilter("ignore", FutureWarning)
        net = models.get_model(spec.name, weights=None, num_classes=spec.num_classes)
    assert isinstance(net, nn.Module)
    return net


def _user_network(spec: NetworkSpec, allow_code: bool) -> nn.Module:
    if not allow_code:
        raise TeacherError(
            f"network `{spec.name}` is built by code that is not pbkd's; if you trust it, pass "
            "allow_code=True"
        )
    module_name, _, function_name = spec.name.partition(":")
    if spec.code and spec.code != network_code(spec.name):
        raise TeacherError(
            f"the code of {module_name} is not that of the teacher any more; run: pbkd teacher"
        )
    try:
        function = getattr(importlib.import_module(module_name), function_name)
        net = function(num_classes=spec.num_classes, in_channels=spec.in_channels)
    except Exception as error:  # whatever a user's code raises
        raise TeacherError(
            f"teacher.model: {spec.name}(num_classes={spec.num_classes}, "
            f"in_channels={spec.in_channels}): {type(error).__name__}: {error}; expected a "
            "function of a module in the workspace, or on the Python path, that takes these two "
            "arguments"
        ) from error
    if not isinstance(net, nn.Module):
        raise TeacherError(
            f"teacher.model: {spec.name} gives {type(net).__name__}, expected a torch.nn.Module"
        )
    return net


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
    """ResNet for small images: a 3x3 stem, then groups of residual blocks."""

    def __init__(
        self, group_channels: tuple[int, ...], blocks_per_group: int, spec: NetworkSpec
    ) -> None:
        super().__init__()
        widths = [_scaled(channels, spec.width) for channels in group_channels]
        self.conv1 = nn.Conv2d(spec.in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        channels = widths[0]
        self._groups = [f"layer{number}" for number in range(1, len(widths) + 1)]
        for group, width in zip(self._groups, widths, strict=True):
            blocks = []
            for index in range(blocks_per_group):
                stride = 2 if group != "layer1" and index == 0 else 1
                blocks.append(BasicBlock(channels, width, stride))
                channels = width
            self.add_module(group, nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, spec.num_classes)

    def forward(self, x_nchw: Tensor) -> Tensor:
        """(N, C, H, W) to (N, K) logits."""
        x = F.relu(self.bn1(self.conv1(x_nchw)))
        for group in self._groups:
            x = self.get_submodule(group)(x)
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


class Classifier(nn.Module):
    """A network with its normalisation: takes float32 NCHW in [0, 1], gives (N, K) logits.

    Its convolutions are in channels-last layout, whatever the layout of the images.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.net = channels_last(net)
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(1, -1, 1, 1))

    def forward(self, x_nchw: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] to (N, K) logits."""
        return self.net((x_nchw - self.mean) / self.std)  # type: ignore[no-any-return]
