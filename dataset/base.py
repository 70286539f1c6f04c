"""What every data set returns, and the array functions they share."""

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


def stack(read: Callable[[int], np.ndarray], n: int, size: int, num_workers: int = 0) -> np.ndarray:
    """Stack read(0) .. read(n - 1) -> (n, size, size, 3) uint8; the number of threads does not change the result."""
    images = np.empty((n, size, size, 3), np.uint8)

    def fill(start: int) -> None:
        for i in range(start, min(start + BLOCK, n)):
            images[i] = read(i)

    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        list(pool.map(fill, range(0, n, BLOCK)))  # raises the error of the first image that has one
    return images


def resize(images: np.ndarray, size: int | None, num_workers: int = 0) -> np.ndarray:
    """Resize (N, H, W, 3) -> (N, size, size, 3) by Pillow's bilinear filter, which averages when it shrinks."""
    if size is None or images.shape[1:3] == (size, size):
        return images

    def read(i: int) -> np.ndarray:
        return np.asarray(Image.fromarray(images[i]).resize((size, size), Image.Resampling.BILINEAR))

    return stack(read, len(images), size, num_workers)


def channel_moments(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and population standard deviation per channel, scaled to 0..1; from integer sums, so exact."""
    n = images.size // 3
    sums = images.sum((0, 1, 2), dtype=np.int64).tolist()
    squares = np.einsum("nhwc,nhwc->c", images, images, dtype=np.int64).tolist()
    mean = tuple(s / n / 255 for s in sums)
    std = tuple(math.sqrt((n * q - s * s) / n**2) / 255 for s, q in zip(sums, squares, strict=True))
    return mean, tuple(max(s, 1 / 255) for s in std)  # a constant channel is not divided by zero
