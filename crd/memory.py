from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ContrastMemory(nn.Module):
    """Embeddings of all training samples, and the draw of the samples to contrast with.

    memory_v1 holds the student's embeddings, memory_v2 the teacher's, (n_data, feat_dim) each. The scores against a
    whole bank are one matrix product, from which those of the drawn samples are gathered. The memory has a random
    generator of its own, on its device, so that its draws do not depend on what else is trained.
    """

    def __init__(self, labels: Sequence[int] | Tensor, feat_dim: int, K: int, T: float, momentum: float, mode: str):
        super().__init__()
        labels = torch.as_tensor(labels, dtype=torch.int64)
        self.n_data, self.K, self.T, self.momentum, self.mode = len(labels), K, T, momentum, mode
        bound = 1 / math.sqrt(feat_dim / 3)
        self.register_buffer("memory_v1", torch.empty(self.n_data, feat_dim).uniform_(-bound, bound))
        self.register_buffer("memory_v2", torch.empty(self.n_data, feat_dim).uniform_(-bound, bound))
        self.register_buffer("Z_v1", torch.zeros(()))  # normalising constants, set by the first batch
        self.register_buffer("Z_v2", torch.zeros(()))

        # samples sorted by class: class c takes the count[c] places from start[c] on
        count = labels.bincount()
        for name, value in {
            "labels": labels,
            "by_class": labels.argsort(stable=True),
            "count": count,
            "start": count.cumsum(0) - count,
        }.items():
            self.register_buffer(name, value, persistent=False)
        present = count[count > 0]
        self.fewest, self.most = self.n_data - int(present.max()), self.n_data - int(present.min())  # negatives
        self.seed = int(torch.randint(2**31, ()))
        self.generator = None

    def forward(self, v_s: Tensor, v_t: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of student and teacher embeddings (B, feat_dim) at idx (B, 1 + K) in the other's bank."""
        return self._scores(v_s, self.memory_v2, self.Z_v1, idx), self._scores(v_t, self.memory_v1, self.Z_v2, idx)

    def _scores(self, v: Tensor, bank: Tensor, Z: Tensor, idx: Tensor) -> Tensor:
        out = torch.exp((v @ bank.T).gather(1, idx) / self.T)
        with torch.no_grad():
            Z.copy_(torch.where(Z > 0, Z, out.mean() * self.n_data))
        return out / Z

    @torch.no_grad()
    def update(self, index: Tensor, v_s: Tensor, v_t: Tensor) -> None:
        """Move the rows of a batch towards its current embeddings."""
        for bank, v in ((self.memory_v1, v_s), (self.memory_v2, v_t)):
            row = self.momentum * bank[index] + (1 - self.momentum) * v
            bank[index] = F.normalize(row, dim=1).to(bank.dtype)

    @torch.no_grad()
    def draw(self, index: Tensor) -> Tensor:
        """(B, 1 + K) samples: the positive, then K of other classes, without replacement if there are that many."""
        c = self.labels[index]
        start, count = self.start[c, None], self.count[c, None]
        n_neg = self.n_data - count  # (B, 1)
        if self.most < self.K:
            r = self._below(n_neg.expand(-1, self.K))
        else:
            r = self._distinct(n_neg)
            if self.fewest < self.K:
                r = torch.where(n_neg >= self.K, r, self._below(n_neg.expand(-1, self.K)))
        negative = self.by_class[r + (r >= start) * count]  # skip the sample's own class
        positive = index if self.mode == "exact" else self.by_class[start + self._below(count)].squeeze(1)
        return torch.cat([positive[:, None], negative], dim=1)

    def _distinct(self, n_neg: Tensor) -> Tensor:
        """K distinct integers below each n_neg (B, 1): the places of the K smallest of random keys."""
        key = torch.rand(len(n_neg), self.most, generator=self.source(), device=n_neg.device)
        key.masked_fill_(torch.arange(self.most, device=n_neg.device) >= n_neg, 2.0)
        return key.topk(self.K, dim=1, largest=False, sorted=False).indices

    def _below(self, high: Tensor) -> Tensor:
        """Uniform integers in [0, high)."""
        u = torch.rand(high.shape, generator=self.source(), device=high.device, dtype=torch.float64)
        return (u * high).long()

    def source(self) -> torch.Generator:
        """The generator of the draws, on the memory's device."""
        device = self.memory_v1.device
        if self.generator is None or self.generator.device != device:
            self.generator = torch.Generator(device).manual_seed(self.seed)
        return self.generator

    def get_extra_state(self) -> Tensor:
        return self.source().get_state()

    def set_extra_state(self, state: Tensor) -> None:
        self.source().set_state(state.cpu())
