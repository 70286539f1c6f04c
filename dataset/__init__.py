"""Data sets by name: whole sets as uint8 arrays, read once."""

from difflib import SequenceMatcher
from pathlib import Path

from dataset.base import DataError, DataSource
from dataset.cifar import cifar10, cifar100
from dataset.digits import digits
from dataset.folder import folder
from dataset.stl10 import stl10
from dataset.tinyimagenet import tinyimagenet

__all__ = ["DataError", "DataSource", "dataset_dict", "load_dataset"]

# The first line of each function's docstring is what --help shows.
dataset_dict = {
    "cifar100": cifar100,
    "cifar10": cifar10,
    "stl10": stl10,
    "tinyimagenet": tinyimagenet,
    "digits": digits,
    "folder": folder,
}


def load_dataset(
    name: str, data_folder: str | Path, image_size: int | None = None, download: bool = True, num_workers: int = 0
) -> DataSource:
    """The data set of this name, resized once where image_size is not the set's own."""
    if name not in dataset_dict:
        closest = sorted(dataset_dict, key=lambda known: -SequenceMatcher(None, name, known).ratio())
        raise DataError(f"unknown data set {name!r}, known are: {', '.join(closest)}")
    if image_size is not None and image_size < 1:
        raise DataError(f"image_size must be at least 1, got {image_size}")
    return dataset_dict[name](Path(data_folder), image_size, download, num_workers)
