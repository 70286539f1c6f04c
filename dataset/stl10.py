"""The labelled part of STL-10, read and checked by torchvision."""

from pathlib import Path

import numpy as np

from dataset.base import DataSource, resize
from dataset.cache import load_or_build
from dataset.download import fetch

NAMES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
MOMENTS = (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2712)  # of the 5,000 training images, 96x96
FILES = ("train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin")


def stl10(data_folder: Path, image_size: int | None, download: bool, num_workers: int) -> DataSource:
    """STL-10: 5,000 + 8,000 photographs 96x96, made 32x32, 10 classes (2.6 GB, downloaded).

    image_size changes the 32x32. The unlabelled images are neither needed nor read.
    """
    folder, size = data_folder / "stl10_binary", image_size or 32

    def build() -> list[np.ndarray]:
        arrays = []
        for split in ("train", "test"):
            raw = _labelled()(data_folder, split)
            images = np.ascontiguousarray(raw.data.transpose(0, 2, 3, 1))  # (N, 96, 96, 3)
            arrays += [resize(images, size, num_workers), raw.labels.astype(np.int64)]
        return arrays

    def load() -> DataSource:
        arrays = load_or_build(folder, "stl10", size, [folder / name for name in FILES], build)
        return DataSource(*arrays, len(NAMES), *MOMENTS, NAMES)

    try:
        return load()
    except (FileNotFoundError, NotADirectoryError, RuntimeError):  # the last is torchvision's, for another MD5
        fetch(_labelled(), data_folder, download)
        return load()


def _labelled():
    """torchvision's class without its unlabelled images, whose 2.8 GB it would ask for and hash."""
    from dataset.torchvision_import import torchvision  # takes a second, so only where it is needed

    official = torchvision.datasets.STL10
    return type("STL10", (official,), {"train_list": [entry for entry in official.train_list if entry[0] in FILES]})
