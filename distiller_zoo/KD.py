from __future__ import annotations

from distiller_zoo.base import Distiller


class DistillKL(Distiller):
    """Distilling the Knowledge in a Neural Network, NIPS workshop 2014. https://arxiv.org/abs/1503.02531

    The loop's own KL term, by its weights; temperature --kd_T.
    """

    feats = slice(0)
    weights = {"gamma": 0.1, "alpha": 0.9, "beta": 0.0}
