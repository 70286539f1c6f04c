from __future__ import annotations

from torch import Tensor

from distiller_zoo.base import Distiller

EPS = 1e-7  # of the published code


class PKT(Distiller):
    """Probabilistic Knowledge Transfer, ECCV 2018. https://arxiv.org/abs/1803.10837

    The teacher's probability that a sample of the batch is another's neighbour, by cosine similarity.
    """

    feats = -1
    across_batch = True
    min_batch = 2
    weights = {"gamma": 1.0, "alpha": 0.0, "beta": 30000.0}

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:  # (B, s_dim), (B, t_dim)
        p_s, p_t = self.neighbours(f_s), self.neighbours(f_t)
        return (p_t * ((p_t + EPS) / (p_s + EPS)).log()).mean()

    def neighbours(self, f: Tensor) -> Tensor:
        f = f / (f.norm(dim=1, keepdim=True) + EPS)
        p = (f @ f.T + 1) / 2  # (B, B)
        return p / p.sum(1, keepdim=True)
