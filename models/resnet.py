"""ResNet-18 and its larger kin (He et al., CVPR 2016, table 1), and the CIFAR ResNets of that paper (section 4.2).

network      feature map (C, h, w) at 32 px    parameters, 10 classes
ResNet-18    512, 4, 4  (stem "cifar")         11.17 M
ResNet-32     64, 8, 8                          0.46 M
ResNet-110    64, 8, 8                          1.73 M
"""

from __future__ import annotations

from typing import NamedTuple

from lwm.models.network import Network, Output
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock, Bottleneck

DEEPER: dict[str, tuple[type[BasicBlock | Bottleneck], list[int], dict[str, int]]] = {
    "resnet18": (BasicBlock, [2, 2, 2, 2], {}),
    "resnet34": (BasicBlock, [3, 4, 6, 3], {}),
    "resnet50": (Bottleneck, [3, 4, 6, 3], {}),
    "resnext50_32x4d": (Bottleneck, [3, 4, 6, 3], {"groups": 32, "width_per_group": 4}),
}


class Stem(NamedTuple):
    """How a network of ``DEEPER`` begins, and whether its last stage halves the map as well."""

    kernel: int  # of the first convolution, px
    stride: int
    pools: bool  # by a 3x3 max-pooling
    last_stride: int

    @property
    def shrinks(self) -> int:
        """How many pixels of the image a cell of the last map stands for, in each direction."""
        return self.stride * (2 if self.pools else 1) * 4 * self.last_stride


STEMS = {  # the cheapest first: of one image the next ones take 4, 7 and 16 times as long
    "imagenet": Stem(7, 2, pools=True, last_stride=2),
    "unpooled": Stem(7, 2, pools=False, last_stride=2),
    "fine": Stem(7, 2, pools=False, last_stride=1),
    "cifar": Stem(3, 1, pools=False, last_stride=2),
}
FEWEST_CELLS = 7  # of a map, in each direction, that one can look at
SMALL_IMAGES = 64  # px; below it the stem is the field's for such images, whatever the number of cells


def recommended_stem(image_size: int) -> str:
    """The cheapest of ``STEMS`` whose last map has ``FEWEST_CELLS`` in each direction (docs/settings-search.md)."""
    if image_size < SMALL_IMAGES:
        return "cifar"
    return next(name for name, stem in STEMS.items() if -(-image_size // stem.shrinks) >= FEWEST_CELLS)


class ImageNetResNet(ResNet, Network):
    """torchvision's network of that name (``DEEPER``), parameter names included, with a ``stem`` of ``STEMS``."""

    last_layer = "layer4"
    closed_form = True
    # torchvision does not say of what kind its own are.
    conv1: nn.Conv2d
    bn1: nn.Module
    relu: nn.Module
    maxpool: nn.Module
    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def __init__(self, architecture: str, classes: int, stem: str):
        block, layers, widths = DEEPER[architecture]
        super().__init__(block, layers, num_classes=classes, **widths)
        self.stem = stem
        kernel, stride, pools, last_stride = STEMS[stem]
        if kernel != self.conv1.kernel_size[0]:
            self.conv1 = nn.Conv2d(3, 64, kernel, stride, padding=kernel // 2, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        if not pools:
            self.maxpool = nn.Identity()
        if last_stride == 1:
            for module in self.layer4.modules():
                if isinstance(module, nn.Conv2d):
                    module.stride = (1, 1)

    def stages(self) -> list[list[nn.Module | nn.Parameter]]:
        return [[self.conv1, self.bn1], [self.layer1], [self.layer2], [self.layer3], [self.layer4]]

    def forward(self, images: Tensor) -> Output:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        features = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.classified(features)


class OptionAShortcut(nn.Module):
    """Every second pixel, and zeros for the channels that are new: a shortcut without parameters."""

    def __init__(self, extra_channels: int):
        super().__init__()
        self.before = extra_channels // 2
        self.after = extra_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


class CifarResNet(Network):
    """6n+2 layers in three stages of 16, 32 and 64 channels: n=5 is ResNet-32, n=18 ResNet-110."""

    last_layer = "layer3"
    closed_form = True

    def __init__(self, blocks_per_stage: int, classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._stage(16, 16, blocks_per_stage)
        self.layer2 = self._stage(16, 32, blocks_per_stage)
        self.layer3 = self._stage(32, 64, blocks_per_stage)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(channels_in: int, channels: int, blocks: int) -> nn.Sequential:
        grows = channels_in != channels
        shortcut = OptionAShortcut(channels - channels_in) if grows else None
        first = BasicBlock(channels_in, channels, stride=2 if grows else 1, downsample=shortcut)
        return nn.Sequential(first, *(BasicBlock(channels, channels) for _ in range(blocks - 1)))

    def stages(self) -> list[list[nn.Module | nn.Parameter]]:
        return [[self.conv1, self.bn1], [self.layer1], [self.layer2], [self.layer3]]

    def forward(self, images: Tensor) -> Output:
        x = self.relu(self.bn1(self.conv1(images)))
        features = self.layer3(self.layer2(self.layer1(x)))
        return self.classified(features)
