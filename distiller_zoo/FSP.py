from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from distiller_zoo.base import Distiller, DistillError, Shapes, pool_to_smaller


class FSP(Distiller):
    """A Gift from Knowledge Distillation, CVPR 2017.
    https://openaccess.thecvf.com/content_cvpr_2017/html/Yim_A_Gift_From_CVPR_2017_paper.html

    First stage: the flow of solution procedure, inner products of the channels of consecutive maps.
    Second stage: cross-entropy (and KL) alone.
    """

    feats = slice(0, -1)
    weights = {"gamma": 1.0, "alpha": 0.0, "beta": 50.0}

    def __init__(self, s_shapes: Shapes, t_shapes: Shapes):
        super().__init__()
        s_c, t_c = ([shape[1] for shape in shapes[self.feats]] for shapes in (s_shapes, t_shapes))
        if s_c != t_c:
            raise DistillError(f"needs equal channels, the student's are {s_c}, the teacher's {t_c}")

    def init_modules(self, model_s: nn.Module) -> list[nn.Module]:
        return list(model_s.get_feat_modules())

    def init_loss(self, g_s: list[Tensor], g_t: list[Tensor]) -> Tensor:
        flows = zip(pairwise(g_s), pairwise(g_t), strict=True)
        return sum(F.mse_loss(flow(*two_s), flow(*two_t)) for two_s, two_t in flows)


def flow(top: Tensor, bottom: Tensor) -> Tensor:
    """Mean over positions of the products of two maps' channels: (B, C_top, C_bottom)."""
    top, bottom = (f.flatten(2) for f in pool_to_smaller(top, bottom))  # (B, C, H * W)
    return top @ bottom.transpose(1, 2) / top.size(2)
