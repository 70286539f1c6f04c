"""Small networks that bring a student's feature into the teacher's space.

Their parameters are named as in RepDistiller, so that its checkpoints and ours can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from distiller_zoo.base import DistillError, Shapes


class ConvReg(nn.Module):
    """Convolutional regression to the channels, height and width of another map (FitNets)."""

    def __init__(self, s_shape: Sequence[int], t_shape: Sequence[int], use_relu: bool = True):
        super().__init__()
        if len(s_shape) != 4 or len(t_shape) != 4:
            raise DistillError(f"a map is needed, not a vector: student {_dims(s_shape)}, teacher {_dims(t_shape)}")
        (_, s_c, s_h, s_w), (_, t_c, t_h, t_w) = s_shape, t_shape
        if s_h == 2 * t_h and s_w == 2 * t_w:
            self.conv = nn.Conv2d(s_c, t_c, kernel_size=3, stride=2, padding=1)
        elif 2 * s_h == t_h and 2 * s_w == t_w:
            self.conv = nn.ConvTranspose2d(s_c, t_c, kernel_size=4, stride=2, padding=1)
        elif s_h >= t_h and s_w >= t_w:
            self.conv = nn.Conv2d(s_c, t_c, kernel_size=(1 + s_h - t_h, 1 + s_w - t_w))
        else:
            raise DistillError(f"no regression from the student's map {_dims(s_shape)} to {_dims(t_shape)}")
        self.bn = nn.BatchNorm2d(t_c)
        self.use_relu = use_relu

    def forward(self, f: Tensor) -> Tensor:
        f = self.bn(self.conv(f))
        return F.relu(f) if self.use_relu else f


class Connector(nn.Module):
    """One ConvReg without ReLU per map whose channels or size differ (AB); others pass unchanged."""

    def __init__(self, s_shapes: Shapes, t_shapes: Shapes):
        super().__init__()
        self.connectors = nn.ModuleList(
            nn.Sequential() if tuple(s[1:]) == tuple(t[1:]) else ConvReg(s, t, use_relu=False)
            for s, t in zip(s_shapes, t_shapes, strict=True)
        )

    def forward(self, g_s: list[Tensor]) -> list[Tensor]:
        return [connect(f) for connect, f in zip(self.connectors, g_s, strict=True)]


class LinearEmbed(nn.Module):
    """Linear projection of a flattened feature."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.linear = nn.Linear(dim_in, dim_out)

    def forward(self, f: Tensor) -> Tensor:
        return self.linear(f.flatten(1))


class Embed(LinearEmbed):
    """Linear projection onto the unit sphere."""

    def forward(self, f: Tensor) -> Tensor:
        return F.normalize(super().forward(f), dim=1)


class Paraphraser(nn.Module):
    """Convolutional autoencoder of a map with `k` times its channels as code (FT); returns the reconstruction."""

    def __init__(self, t_c: int, k: float = 0.5):
        super().__init__()
        code = int(t_c * k)
        self.encoder = _three(nn.Conv2d, (t_c, t_c, code, code), use_bn=False)
        self.decoder = _three(nn.ConvTranspose2d, (code, code, t_c, t_c), use_bn=False)

    def forward(self, f_t: Tensor) -> Tensor:
        return self.decoder(self.encoder(f_t))


class Translator(nn.Module):
    """From the student's map to the channels of the teacher's code (FT)."""

    def __init__(self, s_c: int, t_c: int, k: float = 0.5):
        super().__init__()
        code = int(t_c * k)
        self.encoder = _three(nn.Conv2d, (s_c, s_c, code, code), use_bn=True)

    def forward(self, f_s: Tensor) -> Tensor:
        return self.encoder(f_s)


def _three(kind: type[nn.Module], c: Sequence[int], use_bn: bool) -> nn.Sequential:
    """Three 3x3 layers; without batch norm an empty module holds its place, as names go by position."""
    layers = []
    for c_in, c_out in pairwise(c):
        layers += [kind(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out) if use_bn else nn.Sequential()]
        layers.append(nn.LeakyReLU(0.1, inplace=True))
    return nn.Sequential(*layers)


def _dims(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape[1:]))
