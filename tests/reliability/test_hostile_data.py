"""Spoilt data sets and caches: the images that are there, or one sentence."""

import contextlib
import hashlib
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from dataset import DataSource, load_dataset
from dataset.torchvision_import import torchvision
from tests import test_dataset, test_transfer_data
from tests.reliability.hostile import (
    NOWHERE,
    VALUES,
    Outcome,
    cases,
    changed,
    confined,
    damaged,
    misplaced,
    outcome,
    scene,
)
from tests.test_foreign import Call

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def sets(tmp_path_factory):
    """Whole data sets, and what they give."""
    root = tmp_path_factory.mktemp("sets")
    make_folder(root / "folder")
    test_transfer_data.make_tiny(root / "tiny")
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


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def check_source(source, size):
    test_dataset.check_source(source, size)
    assert np.isfinite([source.mean, source.std]).all()


def check_equal(got, want):
    for name, a, b in zip(DataSource._fields, got, want, strict=True):
        assert type(a) is type(b) and np.array_equal(a, b), name


def read_data(name, folder, rng, size=16):
    ended = outcome(lambda: load_dataset(name, folder, size, rng.random() < 0.2, rng.choice([0, 2])))
    if ended.code == 0:
        check_source(ended.result, size)
    return ended


@cases(150)
def test_image(rng, folder, sets):
    """The other images and all labels stay."""
    shutil.copytree(sets.root / "folder", folder / "data")
    path = rng.choice(files(folder / "data"))
    path.write_bytes(damaged(path.read_bytes(), rng))
    ended, want = read_data("folder", folder / "data", rng), sets.folder
    if ended.code == 0:
        got = ended.result
        assert np.array_equal(got.train_labels, want.train_labels) and got.class_names == want.class_names
        pairs = [(got.train_images, want.train_images), (got.test_images, want.test_images)]
        assert sum((a != b).any(axis=(1, 2, 3)).sum() for a, b in pairs) <= 1
        check_equal(read_data("folder", folder / "data", rng).result, got)  # from the cache
    return ended


def misplace_one(folder, rng):
    if found := sorted(folder.rglob("*")):
        misplaced(rng.choice(found), rng)


@cases(80)
def test_image_folder(rng, folder, sets):
    shutil.copytree(sets.root / "folder", folder / "data")
    for _ in range(rng.choice([1, 1, 2, 4])):
        misplace_one(folder / "data", rng)
    return read_data("folder", folder / "data", rng)


@pytest.mark.slow
def test_large_images_are_decoded_one_by_one(tmp_path):
    """Eight threads, eight images of 300 KB that need 450 MB each while they are decoded."""
    for split, count in (("train", 8 * 64), ("test", 1)):
        for c in ("a", "b"):
            (tmp_path / split / c).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / c / "first.png")
            for i in range(count // 2):
                (tmp_path / split / c / f"{i}.png").symlink_to(tmp_path / split / c / "first.png")
    large = tmp_path / "large.png"
    Image.new("L", (9000, 9000)).save(large)
    for i in range(0, 256, 64):
        for c in ("a", "b"):
            (tmp_path / "train" / c / f"{i}.png").unlink()
            (tmp_path / "train" / c / f"{i}.png").symlink_to(large)
    with confined():
        assert outcome(lambda: load_dataset("folder", tmp_path, 8, num_workers=8)).code == 0


FIELDS = [
    "",
    "../../../etc",
    "/etc",
    "..",
    ".",
    "n01",
    "\0",
    "x" * 300,
    "val_0.JPEG",
    "n01/../n02",
    "\u2028",
    "-1",
    "\x1b",
]


@cases(120)
def test_lists_of_tinyimagenet(rng, folder, sets):
    shutil.copytree(sets.root / "tiny", folder / "data")
    path = rng.choice([path for path in files(folder / "data") if path.suffix == ".txt"])
    lines = path.read_text().split("\n")
    i = rng.randrange(len(lines))
    if rng.random() < 0.3:
        lines.insert(i, rng.choice(FIELDS))
    elif rng.random() < 0.6:
        fields = lines[i].split("\t")
        fields[rng.randrange(len(fields))] = rng.choice(FIELDS)
        lines[i] = "\t".join(fields)
    content = "\n".join(lines).encode()
    path.write_bytes(damaged(content, rng) if rng.random() < 0.4 else content)
    return read_data("tinyimagenet", folder / "data", rng)


@cases(60)
def test_folders_of_tinyimagenet(rng, folder, sets):
    shutil.copytree(sets.root / "tiny", folder / "data")
    for _ in range(rng.choice([1, 1, 2])):
        misplace_one(folder / "data", rng)
    return read_data("tinyimagenet", folder / "data", rng)


@cases(12)
def test_archive_of_tinyimagenet(rng, folder):
    """Behind the right checksum, as the user may name another archive."""
    path = folder / "data" / "tiny-imagenet-200.zip"
    path.parent.mkdir()
    member = rng.choice(["../evil", "/evil", "tiny-imagenet-200/../../evil", "evil\\..\\..\\x", "tiny-imagenet-200/x"])
    with zipfile.ZipFile(path, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as file:
        for name in ("tiny-imagenet-200/wnids.txt", "tiny-imagenet-200/words.txt", member):
            file.writestr(zipfile.ZipInfo(name), "n01\nn02\n" * 50)
    if rng.random() < 0.7:
        path.write_bytes(damaged(path.read_bytes(), rng))
    env = os.environ | {"TINYIMAGENET_MD5": hashlib.md5(path.read_bytes()).hexdigest(), "TINYIMAGENET_URL": NOWHERE}
    command = ["sh", str(ROOT / "data" / "get_tinyimagenet.sh"), str(path.parent)]
    done = subprocess.run(command, env=env | {"PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode in (0, 2) and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("\n") == (done.returncode == 2), done.stderr
    left = {path.name for path in path.parent.iterdir()} - {path.name}
    assert left == (set() if done.returncode else {"tiny-imagenet-200"})
    return Outcome(done.returncode, done.stderr, None)


@cases(80)
def test_cache(rng, folder, sets):
    """It is never believed: the images are decoded again."""
    shutil.copytree(sets.root / "folder", folder / "data")
    (folder / "data" / ".distillers_cache").mkdir()
    (folder / "data" / ".distillers_cache" / "folder_16.npz").write_bytes(damaged(sets.cache, rng))
    ended = read_data("folder", folder / "data", rng)
    check_equal(ended.result, sets.folder)
    return ended


def test_a_cache_is_not_waited_for(sets, tmp_path):
    with scene(tmp_path / "case") as folder:
        shutil.copytree(sets.root / "folder", folder / "data")
        (folder / "data" / ".distillers_cache").mkdir()
        os.mkfifo(folder / "data" / ".distillers_cache" / "folder_16.npz")
        check_equal(outcome(lambda: load_dataset("folder", folder / "data", 16)).result, sets.folder)


def odd_arrays(array):
    return [
        *(array.ravel()[:0], array.astype("U9"), array[None], array.T, np.zeros(3), np.full(3, np.nan), np.array(-1)),
        *(np.array("x" * 1000), np.array([1, 2]), np.array(10**15), np.full(24, 7), np.full(24, -1), np.array([None])),
        np.zeros((200, 16, 16, 3), np.uint8),
    ]


@cases(60)
def test_content_of_a_cache(rng, folder, sets):
    """Of these very images, as it says."""
    shutil.copytree(sets.root / "folder", folder / "data")
    load_dataset("folder", folder / "data", 16)
    path = folder / "data" / ".distillers_cache" / "folder_16.npz"
    with np.load(path) as file:
        kept = dict(file)
    name = rng.choice(list(kept))
    kept[name] = rng.choice(odd_arrays(kept[name]))
    if rng.random() < 0.2:
        del kept[name]
    if rng.random() < 0.2:  # gigabytes when unpacked, if they were
        images = np.broadcast_to(np.zeros((), np.uint8), (100_000, 16, 16, 3))
        kept |= {"train_images": images, "train_labels": np.zeros(len(images), np.int64)}
    rng.choice([np.savez, np.savez_compressed])(path, **kept)
    ended = read_data("folder", folder / "data", rng)
    assert ended.code == 0
    return ended


@contextlib.contextmanager
def official(kind, **attributes):
    """torchvision believes these to be the official files."""
    with contextlib.ExitStack() as stack:
        for name, value in {"url": NOWHERE, "tgz_md5": "0" * 32, **attributes}.items():
            stack.enter_context(mock.patch.object(kind, name, value))
        yield


@cases(80)
def test_cifar(rng, folder):
    """A changed file is not even opened by pickle."""
    info = rng.choice([test_dataset.write_cifar10, test_dataset.write_cifar100])(folder / "data")
    info["kind"] = getattr(torchvision.datasets, info["name"].upper())
    path = rng.choice([path for path in files(folder / "data") if path.suffix != ".html"])
    if rng.random() < 0.2:
        misplaced(path, rng, sparse=False)
    elif rng.random() < 0.2:
        path.write_bytes(pickle.dumps(Call(os.mkdir, "evil")))
    else:
        path.write_bytes(damaged(path.read_bytes(), rng))
    with official(info["kind"], **info["patch"] | {"url": NOWHERE}):
        ended = outcome(lambda: load_dataset(info["name"], folder / "data", download=rng.random() < 0.2))
    if ended.code == 0:
        test_dataset.check_cifar(ended.result, info)
    return ended


@cases(100)
def test_content_of_cifar(rng, folder):
    """Behind the right checksum, what does not fit."""
    values = [*VALUES, np.zeros((3, 3072), np.uint8), np.zeros((30, 3072)), np.zeros(3), list(range(30)), ["x"] * 100]
    values += [[label] * n for label in (-1, 3, 99, 100, 0.5, "3") for n in (6, 30)]
    which = rng.choice([test_dataset.write_cifar10, test_dataset.write_cifar100])
    spoilt, written = rng.randrange(7 if which is test_dataset.write_cifar10 else 3), []

    def write(path, content):
        data = pickle.dumps(changed(content, rng, values) if len(written) == spoilt else content, 2)
        written.append(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return hashlib.md5(data).hexdigest()

    with mock.patch.object(test_dataset, "write_pickle", write):
        info = which(folder / "data")
    with official(getattr(torchvision.datasets, info["name"].upper()), **info["patch"]):
        ended = outcome(lambda: load_dataset(info["name"], folder / "data", rng.choice([None, 16]), download=False))
    if ended.code == 0:
        check_source(ended.result, ended.result.train_images.shape[1])
    return ended


@cases(80)
def test_stl10(rng, folder):
    kind = torchvision.datasets.STL10
    with official(kind, train_list=kind.train_list, test_list=kind.test_list):
        small = test_transfer_data.Stl(folder / "data", SimpleNamespace(setattr=setattr))
        path = rng.choice(sorted(small.folder.glob("*.bin")))
        whole = path.read_bytes()
        path.write_bytes(damaged(whole, rng))
        if rng.random() < 0.2:
            misplaced(path, rng, sparse=False)
        elif rng.random() < 0.6:
            small.accept()
            whole = None
        size = rng.choice([32, 96])
        ended = read_data("stl10", folder / "data", rng, size)
    if ended.code == 0 and whole:
        small.check(ended.result, size)
    return ended
