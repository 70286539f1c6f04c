"""Which modules of a foreign network give its feature list: found by running it on two images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, zip_longest
from math import inf, isqrt
from typing import Any

import torch
from torch import Tensor, nn

from models.util import ModelError

BLOCKS = 4  # stages of a network whose blocks all have the same shape: as many as the usual CNN has
NO_STAGE = nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Dropout, nn.Dropout2d


@dataclass
class Features:
    """Where a network's feature list comes from: names of its submodules."""

    stem: str
    stages: list[str]
    timm: dict[str, int]  # those that timm's forward_intermediates gives, by number; hooks catch the others
    nhwc: set[str]  # those with the channels last
    classifier: str  # '' if it is not one linear layer or convolution
    modules: list[str]  # all that runs up to the last stage


def choose_features(net: nn.Module, n_cls: int, images: Tensor, by_hand: Sequence[str] | None = None) -> Features:
    """Run a network in eval mode, and choose.

    Stages are the last maps of each resolution, or evenly spaced blocks where all have the same shape. The stem is the
    last map before them; where there is none, the first map, if it is more than a fourth of the image high, or else
    the first stage's map once more. Raises ModelError where stages named by hand, or the logits, are none.
    """
    calls, logit = trace(net, net, images)
    if not isinstance(logit, Tensor) or logit.shape != (len(images), n_cls):
        raise ModelError(f"gives {kind(logit)} where logits {[len(images), n_cls]} are expected")
    maps: dict[str, Tensor] = {}  # of timm's own function
    if by_hand:
        check_stages(by_hand, net, calls)
    elif hasattr(net, "forward_intermediates"):
        traced, (found, again) = trace(net, partial(run_timm, net), images)
        if torch.equal(again, logit):
            calls, maps = traced, name_maps(net, traced, found)

    own = net.get_classifier() if hasattr(net, "get_classifier") else ()  # timm's; two where it was distilled
    heads = [call for call in calls.values() if call.module in (own if isinstance(own, tuple) else (own,))]
    heads += sorted((call for call in calls.values() if call.has_weight), key=lambda call: -call.end)[:1]
    known = heads and any(len(p) == n_cls for p in heads[0].module.parameters())
    classifier, end = (heads[0].name, heads[0].start) if known else ("", inf)
    before = {name: call for name, call in calls.items() if call.end < end}

    row = list(by_hand or maps) or choose_maps(net, before)
    if len(row) < 2 and not by_hand:
        row = max(row, choose_blocks(before), key=len)
    if not row:
        raise ModelError("no feature maps are found in it; name its stages by hand")
    outputs = list(maps.values()) or [calls[name].output for name in row]
    stages = spread(row) if len({f.shape for f in outputs}) == 1 and not by_hand else row.copy()
    stem = find_stem(calls, row[0])
    if not stem:
        is_stem = len(row) > 1 and not by_hand and is_map(outputs[0]) and 4 * side(outputs[0]) > images.shape[2]
        stem = stages.pop(0) if is_stem else stages[0]

    layouts = {name: calls[name].output for name in (stem, *row) if name in calls}
    nhwc = any(map(is_nhwc, layouts.values()))  # in such a network a map of (96, 96, 96) has its channels last, too
    done = max((calls[name].end for name in stages if name in calls), default=end)
    late = [name for name, call in calls.items() if call.start >= done]
    whole = [name for name, _ in net.named_modules() if name and not any(overlap(name, other) for other in late)]
    return Features(
        stem,
        stages,
        {name: i for i, name in enumerate(maps) if name in (stem, *stages)},
        {name for name, f in layouts.items() if nhwc and name not in maps and f.shape[1] == f.shape[2]},
        classifier,
        [name for name in whole if name.rpartition(".")[0] not in whole],
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
        """Of the output, 4 for a map; 0 where it is no tensor, came several times, or is overwritten in place later."""
        usable = self.count == 1 and isinstance(self.output, Tensor) and self.output._version == self.version
        return self.output.dim() if usable else 0

    @property
    def shallow(self) -> bool:
        return self.name.count(".") < 2

    @property
    def has_weight(self) -> bool:
        """Whether it is a convolution, a linear layer or the like."""
        leaf = next(self.module.children(), None) is None
        return leaf and any(p.dim() > 1 for p in self.module.parameters())


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


def choose_maps(net: nn.Module, calls: dict[str, Call]) -> list[str]:
    """The last module, at most two names deep, of each resolution at which something with weights runs.

    Parts of a block that works at two resolutions come after all others.
    """
    last_first = sorted((call for call in calls.values() if is_map(call.output)), key=lambda call: -call.end)
    weighted = {side(call.output) for call in last_first if call.has_weight}
    whole: dict[int, str] = {}
    parts: dict[int, str] = {}
    for call in last_first:  # in this order a branch to 1x1 in between (squeeze-excitation) is no stage
        size, parent = side(call.output), net.get_submodule(call.name.rpartition(".")[0])
        pools = isinstance(call.module, NO_STAGE) or (size == 1 and next(call.module.parameters(), None) is None)
        if call.dim and call.shallow and not pools and size in weighted and size >= max(whole | parts, default=0):
            chosen = whole if parent is net or isinstance(parent, nn.Sequential | nn.ModuleList) else parts
            chosen.setdefault(size, call.name)
    return [name for _, name in sorted((parts | whole).items(), reverse=True)]


def choose_blocks(calls: dict[str, Call]) -> list[str]:
    """The longest row of numbered siblings that return tokens (B, N, C) or maps."""
    rows = defaultdict(list)
    for call in calls.values():
        if call.dim >= 3 and call.name[-1].isdigit():
            rows[call.name.rstrip("0123456789")].append(call.name)
    return max(rows.values(), key=len, default=[])


def find_stem(calls: dict[str, Call], first: str) -> str:
    """The last map before the first stage, at most two names deep; '' if there is none."""
    stage, weighted = calls.get(first), [call for call in calls.values() if call.has_weight]
    if stage is None or not any(stage.start <= call.start < stage.end for call in weighted):
        return ""  # norm and activation behind a first convolution are the end of the stem itself
    maps = [call for call in calls.values() if call.dim == 4 and call.shallow and call.end < stage.start]
    last = max(maps, key=lambda call: call.end, default=stage)
    return last.name if any(call.end <= last.end < stage.start for call in weighted) else ""


def spread(names: list[str]) -> list[str]:
    """BLOCKS of them, evenly spaced, the last one included."""
    k = min(BLOCKS, len(names))
    return [names[(i + 1) * len(names) // k - 1] for i in range(k)]


def check_stages(stages: Sequence[str], net: nn.Module, calls: dict[str, Call]) -> None:
    """Check stages that were named by hand."""
    known = [name for name, _ in net.named_modules() if name]
    for name in stages:
        call = calls.get(name)
        if name not in known:
            raise ModelError(f"no module {name!r} in it, but {', '.join(n for n in known if n.count('.') < 2)}")
        if call is None or call.count != 1:
            raise ModelError(f"{name} runs {call.count if call else 0} times in a forward pass; a stage runs once")
        if isinstance(call.output, Tensor) and call.output._version != call.version:
            raise ModelError(f"what {name} returns is overwritten in place; choose the module that does this")
        if call.dim not in (3, 4):
            raise ModelError(f"{name} returns {kind(call.output)}, neither maps (B, C, H, W) nor tokens (B, N, C)")
    in_order = sorted(set(stages), key=lambda name: calls[name].end)
    if in_order != list(stages):
        raise ModelError(f"stages are named once each, in the order in which they run: {','.join(in_order)}")


def kind(output: Any) -> str:
    return str(list(output.shape)) if isinstance(output, Tensor) else f"a {type(output).__name__}"


def run_timm(
    net: nn.Module, x: Tensor, indices: list[int] | None = None, headless: bool = False
) -> tuple[list[Tensor], Tensor]:
    """-> intermediate maps, logits (or a map, where they are not needed)"""
    if headless:
        maps = net.forward_intermediates(x, indices=indices, intermediates_only=True)
        return maps, maps[-1]
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


def overlap(a: str, b: str) -> bool:
    """Whether a module is, contains or belongs to another one."""
    return f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.")
