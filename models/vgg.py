import torch.nn.functional as F
from torch import Tensor, nn

from models.util import init_convs, init_linear, run_stage

WIDTHS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """Very Deep Convolutional Networks for Large-Scale Image Recognition, ICLR 2015. https://arxiv.org/abs/1409.1556"""

    def __init__(self, n_convs: tuple[int, ...], num_classes: int = 100):
        super().__init__()
        n0, n1, n2, n3, n4 = n_convs  # convolutions per block
        c0, c1, c2, c3, c4 = WIDTHS
        self.block0 = _block(3, c0, n0)
        self.pool0 = nn.MaxPool2d(2)
        self.block1 = _block(c0, c1, n1)
        self.pool1 = nn.MaxPool2d(2)
        self.block2 = _block(c1, c2, n2)
        self.pool2 = nn.MaxPool2d(2)
        self.block3 = _block(c2, c3, n3)
        self.pool3 = nn.MaxPool2d(2)
        self.block4 = _block(c3, c4, n4)
        self.pool4 = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(c4, num_classes)
        init_convs(self)
        init_linear(self.classifier)

    def get_feat_modules(self) -> nn.ModuleList:
        pairs = [(getattr(self, f"block{i}"), getattr(self, f"pool{i}")) for i in range(5)]
        return nn.ModuleList([module for pair in pairs for module in pair])

    def forward(self, x: Tensor, is_feat: bool = False, preact: bool = False) -> Tensor | tuple[list[Tensor], Tensor]:
        # as in RepDistiller, only images 64 pixels high are pooled after block 3
        pool3 = self.pool3 if x.shape[2] == 64 else nn.Identity()
        x = F.relu(self.block0(x), inplace=True)
        feats = [x]
        rest = ((self.pool0, self.block1), (self.pool1, self.block2), (self.pool2, self.block3), (pool3, self.block4))
        for pool, block in rest:
            x, pre = run_stage([block], pool(x))
            feats.append(pre if preact else x)
        feats.append(self.pool4(x).flatten(1))
        logit = self.classifier(feats[-1])
        return (feats, logit) if is_feat else logit


def _block(c_in: int, c_out: int, n_convs: int) -> nn.Sequential:
    layers = []
    for i in range(n_convs):
        layers += [nn.Conv2d(c_in if i == 0 else c_out, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(True)]
    return nn.Sequential(*layers[:-1])  # the network applies the last ReLU, as the pre-activation is a feature
