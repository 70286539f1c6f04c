"""Image files of any kind, decoded to RGB."""

import math
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.base import DataError, stacked

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # decoders that may run, whatever a file is called
LARGEST_FILE = 2**28  # bytes
LARGE = 2**23  # pixels; of those that Pillow takes at most (89 million) it needs 700 to 1,500 MB


def decoded(files: Sequence[Path], size: int, num_workers: int = 0) -> np.ndarray:
    """(N, size, size, 3) uint8 of image files, resized by Pillow's bilinear filter, which averages where it shrinks."""
    # one thread for the large ones: several would take as much each
    with ThreadPoolExecutor(1) as alone, warnings.catch_warnings():  # set once, outside of the threads
        warnings.simplefilter("ignore")  # of metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return stacked(lambda i: _decode(files[i], size, alone), len(files), size, num_workers)


def _decode(path, size, alone):
    try:
        image = _resized(path, size, LARGE) or alone.submit(_resized, path, size, math.inf).result()
        return np.asarray(image)  # (size, size, 3)
    except Exception as error:  # decoders raise a dozen kinds for a damaged file
        raise DataError(f"cannot read the image {path} ({type(error).__name__}: {error})") from error


def _resized(path, size, most):
    """The image in RGB; None if it has more than `most` pixels."""
    if os.path.getsize(path) > LARGEST_FILE:  # some decoders begin with reading all of it
        raise ValueError(f"more than {LARGEST_FILE:,} bytes")
    with Image.open(path, formats=FORMATS) as image:
        if image.width * image.height > most:
            return None
        image = _rgb(image)
    return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BILINEAR)


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
