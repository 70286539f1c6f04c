"""Batches of a data set that lives on the device."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dataset.base import DataError

PAD = 4


def large_batch(images: np.ndarray | Tensor) -> int:
    """Batch size for images (N, H, W, 3) without gradients: results do not depend on it, large ones are faster."""
    return max(1, 500 * 32 * 32 // (images.shape[1] * images.shape[2]))


def augment(images: Tensor, dy: Tensor, dx: Tensor, flip: Tensor) -> Tensor:
    """Crop (B, H, W, C) windows at dy, dx from the zero-padded images; mirror those where flip is set."""
    b, h, w, c = images.shape
    rows, columns = h + 2 * PAD, w + 2 * PAD
    n = torch.arange(b, device=images.device)
    images = torch.cat((images, images.flip(2))).index_select(0, n + b * flip)
    padded = F.pad(images, (0, 0, PAD, PAD, PAD, PAD))  # (B, rows, columns, C)
    left = torch.where(flip.bool(), 2 * PAD - dx, dx)  # mirrored already, so counted from the other side
    corner = (n * rows + dy) * columns + left  # (B,) pixel where the window begins
    starts = corner[:, None] + columns * torch.arange(h, device=images.device)  # (B, H) ... and each of its rows
    return padded.flatten().unfold(0, w * c, c).index_select(0, starts.flatten()).view(b, h, w, c)


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


class DeviceLoader:
    """Batches of images (B, 3, H, W), target (B,) and index (B,), from a data set kept on the device as uint8.

    With augment: a new order, random crops (zero-padded by 4) and, unless flip is off, mirroring, as torchvision's
    RandomCrop, RandomHorizontalFlip, ToTensor, Normalize. All draws come from (seed, epoch) alone, so every device
    sees the same batches, and an epoch can be entered again at any step. Without augment: the images in file order.

    What every loader offers:
      len(loader)                    batches of an epoch, the short last one included
      set_epoch(epoch, step=0)       the next iteration is of this epoch, from this batch on
      plans()                        iterator over what each coming batch, or this process's share of it, is made of
      batch(plan)                    -> images, target, index on the device
      iter(loader)                   map(batch, plans())
    None of them waits for the device, so whole steps, batch() included, can be captured as a CUDA graph. `n_data` is
    the number of images, `batch_size` that of a full batch.
    """

    def __init__(
        self,
        images: np.ndarray,  # (N, H, W, 3) uint8
        labels: np.ndarray,  # (N,) int64
        batch_size: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        augment: bool = False,
        flip: bool = True,
        seed: int = 0,
        device: str | torch.device = "cpu",
        layout: torch.memory_format = torch.channels_last,
        n_cls: int | None = None,
        share: tuple[int, int] = (0, 1),  # (rank, world): of every batch this process's part, see share_of()
    ):
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or labels.shape != images.shape[:1]:
            raise DataError(
                f"images must be uint8 (N, H, W, 3) with N labels, got {images.dtype} {images.shape} and {labels.shape}"
            )
        if labels.min() < 0 or (n_cls is not None and labels.max() >= n_cls):  # CUDA would stop with an assert
            raise DataError(f"labels must not be negative and be below {n_cls}, got {labels.min()} .. {labels.max()}")
        if augment and batch_size > len(images):
            raise DataError(f"--batch_size {batch_size} is larger than the training set ({len(images)} images)")
        self.device, self.layout = torch.device(device), layout
        # np.require copies a read-only array, which torch would warn about
        images, labels = (torch.from_numpy(np.require(array, requirements="CW")) for array in (images, labels))
        self.images, self.labels = images.to(self.device), labels.to(self.device)
        self.mean, self.std = (torch.tensor(v, dtype=torch.float32, device=self.device) for v in (mean, std))
        self.batch_size, self.n_data = batch_size, len(images)
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
        if self.augment:
            images = augment(images, *views)
        target = self.labels.index_select(0, index)
        images = normalize(images, self.mean, self.std)
        return images.contiguous(memory_format=self.layout), target, index

    def plan(self, epoch: int) -> Tensor:
        """Draw (4, N) order, dy, dx, flip of an epoch; (1, N) without augmentation."""
        if not self.augment:
            return torch.arange(self.n_data, device=self.device)[None]
        # numpy mixes the pair well; a torch generator on the CPU would look at 32 bits of one number.
        rng = np.random.default_rng((self.seed % 2**64, epoch))
        order = rng.permutation(self.n_data)
        dy, dx = rng.integers(0, 2 * PAD + 1, (2, self.n_data))
        flip = rng.integers(0, 1 + self.flip, self.n_data)
        plan = torch.from_numpy(np.stack((order, dy, dx, flip)).astype(np.int64, copy=False))
        if self.device.type == "cuda":
            plan = plan.pin_memory()  # so that the host does not wait
        return plan.to(self.device, non_blocking=True)
