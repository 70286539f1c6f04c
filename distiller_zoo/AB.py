from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distiller_zoo.adapters import Connector
from distiller_zoo.base import Distiller, Shapes


class ABLoss(Distiller):
    """Knowledge Transfer via Distillation of Activation Boundaries, AAAI 2019. https://arxiv.org/abs/1811.03233

    First stage: the sign of the student's pre-activations follows the teacher's, by a margin.
    Second stage: cross-entropy (and KL) alone.
    """

    preact_s = preact_t = True
    margin = 1.0

    def __init__(self, s_shapes: Shapes, t_shapes: Shapes):
        super().__init__()
        self.connector = Connector(s_shapes[self.feats], t_shapes[self.feats])

    def init_modules(self, model_s: nn.Module) -> list[nn.Module]:
        return [self.connector, *model_s.get_feat_modules()]

    def init_loss(self, g_s: list[Tensor], g_t: list[Tensor]) -> Tensor:
        g_s = self.connector(g_s)
        n = len(g_t)
        # deeper maps weigh more; / 1000 * 3 as in the published code
        return sum(
            boundary_loss(f_s, f_t, self.margin) * 2.0 ** (i - n + 1) / f_s.size(0) / 1000 * 3
            for i, (f_s, f_t) in enumerate(zip(g_s, g_t, strict=True))
        )


def boundary_loss(f_s: Tensor, f_t: Tensor, margin: float) -> Tensor:
    """Squared hinge that asks f_s to be beyond the margin on f_t's side of zero; sum over all entries."""
    wrong = torch.where(f_t > 0, -f_s, f_s)  # how far on the wrong side of zero
    return F.relu(wrong + margin).square().sum()
