from __future__ import annotations

from torch import Tensor

from distiller_zoo.base import Distiller, kd_loss, standardise

# (temperature, weight of the KL term) of the authors' logs
STANDARDISED = {
    ("wrn_40_2", "wrn_16_2"): (2.0, 9.0),
    ("wrn_40_2", "wrn_40_1"): (2.0, 9.0),
    ("resnet56", "resnet20"): (2.0, 9.0),
    ("resnet110", "resnet20"): (4.0, 12.0),
    ("resnet110", "resnet32"): (2.0, 9.0),
    ("resnet32x4", "resnet8x4"): (2.0, 9.0),
    ("resnet32x4", "ShuffleV2"): (2.0, 9.0),
    ("vgg13", "vgg8"): (3.0, 9.0),
    ("vgg13", "MobileNetV2"): (3.0, 9.0),
    ("ResNet50", "MobileNetV2"): (3.0, 1.0),
}


class DistillKL(Distiller):
    """Distilling the Knowledge in a Neural Network, NIPS workshop 2014. https://arxiv.org/abs/1503.02531

    The loop's own KL term, by its weights; temperature --kd_T.
    logit_stand: standardise the logits (Logit Standardization in Knowledge Distillation, CVPR 2024)
    """

    feats = slice(0)
    weights = {"gamma": 0.1, "alpha": 0.9, "beta": 0.0}

    def __init__(self, logit_stand: bool = False):
        super().__init__()
        self.logit_stand = logit_stand

    @classmethod
    def settings(cls, arch_t: str, arch_s: str, options: dict) -> dict:
        if not options.get("logit_stand"):
            return {}
        T, weight = STANDARDISED.get((arch_t, arch_s), (2.0, 9.0))
        return {"kd_T": T, "alpha": weight}

    def kl(self, logit_s: Tensor, logit_t: Tensor, T: float) -> Tensor:
        if self.logit_stand:
            logit_s, logit_t = standardise(logit_s), standardise(logit_t)
        return kd_loss(logit_s, logit_t, T)
