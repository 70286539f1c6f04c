from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from crd.criterion import contrast_loss
from crd.memory import ContrastMemory
from distiller_zoo.adapters import Embed
from distiller_zoo.base import Distiller, DistillError, Share, Size, Temperature


class CRDLoss(Distiller):
    """Contrastive Representation Distillation, ICLR 2020. https://arxiv.org/abs/1910.10699

    A sample's student embedding is told from those of other classes by the teacher's, and the other way round.
    feat_dim: dimension of the embedding
    nce_k: negatives per sample
    nce_t: temperature
    nce_m: momentum of the memory
    mode: the positive is the sample itself (exact) or one of its class (relax)
    """

    feats = -1
    needs = ("index",)
    across_batch = True
    weights = {"gamma": 1.0, "alpha": 0.0, "beta": 0.8}

    def __init__(
        self,
        s_dim: int,
        t_dim: int,
        labels: Sequence[int] | Tensor,
        feat_dim: Size = 128,
        nce_k: Size = 16384,
        nce_t: Temperature = 0.07,
        nce_m: Share = 0.5,
        mode: Literal["exact", "relax"] = "exact",
    ):
        super().__init__()
        if torch.as_tensor(labels).unique().numel() < 2:
            raise DistillError("contrasts classes, and the training set has only one")
        self.embed_s = Embed(s_dim, feat_dim)
        self.embed_t = Embed(t_dim, feat_dim)
        self.contrast = ContrastMemory(labels, feat_dim, nce_k, nce_t, nce_m, mode)
        self.last = None

    def forward(self, f_s: Tensor, f_t: Tensor, index: Tensor) -> Tensor:  # (B, s_dim), (B, t_dim), (B,)
        v_s, v_t = self.embed_s(f_s), self.embed_t(f_t)  # (B, feat_dim)
        p_s, p_t = self.contrast(v_s, v_t, self.contrast.draw(index))  # (B, 1 + nce_k)
        self.last = index, v_s.detach(), v_t.detach()
        n_data = self.contrast.n_data
        return contrast_loss(p_s, n_data) + contrast_loss(p_t, n_data)

    def after_step(self) -> None:
        self.contrast.update(*self.last)

    def generators(self) -> list[torch.Generator]:
        return [self.contrast.source()]
