from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distiller_zoo.adapters import Embed
from distiller_zoo.base import Distiller, Size, Temperature


class RRDLoss(Distiller):
    """Relational Representation Distillation, 2024. https://arxiv.org/abs/2407.12073

    A student embedding's similarities to a queue of earlier teacher embeddings are distributed as the teacher's.
    feat_dim: dimension of the embedding
    nce_k: length of the queue
    nce_t_s: temperature of the student
    nce_t_t: temperature of the teacher
    """

    feats = -1
    across_batch = True

    def __init__(
        self,
        s_dim: int,
        t_dim: int,
        feat_dim: Size = 128,
        nce_k: Size = 16384,
        nce_t_s: Temperature = 0.04,
        nce_t_t: Temperature = 0.10,
    ):
        super().__init__()
        self.T_s, self.T_t = nce_t_s, nce_t_t
        self.embed_s = Embed(s_dim, feat_dim)
        self.embed_t = Embed(t_dim, feat_dim).requires_grad_(False)  # a fixed projection: no gradient reaches it
        self.register_buffer("queue", F.normalize(torch.randn(nce_k, feat_dim), dim=1))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))
        self.last = None

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:  # (B, s_dim), (B, t_dim)
        e_s, e_t = self.embed_s(f_s), self.embed_t(f_t).detach()  # (B, feat_dim)
        self.last = e_t
        p_t = (e_t @ self.queue.T / self.T_t).softmax(1)  # (B, nce_k)
        log_p_s = (e_s @ self.queue.T / self.T_s).log_softmax(1)
        return -(p_t * log_p_s).sum(1).mean()

    @torch.no_grad()
    def after_step(self) -> None:
        """Enqueue the batch over the oldest embeddings."""
        n_queue = len(self.queue)
        e_t = self.last[-n_queue:]
        place = (self.queue_ptr + torch.arange(len(e_t), device=e_t.device)) % n_queue
        self.queue.index_copy_(0, place, e_t.to(self.queue.dtype))
        self.queue_ptr.add_(len(e_t)).remainder_(n_queue)
