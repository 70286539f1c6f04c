"""The losses that are computed in another form than the reference's, and that form, for benchmark.py."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from crd.memory import ContrastMemory
from distiller_zoo import Distiller, create_distiller
from distiller_zoo.base import Shapes, pool_to_smaller
from helper.util import RunError
from models import create_model
from models.util import feature_shapes

N_DATA, N_CLS = 50_000, 100  # CIFAR-100's training set
TOLERANCE = 1e-4  # in float32, relative to the largest entry

Side = Callable[[], list[Tensor]]  # one run: loss and gradients, or the samples drawn


def nst_broadcast(method: Distiller, g_s: list[Tensor], g_t: list[Tensor]) -> Tensor:
    """The product of every two channels at every position: (B, C_b, C_a, H * W)."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a[:, None] * b[:, :, None]).sum(3).square().mean()

    pooled = (pool_to_smaller(*maps) for maps in zip(g_s, g_t, strict=True))
    unit = ([F.normalize(f.flatten(2), dim=2) for f in maps] for maps in pooled)
    return sum(kernel(t, t) + kernel(s, s) - 2 * kernel(s, t) for s, t in unit)


def fsp_broadcast(method: Distiller, g_s: list[Tensor], g_t: list[Tensor]) -> Tensor:
    """The product of every two channels of consecutive maps at every position: (B, C_top, C_bottom, H * W)."""

    def flow(maps: tuple[Tensor, Tensor]) -> Tensor:
        top, bottom = (f.flatten(2) for f in pool_to_smaller(*maps))
        return (top[:, :, None] * bottom[:, None]).mean(3)

    return sum(F.mse_loss(flow(s), flow(t)) for s, t in zip(pairwise(g_s), pairwise(g_t), strict=True))


def crd_gather(method: Distiller, f_s: Tensor, f_t: Tensor, index: Tensor) -> Tensor:
    """The drawn rows of each bank, index (B, 1 + K) -> (B, 1 + K, feat_dim), its constants read from the device.

    In float32 this form's logarithms lose 5e-5 of the loss.
    """
    bank = method.contrast
    noise = bank.K / bank.n_data

    def term(v: Tensor, rows: Tensor, Z: Tensor) -> Tensor:
        drawn = rows[index.flatten()].unflatten(0, index.shape)
        out = torch.exp(torch.bmm(drawn, v[:, :, None]).squeeze(2) / bank.T)
        if Z.item() == 0:
            Z.copy_(out.detach().mean() * bank.n_data)
        p = out / Z.item()
        log_true = torch.log(p[:, 0] / (p[:, 0] + noise + 1e-7))
        log_noise = torch.log(noise / (p[:, 1:] + noise + 1e-7))
        return -(log_true.sum() + log_noise.sum()) / len(v)

    v_s, v_t = method.embed_s(f_s), method.embed_t(f_t)
    method.last = index[:, 0], v_s.detach(), v_t.detach()
    return term(v_s, bank.memory_v2, bank.Z_v1) + term(v_t, bank.memory_v1, bank.Z_v2)


def kdsvd_full(method: Distiller, g_s: list[Tensor], g_t: list[Tensor]) -> Tensor:
    """All singular vectors of each sample's (H * W, C) matrix, of which one or four are used.

    The loss depends on the sign that the library returns them with: here, as in ours, the teacher's sum is positive.
    """

    def right_vectors(f: Tensor, k: int) -> Tensor:  # (B, k, C)
        return F.normalize(torch.linalg.svd(f.flatten(2).transpose(1, 2), full_matrices=False).Vh[:, :k], dim=2)

    def nearest(v: Tensor, v_t: Tensor) -> Tensor:  # (B, k, C), (B, C) -> (B, C)
        cos = (v * v_t[:, None]).sum(2).detach()
        chosen = torch.arange(len(v), device=v.device), cos.abs().argmax(1)
        return v[chosen] * cos[chosen].sign()[:, None]

    def relation(maps: tuple[Tensor, Tensor]) -> Tensor:
        return torch.exp(-(maps[1][:, :, None] - maps[0][:, None]).square() / 8)

    v_t = [right_vectors(f, 1)[:, 0] for f in g_t]
    v_t = [v * v.sum(1, keepdim=True).sign() for v in v_t]
    v_s = [nearest(right_vectors(f, 4), v) for f, v in zip(g_s, v_t, strict=True)]
    pairs = zip(pairwise(v_s), pairwise(v_t), strict=True)
    return sum((relation(s) - relation(t)).square().sum() / len(s[0]) for s, t in pairs)


FORMS = {"nst": nst_broadcast, "fsp": fsp_broadcast, "crd": crd_gather, "kdsvd": kdsvd_full}


def draw_on_host(bank: ContrastMemory, index: Tensor) -> Side:
    """A permutation of the samples of other classes for each sample, as a loader's worker does it."""
    labels, rng = bank.labels.cpu().numpy(), np.random.default_rng(0)
    others = [np.flatnonzero(labels != c) for c in range(N_CLS)]

    def draw() -> list[Tensor]:
        rows = [np.append(i, rng.permutation(others[labels[i]])[: bank.K]) for i in index.tolist()]
        return [torch.from_numpy(np.stack(rows)).to(index.device)]

    return draw


def draw_by_topk(bank: ContrastMemory, index: Tensor) -> Side:
    """The samples with the K smallest of as many random keys as there are samples, the own class's out of reach."""

    def draw() -> list[Tensor]:
        key = torch.rand(len(index), bank.n_data, device=index.device)
        key.masked_fill_(bank.labels == bank.labels[index, None], 2.0)
        negative = key.topk(bank.K, dim=1, largest=False, sorted=False).indices
        return [torch.cat([index[:, None], negative], dim=1)]

    return draw


DRAWS = {"permutations on the host": draw_on_host, "rand and topk": draw_by_topk}


def cases(opt: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, str, Side, Side]]:
    """-> what is computed, on or against what, our side, the other."""
    for name in opt.losses:
        for pair in opt.pairs:
            yield name, ":".join(pair), *loss_sides(name, pair, opt.batch_size, device)
    if "crd" in opt.losses:
        labels, index = torch.arange(N_DATA) % N_CLS, torch.arange(opt.batch_size, device=device)
        bank = create_distiller("crd", s_dim=1, t_dim=1, labels=labels).to(device).contrast
        for against, form in DRAWS.items():
            yield "crd's draw", f"against {against}", lambda: [bank.draw(index)], form(bank, index)


def loss_sides(name: str, pair: tuple[str, str], batch_size: int, device: torch.device) -> tuple[Side, Side]:
    """Loss and gradients of a method, ours and the other form, on equal features."""
    t_shapes, s_shapes = (feature_shapes(create_model(arch, N_CLS)) for arch in pair)
    data = {"s_shapes": s_shapes, "t_shapes": t_shapes, "s_dim": s_shapes[-1][1], "t_dim": t_shapes[-1][1]}
    torch.manual_seed(0)
    method = create_distiller(name, labels=torch.arange(N_DATA) % N_CLS, **data).to(device)
    ours = method.init_loss if name == "fsp" else method  # FSP compares maps in its first stage
    given = ()
    if name == "crd":
        drawn = method.contrast.draw(torch.arange(batch_size, device=device))
        method.contrast.draw = lambda index: drawn  # the same for both sides; rows of its own measure it
        given = (drawn,)

    def side(loss_of: Callable[..., Tensor], layout: torch.memory_format) -> Side:
        g_s, g_t = (features(f, seed, batch_size, layout, device) for seed, f in enumerate((s_shapes, t_shapes)))
        f_s, f_t = g_s[method.feats], g_t[method.feats]
        leaves = [f.requires_grad_() for f in ([f_s] if isinstance(f_s, Tensor) else f_s)]

        def run() -> list[Tensor]:
            loss = loss_of(f_s, f_t, *given)
            return [loss.detach(), *torch.autograd.grad(loss, [*leaves, *method.parameters()])]

        return run

    return side(ours, torch.channels_last), side(partial(FORMS[name], method), torch.contiguous_format)


def features(
    shapes: Shapes, seed: int, batch_size: int, layout: torch.memory_format, device: torch.device
) -> list[Tensor]:
    """Random, as after a ReLU, with channels of unequal strength: of others, singular vectors hardly differ."""
    noise = torch.Generator().manual_seed(seed)
    feats = []
    for _, *dims in shapes:
        level = torch.randn(dims[0], *[1] * (len(dims) - 1), generator=noise)
        f = F.relu(torch.randn(batch_size, *dims, generator=noise) + level).to(device)
        feats.append(f.contiguous(memory_format=layout) if f.dim() == 4 else f)
    return feats


def compare(what: str, ours: list[Tensor], other: list[Tensor]) -> tuple[float, float] | None:
    """Differences of the loss and of the gradients, relative to the largest entry; random draws have none."""
    if len(ours) == 1:
        return None
    apart = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, other, strict=True)]
    if not all(value <= TOLERANCE for value in apart):  # nan too
        found = f"loss {apart[0]:.1e}, gradients {max(apart[1:]):.1e}"
        raise RunError(f"{what}: the two forms disagree by {found} (relative; {TOLERANCE:g} is allowed)")
    return apart[0], max(apart[1:])
