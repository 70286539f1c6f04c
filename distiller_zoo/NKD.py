from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from distiller_zoo.base import Distiller, DistillError, Temperature, Weight, drop_class


class NKDLoss(Distiller):
    """From Knowledge Distillation to Self-Knowledge Distillation, ICCV 2023. https://arxiv.org/abs/2303.13005

    Cross-entropy with the label, weighed by the teacher's probability of it, and with the teacher's probabilities of
    the other classes among these. The defaults are the authors' for ImageNet; theirs for CIFAR-100, with networks
    that are not here (ResNet34 -> ResNet18), are --nkd_T 3 --nkd_gamma 3.5.
    nkd_T: temperature of the other classes
    nkd_gamma: weight of the other classes
    """

    feats = slice(0)
    needs = ("logit_s", "logit_t", "target")

    def __init__(self, n_cls: int, nkd_T: Temperature = 1.0, nkd_gamma: Weight = 1.5):
        super().__init__()
        if n_cls < 3:
            raise DistillError(f"compares the classes other than the label's: needs 3 classes or more, not {n_cls}")
        self.T, self.gamma = nkd_T, nkd_gamma

    def forward(self, f_s, f_t, logit_s: Tensor, logit_t: Tensor, target: Tensor) -> Tensor:
        p_t = logit_t.softmax(1).gather(1, target[:, None]).squeeze(1)  # (B,), the label's
        label = (p_t * F.cross_entropy(logit_s, target, reduction="none")).mean()
        q_t = (drop_class(logit_t, target) / self.T).softmax(1)  # (B, n_cls - 1)
        others = F.cross_entropy(drop_class(logit_s, target) / self.T, q_t)
        return label + self.gamma * self.T**2 * others
