from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from distiller_zoo.base import Distiller, pool_to_smaller


class Attention(Distiller):
    """Paying More Attention to Attention, ICLR 2017. https://arxiv.org/abs/1612.03928

    Match where the maps are strong: the mean over channels of f^p, as a unit vector over positions.
    """

    weights = {"gamma": 1.0, "alpha": 0.0, "beta": 1000.0}
    p = 2

    def forward(self, g_s: list[Tensor], g_t: list[Tensor]) -> Tensor:
        return sum(self.distance(*pool_to_smaller(f_s, f_t)) for f_s, f_t in zip(g_s, g_t, strict=True))

    def distance(self, f_s: Tensor, f_t: Tensor) -> Tensor:  # (B, C_s, H, W), (B, C_t, H, W)
        return F.mse_loss(self.attention(f_s), self.attention(f_t))

    def attention(self, f: Tensor) -> Tensor:
        return F.normalize(f.pow(self.p).mean(1).flatten(1), dim=1)  # (B, H * W)
