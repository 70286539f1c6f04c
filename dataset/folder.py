"""Any folder of images, one sub-folder per class."""

import sys
from collections import Counter
from pathlib import Path

from dataset.base import DataError, DataSource
from dataset.image_files import label_images, list_classes, load_images


def folder(
    data_folder: Path,
    image_size: int | None,
    download: bool,
    num_workers: int,
    test_folder: str | None = None,
    stream: bool | None = False,
) -> DataSource:
    """Your own images in data_folder/train/<class>/ and test/<class>/ (or val/), made 32x32 unless told otherwise.

    Classes are the sorted folder names of train/; folders inside a class and links are followed. Hidden files are left
    out, and so are formats that are not read, which a note on stderr counts by suffix. val/ is read instead of a test/
    that is not sorted by class; test_folder names another.
    Images of any kind become RGB: of 16-bit grey the high byte counts, an alpha channel is dropped. Their middle square
    is what is resized.
    """
    train, notes = data_folder / "train", []
    left_out: Counter[str] = Counter()
    tests = [data_folder / name for name in ([test_folder] if test_folder else ["test", "val"])]
    existing = [path for path in tests if path.is_dir()]
    if not (train.is_dir() and existing):
        needed = " or ".join(f"{path.relative_to(data_folder)}/" for path in tests)
        raise DataError(f"{data_folder} needs folders train/ and {needed}, with a folder for each class in them")
    classes = list_classes(train, left_out)
    if len(classes) < 2:
        raise DataError(f"{train} has {len(classes)} class folders, where at least two are needed")
    test = existing[0]
    if len(existing) > 1 and not list_classes(test, Counter()).keys() & classes.keys():
        notes.append(f"{test} has no folder of a class in train/, so the test images are those of {existing[1]}")
        test = existing[1]
    test_classes = list_classes(test, left_out)
    if not test_classes:
        raise DataError(f"{test} has no class folders")
    if unknown := test_classes.keys() - classes.keys():
        raise DataError(f"{test} has a class {min(unknown)!r} that {train} does not have")
    names = list(classes)
    splits = label_images(classes, names, left_out), label_images(test_classes, names, left_out)
    arrays, moments = load_images(data_folder, "folder", image_size or 32, splits, num_workers, stream)
    if left_out:
        kinds = ", ".join(f"{n:,} {kind if kind.isprintable() else '?'}" for kind, n in left_out.most_common(10))
        notes.append(f"left out of {data_folder} (not in a class folder, or not in a format that is read): {kinds}")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return DataSource(*arrays, len(names), *moments, tuple(names))
