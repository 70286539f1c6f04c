"""Handwritten digits: a real data set that needs no download, for first runs and tests."""

from pathlib import Path

import numpy as np
from PIL import Image

from dataset.base import DataError, DataSource, moments, stacked

N_TRAIN = 1000


def digits(data_folder: Path, image_size: int | None, download: bool, num_workers: int) -> DataSource:
    """Handwritten digits: 1,000 + 797 grey images 8x8, enlarged to 32x32, 10 classes (comes with scikit-learn)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("the data set digits comes with scikit-learn: pip install scikit-learn") from error

    small, labels = load_digits(return_X_y=True)
    small = (small.reshape(-1, 8, 8).astype(int) * 255 // 16).astype(np.uint8)  # 0..16 -> 0..255
    size = image_size or 32

    def enlarged(i: int) -> np.ndarray:
        grey = Image.fromarray(small[i]).resize((size, size), Image.Resampling.BILINEAR)
        return np.asarray(grey)[..., None]  # one value for the three channels

    images = stacked(enlarged, len(small), size)
    labels = labels.astype(np.int64)
    train, test = _split(labels)
    names = tuple("0123456789")
    return DataSource(
        images[train], labels[train], images[test], labels[test], 10, *moments(images[train]), names, flip=False
    )


def _split(labels):
    """Indices of N_TRAIN training images and of the others, in file order, with equal shares of every class.

    Taken at equal distances from the images sorted by class: no random numbers, so the same everywhere.
    """
    order = np.argsort(labels, kind="stable")
    taken = np.diff(np.arange(len(labels) + 1) * N_TRAIN // len(labels)) == 1
    return np.sort(order[taken]), np.sort(order[~taken])
