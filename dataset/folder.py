"""Any folder of images, one sub-folder per class."""

from pathlib import Path

import numpy as np

from dataset.base import DataError, DataSource, moments
from dataset.cache import cached
from dataset.decode import decoded

SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"}


def folder(data_folder: Path, image_size: int | None, download: bool, num_workers: int) -> DataSource:
    """Your own images in data_folder/train/<class>/ and test/<class>/ (or val/), made 32x32 unless told otherwise.

    Classes are the sorted folder names of train/; folders inside a class are followed; hidden files are left out.
    Images of any kind become RGB: of 16-bit grey the high byte counts, an alpha channel is dropped.
    """
    if not data_folder.is_dir():
        raise DataError(f"the data folder {data_folder} does not exist")
    train_folder = data_folder / "train"
    test_folder = data_folder / "test" if (data_folder / "test").is_dir() else data_folder / "val"
    if not train_folder.is_dir():
        raise DataError(f"{data_folder} has no folder train/ with one folder per class in it")
    if not test_folder.is_dir():
        raise DataError(f"{data_folder} has neither a folder test/ nor val/ with one folder per class in it")

    names = _class_names(train_folder)
    if len(names) < 2:
        raise DataError(f"{train_folder} has only one class, {names[0]!r}, where at least two are needed")
    for name in _class_names(test_folder):
        if name not in names:
            raise DataError(f"{test_folder} has a class {name!r} that {train_folder} does not have")
    train_files, train_labels = _list_files(train_folder, names)
    test_files, test_labels = _list_files(test_folder, names)

    size = image_size or 32

    def read() -> DataSource:
        train, test = decoded(train_files, size, num_workers), decoded(test_files, size, num_workers)
        return DataSource(train, train_labels, test, test_labels, len(names), *moments(train), tuple(names))

    return cached(data_folder, "folder", size, [*train_files, *test_files], read)


def _class_names(split):
    names = sorted(path.name for path in split.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise DataError(f"{split} has no class folders")
    return names


def _list_files(split, names):
    files, labels = [], []
    for label, name in enumerate(names):
        if not (split / name).is_dir():  # a class without test images
            continue
        found = sorted((path for path in (split / name).rglob("*") if _is_image(path, split)), key=Path.as_posix)
        if not found:
            raise DataError(f"the class folder {split / name} has no images")
        files += found
        labels += [label] * len(found)
    return files, np.array(labels, np.int64)


def _is_image(path, split):
    hidden = any(part.startswith(".") for part in path.relative_to(split).parts)
    return path.suffix.lower() in SUFFIXES and not hidden and path.is_file()
