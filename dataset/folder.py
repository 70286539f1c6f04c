"""Any folder of images, one sub-folder per class."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.source import DataError, DataSource, moments, stacked

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # decoders that may run, whatever a file is called
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
    train_images = _decoded(train_files, size, num_workers)
    test_images = _decoded(test_files, size, num_workers)
    return DataSource(
        train_images, train_labels, test_images, test_labels, len(names), *moments(train_images), tuple(names)
    )


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


def _decoded(files, size, num_workers):
    with warnings.catch_warnings():  # set once, outside of the threads
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return stacked(lambda i: _decode(files[i], size), len(files), size, num_workers)


def _decode(path, size):
    try:
        with Image.open(path, formats=FORMATS) as image:
            image = _rgb(image)
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        return np.asarray(image)  # (size, size, 3)
    except Exception as error:  # decoders raise a dozen kinds for a damaged file
        raise DataError(f"cannot read the image {path} ({type(error).__name__}: {error})") from error


def _rgb(image):
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip to white
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("grey values do not fit 16 bits")
        return Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point grey has no fixed white")
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # RGB directly warns about a palette with alpha
    return image.convert("RGB")
