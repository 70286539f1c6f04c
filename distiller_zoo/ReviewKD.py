from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distiller_zoo.base import Distiller, Epochs, Shapes, pool, warm_up

MOST_CHANNELS = 512  # of the fused maps


class ReviewKD(Distiller):
    """Distilling Knowledge via Knowledge Review, CVPR 2021. https://arxiv.org/abs/2104.09044

    From the pooled vector to the first stage, the student's levels are fused one after another, and the fused map of
    each level is compared with the teacher's map before its last ReLU, at several sizes. Warm-up, and the teacher in
    eval mode, as in mdistiller; the weights of the pairs are the authors'.
    warmup: epochs in which the term grows linearly to its weight
    """

    feats = slice(1, None)
    preact_t = True
    needs = ("epoch",)
    min_batch = 2  # batch norm of the pooled vector
    weights = {"gamma": 1.0, "alpha": 0.0, "beta": 5.0}
    published = {
        ("wrn_40_2", "wrn_16_2"): {"beta": 5.0},
        ("wrn_40_2", "wrn_40_1"): {"beta": 5.0},
        ("wrn_40_2", "ShuffleV1"): {"beta": 5.0},
        ("resnet56", "resnet20"): {"beta": 0.6},
        ("resnet110", "resnet32"): {"beta": 1.0},
        ("resnet32x4", "resnet8x4"): {"beta": 5.0},
        ("resnet32x4", "ShuffleV1"): {"beta": 5.0},
        ("resnet32x4", "ShuffleV2"): {"beta": 8.0},
    }

    def __init__(self, s_shapes: Shapes, t_shapes: Shapes, warmup: Epochs = 20):
        super().__init__()
        self.warmup = warmup
        mid = min(MOST_CHANNELS, s_shapes[-1][1])
        levels = zip(s_shapes[self.feats][::-1], t_shapes[self.feats][::-1], strict=True)  # from the deepest
        self.abfs = nn.ModuleList(Fusion(s[1], mid, t[1], attend=i > 0) for i, (s, t) in enumerate(levels))

    def forward(self, g_s: list[Tensor], g_t: list[Tensor], epoch: Tensor) -> Tensor:
        if len(g_s[-1]) < self.min_batch:
            return 0 * g_s[-1].sum()
        loss, review = 0.0, None
        for fuse, f_s, f_t in zip(self.abfs, reversed(g_s), reversed(g_t), strict=True):
            f_s, f_t = (f[:, :, None, None] if f.dim() == 2 else f for f in (f_s, f_t))
            review, out = fuse(f_s, review, f_t.shape[2:])
            loss = loss + pyramid_loss(out, f_t)
        return warm_up(epoch, self.warmup) * loss


class Fusion(nn.Module):
    """A level of the student, fused with the review of the deeper ones by attention (ABF)."""

    def __init__(self, s_c: int, mid: int, t_c: int, attend: bool):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(s_c, mid, 1, bias=False), nn.BatchNorm2d(mid))
        self.conv2 = nn.Sequential(nn.Conv2d(mid, t_c, 3, padding=1, bias=False), nn.BatchNorm2d(t_c))
        self.att_conv = nn.Sequential(nn.Conv2d(2 * mid, 2, 1), nn.Sigmoid()) if attend else None
        for conv in (self.conv1[0], self.conv2[0]):
            nn.init.kaiming_uniform_(conv.weight, a=1)

    def forward(self, f_s: Tensor, review: Tensor | None, size: torch.Size) -> tuple[Tensor, Tensor]:
        """-> (B, mid, H_t, W_t) for the next level, (B, t_c, H_t, W_t) to compare with the teacher's map"""
        x = self.conv1(f_s)
        if self.att_conv is not None:
            deeper = resize(review, x.shape[2:])
            own, other = self.att_conv(torch.cat([x, deeper], 1)).split(1, dim=1)  # (B, 1, H_s, W_s)
            x = own * x + other * deeper
        x = resize(x, size)
        return x, self.conv2(x)


def resize(f: Tensor, size: torch.Size) -> Tensor:
    return f if f.shape[2:] == size else F.interpolate(f, size, mode="nearest")


def pyramid_loss(f_s: Tensor, f_t: Tensor) -> Tensor:
    """Mean of the squared errors of two maps and of their 4x4, 2x2 and 1x1 pools, each with half the weight (HCL)."""
    loss, weight, total = F.mse_loss(f_s, f_t), 1.0, 1.0
    for n in (4, 2, 1):
        if n < f_s.size(2):
            weight /= 2
            loss = loss + weight * F.mse_loss(pool(f_s, [n, n]), pool(f_t, [n, n]))
            total += weight
    return loss / total
