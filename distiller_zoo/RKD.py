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
    across_batch = True
    min_batch = 3  # of two, the one distance is its own mean
    w_distance, w_angle = 25.0, 50.0

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:  # (B, s_dim), (B, t_dim)
        to_s, to_t = (f[None] - f[:, None] for f in (f_s, f_t))  # (B, B, dim), from i to j
        distance = F.smooth_l1_loss(distances(to_s), distances(to_t))
        angle = F.smooth_l1_loss(angles(to_s), angles(to_t))
        return self.w_distance * distance + self.w_angle * angle


def distances(to: Tensor) -> Tensor:
    """Euclidean lengths, in units of the mean over pairs: (B, B)."""
    n = len(to)
    off_diagonal = 1 - torch.eye(n, dtype=to.dtype, device=to.device)
    d = to.square().sum(2).clamp(min=EPS).sqrt() * off_diagonal
    return d / (d.sum() / max(n * (n - 1), 1)).clamp(min=EPS)


def angles(to: Tensor) -> Tensor:
    """Cosines of the angles at i between the directions to j and to k: (B, B, B)."""
    direction = F.normalize(to, dim=2)
    return direction @ direction.transpose(1, 2)
