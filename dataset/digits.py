"""Handwritten digits: a real data set that needs no download, for first runs and tests."""

from pathlib import Path

import numpy as np
from PIL import Image

from dataset.base import DataError, DataSource, channel_moments, stack

N_TRAIN = 1000


def digits(data_folder: Path, image_size: int | None, download: bool, num_workers: int) -> DataSource:
    """Handwritten digits: 1,000 + 797 grey images 8x8, enlarged to 32x32, 10 classes (comes with scikit-learn).

    The split is stratified and draws no random numbers: sorted by class, every image that begins another
    1,797th / 1,000 is for training.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("the data set digits comes with scikit-learn: pip install scikit-learn") from error

    small, labels = load_digits(return_X_y=True)
    small = (small.reshape(-1, 8, 8).astype(int) * 255 // 16).astype(np.uint8)  # 0..16 -> 0..255
    labels, size = labels.astype(np.int64), image_size or 32

    def enlarge(i: int) -> np.ndarray:
        grey = Image.fromarray(small[i]).resize((size, size), Image.Resampling.BILINEAR)
        return np.asarray(grey)[..., None]  # one value for the three channels

    images = stack(enlarge, len(small), size)
    order = np.argsort(labels, kind="stable")
    taken = np.diff(np.arange(len(labels) + 1) * N_TRAIN // len(labels)) == 1
    train, test = np.sort(order[taken]), np.sort(order[~taken])  # in file order
    moments, names = channel_moments([images[train]]), tuple("0123456789")
    return DataSource(images[train], labels[train], images[test], labels[test], 10, *moments, names, flip=False)
