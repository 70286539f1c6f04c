"""Networks of timm, torchvision or a file of one's own, with the interface of ours.

`create_external("timm:resnet50", n_cls=100)`, "torchvision:mobilenet_v3_small", "my_nets.py:Small".
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from itertools import count, zip_longest
from math import inf, isqrt
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.util import ModelError, eval_mode, head

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's weights expect images of this mean and std
BLOCKS = 4  # stages of a network whose blocks all have the same shape, as the usual CNN's
Moments = tuple[Sequence[float] | None, Sequence[float] | None]  # mean and std of the images that a network expects
NO_STAGE = nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Dropout, nn.Dropout2d
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
    if source == "timm":
        # names of a hub or folder (hf-hub:...) are not in the list: a name never touches the network
        known = import_timm().list_models(pretrained="." in leaf)  # resnet50.a1_in1k names weights, too
    else:
        models = import_torchvision().models
        known = models.list_models(module=models)
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


def import_torchvision():
    from dataset.torchvision_import import torchvision  # takes seconds, so only where it is needed

    return torchvision


def import_timm():
    import_torchvision()  # timm imports it, which fails beside some builds of torch
    try:
        import timm
    except ImportError as error:
        raise ModelError(f"timm cannot be imported ({error}): pip install -r requirements-extra.txt") from error
    return timm


def build_timm(name: str, n_cls: int, image_size: int, pretrained: bool) -> tuple[nn.Module, Moments]:
    timm = import_timm()
    cfg = timm.get_pretrained_cfg(name)
    size = {"img_size": image_size} if cfg and cfg.fixed_input_size else {}
    net = timm.create_model(name, pretrained=pretrained, num_classes=n_cls, **size)
    if pretrained and cfg.num_classes == n_cls:
        net.reset_classifier(n_cls)
    return net, (net.pretrained_cfg["mean"], net.pretrained_cfg["std"])


def build_torchvision(name: str, n_cls: int, image_size: int, pretrained: bool) -> tuple[nn.Module, Moments]:
    models = import_torchvision().models
    inception = {"aux_logits": False, "init_weights": True, "transform_input": pretrained}
    own = {
        "vit": {"image_size": image_size},
        "maxvit": {"input_size": (image_size, image_size)},
        "googlenet": inception,
        "inception": inception,
    }
    net = models.get_model(name, num_classes=n_cls, **own.get(name.partition("_")[0], {}))
    if pretrained:
        state, fresh = models.get_model_weights(name).DEFAULT.get_state_dict(progress=False), net.state_dict()
        last = list(fresh)[-1].rpartition(".")[0]  # the classifier comes last in all of them
        for key in fresh:
            if key.rpartition(".")[0] != last:
                if state[key].shape != fresh[key].shape:
                    raise ModelError(f"torchvision:{name}: its weights are for images of another size ({key})")
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
    return net, (getattr(type(net), "mean", None), getattr(type(net), "std", None))


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


def check_contract(net: nn.Module, name: str, n_cls: int, image_size: int) -> None:
    """Check a class that has our interface already."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), eval_mode(net):
            feats, logit = net(torch.rand(2, 3, image_size, image_size), is_feat=True, preact=False)
            dims, close = [f.dim() for f in feats], torch.allclose(head(net)(feats[-1]), logit, 1e-3, 1e-3)
        net.get_feat_modules()
    except Exception as error:
        raise ModelError(f"{name}: its forward() takes is_feat but does not work so ({reason(error)})") from error
    if set(dims[:-1]) != {4} or dims[-1] != 2 or logit.shape != (2, n_cls) or not close:
        raise ModelError(
            f"{name}: forward(x, is_feat=True) should give ([maps (B, C, H, W) .., pooled (B, C)], logits "
            f"(B, {n_cls}) = classifier(pooled)), but gives {[tuple(f.shape) for f in feats]}, {tuple(logit.shape)}"
        )


@dataclass
class Call:
    """A submodule in a forward pass: when it first began and last ended, and what it returned."""

    name: str
    module: nn.Module
    start: int
    end: float = inf
    count: int = 0
    output: Any = None
    version: int = 0  # of the output; counts operations in place

    @property
    def dim(self) -> int:
        """Of the output: 4 for a map; 0 where it is no tensor, is overwritten in place later, or came more than once."""
        usable = self.count == 1 and isinstance(self.output, Tensor) and self.output._version == self.version
        return self.output.dim() if usable else 0

    @property
    def shallow(self) -> bool:
        return self.name.count(".") < 2

    @property
    def is_leaf(self) -> bool:
        return next(self.module.children(), None) is None

    @property
    def has_weight(self) -> bool:
        """Whether it is a convolution, a linear layer or the like."""
        return self.is_leaf and any(p.dim() > 1 for p in self.module.parameters())


def trace(net: nn.Module, run: Callable[[Tensor], Any], images: Tensor) -> tuple[dict[str, Call], Any]:
    """-> (calls of the submodules by name, in the order in which they began; what run(images) returned)"""
    calls: dict[str, Call] = {}
    clock = count()

    def begin(name: str, module: nn.Module, given: tuple) -> None:
        if name not in calls:
            calls[name] = Call(name, module, next(clock))

    def end(name: str, module: nn.Module, given: tuple, output: Any) -> None:
        call = calls[name]
        call.end, call.count, call.output = next(clock), call.count + 1, output
        call.version = output._version if isinstance(output, Tensor) else 0

    handles = []
    for name, module in net.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(partial(begin, name)))
            handles.append(module.register_forward_hook(partial(end, name)))
    try:
        return calls, run(images)
    finally:
        for handle in handles:
            handle.remove()


def is_map(f: Any) -> bool:
    return isinstance(f, Tensor) and f.dim() == 4


def is_nhwc(f: Tensor) -> bool:
    """Of images that are square, so that maps are square, too."""
    return f.dim() == 4 and f.shape[1] == f.shape[2] != f.shape[3]


def side(f: Tensor) -> int:
    return f.shape[1 if is_nhwc(f) else 2]


def as_map(f: Tensor, nhwc: bool) -> Tensor:
    """(B, H, W, C), or (B, N, C) with the class token and alike first, or a map already -> (B, C, H, W)"""
    if f.dim() == 3:
        size = isqrt(f.shape[1])
        f, nhwc = f[:, -(size * size) :].unflatten(1, (size, size)), True
    return f.permute(0, 3, 1, 2) if nhwc else f


def choose_maps(calls: dict[str, Call]) -> list[str]:
    """The last module, at most two names deep, of each resolution at which something with weights runs."""
    last_first = sorted((call for call in calls.values() if is_map(call.output)), key=lambda call: -call.end)
    weighted = {side(call.output) for call in last_first if call.has_weight}
    chosen: dict[int, str] = {}
    for call in last_first:  # in this order a branch to 1x1 in between (squeeze-excitation) is no stage
        size = side(call.output)
        pools = isinstance(call.module, NO_STAGE) or (size == 1 and next(call.module.parameters(), None) is None)
        if call.dim and call.shallow and not pools and size in weighted and size > max(chosen, default=0):
            chosen[size] = call.name
    return list(chosen.values())[::-1]


def choose_blocks(calls: dict[str, Call]) -> list[str]:
    """The longest row of numbered siblings that return tokens (B, N, C) or maps."""
    rows = defaultdict(list)
    for call in calls.values():
        if call.dim >= 3 and call.name[-1].isdigit():
            rows[call.name.rstrip("0123456789")].append(call.name)
    return max(rows.values(), key=len, default=[])


def find_stem(calls: dict[str, Call], first: str) -> str:
    """The last map before the first stage, at most two names deep; '' if there is none."""
    if first not in calls or calls[first].is_leaf:
        return ""  # a bare convolution or activation is the end of the stem itself
    begun = min((call.end for call in calls.values() if call.has_weight), default=inf)
    maps = [call for call in calls.values() if call.dim == 4 and call.shallow]
    before = [call for call in maps if begun <= call.end < calls[first].start]
    return max(before, key=lambda call: call.end).name if before else ""


def spread(names: list[str]) -> list[str]:
    """BLOCKS of them, evenly spaced, the last one included."""
    k = min(BLOCKS, len(names))
    return [names[(i + 1) * len(names) // k - 1] for i in range(k)]


def check_stages(arch: str, stages: Sequence[str], net: nn.Module, calls: dict[str, Call]) -> None:
    """Check stages that were named by hand."""
    known = [name for name, _ in net.named_modules() if name]
    for name in stages:
        call = calls.get(name)
        if name not in known:
            shallow = [name for name in known if name.count(".") < 2]
            raise ModelError(f"{arch}: has no module {name!r}; it has: {', '.join(shallow)}")
        if call is None or call.count != 1:
            raise ModelError(f"{arch}: {name} runs {call.count if call else 0} times in a forward pass, a stage once")
        if isinstance(call.output, Tensor) and call.output._version != call.version:
            raise ModelError(f"{arch}: what {name} returns is overwritten in place; choose the module that does so")
        if call.dim not in (3, 4):
            what = list(call.output.shape) if isinstance(call.output, Tensor) else f"a {type(call.output).__name__}"
            raise ModelError(f"{arch}: {name} returns {what}, neither maps (B, C, H, W) nor tokens (B, N, C)")


def run_timm(net: nn.Module, x: Tensor, indices: list[int] | None = None) -> tuple[list[Tensor], Tensor]:
    """-> intermediate maps, logits"""
    last, maps = net.forward_intermediates(x, indices=indices)
    return maps, net.forward_head(last)


def name_maps(net: nn.Module, calls: dict[str, Call], maps: list[Tensor]) -> dict[str, Tensor]:
    """timm's intermediate maps under the names of the modules that return them, or numbers where no module does."""
    said = [info["module"] for info in getattr(net, "feature_info", None) or []]
    named: dict[str, Tensor] = {}
    for i, (name, f) in enumerate(zip_longest(said[: len(maps)], maps)):
        call = calls.get(name)
        own = call is not None and call.dim and torch.equal(as_map(call.output, is_nhwc(call.output)), f)
        named[name if own and name not in named else f"intermediate{i}"] = f
    return named


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
        if f.dim() > 2:  # maps (B, C, H, W), or tokens (B, N, C)
            f = f.flatten(1, -2).mean(1) if linear else f.flatten(2).mean(2)
        self.caught[HEAD] = f
        if not linear or not torch.is_autocast_enabled(f.device.type):
            return None
        with torch.autocast(f.device.type, enabled=False):  # bfloat16 has three digits, too few for a logit
            return F.linear(given[0].float(), module.weight, module.bias)


class External(nn.Module):
    """A foreign network with our interface. Its state is the network's, under the network's own names.

    The feature list is [stem, stage 1 .. n, pooled]. Stages are maps of falling resolution, or evenly spaced blocks
    where all have the same; the stem is the last map before them, or else the first stage's map once more; pooled is
    what the classifier is given.

    stages: names of the submodules of stages 1..n; net: the plain network; mean, std: of the images it expects, or None
    """

    has_preact = False
    scale: Tensor | None
    shift: Tensor | None

    def __init__(
        self,
        net: nn.Module,
        arch: str,
        n_cls: int,
        image_size: int = 32,
        stages: Sequence[str] | None = None,
        moments: Moments = (None, None),
    ):
        super().__init__()
        self.net, self.arch, self.image_size = net, arch, image_size
        self.mean, self.std = moments
        self.register_buffer("scale", None, persistent=False)
        self.register_buffer("shift", None, persistent=False)
        self.caught: dict[str, Any] = {}  # by hooks, in a forward pass
        self.shapes: list[torch.Size] = []
        with torch.no_grad(), torch.random.fork_rng(devices=[]), eval_mode(net):
            images = torch.rand(2, 3, image_size, image_size) * 4 - 2
            try:
                self._choose(images, n_cls, stages)
                feats, _ = self(images, is_feat=True)
            except ModelError:
                raise
            except Exception as error:  # whatever the network raises
                raise ModelError(f"{arch}: fails on {image_size}-pixel images ({reason(error)})") from error
        self.shapes = [f.shape[1:] for f in feats[:-1]]

    def _choose(self, images: Tensor, n_cls: int, by_hand: Sequence[str] | None) -> None:
        """Run the network on two images, choose the features and catch them from then on."""
        net = self.net
        calls, logit = trace(net, net, images)
        if not isinstance(logit, Tensor) or logit.shape != (len(images), n_cls):
            what = list(logit.shape) if isinstance(logit, Tensor) else f"a {type(logit).__name__}"
            raise ModelError(f"{self.arch}: gives {what} where logits {[len(images), n_cls]} are expected")
        maps: dict[str, Tensor] = {}  # of timm's own function
        if by_hand:
            check_stages(self.arch, by_hand, net, calls)
        elif hasattr(net, "forward_intermediates"):
            traced, (found, again) = trace(net, partial(run_timm, net), images)
            if torch.equal(again, logit):
                calls, maps = traced, name_maps(net, traced, found)

        own = net.get_classifier() if hasattr(net, "get_classifier") else ()  # timm's; two where it was distilled
        heads = [call for call in calls.values() if call.module in (own if isinstance(own, tuple) else (own,))]
        heads += sorted((call for call in calls.values() if call.has_weight), key=lambda call: -call.end)[:1]
        classifies = heads and any(len(p) == n_cls for p in heads[0].module.parameters())
        self.classifier, end = (heads[0].name, heads[0].start) if classifies else (HEAD, inf)
        before = {name: call for name, call in calls.items() if call.end < end}
        row = list(by_hand or maps) or choose_maps(before)
        if len(row) < 2 and not by_hand:
            row = max(row, choose_blocks(before), key=len)
        if not row:
            raise ModelError(f"{self.arch}: no feature maps are found; name the stages by hand")
        outputs = list(maps.values()) or [calls[name].output for name in row]
        self.stages = spread(row) if len({f.shape for f in outputs}) == 1 and not by_hand else row
        self.stem = find_stem(calls, row[0])
        if not self.stem:  # the first map is the stem if it is more than a fourth of the image high
            is_stem = len(row) > 1 and not by_hand and is_map(outputs[0]) and 4 * side(outputs[0]) > images.shape[2]
            self.stem = self.stages.pop(0) if is_stem else self.stages[0]

        self.timm = {name: i for i, name in enumerate(maps) if name in (self.stem, *self.stages)}  # numbers of its maps
        self.hooked = {self.stem, *self.stages} - self.timm.keys()
        layouts = {name: calls[name].output for name in {self.stem, *row} if name in calls}
        nhwc = any(map(is_nhwc, layouts.values()))  # in such a network a map of (96, 96, 96) has its channels last, too
        self.nhwc = {name for name in self.hooked if nhwc and layouts[name].shape[1] == layouts[name].shape[2]}
        for name in self.hooked:
            net.get_submodule(name).register_forward_hook(Catch(self.caught, name))
        if classifies:
            net.get_submodule(self.classifier).register_forward_hook(Catch(self.caught, HEAD))
        done = max((calls[name].end for name in self.stages if name in calls), default=end)
        late = [name for name, call in calls.items() if call.start >= done]
        whole = [name for name, _ in net.named_modules() if name and not any(overlap(name, other) for other in late)]
        self.features = [name for name in whole if name.rpartition(".")[0] not in whole]

    @property
    def head(self) -> nn.Linear:
        """The linear classifier; ModelError if it is of another kind."""
        layer = self.net.get_submodule(self.classifier)
        if not isinstance(layer, nn.Linear):
            raise ModelError(f"{self.arch}: its classifier is not a linear layer, which this asks for")
        return layer

    def get_feat_modules(self) -> nn.ModuleList:
        return nn.ModuleList([self.net.get_submodule(name) for name in self.features])

    def renormalise(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Take images normalised by this mean and std from now on, and give the network those that it expects."""
        self.scale = self.shift = None
        if self.mean is None or self.std is None or (tuple(mean), tuple(std)) == (tuple(self.mean), tuple(self.std)):
            return
        device = next(self.net.parameters()).device
        m, s, own_m, own_s = (
            torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (mean, std, self.mean, self.std)
        )
        self.scale, self.shift = (s / own_s).float().to(device), ((m - own_m) / own_s).float().to(device)

    def forward(self, x: Tensor, is_feat: bool = False, preact: bool = False) -> Tensor | tuple[list[Tensor], Tensor]:
        if preact:
            raise ModelError(f"{self.arch}: gives no features from before the last ReLU of its stages")
        if self.scale is not None:
            x = x * self.scale + self.shift
        self.caught.update(dict.fromkeys((*self.hooked, HEAD)))
        if self.timm:
            maps, logit = run_timm(self.net, x, list(self.timm.values()))
            self.caught.update(zip(self.timm, maps, strict=True))
        else:
            logit = self.net(x)
        names, caught = (self.stem, *self.stages), dict(self.caught)
        self.caught.clear()
        if not all(isinstance(f, Tensor) for f in (logit, *(caught[name] for name in names))):
            raise ModelError(f"{self.arch}: not all of {', '.join(names)} and the logits are tensors in this call")
        feats = [as_map(caught[name], name in self.nhwc) for name in names]
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

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        for key in [key for key in state if key.startswith(prefix)]:
            state[f"{prefix}net.{key[len(prefix) :]}"] = state.pop(key)
        super()._load_from_state_dict(state, prefix, *args)


def overlap(a: str, b: str) -> bool:
    """Whether a module is, contains or belongs to another one."""
    return f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.")
