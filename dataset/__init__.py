"""Data sets by name: whole sets as uint8 arrays, read once."""

from difflib import get_close_matches
from inspect import signature
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
    name: str,
    data_folder: str | Path,
    image_size: int | None = None,
    download: bool = True,
    num_workers: int = 0,
    test_folder: str | None = None,
) -> DataSource:
    """Load a data set by name, resized to image_size if that is given. Raises DataError or OSError.

    test_folder: for the data set "folder", where its test images are, instead of test/ or val/
    """
    if name not in dataset_dict:
        closest = get_close_matches(name, dataset_dict, len(dataset_dict), cutoff=0)
        raise DataError(f"unknown data set {name!r}, known are: {', '.join(closest)}")
    load, chosen = dataset_dict[name], {"test_folder": test_folder} if test_folder else {}
    if not chosen.keys() <= signature(load).parameters.keys():
        raise DataError(f"--test_folder: the data set {name} has a test set of its own")
    return load(Path(data_folder), image_size, download, num_workers, **chosen)
