"""Images listed in a table, wherever they are."""

import csv
import unicodedata
from contextlib import suppress
from pathlib import Path

import numpy as np

from dataset.base import DataError, DataSource
from dataset.image_files import load_images

COLUMNS = ("path", "label", "split")
NAMED = 5  # of the files that are missing


def image_list(
    data_folder: Path, image_size: int | None, download: bool, num_workers: int, stream: bool | None = False
) -> DataSource:
    """Your own images in a table with the columns path,label,split, made 32x32 unless told otherwise.

    data_folder is a .csv file in UTF-8, or a folder with exactly one. Paths are relative to the file; a split is train,
    test or val. Rows of val are the test images where no row is of test, and else those that select the best epoch.
    Classes are the labels of the training images, sorted as numbers if all are. Images are read as those of "folder".
    """
    table = data_folder
    if data_folder.is_dir():
        tables = sorted(data_folder.glob("[!.]*.csv"))
        if len(tables) != 1:
            raise DataError(f"{data_folder} has {len(tables)} .csv files where one is expected; name one of them")
        table = tables[0]
    rows = _read_rows(table)
    if not rows["test"]:
        rows["test"], rows["val"] = rows["val"], {}
    names = sorted(set(rows["train"].values()))
    with suppress(ValueError):
        names.sort(key=float)
    if len(names) < 2 or not rows["test"]:
        raise DataError(f"{table} needs training images of two classes or more, and test images")
    for split, of in rows.items():
        if unknown := set(of.values()) - set(names):
            raise DataError(f"{table} has no training image with the label {min(unknown)!r}, which is in {split}")
    number = {name: i for i, name in enumerate(names)}
    splits = [(list(of), np.array([number[label] for label in of.values()], np.int64)) for of in rows.values() if of]
    arrays, moments = load_images(table.parent, f"csv_{table.stem}", image_size or 32, splits, num_workers, stream)
    val_images, val_labels = arrays[4:] or (None, None)
    source = DataSource(*arrays[:4], len(names), *moments, tuple(names))
    return source._replace(val_images=val_images, val_labels=val_labels)


def _read_rows(table):
    """{split: {file: label}} with the splits train, test and val."""
    rows, listed = {"train": {}, "test": {}, "val": {}}, set()
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True, strict=True)
            if missing := [column for column in COLUMNS if column not in (reader.fieldnames or ())]:
                raise DataError(f"{table} needs a first line with path,label,split, and has no {', '.join(missing)}")
            for row in reader:
                path, label, split = ((row[column] or "").strip() for column in COLUMNS)
                where, file = f"{table}, line {reader.line_num}", table.parent / path
                if not path or not label or split not in rows:
                    has = f"{path!r}, {label!r}, {split!r}"
                    raise DataError(f"{where}: needs a path, a label and a split (train, test or val), not {has}")
                if file in listed:
                    raise DataError(f"{where}: {path} is listed a second time")
                listed.add(file)
                rows[split][file] = unicodedata.normalize("NFC", label)
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{table} is not a table in UTF-8 with commas ({error})") from error
    if missing := [str(file) for files in rows.values() for file in files if not file.is_file()]:
        named = ", ".join(missing[:NAMED]) + ", ..." * (len(missing) > NAMED)
        raise DataError(f"{table} lists {len(missing):,} files that do not exist: {named}")
    return rows
