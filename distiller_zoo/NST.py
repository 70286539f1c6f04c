from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from distiller_zoo.base import Distiller, pool_to_smaller

EPS = 1e-12  # least norm of a channel


class NSTLoss(Distiller):
    """Like What You Like: Knowledge Distill via Neuron Selectivity Transfer, 2017. https://arxiv.org/abs/1707.01219

    Maximum mean discrepancy, with the kernel <a, b>^2, between the unit vectors over positions of all channels.
    """

    weights = {"gamma": 1.0, "alpha": 0.0, "beta": 50.0}

    def forward(self, g_s: list[Tensor], g_t: list[Tensor]) -> Tensor:
        return sum(discrepancy(*pool_to_smaller(f_s, f_t)) for f_s, f_t in zip(g_s, g_t, strict=True))


def discrepancy(f_s: Tensor, f_t: Tensor) -> Tensor:
    """k(t, t) + k(s, s) - 2 k(s, t), k the mean over samples and pairs of channels of <a, b>^2.

    (B, C_s, H, W), (B, C_t, H, W). Since sum <a_i, b_j>^2 = <A^T A, B^T B>, products over positions are the smaller
    matrices where there are fewer positions than channels, and the three terms are one squared distance.
    """
    a, b = f_s.flatten(2), f_t.flatten(2)  # (B, C, H * W)
    if a.size(2) <= min(a.size(1), b.size(1)):
        a, b = F.normalize(a, dim=2), F.normalize(b, dim=2)
        distance = a.transpose(1, 2) @ a / a.size(1) - b.transpose(1, 2) @ b / b.size(1)  # (B, H * W, H * W)
        return distance.square().sum((1, 2)).mean()
    aa, bb, ab = a @ a.transpose(1, 2), b @ b.transpose(1, 2), a @ b.transpose(1, 2)  # (B, C, C)
    # squared norms are on the diagonals
    a, b = (xx.diagonal(dim1=1, dim2=2).clamp(min=EPS**2).rsqrt() for xx in (aa, bb))  # (B, C)
    return kernel(b, bb, b) + kernel(a, aa, a) - 2 * kernel(a, ab, b)


def kernel(a: Tensor, products: Tensor, b: Tensor) -> Tensor:
    return (a[:, :, None] * products * b[:, None]).square().mean()
