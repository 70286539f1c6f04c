"""The networks, by name: `create_model("resnet8x4", n_cls=100)`."""

from collections.abc import Callable
from difflib import get_close_matches
from functools import partial

from torch import nn

from models.mobilenetv2 import MobileNetV2
from models.resnet import ResNet
from models.resnetv2 import ResNet50
from models.reused import NAME, Reused
from models.ShuffleNetv1 import ShuffleV1
from models.ShuffleNetv2 import ShuffleV2
from models.util import ModelError
from models.vgg import VGG
from models.wrn import WideResNet

WIDE = (32, 64, 128, 256)  # stem and stages of the x4 networks

model_dict: dict[str, Callable[..., nn.Module]] = {
    "resnet8": partial(ResNet, 8),
    "resnet14": partial(ResNet, 14),
    "resnet20": partial(ResNet, 20),
    "resnet32": partial(ResNet, 32),
    "resnet44": partial(ResNet, 44),
    "resnet56": partial(ResNet, 56),
    "resnet110": partial(ResNet, 110),
    "resnet8x4": partial(ResNet, 8, WIDE),
    "resnet32x4": partial(ResNet, 32, WIDE),
    "ResNet50": ResNet50,
    "wrn_16_1": partial(WideResNet, 16, 1),
    "wrn_16_2": partial(WideResNet, 16, 2),
    "wrn_40_1": partial(WideResNet, 40, 1),
    "wrn_40_2": partial(WideResNet, 40, 2),
    "vgg8": partial(VGG, (1, 1, 1, 1, 1)),
    "vgg11": partial(VGG, (1, 1, 2, 2, 2)),
    "vgg13": partial(VGG, (2, 2, 2, 2, 2)),
    "vgg16": partial(VGG, (2, 2, 3, 3, 3)),
    "vgg19": partial(VGG, (2, 2, 4, 4, 4)),
    "MobileNetV2": MobileNetV2,
    "ShuffleV1": ShuffleV1,
    "ShuffleV2": ShuffleV2,
}

# The published recipe trains these at 0.01 and all others at 0.05. A default: what the user asks for counts.
default_lr = {"MobileNetV2": 0.01, "ShuffleV1": 0.01, "ShuffleV2": 0.01}


def is_known(name: str) -> bool:
    """Whether create_model() can build a network of that name."""
    reused = NAME.fullmatch(name)
    return (reused["net"] if reused else name) in model_dict


def create_model(name: str, n_cls: int) -> nn.Module:
    """Build the network of that name for n_cls classes: one of model_dict, or a student of SimKD made from one."""
    if reused := NAME.fullmatch(name):
        sizes = {key: int(value) for key, value in reused.groupdict("1").items() if key != "net"}
        return Reused(create_model(reused["net"], n_cls), n_cls=n_cls, **sizes)
    if name not in model_dict:
        closest = get_close_matches(name, model_dict, len(model_dict), cutoff=0)
        raise ModelError(f"unknown model {name!r}; known: {', '.join(closest)}")
    model = model_dict[name](num_classes=n_cls)
    model.arch = name
    return model
