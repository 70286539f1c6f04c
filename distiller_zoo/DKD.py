from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distiller_zoo.base import (
    Distiller,
    DistillError,
    Epochs,
    Temperature,
    Weight,
    drop_class,
    kd_loss,
    standardise,
    warm_up,
)

# (temperature, weight of the whole term, dkd_beta) of the authors' logs with standardised logits
STANDARDISED = {
    ("wrn_40_2", "wrn_16_2"): (2.0, 12.0, 2.0),
    ("wrn_40_2", "wrn_40_1"): (2.0, 12.0, 2.0),
    ("resnet56", "resnet20"): (3.0, 18.0, 2.0),
    ("resnet110", "resnet20"): (2.0, 15.0, 2.0),
    ("resnet110", "resnet32"): (2.0, 15.0, 2.0),
    ("resnet32x4", "resnet8x4"): (2.0, 9.0, 8.0),
    ("resnet32x4", "ShuffleV2"): (2.0, 9.0, 8.0),
    ("vgg13", "vgg8"): (2.0, 15.0, 2.0),
    ("vgg13", "MobileNetV2"): (3.0, 9.0, 2.0),
    ("ResNet50", "MobileNetV2"): (2.0, 15.0, 2.0),
}


class DKDLoss(Distiller):
    """Decoupled Knowledge Distillation, CVPR 2022. https://arxiv.org/abs/2203.08679

    KD in two parts with weights of their own: how likely the label is (TCKD), and how likely each of the other
    classes is among these (NCKD). The weights of NCKD are those of the authors' configurations.
    dkd_alpha: weight of TCKD
    dkd_beta: weight of NCKD
    dkd_T: temperature
    warmup: epochs in which the term grows linearly to its weight
    logit_stand: standardise the logits (Logit Standardization in Knowledge Distillation, CVPR 2024)
    """

    feats = slice(0)
    needs = ("logit_s", "logit_t", "target", "epoch")
    published = {
        ("wrn_40_2", "wrn_16_2"): {"dkd_beta": 6.0},
        ("wrn_40_2", "wrn_40_1"): {"dkd_beta": 6.0},
        ("wrn_40_2", "ShuffleV1"): {"dkd_beta": 8.0},
        ("resnet56", "resnet20"): {"dkd_beta": 2.0},
        ("resnet110", "resnet32"): {"dkd_beta": 2.0},
        ("resnet32x4", "resnet8x4"): {"dkd_beta": 8.0},
        ("resnet32x4", "ShuffleV1"): {"dkd_beta": 8.0},
        ("resnet32x4", "ShuffleV2"): {"dkd_beta": 8.0},
        ("vgg13", "vgg8"): {"dkd_beta": 6.0},
        ("vgg13", "MobileNetV2"): {"dkd_beta": 6.0},
        ("ResNet50", "MobileNetV2"): {"dkd_beta": 8.0},
    }

    def __init__(
        self,
        n_cls: int,
        dkd_alpha: Weight = 1.0,
        dkd_beta: Weight = 8.0,
        dkd_T: Temperature = 4.0,
        warmup: Epochs = 20,
        logit_stand: bool = False,
    ):
        super().__init__()
        if n_cls < 3:
            raise DistillError(f"compares the classes other than the label's: needs 3 classes or more, not {n_cls}")
        self.alpha, self.beta, self.T, self.warmup, self.logit_stand = dkd_alpha, dkd_beta, dkd_T, warmup, logit_stand

    @classmethod
    def settings(cls, arch_t: str, arch_s: str, options: dict) -> dict:
        if not options.get("logit_stand"):
            return super().settings(arch_t, arch_s, options)
        T, weight, beta = STANDARDISED.get((arch_t, arch_s), (2.0, 9.0, 8.0))
        return {"beta": weight, "dkd_T": T, "dkd_beta": beta}

    def forward(self, f_s, f_t, logit_s: Tensor, logit_t: Tensor, target: Tensor, epoch: Tensor) -> Tensor:
        if self.logit_stand:
            logit_s, logit_t = standardise(logit_s), standardise(logit_t)
        tckd = binary_kl(log_share(logit_t / self.T, target), log_share(logit_s / self.T, target)) * self.T**2
        nckd = kd_loss(drop_class(logit_s, target), drop_class(logit_t, target), self.T)
        return warm_up(epoch, self.warmup) * (self.alpha * tckd + self.beta * nckd)


def log_share(logit: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of the probability of class which (B,) and of all other classes together."""
    whole = logit.logsumexp(1)
    # 1 - p in place of the second would be 0, of infinite logarithm, where a logit is far ahead
    return logit.gather(1, which[:, None]).squeeze(1) - whole, drop_class(logit, which).logsumexp(1) - whole


def binary_kl(log_t: tuple[Tensor, Tensor], log_s: tuple[Tensor, Tensor]) -> Tensor:
    """KL(t || s) of two probabilities that add up to one, mean over the batch."""
    return F.kl_div(torch.stack(log_s), torch.stack(log_t), reduction="none", log_target=True).sum(0).mean()
