"""The networks, by name: `create_model("resnet8x4", n_cls=100)`."""

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial

from torch import nn

from models.external import check_external, create_external, file_name, is_external, runs_code
from models.mobilenetv2 import MobileNetV2
from models.resnet import ResNet
from models.resnetv2 import ResNet50
from models.reused import NAME, Reused
from models.ShuffleNetv1 import ShuffleV1
from models.ShuffleNetv2 import ShuffleV2
from models.util import ModelError
from models.vgg import VGG
from models.wrn import WideResNet

__all__ = ["check_name", "create_model", "default_lr", "file_name", "inner_name", "is_house", "is_known"]
__all__ += ["model_dict", "runs_code"]

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


def check_name(name: str) -> None:
    """Raise ModelError, with the closest names first, unless create_model() can build a network of that name."""
    if is_external(name):
        check_external(name)
    elif name not in model_dict:
        closest = get_close_matches(name, model_dict, len(model_dict), cutoff=0)
        raise ModelError(
            f"unknown network '{name}'; known: {', '.join(closest)}, timm:NAME, torchvision:NAME, FILE.py:CLASS"
        )


def is_known(name: str) -> bool:
    """Whether create_model() can build a network of that name without running code from a file of the user's."""
    try:
        check_name(inner_name(name))
        return not runs_code(name)
    except ModelError:
        return False


def is_house(model: nn.Module) -> bool:
    """Whether a network is one of model_dict, or a student of SimKD made from one."""
    return inner_name(getattr(model, "arch", "")) in model_dict


def inner_name(name: str) -> str:
    """The network that a student of SimKD is made from; any other name as it is."""
    reused = NAME.fullmatch(name)
    return reused["net"] if reused else name


def create_model(
    name: str, n_cls: int, image_size: int = 32, stages: Sequence[str] | None = None, pretrained: bool = False
) -> nn.Module:
    """Build a network for n_cls classes: one of model_dict, a foreign one, or a student of SimKD made from either.

    image_size, stages (names of modules) and pretrained (weights from its hub) are for foreign networks.
    """
    if reused := NAME.fullmatch(name):
        sizes = {key: int(value) for key, value in reused.groupdict("1").items() if key != "net"}
        return Reused(
            create_model(reused["net"], n_cls, image_size, stages), n_cls=n_cls, image_size=image_size, **sizes
        )
    check_name(name)
    if is_external(name):
        return create_external(name, n_cls, image_size, stages, pretrained)
    if stages or pretrained:
        raise ModelError(f"{name}: {'its stages are fixed' if stages else 'there are no weights for it on a hub'}")
    model = model_dict[name](num_classes=n_cls)
    model.arch = name
    return model
