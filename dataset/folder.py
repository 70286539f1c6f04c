"""Any folder of images, one sub-folder per class."""

from pathlib import Path

from dataset.base import DataError, DataSource
from dataset.image_files import label_images, list_classes, load_images


def folder(data_folder: Path, image_size: int | None, download: bool, num_workers: int) -> DataSource:
    """Your own images in data_folder/train/<class>/ and test/<class>/ (or val/), made 32x32 unless told otherwise.

    Classes are the sorted folder names of train/; folders inside a class are followed; hidden files are left out.
    Images of any kind become RGB: of 16-bit grey the high byte counts, an alpha channel is dropped.
    """
    train = data_folder / "train"
    test = data_folder / "test" if (data_folder / "test").is_dir() else data_folder / "val"
    if not (train.is_dir() and test.is_dir()):
        raise DataError(f"{data_folder} needs a folder train/ and a folder test/ or val/, with a folder for each class")
    names = list_classes(train)
    if len(names) < 2:
        raise DataError(f"{train} has only one class, {names[0]!r}, where at least two are needed")
    if unknown := set(list_classes(test)) - set(names):
        raise DataError(f"{test} has a class {min(unknown)!r} that {train} does not have")
    splits = label_images(train, names), label_images(test, names)
    arrays, moments = load_images(data_folder, "folder", image_size or 32, *splits, num_workers)
    return DataSource(*arrays, len(names), *moments, tuple(names))
