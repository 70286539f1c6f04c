from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from torch import Tensor

from distiller_zoo.adapters import LinearEmbed
from distiller_zoo.base import Distiller, Weight

CONSTANT = 1e-6  # std of a channel over the batch, in units of its largest entry, below which it is constant


class ITRDLoss(Distiller):
    """Information Theoretic Representation Distillation, BMVC 2022. https://arxiv.org/abs/2112.00459

    Every channel of the projected embedding correlates with the teacher's over the batch, and the similarities of
    samples carry the same information, by Renyi's entropy of order 2. Constants of wrn_40_2 -> wrn_16_2; which of
    the authors' settings belong to other pairs is not published.
    lambda_corr: weight of the correlation term
    lambda_mutual: weight of the mutual information term
    alpha_it: order of the entropy in the correlation term
    """

    feats = -1
    across_batch = True
    min_batch = 2

    def __init__(
        self,
        s_dim: int,
        t_dim: int,
        lambda_corr: Weight = 2.0,
        lambda_mutual: Weight = 1.0,
        alpha_it: Annotated[float, 0.5, 10.0] = 1.01,
    ):
        super().__init__()
        self.embed = LinearEmbed(s_dim, t_dim)
        self.same_dim = s_dim == t_dim
        self.lambda_corr, self.lambda_mutual, self.alpha = lambda_corr, lambda_mutual, alpha_it

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:  # (B, s_dim), (B, t_dim)
        e_s = self.embed(f_s)  # (B, t_dim)
        mutual = self.mutual(f_s if self.same_dim else e_s, f_t)
        return self.lambda_corr * self.correlation(e_s, f_t) + self.lambda_mutual * mutual

    def correlation(self, e_s: Tensor, f_t: Tensor) -> Tensor:
        c = (standardise_channels(e_s) * standardise_channels(f_t)).mean(0)  # (t_dim,)
        return (c - 1).abs().pow(2 * self.alpha).sum().log2()

    def mutual(self, v: Tensor, f_t: Tensor) -> Tensor:
        gram_s, gram_t = (f @ f.T for f in (F.normalize(v, dim=1), F.normalize(f_t, dim=1)))  # (B, B)
        return purity(gram_s) - purity(gram_s * gram_t)


def standardise_channels(f: Tensor) -> Tensor:
    """Mean 0 and unbiased standard deviation 1 over the batch; a constant channel becomes 0, without gradient."""
    largest = f.detach().abs().amax(0)
    f = f - f.mean(0)
    var = f.square().sum(0) / max(len(f) - 1, 1)
    constant = var.detach() <= (CONSTANT * largest) ** 2
    return f / var.masked_fill(constant, 1.0).sqrt() * ~constant


def purity(gram: Tensor) -> Tensor:
    """Sum of the squared entries of a Gram matrix scaled to trace 1: 2 to the power of minus its entropy."""
    # not trace(), whose gradient waits for the device
    return (gram / gram.diagonal().sum().clamp(min=1e-12)).square().sum()
