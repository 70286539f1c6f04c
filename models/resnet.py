import torch.nn.functional as F
from torch import Tensor, nn

from models.util import conv, conv_bn, global_pool, init_convs, run_stage


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut, up to the last ReLU."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.conv1 = conv(c_in, c_out, 3, stride)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = conv(c_out, c_out, 3)
        self.bn2 = nn.BatchNorm2d(c_out)
        same = stride == 1 and c_in == c_out
        self.downsample = nn.Identity() if same else conv_bn(c_in, c_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        return out.add_(self.downsample(x))


class ResNet(nn.Module):
    """Deep Residual Learning for Image Recognition (CIFAR form), CVPR 2016. https://arxiv.org/abs/1512.03385"""

    def __init__(self, depth: int, widths: tuple[int, ...] = (16, 16, 32, 64), num_classes: int = 100):
        super().__init__()
        n_blocks = (depth - 2) // 6  # three stages, two convolutions per block
        c0, c1, c2, c3 = widths
        self.conv1 = conv(3, c0, 3)
        self.bn1 = nn.BatchNorm2d(c0)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(c0, c1, n_blocks, stride=1)
        self.layer2 = _stage(c1, c2, n_blocks, stride=2)
        self.layer3 = _stage(c2, c3, n_blocks, stride=2)
        self.fc = nn.Linear(c3, num_classes)
        init_convs(self)

    def get_feat_modules(self) -> nn.ModuleList:
        return nn.ModuleList([self.conv1, self.bn1, self.relu, self.layer1, self.layer2, self.layer3])

    def forward(self, x: Tensor, is_feat: bool = False, preact: bool = False) -> Tensor | tuple[list[Tensor], Tensor]:
        x = self.relu(self.bn1(self.conv1(x)))
        feats = [x]
        for layer in (self.layer1, self.layer2, self.layer3):
            x, pre = run_stage(layer, x)
            feats.append(pre if preact else x)
        feats.append(global_pool(x))
        logit = self.fc(feats[-1])
        return (feats, logit) if is_feat else logit


def _stage(c_in: int, c_out: int, n_blocks: int, stride: int) -> nn.Sequential:
    rest = [BasicBlock(c_out, c_out, 1) for _ in range(n_blocks - 1)]
    return nn.Sequential(BasicBlock(c_in, c_out, stride), *rest)
