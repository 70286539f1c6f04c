from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from distiller_zoo.adapters import ConvReg
from distiller_zoo.base import Distiller, Shapes


class HintLoss(Distiller):
    """FitNets: Hints for Thin Deep Nets, ICLR 2015. https://arxiv.org/abs/1412.6550

    Regress one teacher feature map from the student's.
    hint_layer: entry of the feature list (0 = stem)
    """

    feats = 2
    weights = {"gamma": 1.0, "alpha": 0.0, "beta": 100.0}

    def __init__(self, s_shapes: Shapes, t_shapes: Shapes, hint_layer: Literal[0, 1, 2, 3, 4] = 2):
        super().__init__()
        self.feats = hint_layer
        self.regress = ConvReg(s_shapes[hint_layer], t_shapes[hint_layer])

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:  # (B, C_s, H_s, W_s), (B, C_t, H_t, W_t)
        return F.mse_loss(self.regress(f_s), f_t)
