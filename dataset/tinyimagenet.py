"""TinyImageNet-200, as its official archive unpacks or as scripts have sorted it since."""

import os
import re
from collections import Counter
from pathlib import Path
from shlex import quote
from tempfile import TemporaryDirectory

import numpy as np

from dataset.base import DataError, DataSource
from dataset.download import explain_download
from dataset.image_files import label_images, list_classes, list_images, load_images

FOLDER = "tiny-imagenet-200"
URL, MD5 = f"http://cs231n.stanford.edu/{FOLDER}.zip", "90528d7ca1a48142e341f4ef8d21d0de"
MOMENTS = (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)  # of the 100,000 training images, 64x64


def tinyimagenet(
    data_folder: Path, image_size: int | None, download: bool, num_workers: int, stream: bool | None = False
) -> DataSource:
    """TinyImageNet: 100,000 + 10,000 photographs 64x64, made 32x32, 200 classes (248 MB, sh data/get_tinyimagenet.sh).

    image_size changes the 32x32. data_folder holds tiny-imagenet-200/, or is it; val/ is the test set. Classes are
    the sorted folders of train/, as for torchvision's ImageFolder; words.txt has their names. Images may lie in
    <wnid>/ or <wnid>/images/, and val/ may be sorted by class; then its annotations are not needed.
    """
    roots = [data_folder / FOLDER, data_folder, *sorted(data_folder.glob(f"*/{FOLDER}"))]
    root = next((path for path in roots if (path / "wnids.txt").is_file()), None)
    if root is None:
        get = f"sh data/get_tinyimagenet.sh {quote(str(data_folder))}"
        raise DataError(f"{data_folder} has no {FOLDER}/ with a wnids.txt in it; this gets it: {get}")
    classes, words = list_classes(root / "train", Counter()), _read(root / "words.txt")
    splits = label_images(classes, list(classes), Counter()), _label_val(root / "val", list(classes))
    arrays, _ = load_images(root, "tinyimagenet", image_size or 32, splits, num_workers, stream)
    name_of = dict(re.findall(r"^(\w+)\t([^,\n]+)", words, re.MULTILINE))  # the first of several names
    return DataSource(*arrays, len(classes), *MOMENTS, tuple(name_of.get(wnid, wnid) for wnid in classes))


def _read(path):
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _label_val(val, wnids):
    """Images of val/ and their labels: by class folder or, as in the archive, in the order of the annotations."""
    found = {image.name: image for image in list_images(val, Counter())}
    if folders := {wnid: val / wnid for wnid in wnids if (val / wnid).is_dir()}:
        files, labels = label_images(folders, wnids, Counter())
        if odd := (found.keys() - {path.name for path in files}) | (set(wnids) - folders.keys()):
            raise DataError(f"{val} is sorted by class only in part, see {min(odd)}")
        return files, labels
    annotations = val / "val_annotations.txt"  # a file name, a class and a box on each line
    wnid_of = dict(re.findall(r"^(.+?)\t(\w+)\t", _read(annotations), re.MULTILINE))
    odd = [name for name in found.keys() | wnid_of.keys() if name not in found or wnid_of.get(name) not in wnids]
    if odd or not found:
        raise DataError(f"{annotations} and the images of val/ do not fit, see {min(odd, default='val/')}")
    return [found[name] for name in wnid_of], np.array([wnids.index(wnid) for wnid in wnid_of.values()], np.int64)


def download(folder: Path) -> Path:
    """Download TinyImageNet (248 MB) and unpack it in a folder, unless it is there -> folder/tiny-imagenet-200.

    TINYIMAGENET_URL and TINYIMAGENET_MD5 in the environment name another archive. Raises DataError.
    """
    root, archive = folder / FOLDER, folder / f"{FOLDER}.zip"
    url, md5 = os.environ.get("TINYIMAGENET_URL", URL), os.environ.get("TINYIMAGENET_MD5", MD5)
    if not (root / "wnids.txt").is_file():
        from dataset.torchvision_import import torchvision  # takes a second, so only where it is needed

        folder.mkdir(parents=True, exist_ok=True)
        # Unpacked elsewhere and then moved, so that what is half unpacked is never taken for complete.
        with TemporaryDirectory(dir=folder) as partial, explain_download(url, md5, archive):
            torchvision.datasets.utils.download_and_extract_archive(url, folder, partial, archive.name, md5)
            os.replace(Path(partial) / FOLDER, root)
    return root
