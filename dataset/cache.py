"""A cache of decoded images, kept beside the data: reading it takes a fraction of the time of decoding."""

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import PIL

FOLDER = ".distillers_cache"  # may be deleted at any time
FORMAT = 4  # raise it when images are decoded in another way, or other arrays are stored


def load_or_build(
    folder: Path, name: str, size: int, files: Iterable[Path], build: Callable[[], Sequence[np.ndarray]], key: str = ""
) -> Sequence[np.ndarray]:
    """Load the arrays that build() returned before, or build them if a file's size or time, or Pillow, has changed.

    key: what else the arrays depend on. Raises FileNotFoundError for a file that is missing. A folder that cannot be
    written only causes a note.
    """
    path, parts = folder / FOLDER / f"{name}_{size}.npz", [f"{FORMAT} {PIL.__version__} {size} {key}"]
    for file in files:  # their content is not read: for 100,000 files that would take too long
        about = os.stat(file)
        parts.append(f"{str(file).removeprefix(str(folder))} {about.st_size} {about.st_mtime_ns}")
    digest = hashlib.sha256("\0".join(parts).encode(errors="backslashreplace")).hexdigest()

    if path.is_file():
        # Damaged, it raises one of a dozen kinds, or else testzip() finds it by the CRC-32 of every array.
        with suppress(Exception), np.load(path, allow_pickle=False) as cached:
            if cached["key"].item() == digest and cached.zip.testzip() is None:
                return [cached[f"arr_{i}"] for i in range(len(cached.files) - 1)]
    arrays = build()
    try:
        path.parent.mkdir(exist_ok=True)
        # Written elsewhere and then moved: an interrupted run leaves no part, and two runs do not write to one file.
        with TemporaryDirectory(dir=path.parent) as partial:
            np.savez(Path(partial) / path.name, *arrays, key=digest)
            os.replace(Path(partial) / path.name, path)
    except OSError as error:
        print(f"note: the decoded images are not cached for the next run ({error})", file=sys.stderr)
    return arrays
