from __future__ import annotations

from torch import Tensor

from distiller_zoo.base import Distiller, Share


class TTM(Distiller):
    """Knowledge Distillation Based on Transformed Teacher Matching, ICLR 2024. https://arxiv.org/abs/2402.11148

    KL with a temperature, 1 / power, on the teacher only. Weight and power are the authors' for vgg13 -> vgg8.
    power: exponent of the teacher's probabilities
    """

    feats = slice(0)
    needs = ("logit_s", "logit_t")
    weights = {"gamma": 1.0, "alpha": 0.0, "beta": 45.0}

    def __init__(self, power: Share = 0.1):
        super().__init__()
        self.power = power

    def forward(self, f_s, f_t, logit_s: Tensor, logit_t: Tensor) -> Tensor:
        log_t = (self.power * logit_t).log_softmax(1)  # (B, n_cls)
        kl = (log_t.exp() * (log_t - logit_s.log_softmax(1))).sum(1)
        return (self.sample_weight(logit_t) * kl).mean()

    def sample_weight(self, logit_t: Tensor) -> Tensor | float:
        return 1.0


class WTTM(TTM):
    """Knowledge Distillation Based on Transformed Teacher Matching, ICLR 2024. https://arxiv.org/abs/2402.11148

    TTM with more weight on samples of which the teacher is less certain: sum_c p_t[c]^power, from 1 to n_cls.
    Weight and power are the authors' in combination with CRD; for other pairs they have published none but in the
    paper's appendix.
    power: exponent of the teacher's probabilities
    """

    weights = {"gamma": 1.0, "alpha": 0.0, "beta": 4.0}

    def __init__(self, power: Share = 0.2):
        super().__init__(power)

    def sample_weight(self, logit_t: Tensor) -> Tensor:
        return (self.power * logit_t.log_softmax(1)).exp().sum(1)  # (B,)
