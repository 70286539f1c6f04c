from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distiller_zoo.base import Distiller, DistillError, Shapes, pool
from models.reused import Reused


class SimKD(Distiller):
    """Knowledge Distillation with the Reused Teacher Classifier, CVPR 2022. https://arxiv.org/abs/2203.14001

    The student's last map, projected, is regressed on the teacher's, and the teacher's classifier predicts from it:
    the network that is trained and saved is the student without its classifier, the projector, and that classifier.
    simkd_factor: how many times narrower the projector is than the teacher's last map
    """

    feats = -2
    preact_t = True  # for all teachers the ReLU of it pools to the embedding; WRN's map itself does not
    reuses_head = True
    weights = {"gamma": 0.0, "alpha": 0.0, "beta": 1.0}

    def __init__(
        self, s_shapes: Shapes, t_shapes: Shapes, n_cls: int, head_t: nn.Linear, simkd_factor: Annotated[int, 1, 64] = 2
    ):
        super().__init__()
        (_, _, s_h, *_), (_, t_c, t_h, *_) = s_shapes[self.feats], t_shapes[self.feats]
        if t_c != head_t.in_features:
            raise DistillError(
                f"the teacher's last map has {t_c} channels, its classifier takes {head_t.in_features}: choose a "
                "teacher that has nothing but the pooling between the two"
            )
        if n_cls != head_t.out_features:
            raise DistillError(f"the teacher's classifier is for {head_t.out_features} classes, the data has {n_cls}")
        if s_h > t_h and s_h % t_h:
            raise DistillError(f"the student's last map, {s_h} high, does not pool to the teacher's, {t_h} high")
        self.sizes = {"t_dim": t_c, "n_cls": n_cls, "factor": simkd_factor, "pool": max(s_h // t_h, 1)}
        self.head_t = (head_t,)  # a tuple: it is no module of this method

    def predictor(self, model_s: nn.Module) -> Reused:
        model = Reused(model_s, **self.sizes)
        (head_t,) = self.head_t
        with torch.no_grad():
            model.fc.weight.copy_(head_t.weight)
            model.fc.bias.zero_() if head_t.bias is None else model.fc.bias.copy_(head_t.bias)
        return model

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:  # (B, C, H_s, W_s) projected, (B, C, H_t, W_t)
        return F.mse_loss(f_s, pool(F.relu(f_t), list(f_s.shape[2:])))
