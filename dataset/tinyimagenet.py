"""TinyImageNet-200, as its official archive unpacks."""

import os
from itertools import pairwise
from pathlib import Path
from shlex import quote

import numpy as np

from dataset.base import DataError, DataSource
from dataset.cache import cached
from dataset.decode import decoded

FOLDER = "tiny-imagenet-200"
MOMENTS = (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)  # of the 100,000 training images, 64x64
LARGEST_LIST = 2**25  # bytes; words.txt has 2.7 MB
FIELDS = 6  # of an annotation: file, class, box


def tinyimagenet(data_folder: Path, image_size: int | None, download: bool, num_workers: int) -> DataSource:
    """TinyImageNet: 100,000 + 10,000 photographs 64x64, made 32x32, 200 classes (248 MB, sh data/get_tinyimagenet.sh).

    image_size changes the 32x32. data_folder holds tiny-imagenet-200/, or is it; val/ is the test set. Classes are
    those of wnids.txt, sorted as torchvision's ImageFolder does; words.txt has their names.
    """
    root = data_folder / FOLDER if (data_folder / FOLDER).is_dir() else data_folder
    wnid_list, annotations, words = root / "wnids.txt", root / "val" / "val_annotations.txt", root / "words.txt"
    if not wnid_list.is_file():
        get = f"sh data/get_tinyimagenet.sh {quote(str(data_folder))}"
        raise DataError(f"{data_folder} has no {FOLDER}/ with a wnids.txt in it; this gets it: {get}")
    wnids = _wnids(wnid_list)
    files = [_class_files(root, wnid) for wnid in wnids]
    train_files = [path for paths in files for path in paths]
    train_labels = np.repeat(np.arange(len(wnids), dtype=np.int64), [len(paths) for paths in files])
    test_files, test_labels = _annotated(annotations, wnids)
    size = image_size or 32

    def read() -> DataSource:
        names = _class_names(words, wnids)
        train, test = decoded(train_files, size, num_workers), decoded(test_files, size, num_workers)
        return DataSource(train, train_labels, test, test_labels, len(wnids), *MOMENTS, names)

    lists = [path for path in (wnid_list, annotations, words) if path.is_file()]
    return cached(root, "tinyimagenet", size, [*lists, *train_files, *test_files], read)


def _lines(path):
    try:
        if not path.is_file() or path.stat().st_size > LARGEST_LIST:
            raise DataError(f"{path} is not a list of at most {LARGEST_LIST:,} bytes")
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path} ({error})") from error


def _jpegs(folder):
    """Names of the images in a folder, sorted as strings."""
    try:
        return sorted(name for name in os.listdir(folder) if name.endswith(".JPEG") and name[0] != ".")
    except OSError as error:
        raise DataError(f"cannot read the folder {folder} ({error.strerror})") from error


def _wnids(path):
    wnids = sorted(line.strip() for line in _lines(path) if line.strip())
    if len(wnids) < 2:
        raise DataError(f"{path} names {len(wnids)} classes where at least two are needed")
    if odd := [wnid for wnid in wnids if not wnid.isalnum()]:  # it is to be the name of a folder
        raise DataError(f"{path} names a class {odd[0][:80]!r}, where letters and digits are expected")
    for wnid, other in pairwise(wnids):
        if wnid == other:
            raise DataError(f"{path} names the class {wnid} twice")
    return wnids


def _class_names(path, wnids):
    """The first of a class's names in words.txt; the wnid of a class that has none there."""
    lines = _lines(path) if path.is_file() else []
    words = dict(line.split("\t", 1) for line in lines if "\t" in line)
    return tuple(words.get(wnid, wnid).split(",")[0] for wnid in wnids)


def _class_files(root, wnid):
    folder = root / "train" / wnid / "images"
    if not folder.is_dir():
        raise DataError(f"{root / 'wnids.txt'} names the class {wnid}, but there is no folder {folder}")
    files = [folder / name for name in _jpegs(folder)]
    if not files:
        raise DataError(f"the class folder {folder} has no images")
    return files


def _annotated(path, wnids):
    """Files and labels of val/, in the order of its annotations; every image has exactly one."""
    folder, label_of = path.parent / "images", {wnid: label for label, wnid in enumerate(wnids)}
    present, labels = set(_jpegs(folder)), {}
    if not present:
        raise DataError(f"the folder {folder} has no images")
    for i, line in enumerate(_lines(path), 1):
        fields = line.split("\t")
        if len(fields) != FIELDS:
            raise DataError(f"{path}, line {i}: {line[:80]!r} is not a file name, a class and a box")
        name, wnid, *_ = fields
        if wnid not in label_of:
            raise DataError(f"{path}, line {i}: the class {wnid} is not in wnids.txt")
        if name not in present:
            raise DataError(f"{path}, line {i}: there is no image {folder / name}")
        if name in labels:
            raise DataError(f"{path}, line {i}: {name} has a line already")
        labels[name] = label_of[wnid]
    if left := present - labels.keys():
        raise DataError(f"{path} has no line for {min(left)} ({len(left)} images of {folder} lack one)")
    return [folder / name for name in labels], np.array(list(labels.values()), np.int64)
