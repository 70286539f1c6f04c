from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-7  # of the published code


def contrast_loss(p: Tensor, n_data: int) -> Tensor:
    """Noise-contrastive estimation, eq. 18 of CRD, ICLR 2020. https://arxiv.org/abs/1910.10699

    p (B, 1 + K): unnormalised probabilities, the positive first; the noise is uniform over the n_data samples.
    """
    c = (p.size(1) - 1) / n_data  # K times the noise's probability
    positive, negative = p[:, 0], p[:, 1:]
    # log(c / (p + c + eps)) = -log1p((p + eps) / c): the plain form loses 1e-4 in float32 over 16,384 negatives
    log_true = torch.log(positive / (positive + c + EPS))
    log_noise = -torch.log1p((negative + EPS) / c)
    return -(log_true.sum() + log_noise.sum()) / p.size(0)
