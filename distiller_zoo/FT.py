from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from distiller_zoo.adapters import Paraphraser, Translator
from distiller_zoo.base import Distiller, Shapes, pool_to_smaller
from models.resnet import ResNet
from models.wrn import WideResNet


class FactorTransfer(Distiller):
    """Paraphrasing Complex Network: Network Compression via Factor Transfer, NeurIPS 2018.
    https://arxiv.org/abs/1802.04977

    First stage: an autoencoder of the teacher's last map, its code being the factors. Then it is frozen, and the
    student's factors follow the teacher's.
    """

    feats = -2
    weights = {"gamma": 1.0, "alpha": 0.0, "beta": 200.0}
    p1, p2 = 2, 1

    def __init__(self, s_shapes: Shapes, t_shapes: Shapes):
        super().__init__()
        self.translator = Translator(s_shapes[self.feats][1], t_shapes[self.feats][1])
        self.paraphraser = Paraphraser(t_shapes[self.feats][1])

    def init_modules(self, model_s: nn.Module) -> list[nn.Module]:
        return [self.paraphraser]

    def init_loss(self, f_s: Tensor | None, f_t: Tensor) -> Tensor:
        return F.mse_loss(self.paraphraser(f_t), f_t)

    def init_lr(self, model_s: nn.Module, lr: float) -> float:
        return 0.01 if isinstance(model_s, ResNet | WideResNet) else lr  # as published

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:  # (B, C_s, H_s, W_s), (B, C_t, H_t, W_t)
        return self.distance(self.translator(f_s), self.paraphraser.encoder(f_t))

    def distance(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        q_s, q_t = (self.factor(f) for f in pool_to_smaller(f_s, f_t))
        return (q_s - q_t).abs().pow(self.p2).mean()

    def factor(self, f: Tensor) -> Tensor:
        return F.normalize(f.pow(self.p1).mean(1).flatten(1), dim=1)  # (B, H * W)
