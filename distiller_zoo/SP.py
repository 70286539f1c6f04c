from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from distiller_zoo.base import Distiller


class Similarity(Distiller):
    """Similarity-Preserving Knowledge Distillation, ICCV 2019. https://arxiv.org/abs/1907.09682

    Samples that are alike to the teacher are alike to the student.
    """

    feats = -2
    across_batch = True
    min_batch = 2
    weights = {"gamma": 1.0, "alpha": 0.0, "beta": 3000.0}

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:  # (B, C_s, H_s, W_s), (B, C_t, H_t, W_t)
        return F.mse_loss(self.similarity(f_s), self.similarity(f_t))

    def similarity(self, f: Tensor) -> Tensor:
        f = f.flatten(1)
        return F.normalize(f @ f.T, dim=1)  # (B, B)
