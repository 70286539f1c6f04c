import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.util import channel_shuffle, conv, global_pool, run_stage


class BasicBlock(nn.Module):
    """Half of the channels pass through, half are convolved; up to the last ReLU and the shuffle."""

    def __init__(self, c: int):
        super().__init__()
        half = c // 2
        self.conv1 = conv(half, half, 1)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = conv(half, half, 3, groups=half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv(half, half, 1)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, 1)
        out = F.relu(self.bn1(self.conv1(x2)), inplace=True)
        out = self.bn2(self.conv2(out))
        return torch.cat([x1, self.bn3(self.conv3(out))], 1)


class DownBlock(nn.Module):
    """Two branches of stride 2, concatenated; up to the last ReLU and the shuffle."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        half = c_out // 2
        self.conv1 = conv(c_in, c_in, 3, stride=2, groups=c_in)
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv2 = conv(c_in, half, 1)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv(c_in, half, 1)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = conv(half, half, 3, stride=2, groups=half)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = conv(half, half, 1)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        right = F.relu(self.bn3(self.conv3(x)), inplace=True)
        right = self.bn5(self.conv5(self.bn4(self.conv4(right))))
        return torch.cat([left, right], 1)


class ShuffleV2(nn.Module):
    """ShuffleNet V2: Practical Guidelines for Efficient CNN Design, ECCV 2018. https://arxiv.org/abs/1807.11164"""

    def __init__(self, num_classes: int = 100):
        super().__init__()
        self.conv1 = conv(3, 24, 1)
        self.bn1 = nn.BatchNorm2d(24)
        self.layer1 = _stage(24, 116, 4)
        self.layer2 = _stage(116, 232, 8)
        self.layer3 = _stage(232, 464, 4)
        self.conv2 = conv(464, 1024, 1)
        self.bn2 = nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, num_classes)

    def get_feat_modules(self) -> nn.ModuleList:
        return nn.ModuleList([self.conv1, self.bn1, self.layer1, self.layer2, self.layer3])

    def forward(self, x: Tensor, is_feat: bool = False, preact: bool = False) -> Tensor | tuple[list[Tensor], Tensor]:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        feats = [x]
        for layer in (self.layer1, self.layer2, self.layer3):
            x, pre = run_stage(layer, x, _relu_shuffle)
            feats.append(
                pre if preact else x
            )  # as in RepDistiller, pre is not shuffled: its channels are in another order than x's
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        feats.append(global_pool(x))
        logit = self.linear(feats[-1])
        return (feats, logit) if is_feat else logit


def _relu_shuffle(pre: Tensor, inplace: bool = False) -> Tensor:
    # the half that passed through is already rectified: a second ReLU changes neither it nor its gradient
    return channel_shuffle(F.relu(pre, inplace=inplace), 2)


def _stage(c_in: int, c_out: int, n_blocks: int) -> nn.Sequential:
    return nn.Sequential(DownBlock(c_in, c_out), *[BasicBlock(c_out) for _ in range(n_blocks - 1)])
