"""Networks of timm, torchvision or a file of one's own, with the interface of ours.

`create_external("timm:resnet50", n_cls=100)`, "torchvision:mobilenet_v3_small", "my_nets.py:Small".
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from models.stages import as_map, choose_features, run_timm
from models.util import ModelError, eval_mode, head

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's weights expect images of this mean and std
Moments = tuple[Sequence[float] | None, Sequence[float] | None]  # mean and std of the images that a network expects
HEAD = ""  # what is caught at the classifier; no submodule has this name


def is_external(name: str) -> bool:
    """Whether a network is named as timm:NAME, torchvision:NAME or FILE.py:Class."""
    return name.startswith(("timm:", "torchvision:")) or runs_code(name)


def runs_code(name: str) -> bool:
    """Whether building the network runs a file of the user's: FILE.py:Class."""
    return re.search(r"\.py:[^:]*$", name) is not None


def file_name(name: str) -> str:
    """The name as part of a file's or folder's: timm-resnet50, my_nets-Small."""
    path, _, leaf = name.rpartition(":")
    return re.sub(r"[^\w.-]+", "-", f"{Path(path).stem}-{leaf}" if runs_code(name) else name)


def check_external(name: str) -> None:
    """Check that the network exists, without building it. Raises ModelError."""
    source, _, leaf = name.partition(":")
    if runs_code(name):
        load_class(name)
        return
    package = library(source)
    # timm's hub and folder names (hf-hub:...) are not in its list: a name never asks the network
    options = {"pretrained": "." in leaf} if source == "timm" else {"module": package}  # resnet50.a1_in1k: weights, too
    known = package.list_models(**options)
    if leaf not in known:
        closest = get_close_matches(leaf, known, 5, cutoff=0)
        raise ModelError(f"{source} has no network {leaf!r}; the closest names: {', '.join(closest)}")


def create_external(
    name: str, n_cls: int, image_size: int = 32, stages: Sequence[str] | None = None, pretrained: bool = False
) -> nn.Module:
    """Build a network that is not ours, with our interface. Raises ModelError.

    A class whose forward() takes is_feat is used as it is; all else becomes an External.
    stages: submodules whose outputs become stages 1..n of the feature list; None: chosen by running two images
    pretrained: download the weights that timm or torchvision has for the network; the classifier is fresh
    """
    check_external(name)
    source, _, leaf = name.partition(":")
    builders = {"timm": build_timm, "torchvision": build_torchvision}
    try:
        if runs_code(name):
            net, moments = build_own(name, n_cls, pretrained)
        else:
            net, moments = builders[source](leaf, n_cls, image_size, pretrained)
    except ModelError:
        raise
    except (Exception, SystemExit) as error:  # whatever a library, the network or a user's file raises
        what = "pretrained weights" if pretrained else f"network of {n_cls} classes for {image_size}-pixel images"
        raise ModelError(f"{name}: no {what} ({reason(error)})") from error
    if runs_code(name) and stages is None and "is_feat" in inspect.signature(net.forward).parameters:
        check_contract(net, name, n_cls, image_size)
        net.arch = name
        return net
    return External(net, name, n_cls, image_size, stages, moments)


def library(source: str) -> ModuleType:
    """timm or torchvision.models; takes seconds, so only where it is needed."""
    from dataset.torchvision_import import torchvision  # for timm, too: it imports torchvision, which may fail alone

    if source == "torchvision":
        return torchvision.models
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise ModelError(f"timm cannot be imported ({error}): pip install -r requirements-extra.txt") from error


def build_timm(name: str, n_cls: int, image_size: int, pretrained: bool) -> tuple[nn.Module, Moments]:
    timm = library("timm")
    cfg = timm.get_pretrained_cfg(name)
    size = {"img_size": image_size} if cfg and cfg.fixed_input_size else {}
    net = timm.create_model(name, pretrained=pretrained, num_classes=n_cls, **size)
    if pretrained and cfg.num_classes == n_cls:
        net.reset_classifier(n_cls)
    return net, (net.pretrained_cfg["mean"], net.pretrained_cfg["std"])


def build_torchvision(name: str, n_cls: int, image_size: int, pretrained: bool) -> tuple[nn.Module, Moments]:
    models = library("torchvision")
    inception = {"aux_logits": False, "init_weights": True, "transform_input": pretrained}
    own: dict[str, dict[str, Any]] = {
        "vit": {"image_size": image_size},
        "maxvit": {"input_size": (image_size, image_size)},
        "googlenet": inception,
        "inception": inception,
    }
    net = models.get_model(name, num_classes=n_cls, **own.get(name.partition("_")[0], {}))
    if pretrained:
        state, fresh = models.get_model(name, weights="DEFAULT").state_dict(), net.state_dict()
        classifier = list(fresh)[-1].rpartition(".")[0]  # the last layer in all of them
        for key in fresh:
            if key.rpartition(".")[0] != classifier:
                if state[key].shape != fresh[key].shape:
                    raise ModelError(
                        f"torchvision:{name}: has no weights for {image_size}-pixel images ({key} differs)"
                    )
                fresh[key] = state[key]
        net.load_state_dict(fresh)
    return net, IMAGENET


def build_own(name: str, n_cls: int, pretrained: bool) -> tuple[nn.Module, Moments]:
    if pretrained:
        raise ModelError(f"{name}: there are no pretrained weights for a class of one's own; pass a file")
    make = load_class(name)
    accepted = inspect.signature(make).parameters
    net = make(**next(({key: n_cls} for key in ("num_classes", "n_cls") if key in accepted), {}))
    if not isinstance(net, nn.Module):
        raise ModelError(f"{name}: gives a {type(net).__name__}, not a torch.nn.Module")
    moments: list[Any] = [getattr(type(net), key, None) for key in ("mean", "std")]
    mean, std = moments
    if (mean, std) != (None, None) and not (is_moment(mean) and is_moment(std) and all(std)):
        raise ModelError(f"{name}: its mean and std should be three numbers each, in 0..1, not {mean} and {std}")
    return net, (mean, std)


def is_moment(values: Any) -> bool:
    return isinstance(values, list | tuple) and len(values) == 3 and all(0 <= value <= 1 for value in values)


def load_class(name: str) -> Callable[..., nn.Module]:
    """Run a file and take a class from it."""
    path, _, leaf = name.rpartition(":")
    file = Path(path).resolve()
    if not file.is_file():
        raise ModelError(f"{path}: no such file")
    key = f"{file.stem}_{zlib.crc32(f'{file} {file.stat().st_mtime_ns}'.encode()):08x}"
    if key not in sys.modules:
        if str(file.parent) not in sys.path:
            sys.path.append(str(file.parent))  # for what the file imports from beside it
        spec = importlib.util.spec_from_file_location(key, file)
        assert spec is not None and spec.loader is not None  # for a name that ends in .py
        sys.modules[key] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[key]
            raise ModelError(f"{path}: cannot be imported ({reason(error)})") from error
    found = vars(sys.modules[key])
    if not callable(found.get(leaf)):
        classes = [k for k, v in found.items() if isinstance(v, type) and issubclass(v, nn.Module)]
        raise ModelError(f"{path}: has no class {leaf!r}; it has: {', '.join(classes) or 'none'}")
    return found[leaf]


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.200}"


def foreign_parts(net: nn.Module) -> list[External]:
    """The foreign networks in a network: itself, or what a student of SimKD or a probe is made from."""
    return [module for module in net.modules() if isinstance(module, External)]


def stages_of(net: nn.Module) -> list[str] | None:
    """The modules whose outputs are the stages of a foreign network; None for ours."""
    return next((part.stages for part in foreign_parts(net)), None)


def renormalise(net: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
    """Let a network take images normalised by this mean and std, whatever the foreign networks in it expect."""
    for part in foreign_parts(net):
        part.renormalise(mean, std)


def probe_images(size: int) -> Tensor:
    """Two images of noise, always the same."""
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def check_contract(net: nn.Module, name: str, n_cls: int, image_size: int) -> None:
    """Check a class that has our interface already."""
    want = f"([maps (B, C, H, W) .., pooled (B, C)], logits (B, {n_cls}) = classifier(pooled))"
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), eval_mode(net):
            feats, logit = net(probe_images(image_size), is_feat=True, preact=False)
            good = [f.dim() for f in feats] == [4] * (len(feats) - 1) + [2] and logit.shape == (2, n_cls)
            good = good and torch.allclose(head(net)(feats[-1]), logit, 1e-3, 1e-3)
        net.get_feat_modules()
    except Exception as error:
        raise ModelError(f"{name}: forward(x, is_feat=True) should give {want}, but fails ({reason(error)})") from error
    if not good:
        found = [list(f.shape) for f in (*feats, logit)]
        raise ModelError(f"{name}: forward(x, is_feat=True) should give {want}, but gives {found}")


class Catch:
    """A forward hook that keeps what passes through a module, where `caught` has its name. Can be deep-copied."""

    def __init__(self, caught: dict[str, Any], name: str):
        self.caught, self.name = caught, name

    def __call__(self, module: nn.Module, given: tuple[Tensor], output: Tensor) -> Tensor | None:
        if self.name not in self.caught:
            return None
        if self.name != HEAD:
            self.caught[self.name] = output
            return None
        f, linear = given[0], isinstance(module, nn.Linear)
        if f.dim() > 2:  # tokens (B, N, C) or maps (B, C, H, W)
            f = f.flatten(1, -2).mean(1) if linear else f.flatten(2).mean(2)
        self.caught[HEAD] = f
        if not linear or not torch.is_autocast_enabled(f.device.type):
            return None
        with torch.autocast(f.device.type, enabled=False):  # bfloat16 has three digits, too few for a logit
            return module.forward(given[0].float())


class External(nn.Module):
    """A foreign network with our interface. Its state is the network's, under the network's own names.

    The feature list is [stem, stage 1 .. n, pooled], see choose_features; pooled is what the classifier is given.

    stages: names of the submodules of stages 1..n; net: the plain network; mean, std: of the images it expects, or None
    """

    has_preact = False
    headless = False  # SimKD's students need no logits of their own, and lose their tail
    scale: Tensor | None
    shift: Tensor | None

    def __init__(
        self, net: nn.Module, arch: str, n_cls: int, image_size: int, stages: Sequence[str] | None, moments: Moments
    ):
        super().__init__()
        self.net, self.arch, self.image_size = net, arch, image_size
        self.mean, self.std = moments
        self.register_buffer("scale", None, persistent=False)
        self.register_buffer("shift", None, persistent=False)
        self.caught: dict[str, Any] = {}  # by hooks, in a forward pass
        self.shapes: list[torch.Size] = []
        with torch.no_grad(), torch.random.fork_rng(devices=[]), eval_mode(net):
            images = probe_images(image_size)
            try:
                chosen = choose_features(net, n_cls, images, stages)
            except ModelError as error:
                raise ModelError(f"{arch}: {error}") from error
            except Exception as error:  # whatever the network raises
                raise ModelError(f"{arch}: fails on {image_size}-pixel images ({reason(error)})") from error
            self.chosen, self.stages = chosen, chosen.stages
            self.hooked = {chosen.stem, *chosen.stages} - chosen.timm.keys()
            for name in self.hooked:
                net.get_submodule(name).register_forward_hook(Catch(self.caught, name))
            if chosen.classifier:
                net.get_submodule(chosen.classifier).register_forward_hook(Catch(self.caught, HEAD))
            feats, logit = self(images, is_feat=True)
            layer = net.get_submodule(chosen.classifier)
            self.is_linear = isinstance(layer, nn.Linear) and torch.allclose(layer(feats[-1]), logit, 1e-3, 1e-3)
        self.shapes = [f.shape[1:] for f in feats[:-1]]

    @property
    def head(self) -> nn.Linear:
        """The linear classifier; ModelError if the logits are not those of one linear layer."""
        layer = self.net.get_submodule(self.chosen.classifier)
        if not self.is_linear or not isinstance(layer, nn.Linear):
            raise ModelError(f"{self.arch}: its logits are not those of one linear layer, which this asks for")
        return layer

    def get_feat_modules(self) -> nn.ModuleList:
        return nn.ModuleList([self.net.get_submodule(name) for name in self.chosen.modules])

    def renormalise(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Take images normalised by this mean and std from now on, and give the network those that it expects."""
        self.scale = self.shift = None
        if self.mean is None or self.std is None or (tuple(mean), tuple(std)) == (tuple(self.mean), tuple(self.std)):
            return
        weight = next(self.net.parameters())
        scale = [s / own for s, own in zip(std, self.std, strict=True)]
        shift = [(m - own) / s for m, own, s in zip(mean, self.mean, self.std, strict=True)]
        self.scale, self.shift = weight.new_tensor(scale).view(3, 1, 1), weight.new_tensor(shift).view(3, 1, 1)

    def forward(self, x: Tensor, is_feat: bool = False, preact: bool = False) -> Tensor | tuple[list[Tensor], Tensor]:
        if preact:
            raise ModelError(f"{self.arch}: gives no features from before the last ReLU of its stages")
        if self.scale is not None:
            x = x * self.scale + self.shift
        self.caught.update(dict.fromkeys((*self.hooked, HEAD)))
        if self.chosen.timm:
            maps, logit = run_timm(self.net, x, list(self.chosen.timm.values()), self.headless)
            self.caught.update(zip(self.chosen.timm, maps, strict=True))
        else:
            logit = self.net(x)
        names, caught = (self.chosen.stem, *self.stages), dict(self.caught)
        self.caught.clear()
        if not all(isinstance(f, Tensor) for f in (logit, *(caught[name] for name in names))):
            raise ModelError(f"{self.arch}: not all of {', '.join(names)} and the logits are tensors in this call")
        feats = [as_map(caught[name], name in self.chosen.nhwc) for name in names]
        shapes = [f.shape[1:] for f in feats]
        if self.shapes and x.shape[2] == x.shape[3] == self.image_size and shapes != self.shapes:
            was, now = ([list(shape) for shape in each] for each in (self.shapes, shapes))
            raise ModelError(f"{self.arch}: its features have changed their shapes from {was} to {now}")
        feats.append(feats[-1].mean((2, 3)) if caught[HEAD] is None else caught[HEAD])
        if torch.is_autocast_enabled(x.device.type):
            logit = logit.float()
        return (feats, logit) if is_feat else logit

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return self.net.state_dict(*args, **kwargs)

    def load_state_dict(self, state: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        state = OrderedDict(state)
        vars(state).update(vars(self.net.state_dict()))  # its metadata, lost in some files; MNASNet asks for it
        return self.net.load_state_dict(state, *args, **kwargs)

    # the same where this is a part of another module
    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        for key in [key for key in state if key.startswith(prefix)]:
            state[f"{prefix}net.{key[len(prefix) :]}"] = state.pop(key)
        super()._load_from_state_dict(state, prefix, *args)
