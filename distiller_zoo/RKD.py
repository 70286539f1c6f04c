from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distiller_zoo.base import Distiller

EPS = 1e-12  # least squared distance


class RKDLoss(Distiller):
    """Relational Knowledge Distillation, CVPR 2019. https://arxiv.org/abs/1904.05068

    Distances of pairs and angles of triples of the batch's embeddings, as the teacher has them.
    """

    feats = -1
    w_distance, w_angle = 25.0, 50.0

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:  # (B, s_dim), (B, t_dim)
        distance = F.smooth_l1_loss(distances(f_s), distances(f_t))
        angle = F.smooth_l1_loss(angles(f_s), angles(f_t))
        return self.w_distance * distance + self.w_angle * angle


def distances(f: Tensor) -> Tensor:
    """Euclidean distances of all pairs, in units of their mean: (B, B)."""
    n = len(f)
    square = f.square().sum(1)
    square = square[:, None] + square - 2 * f @ f.T
    off_diagonal = 1 - torch.eye(n, dtype=f.dtype, device=f.device)
    d = square.clamp(min=EPS).sqrt() * off_diagonal
    return d / (d.sum() / max(n * (n - 1), 1)).clamp(min=EPS)


def angles(f: Tensor) -> Tensor:
    """Cosines of the angles at i between the directions to j and to k: (B, B, B)."""
    direction = F.normalize(f[None] - f[:, None], dim=2)  # (B, B, dim), from i to j
    return direction @ direction.transpose(1, 2)
