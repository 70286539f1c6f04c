from __future__ import annotations

from torch import Tensor

from distiller_zoo.base import Distiller, Epochs, Temperature, Weight, kd_loss, standardise, warm_up
from distiller_zoo.DKD import binary_kl, log_share

LOW = -1e9  # logit of a class that is left out; an infinite one would make 0 * inf in the KL


class RLDLoss(Distiller):
    """Knowledge Distillation with Refined Logits, ICCV 2025. https://arxiv.org/abs/2408.07703

    The label is to be as likely as the teacher's first class (SCD), and KD over the classes that the teacher ranks
    below the label (MCD), so that what the teacher gets wrong is not taught. Defaults of the authors' code.
    rld_alpha: weight of SCD
    rld_beta: weight of MCD
    rld_T: temperature of MCD
    rld_T_alpha: temperature of SCD
    warmup: epochs in which the term grows linearly to its weight
    logit_stand: standardise the logits (Logit Standardization in Knowledge Distillation, CVPR 2024)
    """

    feats = slice(0)
    needs = ("logit_s", "logit_t", "target", "epoch")

    def __init__(
        self,
        rld_alpha: Weight = 1.0,
        rld_beta: Weight = 8.0,
        rld_T: Temperature = 4.0,
        rld_T_alpha: Temperature = 1.0,
        warmup: Epochs = 20,
        logit_stand: bool = False,
    ):
        super().__init__()
        self.alpha, self.beta, self.T, self.T_alpha = rld_alpha, rld_beta, rld_T, rld_T_alpha
        self.warmup, self.logit_stand = warmup, logit_stand

    @classmethod
    def settings(cls, arch_t: str, arch_s: str, options: dict) -> dict:
        return {"beta": 9.0, "rld_T": 2.0, "rld_T_alpha": 2.0} if options.get("logit_stand") else {}

    def forward(self, f_s, f_t, logit_s: Tensor, logit_t: Tensor, target: Tensor, epoch: Tensor) -> Tensor:
        first = logit_t.argmax(1)
        out = logit_t >= logit_t.gather(1, target[:, None])  # (B, n_cls), before rounding can make ties
        if self.logit_stand:
            logit_s, logit_t = standardise(logit_s), standardise(logit_t)
        T = self.T_alpha
        scd = binary_kl(log_share(logit_t / T, first), log_share(logit_s / T, target)) * T**2
        # where no class is left, both distributions are uniform: 0, and no gradient
        mcd = kd_loss(logit_s.masked_fill(out, LOW), logit_t.masked_fill(out, LOW), self.T)
        return warm_up(epoch, self.warmup) * (self.alpha * scd + self.beta * mcd)
