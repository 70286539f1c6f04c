import torch.nn.functional as F
from torch import Tensor, nn

from models.util import conv, conv_bn, global_pool, init_convs, run_stage


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with a shortcut, up to the last ReLU."""

    expansion = 4

    def __init__(self, c_in: int, width: int, stride: int):
        super().__init__()
        c_out = self.expansion * width
        self.conv1 = conv(c_in, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, c_out, 1)
        self.bn3 = nn.BatchNorm2d(c_out)
        same = stride == 1 and c_in == c_out
        self.shortcut = nn.Identity() if same else conv_bn(c_in, c_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        return out.add_(self.shortcut(x))


class ResNet50(nn.Module):
    """Deep Residual Learning for Image Recognition (small-image stem), CVPR 2016. https://arxiv.org/abs/1512.03385"""

    def __init__(self, num_classes: int = 100):
        super().__init__()
        self.conv1 = conv(3, 64, 3)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _stage(64, 64, 3, stride=1)
        self.layer2 = _stage(256, 128, 4, stride=2)
        self.layer3 = _stage(512, 256, 6, stride=2)
        self.layer4 = _stage(1024, 512, 3, stride=2)
        self.linear = nn.Linear(2048, num_classes)
        init_convs(self)

    def get_feat_modules(self) -> nn.ModuleList:
        return nn.ModuleList([self.conv1, self.bn1, self.layer1, self.layer2, self.layer3, self.layer4])

    def forward(self, x: Tensor, is_feat: bool = False, preact: bool = False) -> Tensor | tuple[list[Tensor], Tensor]:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        feats = [x]
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x, pre = run_stage(layer, x)
            feats.append(pre if preact else x)
        feats.append(global_pool(x))
        logit = self.linear(feats[-1])
        return (feats, logit) if is_feat else logit


def _stage(c_in: int, width: int, n_blocks: int, stride: int) -> nn.Sequential:
    rest = [Bottleneck(Bottleneck.expansion * width, width, 1) for _ in range(n_blocks - 1)]
    return nn.Sequential(Bottleneck(c_in, width, stride), *rest)
