"""Decoded sets, kept beside the data: reading one costs a fraction of decoding it."""

import hashlib
import math
import os
import stat
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import PIL

from dataset.base import DataError, DataSource

FOLDER = ".distillers_cache"  # may be deleted at any time
FORMAT = 1  # raised by whoever changes how images are decoded or what a file holds


def cached(folder: Path, name: str, size: int, sources: Iterable[Path], read: Callable[[], DataSource]) -> DataSource:
    """read(), or what it gave before where neither a source's size or time nor the decoder has changed since.

    Raises FileNotFoundError for a source that is missing. A folder that may not be written is only noted.
    """
    path, key = folder / FOLDER / f"{name}_{size}.npz", _key(folder, size, sources)
    source = _load(path, key, size)
    if source is None:
        source = read()
        try:
            _write(path, key, source)
        except OSError as error:
            print(f"note: the decoded images are not kept for the next run ({error})", file=sys.stderr)
    return source


def _key(folder, size, sources):
    """Tells apart what may decode differently; contents are not read, 100,000 files would take too long."""
    parts = [f"{FORMAT} {PIL.__version__} {size}"]
    for path in sources:
        about = os.stat(path)
        if not stat.S_ISREG(about.st_mode):  # a pipe would be waited for, a device read without end
            raise DataError(f"{path} is not a file")
        parts.append(f"{str(path).removeprefix(str(folder))} {about.st_size} {about.st_mtime_ns}")
    return hashlib.sha256("\0".join(parts).encode(errors="backslashreplace")).hexdigest()


def _load(path, key, size):
    """The kept set; None if there is none, if it is of other sources, or damaged."""
    if not path.is_file():  # a pipe would be waited for
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as kept:  # a zip file: it has CRC32s
            if sum(member.file_size for member in kept.zip.infolist()) > path.stat().st_size:  # _write() packs nothing
                return None
            if kept["key"].item() != key:
                return None
            arrays = [kept[name] for name in ("train_images", "train_labels", "test_images", "test_labels")]
            names, n_cls, flip = tuple(kept["class_names"].tolist()), kept["n_cls"].item(), kept["flip"].item()
            mean, std = tuple(kept["mean"].tolist()), tuple(kept["std"].tolist())
        source = DataSource(*arrays, n_cls, mean, std, names, flip)
        return source if _fits(source, size) else None
    except Exception:  # a damaged file raises a dozen kinds
        return None


def _fits(source, size):
    """Whether it is a set of images of this size: an array that was not read to its end has no CRC32."""
    *arrays, n_cls, mean, std, names, flip = source
    pairs = arrays[:2], arrays[2:]
    return (
        all(images.dtype == np.uint8 and images.shape == (len(labels), size, size, 3) for images, labels in pairs)
        and all(labels.dtype == np.int64 and labels.ndim == 1 for _, labels in pairs)
        and all(0 <= labels.min() <= labels.max() < n_cls == len(names) for _, labels in pairs)
        and all(isinstance(name, str) for name in names)
        and type(n_cls) is int
        and len(mean) == len(std) == 3
        and all(map(math.isfinite, mean + std))
        and min(std) > 0
        and isinstance(flip, bool)
    )


def _write(path, key, source):
    path.parent.mkdir(exist_ok=True)
    # A folder of its own: an interrupted run leaves nothing, and two runs do not write one file.
    with TemporaryDirectory(dir=path.parent) as partial:
        temporary = Path(partial) / path.name
        with temporary.open("wb") as file:
            np.savez(file, key=key, **source._asdict())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
