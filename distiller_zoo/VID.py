from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distiller_zoo.base import Distiller, Shapes, pool_to_smaller

EPS = 1e-5  # least variance
INIT_VAR = 5.0


class VIDLoss(Distiller):
    """Variational Information Distillation for Knowledge Transfer, CVPR 2019. https://arxiv.org/abs/1904.05835

    Each teacher map is Gaussian around a regression from the student's, with a learnt variance per channel.
    """

    def __init__(self, s_shapes: Shapes, t_shapes: Shapes):
        super().__init__()
        maps = zip(s_shapes[self.feats], t_shapes[self.feats], strict=True)
        self.maps = nn.ModuleList(Gaussian(s[1], t[1]) for s, t in maps)

    def forward(self, g_s: list[Tensor], g_t: list[Tensor]) -> Tensor:
        return sum(nll(f_s, f_t) for nll, f_s, f_t in zip(self.maps, g_s, g_t, strict=True))


class Gaussian(nn.Module):
    """Negative log-likelihood (but for a constant) of a teacher map given the student's."""

    def __init__(self, s_c: int, t_c: int):
        super().__init__()
        # 1x1 convolutions s -> t -> t -> t with ReLU between; their positions are part of the state's names
        self.regressor = nn.Sequential(
            nn.Conv2d(s_c, t_c, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(t_c, t_c, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(t_c, t_c, 1, bias=False),
        )
        self.log_scale = nn.Parameter(torch.full((t_c,), math.log(math.expm1(INIT_VAR - EPS))))

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        f_s, f_t = pool_to_smaller(f_s, f_t)
        mean = self.regressor(f_s)  # (B, C_t, H, W)
        var = F.softplus(self.log_scale) + EPS
        var = var.view(1, -1, 1, 1)
        return 0.5 * ((mean - f_t).square() / var + var.log()).mean()
