"""Decoded sets, kept beside the data: reading one costs a fraction of decoding it."""

import hashlib
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import PIL

from dataset.source import DataSource

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
        stat = os.stat(path)
        parts.append(f"{str(path).removeprefix(str(folder))} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\0".join(parts).encode(errors="backslashreplace")).hexdigest()


def _load(path, key, size):
    """The kept set; None if there is none, if it is of other sources, or damaged."""
    try:
        with np.load(path, allow_pickle=False) as kept:  # a zip file: it compares every array's CRC32
            if kept["key"].item() != key:
                return None
            arrays = [kept[name] for name in ("train_images", "train_labels", "test_images", "test_labels")]
            names, n_cls, flip = tuple(kept["class_names"].tolist()), kept["n_cls"].item(), kept["flip"].item()
            mean, std = tuple(kept["mean"].tolist()), tuple(kept["std"].tolist())
    except Exception:  # a damaged file raises a dozen kinds
        return None
    for images, labels in (arrays[:2], arrays[2:]):
        if images.shape != (len(labels), size, size, 3):  # an array that was not read to its end has no CRC32
            return None
    return DataSource(*arrays, n_cls, mean, std, names, flip)


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
