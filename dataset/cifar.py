"""CIFAR-100 and CIFAR-10, read and checked by torchvision."""

import warnings
from pathlib import Path

import numpy as np

from dataset.base import DataError, DataSource, resized
from dataset.download import fetch

# Per-channel mean and standard deviation of the 50,000 training images.
CIFAR100_MOMENTS = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
CIFAR10_MOMENTS = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def cifar100(data_folder: Path, image_size: int | None, download: bool, num_workers: int) -> DataSource:
    """CIFAR-100: 50,000 + 10,000 photographs 32x32, 100 classes (169 MB, downloaded)."""
    return _read("CIFAR100", CIFAR100_MOMENTS, data_folder, image_size, download, num_workers)


def cifar10(data_folder: Path, image_size: int | None, download: bool, num_workers: int) -> DataSource:
    """CIFAR-10: 50,000 + 10,000 photographs 32x32, 10 classes (170 MB, downloaded)."""
    return _read("CIFAR10", CIFAR10_MOMENTS, data_folder, image_size, download, num_workers)


def _read(name, moments, data_folder, image_size, download, num_workers):
    from dataset.torchvision_import import torchvision  # takes a second, so only where it is needed

    kind = getattr(torchvision.datasets, name)
    try:
        names, *sets = _open(kind, data_folder)
    except RuntimeError:  # torchvision's, for a file that is missing or has another MD5
        fetch(kind, data_folder, download)
        names, *sets = _open(kind, data_folder)
    train, test = [(resized(images, image_size, num_workers), labels) for images, labels in sets]
    return DataSource(*train, *test, len(names), *moments, names)


def _open(kind, data_folder):
    """Classes, training and test set; torchvision unpickles a file only after its MD5 has matched."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"dtype\(\): align", UserWarning)  # numpy 2.4.0, of Python 2 pickles
            sets = [kind(data_folder, train=train) for train in (True, False)]
        names = tuple(sets[0].classes)
        # (N, 32, 32, 3), a view of (N, 3, 32, 32) until here
        pairs = [(np.ascontiguousarray(s.data), np.array(s.targets, np.int64)) for s in sets]
        if not all(isinstance(name, str) for name in names) or not all(_fit(*pair, len(names)) for pair in pairs):
            raise ValueError("images, labels and classes do not fit")
    except RuntimeError:
        raise
    except Exception as error:  # pickles hold anything
        raise DataError(f"{data_folder / kind.base_folder} is not {kind.__name__} ({error})") from error
    return names, *pairs


def _fit(images, labels, n_cls):
    return images.dtype == np.uint8 and labels.shape == (len(images),) and 0 <= labels.min() <= labels.max() < n_cls
