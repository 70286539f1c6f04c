from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from distiller_zoo.base import Distiller


class SRRLLoss(Distiller):
    """Knowledge Distillation via Softmax Regression Representation Learning, ICLR 2021.
    https://openreview.net/forum?id=ZzwDy_wiWv

    The student's embedding, projected, is the teacher's, and so are the logits that the teacher's classifier makes
    of it. Weights, KL included, of SimKD's toolbox.
    """

    feats = -1
    needs = ("logit_t", "head_t")
    min_batch = 2  # batch norm of vectors
    weights = {"gamma": 1.0, "alpha": 1.0, "beta": 1.0}

    def __init__(self, s_dim: int, t_dim: int):
        super().__init__()
        self.transfer = nn.Sequential(nn.Conv2d(s_dim, t_dim, 1, bias=False), nn.BatchNorm2d(t_dim), nn.ReLU())

    def forward(self, f_s: Tensor, f_t: Tensor, logit_t: Tensor, head_t: nn.Linear) -> Tensor:
        if len(f_s) < self.min_batch:
            return 0 * f_s.sum()
        v = self.transfer(f_s[:, :, None, None]).flatten(1)  # (B, t_dim)
        return F.mse_loss(v, f_t) + F.mse_loss(head_t(v), logit_t)
