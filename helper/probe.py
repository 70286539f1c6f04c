"""Linear probe of a frozen network, and its features computed once instead of in every epoch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from dataset.loader import PAD, DeviceLoader, Loader, large_batch, padding
from helper.loops import progress
from helper.util import RunError
from models.util import head, replace_head


class Probe(nn.Module):
    """A frozen network with a new linear classifier, which alone is trained.

    Takes images, or the network's pooled features of them (B, dim). Its state is the network's.
    """

    def __init__(self, net: nn.Module, n_cls: int):
        super().__init__()
        self.arch, self.net = net.arch, net.requires_grad_(False)
        replace_head(net, n_cls)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        return self.net(images, is_feat=True)[0][-1]

    def forward(self, x: Tensor, is_feat: bool = False, preact: bool = False):
        f = self.features(x) if x.dim() == 4 else x
        logit = head(self.net)(f)
        return ([f], logit) if is_feat else logit

    def train(self, mode: bool = True) -> Probe:
        """The network keeps its batch statistics."""
        super().train(mode)
        self.net.eval()
        return self

    def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        return self.net.state_dict(*args, **kwargs)

    def load_state_dict(self, state: dict[str, Tensor], *args, **kwargs):
        return self.net.load_state_dict(state, *args, **kwargs)


class FeatureLoader:
    """The batches of a DeviceLoader with pooled features in place of images.

    Each view (image, crop, mirrored or not) that the given epochs show passes through the network once: in 100 epochs
    75 of the 162 views of an image come up, and the test images once instead of 100 times.
    """

    def __init__(self, loader: DeviceLoader, model: Probe, epochs: Iterable[int]):
        self.loader, self.model = loader, model
        self.pad = padding(loader.height)
        self.views = torch.cat([number_views(loader.plan(epoch), self.pad) for epoch in epochs]).unique()
        self.bank = torch.empty(0)

    def nbytes(self) -> int:
        return 4 * head(self.model.net).in_features * len(self.views)

    def fill(self) -> FeatureLoader:
        rows = len(self.loader.plan(1))
        self.model.eval()
        parts = progress(self.views.split(large_batch(self.loader.images)), "features")
        self.bank = torch.cat([self.model.features(self.loader.batch(plan_views(v, rows, self.pad))[0]) for v in parts])
        return self

    def __len__(self) -> int:
        return len(self.loader)

    def set_epoch(self, epoch: int, step: int = 0) -> None:
        self.loader.set_epoch(epoch, step)

    def plans(self) -> Iterator[Tensor]:
        return self.loader.plans()

    def batch(self, plan: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        place = torch.searchsorted(self.views, number_views(plan, self.pad))
        return self.bank.index_select(0, place), self.loader.labels.index_select(0, plan[0]), plan[0]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        return map(self.batch, self.plans())


def number_views(plan: Tensor, pad: int = PAD) -> Tensor:
    """(4, N) image, dy, dx, flip as one number each; (1, N) images are views themselves."""
    view = plan[0]
    for row, size in zip(plan[1:], (2 * pad + 1, 2 * pad + 1, 2), strict=False):
        view = view * size + row
    return view


def plan_views(view: Tensor, rows: int, pad: int = PAD) -> Tensor:
    """The inverse of number_views, for a plan of so many rows."""
    plan: list[Tensor] = []
    for size in (2, 2 * pad + 1, 2 * pad + 1)[: rows - 1]:
        plan.insert(0, view % size)
        view = view // size
    return torch.stack([view, *plan])


def cache_features(
    train_loader: Loader, test_loader: Loader, model: Probe, epochs: range, wanted: bool | None
) -> tuple[Loader | FeatureLoader, Loader | FeatureLoader]:
    """Loaders of features instead of images, where wanted; if that is None, where half the free memory holds them.

    Images that are streamed, and the endless views of resized_crop, pass through the network in every epoch.
    """
    views = isinstance(train_loader, DeviceLoader) and train_loader.augment != "resized_crop"
    if wanted and not views:
        raise RunError("--cache_features: needs images in memory and their views by --augment crop or none")
    if wanted is False or not epochs or not views:
        return train_loader, test_loader
    loaders = FeatureLoader(train_loader, model, epochs), FeatureLoader(test_loader, model, [1])
    size, free = sum(loader.nbytes() for loader in loaders), free_memory(train_loader.device)
    if wanted is None and size > free / 2:
        print(f"features are computed in every epoch: all would take {size / 1e9:.1f} of {free / 1e9:.1f} GB free")
        return train_loader, test_loader
    count = sum(len(loader.views) for loader in loaders)
    print(f"features of {count:,} views are computed once and kept, {size / 1e6:.0f} MB", flush=True)
    return loaders[0].fill(), loaders[1].fill()


def free_memory(device: torch.device) -> float:
    """Bytes; 4 GB where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 4e9
