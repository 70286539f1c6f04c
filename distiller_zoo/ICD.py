from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distiller_zoo.adapters import Embed
from distiller_zoo.base import Distiller, Size


class ICDLoss(Distiller):
    """Invariant Consistency Distillation, 2024. https://arxiv.org/abs/2407.11802

    Each student embedding finds its teacher's among the batch (contrast), and the batch's similarities
    read the same from both sides (invariance); temperature and bias are learnt.
    feat_dim: dimension of the embedding
    """

    feats = -1
    across_batch = True
    min_batch = 2

    def __init__(self, s_dim: int, t_dim: int, feat_dim: Size = 128):
        super().__init__()
        self.embed_s = Embed(s_dim, feat_dim)
        self.embed_t = Embed(t_dim, feat_dim)
        self.log_tau = nn.Parameter(torch.tensor(1.0))
        self.b = nn.Parameter(torch.tensor(0.0))  # cancels in every softmax; kept as published

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:  # (B, s_dim), (B, t_dim)
        tau = self.log_tau.clamp(max=math.log(10)).exp()
        logits = tau * self.embed_s(f_s) @ self.embed_t(f_t).T + self.b  # (B, B)
        own = torch.arange(len(logits), device=logits.device)
        contrast = F.cross_entropy(logits, own)
        row, column = logits.log_softmax(1), logits.log_softmax(0).T
        invariance = F.kl_div(row, column, reduction="batchmean", log_target=True)
        return contrast + 0.5 * invariance
