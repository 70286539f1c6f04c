"""Building blocks shared by the model families, and helpers for any model: its head, its feature shapes."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ModelError(ValueError):
    """Bad input that concerns a model; the message is one sentence for the user."""


def conv(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Convolution without bias, padded to keep the size at stride 1."""
    return nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


def conv_bn(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """conv() followed by batch norm."""
    return nn.Sequential(conv(c_in, c_out, kernel, stride, groups), nn.BatchNorm2d(c_out))


def run_stage(
    blocks: Iterable[nn.Module], x: Tensor, activate: Callable[..., Tensor] = F.relu
) -> tuple[Tensor, Tensor]:
    """Run a stage whose blocks stop before their last ReLU; returns its output and its pre-activation."""
    *inner, last = blocks
    for block in inner:
        x = activate(block(x), inplace=True)  # safe: nothing else reads the sum between blocks
    pre = last(x)
    return activate(pre), pre


def global_pool(x: Tensor) -> Tensor:
    """Global average pooling, for any image size."""
    return x.mean((2, 3))  # (B, C, H, W) -> (B, C)


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels of the groups: a1 a2 .. b1 b2 .. becomes a1 b1 a2 b2 .."""
    if x.is_contiguous(memory_format=torch.channels_last):
        # regroup (B, H, W, C): unflattening dim 1 would copy to NCHW, and the next convolution would convert back
        grouped = x.permute(0, 2, 3, 1).unflatten(3, (groups, -1))
        return grouped.transpose(3, 4).flatten(3).permute(0, 3, 1, 2)
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def init_convs(model: nn.Module) -> None:
    """He initialisation (fan out) of the convolutions: variance 2 / (k * k * c_out), zero biases."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def init_linear(layer: nn.Linear) -> None:
    """Normal weights with std 0.01, zero bias."""
    nn.init.normal_(layer.weight, 0, 0.01)
    nn.init.zeros_(layer.bias)


def head(model: nn.Module) -> nn.Linear:
    """The linear classifier of a model, whatever its name in the state dict; ModelError if there is none."""
    if isinstance(getattr(type(model), "head", None), property):  # External knows its own
        own: nn.Linear = model.head
        return own
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ModelError(f"{type(model).__name__} has no linear layer that could be its classifier")
    return layers[-1]


def replace_head(model: nn.Module, n_cls: int) -> nn.Linear:
    """Give the linear classifier fresh weights for n_cls classes, and return it. Hooks on it stay."""
    layer = head(model)
    fresh = nn.Linear(layer.in_features, n_cls, device=layer.weight.device, dtype=layer.weight.dtype)
    init_linear(fresh)
    layer.weight, layer.bias, layer.out_features = fresh.weight, fresh.bias, n_cls
    return layer


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while. Each module gets its own mode back: frozen parts may be in eval mode already."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def feature_shapes(model: nn.Module, image_size: int | None = None) -> list[tuple[int, ...]]:
    """Shapes of the feature list for two square images, batch dimension included; the model is left as it was.

    image_size: by default that for which a foreign network was built, or 32
    """
    weight = next(model.parameters())
    size: int = image_size or getattr(model, "image_size", 32)
    with eval_mode(model):
        feats, _ = model(torch.zeros(2, 3, size, size, device=weight.device, dtype=weight.dtype), is_feat=True)
    return [tuple(f.shape) for f in feats]
