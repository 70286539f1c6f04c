"""What every data set returns, and the array functions they share."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

BLOCK = 64  # images per task of the thread pool


class DataError(ValueError):
    """Data that is missing, damaged or does not fit, in one sentence for the user."""


class ImageFiles:
    """Image files that a StreamLoader decodes batch by batch; by its shape an (N, size, size, 3) uint8 array.

    root: the folder that listing() leaves out of the names
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, files: Sequence[Path], size: int, root: Path):
        self.files, self.size, self.root = files, size, root

    def __len__(self) -> int:
        return len(self.files)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self.files), self.size, self.size, 3

    def __getitem__(self, index: np.ndarray) -> ImageFiles:
        return ImageFiles([self.files[i] for i in index], self.size, self.root)

    def listing(self) -> bytes:
        """Names below root and sizes in bytes, for a checksum that does not read the files."""
        names = (f"{str(file).removeprefix(str(self.root))} {os.stat(file).st_size}" for file in self.files)
        return "\0".join(names).encode(errors="backslashreplace")


class DataSource(NamedTuple):
    """A whole data set, in memory or as files."""

    train_images: np.ndarray | ImageFiles  # (N, H, W, 3) uint8
    train_labels: np.ndarray  # (N,) int64
    test_images: np.ndarray | ImageFiles
    test_labels: np.ndarray
    n_cls: int
    mean: tuple[float, float, float]  # of the training images (of files: of a sample of them), scaled to 0..1
    std: tuple[float, float, float]
    class_names: tuple[str, ...]
    flip: bool = True  # a mirrored image keeps its class
    val_images: np.ndarray | ImageFiles | None = None  # held out of the training images
    val_labels: np.ndarray | None = None
    crc32: int = 0  # of images, labels and class names, to tell whether a resumed run still sees the same data


def stack(
    read: Callable[[int], np.ndarray], n: int, size: int, num_workers: int = 0, bar: str | None = None
) -> np.ndarray:
    """Stack read(0) .. read(n - 1) -> (n, size, size, 3) uint8; the number of threads does not change the result.

    bar: title of a progress bar, shown on a terminal only
    """
    images = np.empty((n, size, size, 3), np.uint8)

    def fill(start: int) -> None:
        for i in range(start, min(start + BLOCK, n)):
            images[i] = read(i)

    starts = range(0, n, BLOCK)
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        parts: Iterable = pool.map(fill, starts)
        if bar:  # not even a hidden one in forked processes: tqdm has locks
            parts = tqdm(parts, bar, len(starts), leave=False, disable=None, unit_scale=BLOCK)
        list(parts)  # raises the error of the first image that has one
    return images


def resize(images: np.ndarray, size: int | None, num_workers: int = 0) -> np.ndarray:
    """Resize (N, H, W, 3) -> (N, size, size, 3) by Pillow's bilinear filter, which averages when it shrinks."""
    if size is None or images.shape[1:3] == (size, size):
        return images

    def read(i: int) -> np.ndarray:
        return np.asarray(Image.fromarray(images[i]).resize((size, size), Image.Resampling.BILINEAR))

    return stack(read, len(images), size, num_workers)


def channel_moments(blocks: Iterable[np.ndarray]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and population standard deviation per channel of all (N, H, W, 3) uint8 blocks together, scaled to 0..1.

    From integer sums, so exact and independent of the division into blocks.
    """
    n, sums, squares = 0, np.zeros(3, np.int64), np.zeros(3, np.int64)
    for images in blocks:
        n += images.size // 3
        sums += images.sum((0, 1, 2), dtype=np.int64)
        squares += np.einsum("nhwc,nhwc->c", images, images, dtype=np.int64)
    mean = tuple(s / n / 255 for s in sums.tolist())
    pairs = zip(sums.tolist(), squares.tolist(), strict=True)
    std = tuple(math.sqrt((n * q - s * s) / n**2) / 255 for s, q in pairs)
    return mean, tuple(max(s, 1 / 255) for s in std)  # a constant channel is not divided by zero
