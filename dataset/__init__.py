"""Data sets by name: uint8 arrays, decoded once, or image files that are streamed."""

from difflib import get_close_matches
from inspect import signature
from pathlib import Path

from dataset.base import DataError, DataSource, ImageFiles
from dataset.cifar import cifar10, cifar100
from dataset.digits import digits
from dataset.folder import folder
from dataset.image_list import image_list
from dataset.stl10 import stl10
from dataset.tinyimagenet import tinyimagenet

__all__ = ["DataError", "DataSource", "ImageFiles", "dataset_dict", "load_dataset"]

# The first line of each function's docstring is what --help shows.
dataset_dict = {
    "cifar100": cifar100,
    "cifar10": cifar10,
    "stl10": stl10,
    "tinyimagenet": tinyimagenet,
    "digits": digits,
    "folder": folder,
    "csv": image_list,
}


def load_dataset(
    name: str,
    data_folder: str | Path,
    image_size: int | None = None,
    download: bool = True,
    num_workers: int = 0,
    test_folder: str | None = None,
    stream: bool | None = False,
) -> DataSource:
    """Load a data set by name, resized to image_size if that is given. Raises DataError or OSError.

    test_folder: for the data set "folder", where its test images are, instead of test/ or val/
    stream: leave images in their files, for a StreamLoader; None does so for sets of more than 4 GB
    """
    if name not in dataset_dict:
        closest = get_close_matches(name, dataset_dict, len(dataset_dict), cutoff=0)
        raise DataError(f"unknown data set {name!r}, known are: {', '.join(closest)}")
    load = dataset_dict[name]
    taken = signature(load).parameters
    if test_folder and "test_folder" not in taken:
        raise DataError(f"--test_folder: the data set {name} has a test set of its own")
    if stream and "stream" not in taken:
        raise DataError(f"--stream: the data set {name} is always kept in memory, as it is not one of image files")
    chosen = {key: value for key, value in {"test_folder": test_folder, "stream": stream}.items() if key in taken}
    return load(Path(data_folder), image_size, download, num_workers, **chosen)
