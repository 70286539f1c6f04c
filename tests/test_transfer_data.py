"""STL-10 and TinyImageNet in their official layouts, the cache of decoded images, and the script that gets one."""

import hashlib
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import tarfile
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image

from dataset import DataError, DataSource, load_dataset
from dataset.tinyimagenet import download
from dataset.torchvision_import import torchvision
from tests.test_dataset import NOWHERE, MakesFolder, check_equal, check_source, python, refuse, remove, save, serve

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "data" / "get_tinyimagenet.sh"


def shrink(image: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))


# --- STL-10


class Stl:
    """A small STL-10 in `root`, and torchvision's checksums replaced by its own."""

    names = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
    moments = (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2712)

    def __init__(self, root: Path, setattr):
        self.root, self.folder, self.cls = root, root / "stl10_binary", torchvision.datasets.STL10
        rng = np.random.default_rng(0)
        self.folder.mkdir(parents=True)
        self.images, self.labels = {}, {}
        for split, n in (("train", 20), ("test", 11)):
            self.images[split] = rng.integers(0, 256, (n, 96, 96, 3), dtype=np.uint8)
            self.labels[split] = rng.permutation(np.arange(n) % 10)
            # channel by channel, each column by column
            data = np.transpose(self.images[split], (0, 3, 2, 1)).tobytes()
            (self.folder / f"{split}_X.bin").write_bytes(data)
            (self.folder / f"{split}_y.bin").write_bytes(bytes(int(label) + 1 for label in self.labels[split]))
        md5 = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in self.folder.glob("*.bin")}
        for which in ("train_list", "test_list"):  # the unlabelled images are not there
            names = [name for name, _ in getattr(self.cls, which)]
            setattr(self.cls, which, [[name, md5.get(name, "0" * 32)] for name in names])
        self.archive = root.parent / self.cls.filename
        with tarfile.open(self.archive, "w:gz") as tar:
            tar.add(self.folder, self.cls.base_folder)
        setattr(self.cls, "tgz_md5", hashlib.md5(self.archive.read_bytes()).hexdigest())
        setattr(self.cls, "url", NOWHERE)

    def check(self, source: DataSource, size: int):
        check_source(source, size)
        assert (source.n_cls, source.class_names, source.flip) == (10, self.names, True)
        assert (source.mean, source.std) == self.moments
        for split in ("train", "test"):
            assert getattr(source, f"{split}_labels").tolist() == self.labels[split].tolist()
            for got, image in zip(getattr(source, f"{split}_images"), self.images[split], strict=True):
                assert np.array_equal(got, shrink(image, size))


@pytest.fixture
def stl(tmp_path, monkeypatch):
    return Stl(tmp_path / "root", monkeypatch.setattr)


@pytest.mark.parametrize(("image_size", "size"), [(None, 32), (96, 96), (40, 40)])
def test_stl10(stl, image_size, size):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):  # the second time from the cache
            stl.check(load_dataset("stl10", stl.root, image_size, download=False, num_workers=size % 3), size)


@pytest.mark.parametrize("name", ["train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin"])
@pytest.mark.parametrize("damage", ["changed", "truncated", "missing"])
def test_stl10_damaged_file(stl, name, damage):
    load_dataset("stl10", stl.root, download=False)  # a cache of the whole file helps nobody
    path = stl.folder / name
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(data[:-1] if damage == "truncated" else bytes([data[0] ^ 1]) + data[1:])
        os.utime(path, (0, 0))
    said = refuse("stl10", stl.root, download=False)
    assert stl.cls.url in said and stl.cls.tgz_md5 in said and str(stl.root / stl.cls.filename) in said


def test_stl10_download_and_archive_by_hand(stl, tmp_path, monkeypatch, capfd):
    (tmp_path / "by_hand").mkdir()
    assert str(tmp_path / "by_hand" / stl.cls.filename) in refuse("stl10", tmp_path / "by_hand", download=False)
    shutil.copy(stl.archive, tmp_path / "by_hand")
    stl.check(load_dataset("stl10", tmp_path / "by_hand", download=False), 32)
    (stl.folder / "test_X.bin").unlink()
    with serve(stl.archive.read_bytes(), monkeypatch) as server:
        monkeypatch.setattr(stl.cls, "url", server["url"])
        for root in (tmp_path / "new", stl.root):  # nothing is there; a file is missing
            stl.check(load_dataset("stl10", root), 32)
            assert sorted(path.name for path in root.iterdir()) == ["stl10_binary", stl.cls.filename]
        asked = server["asked"]
        stl.check(load_dataset("stl10", stl.root, 48), 48)
        assert server["asked"] == asked
    assert capfd.readouterr() == ("", "")


# --- TinyImageNet

WNIDS = ["n03", "n01", "n02"]  # unsorted, as in the archive
VAL = ("n02", "n03", "n02", "n01", "n01", "n03", "n03")


def picture(seed: int, mode: str = "RGB", size: int = 64) -> Image.Image:
    """Smooth, so that JPEG keeps it."""
    colours = np.random.default_rng(seed).integers(0, 256, (4, 4, len(mode)), dtype=np.uint8)
    bands = [Image.fromarray(colours[..., i]).resize((size, size)) for i in range(len(mode))]
    return Image.merge(mode, bands)


def make_tiny(root: Path) -> Path:
    """Three classes of four training images and two or three of val/, in root/tiny-imagenet-200."""
    tiny = root / "tiny-imagenet-200"
    for c, wnid in enumerate(WNIDS):
        for i, number in enumerate((0, 1, 2, 10)):
            mode = {(0, 0): "L", (1, 3): "CMYK"}.get((c, i), "RGB")
            save(tiny / "train" / wnid / "images" / f"{wnid}_{number}.JPEG", picture(10 * c + i, mode), quality=95)
        (tiny / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t63\t63\n")
    for i in range(len(VAL)):
        save(tiny / "val" / "images" / f"val_{i}.JPEG", picture(100 + i, "L" if i == 4 else "RGB"), quality=95)
    lines = [f"val_{i}.JPEG\t{wnid}\t0\t32\t44\t62\n" for i, wnid in enumerate(VAL)]
    (tiny / "val" / "val_annotations.txt").write_text("".join(lines))
    save(tiny / "test" / "images" / "test_0.JPEG", picture(200))
    (tiny / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    (tiny / "words.txt").write_text("n00\tentity\nn01\tgoldfish, Carassius auratus\nn02\tice lolly, lolly\n")
    return tiny


@pytest.fixture
def tiny(tmp_path):
    return make_tiny(tmp_path / "data")


def load_tiny(tiny: Path, **options) -> DataSource:
    return load_dataset("tinyimagenet", tiny.parent, **options)


def open_rgb(path: str | Path, size: int) -> np.ndarray:
    return shrink(np.asarray(Image.open(path).convert("RGB")), size)


def check_tiny(source: DataSource, tiny: Path, size: int):
    """Against torchvision's ImageFolder for train/, and a reading by hand of val/."""
    check_source(source, size)
    assert (source.mean, source.std) == ((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821))
    reference = torchvision.datasets.ImageFolder(tiny / "train")
    assert source.n_cls == len(reference.classes) == len(WNIDS) and source.flip is True
    assert source.train_labels.tolist() == reference.targets
    for got, (path, _) in zip(source.train_images, reference.samples, strict=True):
        assert np.array_equal(got, open_rgb(path, size))
    lines = (tiny / "val" / "val_annotations.txt").read_text().splitlines()
    for got, label, line in zip(source.test_images, source.test_labels, lines, strict=True):
        name, wnid = line.split("\t")[:2]
        assert label == reference.class_to_idx[wnid]
        assert np.array_equal(got, open_rgb(tiny / "val" / "images" / name, size))


@pytest.mark.parametrize(("image_size", "size"), [(None, 32), (64, 64), (48, 48)])
def test_tinyimagenet(tiny, image_size, size):
    assert {Image.open(path).mode for path in tiny.rglob("*.JPEG")} == {"L", "CMYK", "RGB"}
    (tiny / "train" / "n01" / "images" / ".DS_Store").write_text("")
    (tiny / "val" / "images" / "Thumbs.db").write_text("")
    (tiny / "val" / "images" / "._val_1.JPEG").write_text("")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = load_tiny(tiny, image_size=image_size, num_workers=size % 3)
    check_tiny(source, tiny, size)
    assert source.class_names == ("goldfish", "ice lolly", "n03")  # words.txt has no n03
    check_equal(load_dataset("tinyimagenet", tiny, image_size), source)  # the folder itself
    (tiny / "words.txt").unlink()
    assert load_tiny(tiny, image_size=image_size).class_names == ("n01", "n02", "n03")


def test_tinyimagenet_missing_says_which_script_gets_it(tmp_path):
    folder = tmp_path / "my data"
    for _ in range(2):
        assert f"sh data/get_tinyimagenet.sh '{folder}'" in refuse("tinyimagenet", folder) and SCRIPT.is_file()
        (folder / "tiny-imagenet-200").mkdir(parents=True, exist_ok=True)


def sort_val(tiny, below=""):
    for i, wnid in enumerate(VAL):
        (tiny / "val" / wnid / below).mkdir(parents=True, exist_ok=True)
        (tiny / "val" / "images" / f"val_{i}.JPEG").rename(tiny / "val" / wnid / below / f"val_{i}.JPEG")


def flatten_train(tiny):
    for wnid in WNIDS:
        for path in (tiny / "train" / wnid / "images").iterdir():
            path.rename(tiny / "train" / wnid / path.name)
        (tiny / "train" / wnid / "images").rmdir()


def nest(tiny):
    tiny.rename(tiny.parent / "moved")
    tiny.mkdir()
    (tiny.parent / "moved").rename(tiny / tiny.name)


LAYOUTS = {
    "val by class": [sort_val],
    "val by class, in images/": [lambda tiny: sort_val(tiny, "images")],
    "val by class, without annotations and images/": [
        sort_val,
        lambda tiny: (tiny / "val" / "val_annotations.txt").unlink(),
        lambda tiny: (tiny / "val" / "images").rmdir(),
    ],
    "flat train": [flatten_train],
    "flat val": [lambda tiny: [path.rename(tiny / "val" / path.name) for path in (tiny / "val/images").iterdir()]],
    "one more folder": [nest],
    "all of it": [flatten_train, sort_val, nest],
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_tinyimagenet_as_scripts_leave_it(tiny, case):
    want = load_tiny(tiny)
    for change in LAYOUTS[case]:
        change(tiny)
    got = load_tiny(tiny)
    by_class = np.argsort(want.test_labels, kind="stable") if "val by" in case or "all" in case else slice(None)
    check_equal(got, want._replace(test_images=want.test_images[by_class], test_labels=want.test_labels[by_class]))


def test_tinyimagenet_sorted_in_part(tiny):
    sort_val(tiny)
    save(tiny / "val" / "images" / "val_9.JPEG", picture(9))
    assert "val_9.JPEG" in refuse("tinyimagenet", tiny.parent)
    (tiny / "val" / "images" / "val_9.JPEG").rename(tiny / "val" / "images" / "val_0.JPEG")  # a copy does not count
    assert len(load_tiny(tiny).test_labels) == len(VAL)
    shutil.rmtree(tiny / "val" / "n03")
    assert "n03" in refuse("tinyimagenet", tiny.parent)


def annotate(change):
    def apply(tiny):
        path = tiny / "val" / "val_annotations.txt"
        path.write_text(change(path.read_text()))

    return apply


def write(path, content):
    return lambda tiny: (tiny / path).write_bytes(content)


def cut(path, keep):
    return lambda tiny: (tiny / path).write_bytes((tiny / path).read_bytes()[:keep])


def empty(path):
    def apply(tiny):
        shutil.rmtree(tiny / path)
        (tiny / path).mkdir()

    return apply


IMAGE, NOTES = "train/n02/images/n02_1.JPEG", "val/val_annotations.txt"
TINY_ERRORS = {
    "no wnids": (remove("wnids.txt"), "wnids.txt"),
    "class folder gone": (remove("train/n02"), NOTES),
    "empty class": (empty("train/n02/images"), "train/n02"),
    "val gone": (remove("val"), "val"),
    "val images gone": (empty("val/images"), "val_0.JPEG"),
    "no annotations": (remove(NOTES), NOTES),
    "empty annotations": (write(NOTES, b""), "val_0.JPEG"),
    "annotations no text": (write(NOTES, b"\xff\xfe\0"), NOTES),
    "image cut": (cut(IMAGE, 500), IMAGE),
    "val image cut": (cut("val/images/val_5.JPEG", 700), "val/images/val_5.JPEG"),
    "val image gone": (remove("val/images/val_3.JPEG"), "val_3.JPEG"),
    "unknown class": (annotate(lambda old: old.replace("n02", "n98", 1)), "val_0.JPEG"),
    "image without line": (annotate(lambda old: old.partition("\n")[2]), "val_0.JPEG"),
    "spaces for tabs": (annotate(lambda old: old.replace("\t", " ")), NOTES),
    "last line cut": (annotate(lambda old: old[:-18]), "val_6.JPEG"),
}


@pytest.mark.parametrize("case", TINY_ERRORS)
@pytest.mark.parametrize("before", [False, True], ids=["at once", "after a whole set was cached"])
def test_tinyimagenet_errors(tiny, case, before):
    change, want = TINY_ERRORS[case]
    if before:
        load_tiny(tiny)
    change(tiny)
    said = refuse("tinyimagenet", tiny.parent)
    assert str(tiny.parent) in said and want in said, said


# --- the cache


def list_cache(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / ".distillers_cache").rglob("*"))


def cache_of(tiny: Path) -> Path:
    return tiny / ".distillers_cache" / "tinyimagenet_32.npz"


def swap_pixels(path: Path) -> None:
    """Another image in a file of the same size and time, which no look at the folder can tell from the old one."""
    stat, old = path.stat(), path.read_bytes()
    new = bytearray(old)
    at = old.index(b"\xff\xdb") + 5  # the first quantisation table
    new[at : at + 64] = bytes(255 - value for value in old[at : at + 64])
    path.write_bytes(new)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_second_reading_comes_from_the_cache_and_equals_the_first(tiny):
    first = load_tiny(tiny)
    assert list_cache(tiny) == ["tinyimagenet_32.npz"]
    swap_pixels(tiny / "train" / "n01" / "images" / "n01_0.JPEG")
    check_equal(load_tiny(tiny), first)
    shutil.rmtree(tiny / ".distillers_cache")
    assert not np.array_equal(load_tiny(tiny).train_images[0], first.train_images[0])


@pytest.mark.parametrize("name", ["stl10", "folder"])
def test_other_sets_are_cached_too(name, stl, image_folder, tmp_path):
    folder = stl.root
    if name == "folder":
        folder = shutil.copytree(image_folder, tmp_path / "images", ignore=shutil.ignore_patterns(".*"))
    first = load_dataset(name, folder, download=False)
    assert list_cache(stl.folder if name == "stl10" else folder) == [f"{name}_32.npz"]
    done = python(
        "import pickle, sys; from dataset import load_dataset\n"
        f"source = load_dataset({name!r}, {str(folder)!r}, download=False)\n"
        "assert not {'torchvision', 'PIL.PngImagePlugin'} & set(sys.modules)\n"  # neither is needed to read the cache
        "print(pickle.dumps(tuple(source)).hex())"
    )
    assert done.stderr == ""
    check_equal(DataSource(*pickle.loads(bytes.fromhex(done.stdout))), first)


def test_sizes_are_kept_side_by_side_and_a_moved_folder_stays_valid(tiny):
    for size in (None, 48):
        load_tiny(tiny, image_size=size)
    times = [path.stat().st_mtime_ns for path in sorted(cache_of(tiny).parent.iterdir())]
    moved = tiny.parent.rename(tiny.parent.with_name("moved")) / tiny.name
    for size in (None, 48):
        check_tiny(load_tiny(moved, image_size=size), moved, size or 32)
    assert list_cache(moved) == ["tinyimagenet_32.npz", "tinyimagenet_48.npz"]
    assert [path.stat().st_mtime_ns for path in sorted(cache_of(moved).parent.iterdir())] == times


def new_time(tiny):
    path = tiny / "train/n01/images/n01_0.JPEG"
    swap_pixels(path)
    os.utime(path, (1, 1))


def new_size(path):
    def change(tiny):
        stat = (tiny / path).stat()
        save(tiny / path, picture(999))
        os.utime(tiny / path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    return change


def rename(old, new):
    return lambda tiny: (tiny / old).rename(tiny / new)


STALE = {
    "new time": new_time,
    "new size": new_size("train/n01/images/n01_0.JPEG"),
    "new size in val": new_size("val/images/val_2.JPEG"),
    "image more": lambda tiny: save(tiny / "train" / "n01" / "images" / "n01_11.JPEG", picture(5)),
    "image less": lambda tiny: (tiny / "train" / "n01" / "images" / "n01_2.JPEG").unlink(),
    "image of another class": rename("train/n01/images/n01_2.JPEG", "train/n02/images/x.JPEG"),
    "annotations": annotate(lambda old: "".join(reversed(old.splitlines(keepends=True)))),
}


@pytest.mark.parametrize("case", STALE)
def test_stale_cache_is_rebuilt(tiny, case):
    first = load_tiny(tiny)
    STALE[case](tiny)
    second = load_tiny(tiny)
    assert any(not np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    check_tiny(second, tiny, 32)
    written = cache_of(tiny).stat().st_mtime_ns
    check_equal(load_tiny(tiny), second)
    assert cache_of(tiny).stat().st_mtime_ns == written and list_cache(tiny) == ["tinyimagenet_32.npz"]


def test_another_pillow_decodes_anew(tiny, monkeypatch):
    first = load_tiny(tiny)
    old = cache_of(tiny).read_bytes()
    monkeypatch.setattr(PIL, "__version__", "0.0")
    check_equal(load_tiny(tiny), first)
    assert cache_of(tiny).read_bytes() != old


def test_no_damage_of_a_cache_is_ever_believed(tiny):
    first, data = load_tiny(tiny), cache_of(tiny).read_bytes()
    damaged = [b"", b"no npz" * 100, data[:-1], data[: len(data) // 2]]
    for at in [*np.linspace(0, len(data) - 1, 100).astype(int), *range(len(data) - 600, len(data), 12)]:
        damaged.append(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
    for content in damaged:
        cache_of(tiny).write_bytes(content)
        check_equal(load_tiny(tiny), first)


def test_cache_never_unpickles(tiny, tmp_path):
    first = load_tiny(tiny)
    with np.load(cache_of(tiny)) as old:
        arrays = dict(old)
    arrays["arr_2"] = np.array([MakesFolder(tmp_path / "ran")], object)
    np.savez(cache_of(tiny), **arrays)
    check_equal(load_tiny(tiny), first)
    assert not (tmp_path / "ran").exists()


def test_folder_that_cannot_be_written_means_no_cache(tiny, capfd):
    (tiny / ".distillers_cache").write_text("in the way")
    for _ in range(2):
        check_tiny(load_tiny(tiny), tiny, 32)
        out, err = capfd.readouterr()
        assert out == "" and err.startswith("note: ") and err.count("\n") == 1
    assert (tiny / ".distillers_cache").read_text() == "in the way"


@pytest.mark.parametrize("reason", ["full disk", "Ctrl-C"])
def test_write_that_fails_leaves_the_old_cache_and_no_part(tiny, reason, monkeypatch, capfd):
    load_tiny(tiny)
    old = cache_of(tiny).read_bytes()
    STALE["new size"](tiny)
    if reason == "full disk":
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        try:
            check_tiny(load_tiny(tiny), tiny, 32)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert capfd.readouterr().err.startswith("note: ")
    else:

        def interrupt(path, *arrays, **named):
            Path(path).write_bytes(b"PK")
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(np, "savez", interrupt)
            load_tiny(tiny)
    assert list_cache(tiny) == ["tinyimagenet_32.npz"] and cache_of(tiny).read_bytes() == old


def test_runs_at_the_same_time(tiny):
    with ThreadPoolExecutor(4) as pool:
        sources = list(pool.map(load_tiny, [tiny] * 4))
    for source in [*sources, load_tiny(tiny)]:
        check_tiny(source, tiny, 32)
    assert list_cache(tiny) == ["tinyimagenet_32.npz"]


# --- getting TinyImageNet

WHOLE = ["tiny-imagenet-200", "tiny-imagenet-200.zip"]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def archive(tiny, tmp_path, monkeypatch):
    """TinyImageNet's archive in a folder of its own, with the right checksum but nowhere to be downloaded."""
    path = tmp_path / "my data" / "tiny-imagenet-200.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as file:
        for member in sorted(tiny.rglob("*")):
            file.write(member, member.relative_to(tiny.parent))
    monkeypatch.setenv("TINYIMAGENET_URL", NOWHERE)
    monkeypatch.setenv("TINYIMAGENET_MD5", hashlib.md5(path.read_bytes()).hexdigest())
    return path


def test_download(archive, tiny, tmp_path, monkeypatch):
    whole, folder = archive.read_bytes(), tmp_path / "new" / "data"
    with serve(whole[:-1], monkeypatch) as server:
        monkeypatch.setenv("TINYIMAGENET_URL", server["url"])
        with pytest.raises(DataError, match=server["url"]):  # cut off
            download(folder)
        assert not (folder / "tiny-imagenet-200").exists()
        server["body"] = whole
        for _ in range(2):  # the second time there is nothing to do
            assert download(folder) == folder / "tiny-imagenet-200"
            asked = server["asked"]
        assert server["asked"] == asked and names_in(folder) == WHOLE
    check_equal(load_dataset("tinyimagenet", folder), load_tiny(tiny))


@pytest.mark.parametrize("content", ["no zip", "another zip", "a damaged zip"])
def test_nothing_is_left_half_unpacked(archive, content, monkeypatch):
    """Behind the right checksum, as the user may name another archive."""
    if content == "no zip":
        archive.write_bytes(b"no zip")
    elif content == "another zip":
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("../other/wnids.txt", "n01")
    else:  # its last member
        archive.write_bytes(archive.read_bytes().replace(b"Carassius", b"Carassios"))
    monkeypatch.setenv("TINYIMAGENET_MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    with pytest.raises(DataError, match=re.escape(str(archive))):
        download(archive.parent)
    assert names_in(archive.parent) == [archive.name] and not list(archive.parent.parent.rglob("other"))


def test_a_folder_unpacked_in_part_by_hand_is_left_alone(archive):
    (archive.parent / "tiny-imagenet-200" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match="tiny-imagenet-200"):
        download(archive.parent)
    assert names_in(archive.parent) == WHOLE and names_in(archive.parent / "tiny-imagenet-200") == ["train"]


class Clone:
    """A fresh clone without an environment, called from beside it, where another package has the same name."""

    def __init__(self, folder: Path):
        self.folder, self.data = folder, folder / "clone" / "data"
        shutil.copytree(ROOT / "dataset", folder / "clone" / "dataset")
        self.data.mkdir()
        shutil.copy(SCRIPT, self.data)
        (folder / "dataset.py").write_text("raise SystemExit('another package')")

    def python(self, path: Path, *flags: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#!/bin/sh\nexec {sys.executable} {" ".join(flags)} "$@"\n')
        path.chmod(0o755)
        return path

    def get(self, *args: str, python: str | Path = sys.executable) -> subprocess.CompletedProcess:
        command, env = ["sh", "clone/data/get_tinyimagenet.sh", *args], os.environ | {"PYTHON": str(python)}
        return subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True)


@pytest.fixture
def clone(tmp_path):
    (tmp_path / "here").mkdir()
    return Clone(tmp_path / "here")


def test_the_script_unpacks_an_archive_put_there_by_hand(archive, clone):
    archive.rename(clone.data / archive.name)
    clone.python(clone.data.parent / ".venv" / "bin" / "python")
    done = clone.get(python="none")
    assert done.returncode == 0 and done.stderr == "" and str(clone.data) in done.stdout
    assert load_dataset("tinyimagenet", clone.data).n_cls == 3


@pytest.mark.parametrize(
    ("args", "flags", "said"),
    [
        (["new"], [], "new/tiny-imagenet-200.zip"),
        (["new"], ["-S"], "requirements.txt"),  # without torchvision
        *[(args, [], "usage") for args in (["--help"], ["a", "b"], [""])],
    ],
)
def test_the_script_ends_in_one_sentence(archive, clone, args, flags, said):
    done = clone.get(*args, python=clone.python(clone.folder / "python", *flags))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stdout == "" and said in done.stderr
