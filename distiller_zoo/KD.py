from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from distiller_zoo.base import Distiller


def kd_loss(logit_s: Tensor, logit_t: Tensor, T: float) -> Tensor:
    """T^2 KL(p_t || p_s) with p = softmax(logit / T), mean over the batch."""
    log_p_s = F.log_softmax(logit_s / T, dim=1)  # (B, n_cls)
    p_t = F.softmax(logit_t / T, dim=1)
    return F.kl_div(log_p_s, p_t, reduction="batchmean") * T**2


class DistillKL(Distiller):
    """Distilling the Knowledge in a Neural Network, NIPS workshop 2014. https://arxiv.org/abs/1503.02531

    The loop's own KL term, by its weights; temperature --kd_T.
    """

    feats = slice(0)
    weights = {"gamma": 0.1, "alpha": 0.9, "beta": 0.0}
