"""Batches of a data set that lives on the device."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dataset.base import DataError

PAD = 4


def large_batch(images: np.ndarray | Tensor) -> int:
    """Images (N, H, W, 3) of a batch without gradients: results do not depend on it, large ones are faster."""
    return max(1, 500 * 32 * 32 // (images.shape[1] * images.shape[2]))


def augmented(images: Tensor, dy: Tensor, dx: Tensor, flip: Tensor, pad: int = PAD) -> Tensor:
    """(B, H, W, C) windows at dy, dx of the zero-padded images, mirrored where flip is set."""
    b, h, w, c = images.shape
    rows, columns = h + 2 * pad, w + 2 * pad
    n = torch.arange(b, device=images.device)
    images = torch.cat((images, images.flip(2))).index_select(0, n + b * flip)
    padded = F.pad(images, (0, 0, pad, pad, pad, pad))  # (B, rows, columns, C)
    left = torch.where(flip.bool(), 2 * pad - dx, dx)  # mirrored already, so counted from the other side
    corner = (n * rows + dy) * columns + left  # (B,) pixel where the window begins
    starts = corner[:, None] + columns * torch.arange(h, device=images.device)  # (B, H) ... and each of its rows
    return padded.flatten().unfold(0, w * c, c).index_select(0, starts.flatten()).view(b, h, w, c)


def normalised(
    images: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(B, 3, H, W) channels_last of (image / 255 - mean) / std, in float32 and then of the dtype."""
    w = images.shape[2]
    # A row of the image at a time: three channels alone would be too short a vector.
    mean, std = (torch.as_tensor(v, dtype=torch.float32, device=images.device).repeat(w) for v in (mean, std))
    x = images.flatten(2).float()  # (B, H, W * 3)
    white = x.new_full((), 255)  # a tensor, as CUDA multiplies by the inexact 1/255 for a number
    x = x.div_(white).sub_(mean).div_(std)
    return x.view(images.shape).permute(0, 3, 1, 2).to(dtype)


class DeviceLoader:
    """Iterates over images (B, 3, H, W) in the layout, target (B,), index (B,), all on the device.

    With augment: a new order, random crops (zero-padded by 4) and, unless flip is off, mirroring, as torchvision's
    RandomCrop, RandomHorizontalFlip, ToTensor, Normalize. All draws come from (seed, epoch) alone, so that every
    device sees the same batches and an epoch can be entered again at any step. Without: the images in file order.
    """

    def __init__(
        self,
        images: np.ndarray | Tensor,
        labels: np.ndarray | Tensor,
        batch_size: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        augment: bool = False,
        flip: bool = True,
        seed: int = 0,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        layout: torch.memory_format = torch.channels_last,
        n_cls: int | None = None,
    ):
        images, labels = _as_tensor(images), _as_tensor(labels)
        _check(images, labels, batch_size, augment, n_cls)
        self.device, self.dtype, self.layout = torch.device(device), dtype, layout
        self.images, self.labels = images.to(self.device), labels.to(self.device)
        self.mean, self.std = (torch.tensor(v, dtype=torch.float32, device=self.device) for v in (mean, std))
        self.batch_size, self.n_data = batch_size, len(images)
        self.augment, self.flip, self.seed = augment, flip, seed
        self.set_epoch(1)

    def __len__(self) -> int:
        return -(-self.n_data // self.batch_size)

    def set_epoch(self, epoch: int, step: int = 0) -> None:
        """Let the next iteration be that of this epoch (from 1), beginning at this batch (from 0)."""
        if epoch < 1 or not 0 <= step <= len(self):
            raise DataError(f"no batch {step} of epoch {epoch}: epochs count from 1, batches from 0 to {len(self)}")
        self.epoch, self.step = epoch, step

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        return map(self.batch, self.plans())

    def plans(self) -> Iterator[Tensor]:
        """What each batch to come is made of: columns of the epoch's plan."""
        step, self.step = self.step, 0
        return iter(self.plan(self.epoch).split(self.batch_size, dim=1)[step:])

    def batch(self, plan: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images, target and index of some columns of a plan."""
        index, *views = plan  # (B,) each
        images = self.images.index_select(0, index)
        if self.augment:
            images = augmented(images, *views)
        target = self.labels.index_select(0, index)
        images = normalised(images, self.mean, self.std, self.dtype)
        return images.contiguous(memory_format=self.layout), target, index

    def plan(self, epoch: int) -> Tensor:
        """(4, N) order, dy, dx, flip of an epoch; (1, N) without augmentation."""
        if not self.augment:
            return torch.arange(self.n_data, device=self.device)[None]
        # numpy mixes the pair well; a torch generator on the CPU would look at 32 bits of one number.
        rng = np.random.default_rng((self.seed % 2**64, epoch))
        order = rng.permutation(self.n_data)
        dy, dx = rng.integers(0, 2 * PAD + 1, (2, self.n_data))
        flip = rng.integers(0, 1 + self.flip, self.n_data)
        plan = torch.from_numpy(np.stack((order, dy, dx, flip)).astype(np.int64, copy=False))
        if self.device.type != "cuda":
            return plan.to(self.device)
        return plan.pin_memory().to(self.device, non_blocking=True)  # pinned: the host does not wait


def _as_tensor(array):
    if isinstance(array, Tensor):
        return array.contiguous()
    return torch.from_numpy(np.require(array, requirements="CW"))  # a read-only array is copied


def _check(images, labels, batch_size, augment, n_cls):
    shape, n = tuple(images.shape), len(images)
    if images.dtype != torch.uint8 or images.dim() != 4 or shape[3] != 3 or images.numel() == 0:
        raise DataError(f"images must be uint8 (N, H, W, 3), got {_name(images)} {shape}")
    if labels.dtype != torch.int64 or tuple(labels.shape) != (n,):
        raise DataError(f"labels must be int64 ({n},), one per image, got {_name(labels)} {tuple(labels.shape)}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (n_cls is not None and high >= n_cls):
        raise DataError(f"labels must lie in 0..{'' if n_cls is None else n_cls - 1}, got {low}..{high}")
    if batch_size < 1:
        raise DataError(f"--batch_size must be at least 1, got {batch_size}")
    if augment and batch_size > n:
        raise DataError(f"--batch_size {batch_size} is larger than the training set ({n} images)")


def _name(tensor):
    return str(tensor.dtype).removeprefix("torch.")
