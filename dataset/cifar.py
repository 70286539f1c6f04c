"""CIFAR-100 and CIFAR-10, read and checked by torchvision."""

import warnings
from pathlib import Path

import numpy as np

from dataset.base import DataSource, resize
from dataset.download import fetch

# Per-channel mean and standard deviation of the 50,000 training images.
CIFAR100_MOMENTS = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
CIFAR10_MOMENTS = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def cifar100(data_folder: Path, image_size: int | None, download: bool, num_workers: int) -> DataSource:
    """CIFAR-100: 50,000 + 10,000 photographs 32x32, 100 classes (169 MB, downloaded)."""
    return _load("CIFAR100", CIFAR100_MOMENTS, data_folder, image_size, download, num_workers)


def cifar10(data_folder: Path, image_size: int | None, download: bool, num_workers: int) -> DataSource:
    """CIFAR-10: 50,000 + 10,000 photographs 32x32, 10 classes (170 MB, downloaded)."""
    return _load("CIFAR10", CIFAR10_MOMENTS, data_folder, image_size, download, num_workers)


def _load(name, moments, data_folder, image_size, download, num_workers):
    from dataset.torchvision_import import torchvision  # takes a second, so only where it is needed

    cls, arrays = getattr(torchvision.datasets, name), []

    def open_sets() -> list:
        return [cls(data_folder, train=train) for train in (True, False)]

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"dtype\(\): align", UserWarning)  # numpy 2.4, on pickles of Python 2
        try:
            sets = open_sets()
        except RuntimeError:  # a file is missing, or has another MD5 and so has not been unpickled
            fetch(cls, data_folder, download)
            sets = open_sets()
    for part in sets:
        images = np.ascontiguousarray(part.data)  # (N, 32, 32, 3), a view of (N, 3, 32, 32) until here
        arrays += [resize(images, image_size, num_workers), np.array(part.targets, np.int64)]
    return DataSource(*arrays, len(part.classes), *moments, tuple(part.classes))
