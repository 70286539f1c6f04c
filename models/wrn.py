import torch.nn.functional as F
from torch import Tensor, nn

from models.util import conv, global_pool, init_convs


class BasicBlock(nn.Module):
    """Pre-activation block. Its caller applies bn1, whose output may also be a feature of the network."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = conv(c_in, c_out, 3, stride)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = conv(c_out, c_out, 3)
        self.convShortcut = None if c_in == c_out else conv(c_in, c_out, 1, stride)

    def forward(self, x: Tensor, act: Tensor) -> Tensor:  # act = relu(bn1(x))
        out = F.relu(self.bn2(self.conv1(act)), inplace=True)
        out = self.conv2(out)
        return out.add_(x if self.convShortcut is None else self.convShortcut(act))


class NetworkBlock(nn.Module):
    """A stage of blocks of equal width."""

    def __init__(self, c_in: int, c_out: int, n_blocks: int, stride: int):
        super().__init__()
        rest = [BasicBlock(c_out, c_out, 1) for _ in range(n_blocks - 1)]
        self.layer = nn.Sequential(BasicBlock(c_in, c_out, stride), *rest)

    def forward(self, x: Tensor, act: Tensor) -> Tensor:  # act = relu(bn1(x)), bn1 of the first block
        first, *rest = self.layer
        x = first(x, act)
        for block in rest:
            x = block(x, F.relu(block.bn1(x), inplace=True))
        return x


class WideResNet(nn.Module):
    """Wide Residual Networks, BMVC 2016. https://arxiv.org/abs/1605.07146"""

    def __init__(self, depth: int, widen: int, num_classes: int = 100):
        super().__init__()
        n_blocks = (depth - 4) // 6  # three stages, two convolutions per block
        self.conv1 = conv(3, 16, 3)
        self.block1 = NetworkBlock(16, 16 * widen, n_blocks, stride=1)
        self.block2 = NetworkBlock(16 * widen, 32 * widen, n_blocks, stride=2)
        self.block3 = NetworkBlock(32 * widen, 64 * widen, n_blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * widen)
        self.fc = nn.Linear(64 * widen, num_classes)
        init_convs(self)
        nn.init.zeros_(self.fc.bias)

    def get_feat_modules(self) -> nn.ModuleList:
        return nn.ModuleList([self.conv1, self.block1, self.block2, self.block3])

    def forward(self, x: Tensor, is_feat: bool = False, preact: bool = False) -> Tensor | tuple[list[Tensor], Tensor]:
        x = self.conv1(x)
        feats = [x]
        pre = self.block1.layer[0].bn1(x)
        next_bn = (self.block2.layer[0].bn1, self.block3.layer[0].bn1, self.bn1)
        for block, bn in zip((self.block1, self.block2, self.block3), next_bn, strict=True):
            x = block(x, F.relu(pre))
            pre = bn(x)  # called once: a second call would update its running statistics twice per step
            feats.append(pre if preact else x)
        feats.append(global_pool(F.relu(pre)))
        logit = self.fc(feats[-1])
        return (feats, logit) if is_feat else logit
