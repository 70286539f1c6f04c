"""Damaged data sets and caches: the images that are there, or one sentence."""

import os
import pickle
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dataset import load_dataset
from tests.reliability.hostile import cases, damaged, misplaced, outcome
from tests.test_dataset import Cifar, MakesFolder, check_equal, check_source
from tests.test_transfer_data import Stl, make_tiny


@pytest.fixture(scope="session")
def sets(tmp_path_factory):
    """Whole data sets, and what they give."""
    root = tmp_path_factory.mktemp("sets")
    make_folder(root / "folder")
    make_tiny(root / "tiny")
    found = SimpleNamespace(root=root, folder=load_dataset("folder", root / "folder", 16))
    found.cache = (root / "folder" / ".distillers_cache" / "folder_16.npz").read_bytes()
    shutil.rmtree(root / "folder" / ".distillers_cache")
    return found


def make_folder(root):
    """Two classes with an image of each format and mode."""
    rng = np.random.default_rng(0)
    kinds = ["png", "jpg", "gif", "bmp", "tiff", "webp", "ppm"]
    modes = ["L", "P", "1", "CMYK"]
    for split, count in (("train", 12), ("test", 3)):
        for c in ("a", "b"):
            (root / split / c).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)).resize((20, 20))
                name = f"{i:02d}.{kinds[i]}" if i < len(kinds) else f"{i:02d}.tif"
                if i == 7:
                    name, image = "07.png", Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 256)
                elif i > 7:
                    image = image.convert(modes[i - 8])
                image.save(root / split / c / name, **({"compression": "tiff_lzw"} if name.endswith("tif") else {}))


def pick_file(folder, rng, pattern="*"):
    return rng.choice(sorted(path for path in folder.rglob(pattern) if path.is_file()))


def load(name, folder, rng, size=16):
    ended = outcome(lambda: load_dataset(name, folder, size, rng.random() < 0.2, rng.choice([0, 2])))
    if ended.code == 0:
        check_source(ended.result, size)
        assert np.isfinite([ended.result.mean, ended.result.std]).all()
    return ended


@cases(150)
def test_image(rng, folder, sets):
    """The other images and all labels stay."""
    shutil.copytree(sets.root / "folder", folder / "data")
    path = pick_file(folder / "data", rng)
    path.write_bytes(damaged(path.read_bytes(), rng))
    ended, want = load("folder", folder / "data", rng), sets.folder
    if ended.code == 0:
        got = ended.result
        assert np.array_equal(got.train_labels, want.train_labels) and got.class_names == want.class_names
        pairs = [(got.train_images, want.train_images), (got.test_images, want.test_images)]
        assert sum((a != b).any(axis=(1, 2, 3)).sum() for a, b in pairs) <= 1
        check_equal(load("folder", folder / "data", rng).result, got)  # from the cache
    return ended


@cases(140)
def test_folders(rng, folder, sets):
    """Links that lead nowhere, pipes, files for folders, odd names."""
    name = rng.choice(["folder", "tiny"])
    shutil.copytree(sets.root / name, folder / "data")
    for _ in range(rng.choice([1, 1, 2, 4])):
        if found := sorted((folder / "data").rglob("*")):
            misplaced(rng.choice(found), rng, sparse=False)
    return load("tinyimagenet" if name == "tiny" else "folder", folder / "data", rng)


@cases(120)
def test_lists_of_tinyimagenet(rng, folder, sets):
    shutil.copytree(sets.root / "tiny", folder / "data")
    path = pick_file(folder / "data", rng, "*.txt")
    path.write_bytes(damaged(path.read_bytes(), rng))
    return load("tinyimagenet", folder / "data", rng)


@cases(100)
def test_table(rng, folder, sets):
    shutil.copytree(sets.root / "folder", folder / "data")
    files = sorted(path.relative_to(folder / "data") for path in (folder / "data").rglob("*.*"))
    rows = [f"{path},{path.parts[1]},{path.parts[0]}" for path in files]
    text = "\n".join(["path,label,split", *rows, ""])
    (folder / "data" / "list.csv").write_bytes(damaged(text.encode(), rng))
    return load("csv", folder / "data", rng)


@cases(80)
def test_cache(rng, folder, sets):
    """It is never believed: the images are decoded again."""
    shutil.copytree(sets.root / "folder", folder / "data")
    (folder / "data" / ".distillers_cache").mkdir()
    (folder / "data" / ".distillers_cache" / "folder_16.npz").write_bytes(damaged(sets.cache, rng))
    ended = load("folder", folder / "data", rng)
    check_equal(ended.result, sets.folder)
    return ended


@cases(160)
def test_checked_by_torchvision(rng, folder):
    """A changed file is not even opened."""
    with pytest.MonkeyPatch.context() as patch:
        kind = rng.choice([10, 100, "stl10"])
        made = Stl(folder / "data", patch.setattr) if kind == "stl10" else Cifar(kind, folder / "data", patch.setattr)
        made.archive.unlink()
        name, size = ("stl10", 96) if kind == "stl10" else (made.name, 32)
        path = pick_file(folder / "data", rng)
        if rng.random() < 0.2:
            misplaced(path, rng, sparse=False)
        else:
            path.write_bytes(rng.choice([damaged(path.read_bytes(), rng), pickle.dumps(MakesFolder("evil"))]))
        ended = load(name, folder / "data", rng, size)
        if ended.code == 0:
            made.check(ended.result, *([size] if kind == "stl10" else []))
    assert not os.path.exists("evil")
    return ended
