from __future__ import annotations

from torch import Tensor

from distiller_zoo.adapters import LinearEmbed
from distiller_zoo.base import Distiller, Size


class Correlation(Distiller):
    """Correlation Congruence for Knowledge Distillation, ICCV 2019. https://arxiv.org/abs/1904.01802

    As RepDistiller has it: the embeddings' distances of neighbours in the batch are made small together.
    feat_dim: dimension of the embedding
    """

    feats = -1
    across_batch = True
    min_batch = 2
    weights = {"gamma": 1.0, "alpha": 0.0, "beta": 0.02}

    def __init__(self, s_dim: int, t_dim: int, feat_dim: Size = 128):
        super().__init__()
        self.embed_s = LinearEmbed(s_dim, feat_dim)
        self.embed_t = LinearEmbed(t_dim, feat_dim)

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:  # (B, s_dim), (B, t_dim)
        distance = (self.embed_s(f_s) - self.embed_t(f_t)).abs()  # (B, feat_dim)
        pairs = (distance[:-1] * distance[1:]).sum(1)
        return pairs.sum() / max(len(pairs), 1)  # a batch of one has no neighbours
