"""What every data set gives, and what several of them share."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import Image

BLOCK = 64  # images per task of the thread pool


class DataError(ValueError):
    """Data that is missing, damaged or does not fit, in one sentence for the user."""


class DataSource(NamedTuple):
    """A whole data set in memory."""

    train_images: np.ndarray  # (N, H, W, 3) uint8
    train_labels: np.ndarray  # (N,) int64
    test_images: np.ndarray
    test_labels: np.ndarray
    n_cls: int
    mean: tuple[float, float, float]  # of the training images, scaled to 0..1
    std: tuple[float, float, float]
    class_names: tuple[str, ...]
    flip: bool = True  # a mirrored image keeps its class
    val_images: np.ndarray | None = None  # held out of the training images
    val_labels: np.ndarray | None = None
    crc32: int = 0  # of images, labels and class names, to tell whether a resumed run still sees the same data


def stacked(read: Callable[[int], np.ndarray], n: int, size: int, num_workers: int = 0) -> np.ndarray:
    """(n, size, size, 3) uint8 array of read(0) .. read(n - 1), the same for any number of threads."""
    images = np.empty((n, size, size, 3), np.uint8)

    def fill(start: int) -> None:
        for i in range(start, min(start + BLOCK, n)):
            images[i] = read(i)

    starts = range(0, n, BLOCK)
    if num_workers == 0:
        for start in starts:
            fill(start)
        return images
    with ThreadPoolExecutor(num_workers) as pool:
        list(pool.map(fill, starts))  # raises the first error in the order of the images
    return images


def resized(images: np.ndarray, size: int | None, num_workers: int = 0) -> np.ndarray:
    """(N, size, size, 3) images by Pillow's bilinear filter, which averages where it shrinks."""
    if size is None or images.shape[1:3] == (size, size):
        return images

    def resize(i: int) -> np.ndarray:
        return np.asarray(Image.fromarray(images[i]).resize((size, size), Image.Resampling.BILINEAR))

    return stacked(resize, len(images), size, num_workers)


def moments(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel mean and population standard deviation, scaled to 0..1; from integer sums, so exact."""
    counts, pixels = np.zeros((3, 256), np.int64), images.reshape(-1, 3)
    for start in range(0, len(pixels), 2**20):  # bincount works on 8-byte copies: keep them small
        for channel, count in enumerate(counts):
            count += np.bincount(pixels[start : start + 2**20, channel], minlength=256)
    n, grey = int(counts[0].sum()), np.arange(256)
    sums, squares = [[int(s) for s in counts @ power] for power in (grey, grey**2)]
    mean = tuple(s / n / 255 for s in sums)
    std = tuple(math.sqrt((n * q - s * s) / n**2) / 255 for s, q in zip(sums, squares, strict=True))
    return mean, tuple(max(s, 1 / 255) for s in std)  # one grey level: a constant channel is not divided by zero
