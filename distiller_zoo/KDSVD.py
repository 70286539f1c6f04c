from __future__ import annotations

import functools
import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from distiller_zoo.base import Distiller, DistillError, Shapes

K_S = 4  # singular vectors of the student among which the teacher's first is looked for


class KDSVD(Distiller):
    """Self-supervised Knowledge Distillation Using Singular Value Decomposition, ECCV 2018.
    https://arxiv.org/abs/1807.06819

    How the first singular vectors over channels of consecutive maps relate, by a radial basis function.
    """

    capturable = False  # eigh reads an error code from the device

    def __init__(self, s_shapes: Shapes, t_shapes: Shapes):
        super().__init__()
        s_c, t_c = ([shape[1] for shape in shapes[self.feats]] for shapes in (s_shapes, t_shapes))
        if s_c != t_c:
            raise DistillError(f"needs equal channels, the student's are {s_c}, the teacher's {t_c}")

    def forward(self, g_s: list[Tensor], g_t: list[Tensor]) -> Tensor:
        if g_s[0].device.type != "cpu" and torch.__version__ < (2, 12):
            say_slow()
        v_t = [signed(right_vectors(f, 1)).squeeze(2) for f in g_t]  # (B, C) each
        v_s = [nearest(right_vectors(f, K_S), v) for f, v in zip(g_s, v_t, strict=True)]
        pairs = zip(pairwise(v_s), pairwise(v_t), strict=True)
        return sum((relation(*two_s) - relation(*two_t)).square().sum((1, 2)).mean() for two_s, two_t in pairs)


@functools.cache  # once
def say_slow() -> None:
    print(
        "note: before torch 2.12, kdsvd is very slow on a GPU: its matrices are decomposed one by one",
        flush=True,
    )


def relation(v_below: Tensor, v: Tensor) -> Tensor:
    """exp(-(difference of every two entries)^2 / 8): (B, C, C_below)."""
    return (-(v[:, :, None] - v_below[:, None]).square() / 8).exp()


def nearest(vectors: Tensor, v_t: Tensor) -> Tensor:
    """Of each sample's vectors (B, C, k) the one most parallel to v_t (B, C), pointing the same way."""
    cos = torch.einsum("bck,bc->bk", vectors, v_t)
    which = cos.abs().argmax(1, keepdim=True)  # (B, 1)
    chosen = vectors.gather(2, which[:, None].expand(-1, vectors.size(1), -1)).squeeze(2)
    return torch.where(cos.gather(1, which) < 0, -chosen, chosen)


def signed(vectors: Tensor) -> Tensor:
    """The sign that a singular vector comes with is the library's choice: make its sum positive."""
    return torch.where(vectors.sum(1, keepdim=True) < 0, -vectors, vectors)


def right_vectors(f: Tensor, k: int) -> Tensor:
    """First k right singular vectors of each sample's (H * W, C) matrix: (B, C, k).

    They are eigenvectors of the smaller of its two Gram matrices, or the matrix times them.
    """
    f = f.flatten(2)  # (B, C, H * W)
    # the vectors do not depend on the scale, squares in float32 do
    f = f / f.detach().abs().amax((1, 2), keepdim=True).clamp(min=torch.finfo(f.dtype).tiny)
    if f.size(1) <= f.size(2):
        return TopEigenvectors.apply(f @ f.transpose(1, 2), k)
    left = TopEigenvectors.apply(f.transpose(1, 2) @ f, k)  # (B, H * W, k)
    return F.normalize(f @ left, dim=1)


class TopEigenvectors(torch.autograd.Function):
    """Eigenvectors (B, n, k) of the k largest eigenvalues of symmetric matrices (B, n, n), largest first.

    The gradient needs the k chosen vectors alone, and leaves out pairs of equal eigenvalues, where it does not exist.
    """

    @staticmethod
    def forward(ctx, gram: Tensor, k: int) -> Tensor:
        bad = ~gram.isfinite().all(2, keepdim=True).all(1, keepdim=True)  # eigh would raise
        value, vector = torch.linalg.eigh(gram.masked_fill(bad, 0))  # ascending
        k = min(k, value.size(1))
        top = vector[:, :, -k:].flip(2).masked_fill(bad, math.nan)
        ctx.save_for_backward(value, vector, top)
        return top

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        value, vector, top = ctx.saved_tensors
        gap = value[:, -top.size(2) :].flip(1)[:, None] - value[:, :, None]  # (B, n, k)
        least = torch.finfo(gap.dtype).eps * value[:, -1:, None].abs()
        inverse = torch.where(gap.abs() > least, 1 / gap, 0)
        mixed = (vector.transpose(1, 2) @ grad) * inverse  # (B, n, k)
        return vector @ mixed @ top.transpose(1, 2), None
