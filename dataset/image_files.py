"""Data sets of image files: listed by class folder, decoded to RGB, cached."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.base import DataError, channel_moments, stack
from dataset.cache import load_or_build

SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"}
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # decoders that may run, whatever a file is called
Split = tuple[list[Path], np.ndarray]  # files and their labels (N,)


def list_classes(split: Path) -> list[str]:
    """Sorted names of the class folders; hidden ones are left out."""
    names = sorted(path.name for path in split.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise DataError(f"{split} has no class folders")
    return names


def label_images(split: Path, names: Sequence[str]) -> Split:
    """Images of the class folders that are there; a label is the class's place in names."""
    files, labels = [], []
    for label, name in enumerate(names):
        if (split / name).is_dir():
            found = list_images(split / name)
            if not found:
                raise DataError(f"the class folder {split / name} has no images")
            files += found
            labels += [label] * len(found)
    return files, np.array(labels, np.int64)


def list_images(folder: Path) -> list[Path]:
    """Images below a folder, at any depth, sorted by path; hidden files are left out."""
    paths = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
    hidden = [any(part.startswith(".") for part in path.relative_to(folder).parts) for path in paths]
    return sorted((path for path, left_out in zip(paths, hidden, strict=True) if not left_out), key=Path.as_posix)


def load_images(
    root: Path, name: str, size: int, train: Split, test: Split, num_workers: int
) -> tuple[Sequence[np.ndarray], Sequence[tuple[float, ...]]]:
    """Decode both splits, or load them from the cache -> (images and labels of both), (mean and std of train)."""

    def build() -> list[np.ndarray]:
        images = [decode(files, size, num_workers) for files, _ in (train, test)]
        return [*images, np.array(channel_moments(images[0]))]  # (2, 3)

    train_images, test_images, moments = load_or_build(root, name, size, train[0] + test[0], build)
    return (train_images, train[1], test_images, test[1]), [tuple(values) for values in moments.tolist()]


def decode(files: Sequence[Path], size: int, num_workers: int = 0) -> np.ndarray:
    """Decode image files -> (N, size, size, 3) uint8, resized by Pillow's bilinear filter. Raises DataError."""

    def read(i: int) -> np.ndarray:
        try:
            return np.asarray(_open(files[i], size))
        except Exception as error:  # decoders raise a dozen kinds for a damaged file
            raise DataError(f"cannot read the image {files[i]} ({type(error).__name__}: {error})") from error

    with warnings.catch_warnings():  # here, as this is not thread-safe
        warnings.simplefilter("ignore")  # about metadata
        return stack(read, len(files), size, num_workers)


def _open(path, size):
    with Image.open(path, formats=FORMATS) as image:
        if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip to white
            grey = np.asarray(image)
            if grey.min() < 0 or grey.max() > 65535:
                raise ValueError("grey values do not fit 16 bits")
            image = Image.fromarray((grey >> 8).astype(np.uint8))
        elif image.mode == "F":
            raise ValueError("floating-point grey has no fixed white")
        elif image.mode in ("P", "PA"):
            image = image.convert("RGBA")  # RGB directly warns about a palette with alpha
        image = image.convert("RGB")
    return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BILINEAR)
