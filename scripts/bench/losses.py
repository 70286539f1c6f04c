"""Reference forms of the losses that the product computes in another, faster form, and both sides on equal features."""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from distiller_zoo import Distiller, create_distiller
from helper.util import RunError
from models import create_model
from models.util import feature_shapes

N_DATA, N_CLS = 50_000, 100  # CIFAR-100's training set
TOLERANCE = 1e-4  # in float32, relative to the largest entry

Side = Callable[[], list[Tensor]]  # one run: loss and gradients


def pool(a: Tensor, b: Tensor) -> list[Tensor]:
    """Two maps at the smaller height and width, with positions flattened: (B, C, H * W)."""
    size = [min(sizes) for sizes in zip(a.shape[2:], b.shape[2:], strict=True)]
    return [F.adaptive_avg_pool2d(f, size).flatten(2) for f in (a, b)]


def nst_reference(method: Distiller, g_s: list[Tensor], g_t: list[Tensor]) -> Tensor:
    """The product of every two channels at every position: (B, C_b, C_a, H * W)."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a[:, None] * b[:, :, None]).sum(3).square().mean()

    unit = ([F.normalize(f, dim=2) for f in pool(*maps)] for maps in zip(g_s, g_t, strict=True))
    return sum(kernel(t, t) + kernel(s, s) - 2 * kernel(s, t) for s, t in unit)


def fsp_reference(method: Distiller, g_s: list[Tensor], g_t: list[Tensor]) -> Tensor:
    """The product of every two channels of consecutive maps at every position: (B, C_top, C_bottom, H * W)."""

    def flow(maps: tuple[Tensor, Tensor]) -> Tensor:
        top, bottom = pool(*maps)
        return (top[:, :, None] * bottom[:, None]).mean(3)

    return sum(F.mse_loss(flow(s), flow(t)) for s, t in zip(pairwise(g_s), pairwise(g_t), strict=True))


def crd_reference(method: Distiller, f_s: Tensor, f_t: Tensor, index: Tensor) -> Tensor:
    """The drawn rows of each bank, index (B, 1 + K) -> (B, 1 + K, feat_dim); its constants are read from the device.

    In float32 its logarithms lose 5e-5 of the loss.
    """
    bank = method.contrast
    noise = (index.size(1) - 1) / bank.n_data

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


def kdsvd_reference(method: Distiller, g_s: list[Tensor], g_t: list[Tensor]) -> Tensor:
    """All singular vectors of each sample's (H * W, C) matrix, of which one or four are used.

    The loss depends on their signs, which the library chooses: here the teacher's sum is positive, as in ours.
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


REFERENCES = {"nst": nst_reference, "fsp": fsp_reference, "crd": crd_reference, "kdsvd": kdsvd_reference}


def cases(opt: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, str, Side, Side]]:
    """-> method, networks, our side, the reference's."""
    for name in opt.losses:
        for pair in opt.pairs:
            yield name, ":".join(pair), *sides(name, pair, opt.batch_size, device)


def sides(name: str, pair: tuple[str, str], batch_size: int, device: torch.device) -> tuple[Side, Side]:
    """Loss and gradients of a method, in our form and the reference's, on equal features of two networks."""
    t_shapes, s_shapes = (feature_shapes(create_model(arch, N_CLS)) for arch in pair)
    data = {"s_shapes": s_shapes, "t_shapes": t_shapes, "s_dim": s_shapes[-1][1], "t_dim": t_shapes[-1][1]}
    torch.manual_seed(0)
    method = create_distiller(name, labels=torch.arange(N_DATA) % N_CLS, **data).to(device)
    needs = {}
    if name == "crd":
        needs["index"] = method.contrast.draw(torch.arange(batch_size, device=device))
        method.contrast.draw = lambda index: index  # the samples drawn, the same for both sides

    def side(loss_of: Callable[..., Tensor], layout: torch.memory_format) -> Side:
        g_s, g_t = (features(shapes, i, batch_size, layout, device) for i, shapes in enumerate((s_shapes, t_shapes)))
        f_s, f_t = g_s[method.feats], g_t[method.feats]
        leaves = [f.requires_grad_() for f in ([f_s] if isinstance(f_s, Tensor) else f_s)]

        def run() -> list[Tensor]:
            loss = loss_of(f_s, f_t, **needs)
            return [loss.detach(), *torch.autograd.grad(loss, [*leaves, *method.parameters()])]

        return run

    ours = method.init_loss if name == "fsp" else method  # FSP compares maps in its first stage
    return side(ours, torch.channels_last), side(partial(REFERENCES[name], method), torch.contiguous_format)


def features(shapes: list, seed: int, batch_size: int, layout: torch.memory_format, device: torch.device) -> list:
    """Random, as after a ReLU, with channels of unequal strength: else their singular vectors hardly differ."""
    noise, feats = torch.Generator().manual_seed(seed), []
    for _, *dims in shapes:
        level = torch.randn(dims[0], *[1] * (len(dims) - 1), generator=noise)
        f = F.relu(torch.randn(batch_size, *dims, generator=noise) + level).to(device)
        feats.append(f.contiguous(memory_format=layout) if f.dim() == 4 else f)
    return feats


def compare(what: str, ours: list[Tensor], other: list[Tensor]) -> tuple[float, float]:
    """Differences of the loss and of the gradients, relative to the largest entry; RunError if they are too large."""
    apart = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, other, strict=True)]
    if not all(value <= TOLERANCE for value in apart):  # nan too
        found = f"loss {apart[0]:.1e}, gradients {max(apart[1:]):.1e}"
        raise RunError(f"{what}: the two forms differ by {found} (relative; {TOLERANCE:g} is allowed)")
    return apart[0], max(apart[1:])
