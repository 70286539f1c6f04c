from torch import Tensor, nn

from models.util import conv_bn, global_pool, init_convs, init_linear

WIDTH = 0.5
EXPANSION = 6
STAGES = ((16, 1, 1), (24, 2, 1), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))  # width, blocks, stride
FEATURE_STAGES = (1, 2, 4, 6)


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise and 1x1 linear projection: no ReLU follows."""

    def __init__(self, c_in: int, c_out: int, stride: int, expansion: int):
        super().__init__()
        hidden = expansion * c_in
        self.skip = stride == 1 and c_in == c_out
        self.conv = nn.Sequential(
            *conv_bn(c_in, hidden, 1),
            nn.ReLU(inplace=True),
            *conv_bn(hidden, hidden, 3, stride, groups=hidden),
            nn.ReLU(inplace=True),
            *conv_bn(hidden, c_out, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        return out.add_(x) if self.skip else out


class MobileNetV2(nn.Module):
    """MobileNetV2: Inverted Residuals and Linear Bottlenecks, CVPR 2018. https://arxiv.org/abs/1801.04381"""

    def __init__(self, num_classes: int = 100):
        super().__init__()
        c_in = int(32 * WIDTH)
        self.conv1 = nn.Sequential(*conv_bn(3, c_in, 3, stride=2), nn.ReLU(inplace=True))
        self.blocks = nn.ModuleList()
        for i, (width, n_blocks, stride) in enumerate(STAGES):
            c_out, expansion = int(width * WIDTH), 1 if i == 0 else EXPANSION
            rest = [InvertedResidual(c_out, c_out, 1, EXPANSION) for _ in range(n_blocks - 1)]
            self.blocks.append(nn.Sequential(InvertedResidual(c_in, c_out, stride, expansion), *rest))
            c_in = c_out
        self.conv2 = nn.Sequential(*conv_bn(c_in, 1280, 1), nn.ReLU(inplace=True))
        linear = nn.Linear(1280, num_classes)
        self.classifier = nn.Sequential(linear)
        init_convs(self)
        init_linear(linear)

    def get_feat_modules(self) -> nn.ModuleList:
        return nn.ModuleList([self.conv1, self.blocks])

    def forward(self, x: Tensor, is_feat: bool = False, preact: bool = False) -> Tensor | tuple[list[Tensor], Tensor]:
        x = self.conv1(x)
        feats = [x]
        for i, stage in enumerate(self.blocks):
            x = stage(x)
            if i in FEATURE_STAGES:
                feats.append(x)  # preact changes nothing: a linear bottleneck has no last ReLU
        feats.append(global_pool(self.conv2(x)))
        logit = self.classifier(feats[-1])
        return (feats, logit) if is_feat else logit
