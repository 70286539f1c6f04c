"""What every loader of batches does, and batches of a data set that is kept on the device."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dataset.base import DataError, ImageFiles

PAD = 4  # pixels, of zeros around an image before it is cropped
AUGMENTS = ("crop", "resized_crop", "none")
TRIES = 10  # of torchvision's RandomResizedCrop to find a window that is inside the image


def padding(size: int) -> int:
    """PAD up to 96 pixels, as published for small images; an eighth of the image above."""
    return PAD if size <= 96 else size // 8


def large_batch(images: np.ndarray | Tensor | ImageFiles) -> int:
    """Batch size for images (N, H, W, 3) without gradients: results do not depend on it, large ones are faster."""
    return max(1, 500 * 32 * 32 // (images.shape[1] * images.shape[2]))


def crop(images: Tensor, dy: Tensor, dx: Tensor, flip: Tensor) -> Tensor:
    """Crop (B, H, W, C) windows at dy, dx from the zero-padded images; mirror those where flip is set."""
    b, h, w, c = images.shape
    pad = padding(h)
    rows, columns = h + 2 * pad, w + 2 * pad
    n = torch.arange(b, device=images.device)
    images = torch.cat((images, images.flip(2))).index_select(0, n + b * flip)
    padded = F.pad(images, (0, 0, pad, pad, pad, pad))  # (B, rows, columns, C)
    left = torch.where(flip.bool(), 2 * pad - dx, dx)  # mirrored already, so counted from the other side
    corner = (n * rows + dy) * columns + left  # (B,) pixel where the window begins
    starts = corner[:, None] + columns * torch.arange(h, device=images.device)  # (B, H) ... and each of its rows
    return padded.flatten().unfold(0, w * c, c).index_select(0, starts.flatten()).view(b, h, w, c)


def draw_windows(draws: np.ndarray, height: int, width: int) -> np.ndarray:
    """Turn (2 * TRIES + 2, N) uniform draws into (4, N) top, left, height, width, as torchvision's RandomResizedCrop.

    8 to 100 % of the image, 3:4 to 4:3; where no try is inside the image, the largest window in the middle.
    """
    scale, ratio = draws[: 2 * TRIES].astype(np.float64).reshape(2, TRIES, -1)
    area, aspect = height * width * (0.08 + 0.92 * scale), 3 / 4 * (16 / 9) ** ratio
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))  # (TRIES, N)
    inside = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first, n = inside.argmax(0), np.arange(draws.shape[1])
    found = inside[first, n]
    w = np.where(found, w[first, n], min(width, round(height * 4 / 3)))
    h = np.where(found, h[first, n], min(height, round(width * 4 / 3)))
    y, x = np.where(found, draws[2 * TRIES :], 0.5)
    return np.stack((y * (height - h + found), x * (width - w + found), h, w)).astype(np.int64)


def resized_crop(images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, flip: Tensor) -> Tensor:
    """Crop a window of each (B, H, W, C) uint8 image and enlarge it to H x W, bilinearly; mirror where flip is set."""
    _, h, w, _ = images.shape

    def interpolate(start: Tensor, length: Tensor, size: int) -> Tensor:
        """(B, size, size) weights of the input pixels, at most two other than zero, for each output pixel."""
        pixel = torch.arange(size, device=images.device)
        place = ((pixel + 0.5) * (length / size)[:, None] - 0.5).clamp(min=0).minimum(length[:, None] - 1)
        return (1 - (place[..., None] + start[:, None, None] - pixel).abs()).clamp(min=0)

    columns = interpolate(left, width, w)
    columns = torch.where(flip.bool()[:, None, None], columns.flip(1), columns)
    views = torch.einsum("byh,bhwc,bxw->byxc", interpolate(top, height, h), images.float(), columns)
    return views.round().to(torch.uint8)


def normalize(images: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> Tensor:
    """Compute (image / 255 - mean) / std of (B, H, W, 3) uint8 -> (B, 3, H, W) float32, channels_last."""
    w = images.shape[2]
    # A row of the image at a time: three channels alone would be too short a vector.
    mean, std = (torch.as_tensor(v, dtype=torch.float32, device=images.device).repeat(w) for v in (mean, std))
    x = images.flatten(2).float()  # (B, H, W * 3)
    white = x.new_full((), 255)  # a tensor, as CUDA multiplies by the inexact 1/255 for a number
    x = x.div_(white).sub_(mean).div_(std)
    return x.view(images.shape).permute(0, 3, 1, 2)


def share_of(plan: Tensor, share: tuple[int, int]) -> Tensor:
    """The columns of a batch that one of several processes takes, (rank, world): joined by rank, they are the batch."""
    rank, world = share
    return plan.tensor_split(world, dim=-1)[rank] if world > 1 else plan


class Loader:
    """Batches of images (B, 3, H, W), target (B,) and index (B,), in an order and with views that are drawn in advance.

    augment: of training images, which come in a new order in each epoch
      crop           random crops of the zero-padded image and, unless flip is off, mirroring, as torchvision's
                     RandomCrop, RandomHorizontalFlip, ToTensor, Normalize
      resized_crop   torchvision's RandomResizedCrop in place of RandomCrop
      none           the images as they are
      None           for evaluation: the images as they are, in file order
    All draws come from (seed, epoch) alone, so every device sees the same batches (of resized_crop, up to a grey level
    where it rounds otherwise), and an epoch can be entered again at any step.

    What every loader offers:
      len(loader)                    batches of an epoch, the short last one included
      set_epoch(epoch, step=0)       the next iteration is of this epoch, from this batch on
      plans()                        iterator over what each coming batch, or this process's share of it, is made of:
                                     a tensor (k, B), or a tuple of tensors whose first is index (B,)
      batch(plan)                    -> images, target, index on the device
      iter(loader)                   map(batch, plans())
    batch() does not wait for the device, so whole steps can be captured as a CUDA graph. `n_data` is the number of
    images, `batch_size` that of a full batch.
    """

    def __init__(
        self,
        images: np.ndarray | ImageFiles,  # (N, H, W, 3) uint8
        labels: np.ndarray,  # (N,) int64
        batch_size: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        augment: str | None = None,
        flip: bool = True,
        seed: int = 0,
        device: str | torch.device = "cpu",
        layout: torch.memory_format = torch.channels_last,
        n_cls: int | None = None,
        share: tuple[int, int] = (0, 1),  # (rank, world): of every batch this process's part, see share_of()
    ):
        shape = images.shape
        if images.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or labels.shape != shape[:1]:
            raise DataError(
                f"images must be uint8 (N, H, W, 3) with N labels, got {images.dtype} {shape} and {labels.shape}"
            )
        if labels.min() < 0 or (n_cls is not None and labels.max() >= n_cls):  # CUDA would stop with an assert
            raise DataError(f"labels must not be negative and be below {n_cls}, got {labels.min()} .. {labels.max()}")
        if augment not in (None, *AUGMENTS):
            raise DataError(f"augment {augment!r}: choose {', '.join(AUGMENTS)} or None")
        if augment and batch_size > len(images):
            raise DataError(f"--batch_size {batch_size} is larger than the training set ({len(images)} images)")
        self.device, self.layout = torch.device(device), layout
        self.mean, self.std = (torch.tensor(v, dtype=torch.float32, device=self.device) for v in (mean, std))
        self.batch_size, self.n_data, self.height, self.width = batch_size, *shape[:3]
        self.augment, self.flip, self.seed, self.share = augment, flip, seed, share
        self.set_epoch(1)

    def __len__(self) -> int:
        return -(-self.n_data // self.batch_size)

    def set_epoch(self, epoch: int, step: int = 0) -> None:
        """Let the next iteration be of this epoch (from 1), beginning at this batch (from 0)."""
        if epoch < 1 or not 0 <= step <= len(self):
            raise DataError(f"no batch {step} of epoch {epoch}: epochs count from 1, batches from 0 to {len(self)}")
        self.epoch, self.step = epoch, step

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        return map(self.batch, self.plans())

    def plans(self) -> Iterator:
        raise NotImplementedError

    def batch(self, plan) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError

    def draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw an epoch's order (N,) and views: (3, N) dy, dx, flip, or (2 * TRIES + 3, N) uniform draws, or (0, N)."""
        n = self.n_data
        if self.augment is None:
            return np.arange(n), np.empty((0, n), np.int64)
        # numpy mixes the pair well; a torch generator on the CPU would look at 32 bits of one number.
        rng = np.random.default_rng((self.seed % 2**64, epoch))
        order = rng.permutation(n)
        if self.augment == "resized_crop":
            draws = rng.random((2 * TRIES + 3, n), np.float32)
            draws[-1] = (draws[-1] < 0.5) & self.flip
            return order, draws
        if self.augment == "none":
            return order, np.empty((0, n), np.int64)
        dy, dx = rng.integers(0, 2 * padding(self.height) + 1, (2, n))
        return order, np.stack((dy, dx, rng.integers(0, 1 + self.flip, n)))


class DeviceLoader(Loader):
    """Batches of a data set kept on the device as uint8. Nothing in an iteration waits for the device."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, batch_size: int, **options: Any):
        super().__init__(images, labels, batch_size, **options)
        # np.require copies a read-only array, which torch would warn about
        on_cpu = (torch.from_numpy(np.require(array, requirements="CW")) for array in (images, labels))
        self.images, self.labels = (array.to(self.device) for array in on_cpu)

    def plans(self) -> Iterator[Tensor]:
        """Columns of the epoch's plan, a batch each; the iteration after this one begins at the first batch."""
        step, self.step = self.step, 0
        plans = self.plan(self.epoch).split(self.batch_size, dim=1)[step:]
        parts = (share_of(plan, self.share) for plan in plans)
        return (part for part in parts if part.size(1))  # a batch of test images may be too short for all

    def batch(self, plan: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Assemble images, target and index of some columns of a plan."""
        index, *views = plan  # (B,) each
        images = self.images.index_select(0, index)
        if views:
            images = (crop if self.augment == "crop" else resized_crop)(images, *views)
        target = self.labels.index_select(0, index)
        images = normalize(images, self.mean, self.std)
        return images.contiguous(memory_format=self.layout), target, index

    def plan(self, epoch: int) -> Tensor:
        """Draw (4, N) order, dy, dx, flip of an epoch; (6, N) order, window, flip for resized_crop; else (1, N)."""
        order, views = self.draw(epoch)
        if self.augment == "resized_crop":
            views = np.concatenate((draw_windows(views[:-1], self.height, self.width), views[-1:].astype(np.int64)))
        plan = torch.from_numpy(np.concatenate((order[None], views)).astype(np.int64, copy=False))
        if self.device.type == "cuda":
            plan = plan.pin_memory()  # so that the host does not wait
        return plan.to(self.device, non_blocking=True)
