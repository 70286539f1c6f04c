from __future__ import annotations

import torch
from torch import Tensor

from distiller_zoo.base import Distiller, Temperature

EPS = 1e-8  # of the published code; at tau 4 not negligible: the loss of s = t is 0.005


class DISTLoss(Distiller):
    """Knowledge Distillation from A Stronger Teacher, NeurIPS 2022. https://arxiv.org/abs/2205.10536

    Probabilities correlate with the teacher's, over the classes of a sample and over the samples of a batch.
    The weight, the same for every pair, and tau are the authors' for CIFAR-100.
    dist_tau: temperature
    """

    feats = slice(0)
    needs = ("logit_s", "logit_t")
    across_batch = True
    weights = {"gamma": 1.0, "alpha": 0.0, "beta": 2.0}
    w_inter = w_intra = 1.0

    def __init__(self, dist_tau: Temperature = 4.0):
        super().__init__()
        self.tau = dist_tau

    def forward(self, f_s, f_t, logit_s: Tensor, logit_t: Tensor) -> Tensor:
        p_s, p_t = (logit_s / self.tau).softmax(1), (logit_t / self.tau).softmax(1)  # (B, n_cls)
        inter = 1 - correlation(p_s, p_t).mean()
        intra = 1 - correlation(p_s.T, p_t.T).mean()  # of a batch of one: 1, and no gradient
        return self.tau**2 * (self.w_inter * inter + self.w_intra * intra)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's, of the rows of two matrices."""
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    norm = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
    return (a * b).sum(1) / (norm + EPS)
