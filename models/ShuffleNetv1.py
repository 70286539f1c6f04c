import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.util import channel_shuffle, conv, global_pool, run_stage

STEM = 24
GROUPS = 3


class Bottleneck(nn.Module):
    """Grouped 1x1, depthwise 3x3 and grouped 1x1 convolutions with a shortcut, up to the last ReLU."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.stride = stride
        if stride == 2:
            c_out -= c_in  # the pooled shortcut is concatenated
        mid = c_out // 4
        self.groups = 1 if c_in == STEM else GROUPS  # after the stem: too few channels for groups, hence no shuffle
        self.conv1 = conv(c_in, mid, 1, groups=self.groups)
        self.bn1 = nn.BatchNorm2d(mid)
        self.conv2 = conv(mid, mid, 3, stride, groups=mid)
        self.bn2 = nn.BatchNorm2d(mid)
        self.conv3 = conv(mid, c_out, 1, groups=GROUPS)
        self.bn3 = nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = channel_shuffle(out, self.groups)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        if self.stride == 2:
            return torch.cat([out, F.avg_pool2d(x, 3, stride=2, padding=1)], 1)
        return out.add_(x)


class ShuffleV1(nn.Module):
    """ShuffleNet: An Extremely Efficient CNN for Mobile Devices, CVPR 2018. https://arxiv.org/abs/1707.01083"""

    def __init__(self, num_classes: int = 100):
        super().__init__()
        self.conv1 = conv(3, STEM, 1)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.layer1 = _stage(STEM, 240, 4)
        self.layer2 = _stage(240, 480, 8)
        self.layer3 = _stage(480, 960, 4)
        self.linear = nn.Linear(960, num_classes)

    def get_feat_modules(self) -> nn.ModuleList:
        return nn.ModuleList([self.conv1, self.bn1, self.layer1, self.layer2, self.layer3])

    def forward(self, x: Tensor, is_feat: bool = False, preact: bool = False) -> Tensor | tuple[list[Tensor], Tensor]:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        feats = [x]
        for layer in (self.layer1, self.layer2, self.layer3):
            x, pre = run_stage(layer, x)
            feats.append(pre if preact else x)
        feats.append(global_pool(x))
        logit = self.linear(feats[-1])
        return (feats, logit) if is_feat else logit


def _stage(c_in: int, c_out: int, n_blocks: int) -> nn.Sequential:
    rest = [Bottleneck(c_out, c_out, 1) for _ in range(n_blocks - 1)]
    return nn.Sequential(Bottleneck(c_in, c_out, 2), *rest)
