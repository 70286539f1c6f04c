"""The labelled part of STL-10, read and checked by torchvision."""

from pathlib import Path

import numpy as np

from dataset.base import DataError, DataSource, resized
from dataset.cache import cached
from dataset.download import fetch

NAMES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")  # of labels 1 .. 10
MOMENTS = (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2712)  # of the 5,000 training images, 96x96
FILES = ("train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin")


def stl10(data_folder: Path, image_size: int | None, download: bool, num_workers: int) -> DataSource:
    """STL-10: 5,000 + 8,000 photographs 96x96, made 32x32, 10 classes (2.6 GB, downloaded).

    image_size changes the 32x32. The unlabelled images are neither needed nor read.
    """
    folder, size = data_folder / "stl10_binary", image_size or 32

    def load() -> DataSource:
        files = [folder / name for name in FILES]
        return cached(folder, "stl10", size, files, lambda: _read(folder, size, num_workers))

    try:
        return load()
    except (FileNotFoundError, NotADirectoryError, RuntimeError):  # the last is torchvision's, for another MD5
        fetch(_labelled(), data_folder, download)
        return load()


def _labelled():
    """torchvision's class without its unlabelled images, whose 2.8 GB it would ask for and hash."""
    from dataset.torchvision_import import torchvision  # takes a second, so only where it is needed

    class STL10(torchvision.datasets.STL10):
        train_list = [entry for entry in torchvision.datasets.STL10.train_list if entry[0] in FILES]

    return STL10


def _read(folder, size, num_workers):
    kind = _labelled()
    train, test = [_split(kind, folder, split, size, num_workers) for split in ("train", "test")]
    return DataSource(*train, *test, len(NAMES), *MOMENTS, NAMES)


def _split(kind, folder, split, size, num_workers):
    try:
        raw = kind(folder.parent, split)
    except ValueError as error:  # it cannot be reshaped
        raise DataError(f"{folder / f'{split}_X.bin'} does not hold a whole number of images 96x96") from error
    n = len(raw.labels)
    if not 0 < n == len(raw.data):
        raise DataError(f"{folder / f'{split}_X.bin'} holds {len(raw.data)} images, {split}_y.bin {n} labels")
    if raw.labels.max() >= len(NAMES):  # label 0 has become 255
        raise DataError(f"{folder / f'{split}_y.bin'} has a label outside of 1 .. {len(NAMES)}")
    images = np.ascontiguousarray(raw.data.transpose(0, 2, 3, 1))  # (N, 96, 96, 3)
    return resized(images, size, num_workers), raw.labels.astype(np.int64)
