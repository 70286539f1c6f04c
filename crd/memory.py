from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ContrastMemory(nn.Module):
    """Embeddings of every training sample, and the draw of samples to contrast with.

    memory_v1 holds the student's embeddings, memory_v2 the teacher's, (n_data, feat_dim) each. Scores against a
    whole bank are one matrix product; the drawn ones are gathered from it as scalars. Draws come from a generator
    of the memory's own, on the device of its bank, so that they depend on nothing else that is trained beside it.
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

        # samples sorted by class: the others of class c are all but count[c] places from start[c]
        count = labels.bincount()
        for name, value in {
            "labels": labels,
            "by_class": labels.argsort(stable=True),
            "count": count,
            "start": count.cumsum(0) - count,
        }.items():
            self.register_buffer(name, value, persistent=False)
        present = count[count > 0]
        fewest, most = self.n_neg_range = self.n_data - int(present.max()), self.n_data - int(present.min())
        self.tries = draws_for(K, fewest) if fewest > K else most
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
        """Move the rows of a batch towards its present embeddings."""
        for bank, v in ((self.memory_v1, v_s), (self.memory_v2, v_t)):
            row = self.momentum * bank[index] + (1 - self.momentum) * v
            bank[index] = F.normalize(row, dim=1).to(bank.dtype)

    @torch.no_grad()
    def draw(self, index: Tensor) -> Tensor:
        """(B, 1 + K) samples: the positive, then K of other classes, without replacement where there are K."""
        c = self.labels[index]
        fewest, most = self.n_neg_range
        if fewest >= self.K:
            r = self._distinct(c, most)
        elif most < self.K:
            r = self._repeated(c)
        else:
            enough = self.n_data - self.count[c] >= self.K
            r = torch.where(enough[:, None], self._distinct(c, most), self._repeated(c))
        start, count = self.start[c, None], self.count[c, None]
        negative = self.by_class[r + (r >= start) * count]  # step over the own class
        return torch.cat([self._positive(index, c)[:, None], negative], dim=1)

    def _distinct(self, c: Tensor, most: int) -> Tensor:
        """K distinct ranks among each sample's negatives, every set of K as likely as any other."""
        return self._smallest_keys(c, most) if self.tries > 0.75 * most else self._first_seen(c)  # the faster of two

    def _smallest_keys(self, c: Tensor, most: int) -> Tensor:
        """Where the K smallest of as many random keys stand."""
        key = torch.rand(len(c), most, generator=self.source(), device=c.device)
        if self.n_neg_range[0] < most:  # classes of unequal size
            key.masked_fill_(torch.arange(most, device=c.device) >= self.n_data - self.count[c, None], 2.0)
        return key.topk(self.K, dim=1, largest=False, sorted=False).indices

    def _first_seen(self, c: Tensor) -> Tensor:
        """Ranks drawn with replacement, of which the first K that had not come up before are kept."""
        rank = self._ranks(c, self.tries)  # (B, tries)
        order = torch.arange(self.tries, dtype=torch.int32, device=c.device).expand_as(rank)
        seen_at = order.new_full((len(c), self.n_neg_range[1]), self.tries).scatter_reduce_(1, rank, order, "amin")
        new = seen_at.gather(1, rank) == order
        place = new.cumsum(1) - 1
        kept = rank[:, : self.K + 1].clone()  # a place left open, see draws_for, would hold a repeated negative
        return kept.scatter_(1, torch.where(new & (place < self.K), place, self.K), rank)[:, : self.K]

    def _repeated(self, c: Tensor) -> Tensor:
        return self._ranks(c, self.K)

    def _ranks(self, c: Tensor, n: int) -> Tensor:
        """(B, n) independent ranks among each sample's negatives."""
        fewest, most = self.n_neg_range
        if fewest == most:
            return torch.randint(most, (len(c), n), generator=self.source(), device=c.device)
        return self._below((self.n_data - self.count[c])[:, None].expand(-1, n))

    def _positive(self, index: Tensor, c: Tensor) -> Tensor:
        if self.mode == "exact":
            return index
        return self.by_class[self.start[c] + self._below(self.count[c])]

    def _below(self, high: Tensor) -> Tensor:
        """Uniform integers in [0, high)."""
        u = torch.rand(high.shape, generator=self.source(), device=high.device, dtype=torch.float64)
        return (u * high).long()

    def source(self) -> torch.Generator:
        device = self.memory_v1.device
        if self.generator is None or self.generator.device != device:
            self.generator = torch.Generator(device).manual_seed(self.seed)
        return self.generator

    def get_extra_state(self) -> Tensor:
        return self.source().get_state()

    def set_extra_state(self, state: Tensor) -> None:
        self.source().set_state(state.cpu())


def draws_for(k: int, n: int) -> int:
    """Draws with replacement from n that hold k different ones, but for a chance below 1e-20 where k < n / 2."""
    new = 1 - torch.arange(k, dtype=torch.float64) / n  # chance that the next is one
    mean, variance = (1 / new).sum(), ((1 - new) / new.square()).sum()
    return int(mean + 12 * variance.sqrt()) + 100
