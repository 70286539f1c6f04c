"""Data sets of image files: listed by class folder, then decoded to RGB once and cached, or streamed."""

import os
import sys
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dataset.base import BLOCK, DataError, ImageFiles, channel_moments, stack
from dataset.cache import load_or_build

SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"}
# Folders and files that other programs leave among images; many more are hidden.
JUNK = {"@eadir", "__macosx", "#recycle", "@recycle", "$recycle.bin", "lost+found"}
JUNK |= {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # decoders that may run, whatever a file is called
REPORTED = 20  # of the files that cannot be read
# Larger sets stay in their files. The same on every machine, so that a run can be resumed on another one.
MOST_GB = 4
SAMPLE = 2048  # images that mean and standard deviation of a streamed set are measured on
Split = tuple[list[Path], np.ndarray]  # files and their labels (N,)


def list_entries(folder: str | Path) -> list[os.DirEntry]:
    """Entries of a folder, sorted by name, without hidden ones and JUNK. Raises DataError for a dead link."""
    entries = [e for e in os.scandir(folder) if not e.name.startswith(".") and e.name.lower() not in JUNK]
    for entry in entries:
        if entry.is_symlink() and not os.path.exists(entry.path):
            raise DataError(f"{entry.path} is a link to {os.readlink(entry.path)}, which does not exist")
    return sorted(entries, key=lambda entry: entry.name)


def _suffix(entry):
    return os.path.splitext(entry.name)[1].lower() or "without a suffix"


def list_classes(split: Path, left_out: Counter) -> dict[str, Path]:
    """List the class folders, {name in NFC: folder}, sorted; files beside them are counted in left_out by suffix."""
    classes = {}
    for entry in list_entries(split):
        name = unicodedata.normalize("NFC", entry.name)  # macOS writes accents apart from their letters
        if not entry.is_dir():
            left_out[_suffix(entry)] += 1
        elif name in classes:
            raise DataError(f"{split} has two folders of the class {name!r}, with its accents written in two ways")
        else:
            classes[name] = Path(entry.path)
    return dict(sorted(classes.items()))


def label_images(folders: dict[str, Path], names: Sequence[str], left_out: Counter) -> Split:
    """List the images of class folders in the order of names; a label is the index of the class in names."""
    files, labels = [], []
    for label, name in enumerate(names):
        if name in folders:
            found = list_images(folders[name], left_out)
            if not found:
                raise DataError(f"the class folder {folders[name]} has no images")
            files += found
            labels += [label] * len(found)
    return files, np.array(labels, np.int64)


def list_images(folder: Path, left_out: Counter) -> list[Path]:
    """List the images below a folder, at any depth, sorted by path; other files are counted in left_out by suffix.

    Links are followed. Each folder is entered once, and none above this one, as links may lead in circles.
    """
    real = Path(os.path.realpath(folder))
    entered, waiting, found = {real, *real.parents}, [folder], []
    while waiting:
        for entry in list_entries(waiting.pop()):
            if entry.is_dir():
                real = Path(os.path.realpath(entry.path))
                waiting += [entry.path] if real not in entered else []
                entered.add(real)
            elif _suffix(entry) in SUFFIXES and entry.is_file():
                found.append(Path(entry.path))
            else:
                left_out[_suffix(entry)] += 1
    return sorted(found, key=Path.as_posix)


def load_images(
    root: Path, name: str, size: int, splits: Sequence[Split], num_workers: int, stream: bool | None
) -> tuple[list[np.ndarray | ImageFiles], list[tuple[float, ...]]]:
    """Load splits, the first of which is for training -> [images, labels, images, ...], (mean and std of training).

    They are decoded, or come from the cache; with stream, or if that is None and they would take more than MOST_GB,
    they remain files. Mean and std are then those of SAMPLE evenly spaced training images, which are cached, too.
    """
    files = [file for split, _ in splits for file in split]
    gigabytes = len(files) * size * size * 3 / 1e9
    if stream is None and (stream := gigabytes > MOST_GB):
        print(f"note: images are read again in every epoch, as all would take {gigabytes:.1f} GB", file=sys.stderr)
    images: list[np.ndarray | ImageFiles]
    if stream:
        train = splits[0][0]
        n = min(len(train), SAMPLE)
        sample = [train[i * len(train) // n] for i in range(n)]

        def measure() -> list[np.ndarray]:
            step = 8 * BLOCK
            parts = (decode(sample[i : i + step], size, num_workers, "mean and std") for i in range(0, n, step))
            return [np.array(channel_moments(parts))]

        (moments,) = load_or_build(root, f"{name}_sample", size, sample, measure)
        images = [ImageFiles(split, size, root) for split, _ in splits]
    else:
        ends = np.cumsum([len(split) for split, _ in splits])

        def build() -> list[np.ndarray]:
            decoded = decode(files, size, num_workers, "decoding")  # in one pass, to report all that cannot be read
            parts = np.split(decoded, ends[:-1])
            return [*parts, np.array(channel_moments(parts[:1]))]  # (2, 3)

        *images, moments = load_or_build(root, name, size, files, build, str(ends))
    arrays = [array for part, (_, labels) in zip(images, splits, strict=True) for array in (part, labels)]
    return arrays, [tuple(values) for values in moments.tolist()]


def decode(
    files: Sequence[Path],
    size: int,
    num_workers: int = 0,
    bar: str | None = None,
    view: Callable[[Image.Image, int], Image.Image] | None = None,
) -> np.ndarray:
    """Decode image files -> (N, size, size, 3) uint8: the middle square, resized by Pillow's bilinear filter.

    view: makes another view than that of image number i. Raises DataError with all files that cannot be read, the
    first REPORTED of them by name.
    """
    failed = {}

    def read(i: int) -> np.ndarray:
        try:
            image = _open(files[i])
            image = view(image, i) if view else ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
            return np.asarray(image)
        except Exception as error:  # decoders raise a dozen kinds for a damaged file
            reason = "not an image" if isinstance(error, UnidentifiedImageError) else f"{type(error).__name__}: {error}"
            failed[i] = f"{files[i]} ({reason})"
            return np.zeros((size, size, 3), np.uint8)

    with warnings.catch_warnings():  # here, as this is not thread-safe
        warnings.simplefilter("ignore")  # about metadata
        images = stack(read, len(files), size, num_workers, bar)
    if failed:
        names = ", ".join(failed[i] for i in sorted(failed)[:REPORTED]) + ", ..." * (len(failed) > REPORTED)
        raise DataError(f"cannot read {len(failed):,} of {len(files):,} images: {names}")
    return images


def _open(path):
    with Image.open(path, formats=FORMATS) as image:
        image.load()
        with suppress(Exception):  # EXIF data is often damaged, and then an image is used as it is stored
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip to white
            grey = np.asarray(image)
            if grey.min() < 0 or grey.max() > 65535:
                raise ValueError("grey values do not fit 16 bits")
            image = Image.fromarray((grey >> 8).astype(np.uint8))
        elif image.mode == "F":
            raise ValueError("floating-point grey has no fixed white")
        elif image.mode in ("P", "PA"):
            image = image.convert("RGBA")  # RGB directly warns about a palette with alpha
        return image.convert("RGB")
