"""STL-10 and TinyImageNet from their official layouts, the cache of decoded sets, and the script that gets one."""

import errno
import hashlib
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image

import train_teacher
from dataset import DataError, DataSource, load_dataset
from dataset.torchvision_import import torchvision
from tests.test_dataset import MakesFolder, one_sentence

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "data" / "get_tinyimagenet.sh"


# as the reference normalises them
STL10 = (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2712)
TINY = (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)


def check_source(source: DataSource, size: int):
    for images, labels in ((source.train_images, source.train_labels), (source.test_images, source.test_labels)):
        assert images.dtype == np.uint8 and images.shape == (len(labels), size, size, 3)
        assert images.flags.c_contiguous and labels.dtype == np.int64
    assert (source.mean, source.std) == (STL10 if "airplane" in source.class_names else TINY)
    assert len(source.class_names) == source.n_cls and source.flip is True


def check_equal(got: DataSource, want: DataSource):
    for name, a, b in zip(DataSource._fields, got, want, strict=True):
        assert type(a) is type(b) and np.array_equal(a, b), name
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype and a.flags.c_contiguous and a.flags.writeable, name


@pytest.fixture
def server(monkeypatch):
    """Serves `content["body"]` on the loopback address, parts of it too; cuts the first answer after `cut` bytes."""
    content = {"body": b"", "asked": [], "cut": None, "ranges": True, "status": 200}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
            content["asked"].append(self.headers.get("Range"))
            body, start = content["body"], int(wanted[1]) if wanted and content["ranges"] else 0
            if content["status"] != 200 or start >= len(body) > 0:
                self.send_response(content["status"] if content["status"] != 200 else 416)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            cut, content["cut"] = content["cut"], None
            with suppress(ConnectionError):
                self.wfile.write(body[start:cut])

        def log_message(self, *args):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        content["url"] = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield content
        http.shutdown()
        thread.join()


# --- STL-10


class Stl:
    """A small STL-10 in `root`, and torchvision's checksums replaced by its own."""

    names = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]

    def __init__(self, root: Path, monkeypatch):
        self.root, self.folder, self.kind = root, root / "stl10_binary", torchvision.datasets.STL10
        self.monkeypatch = monkeypatch
        rng = np.random.default_rng(0)
        self.folder.mkdir(parents=True)
        self.images, self.labels = {}, {}
        for split, n in (("train", 20), ("test", 11)):
            self.images[split] = rng.integers(0, 256, (n, 96, 96, 3), dtype=np.uint8)
            self.labels[split] = rng.permutation(np.arange(n) % 10)
            # channel by channel, each column by column
            self.write(f"{split}_X.bin", np.transpose(self.images[split], (0, 3, 2, 1)).tobytes())
            self.write(f"{split}_y.bin", bytes(int(label) + 1 for label in self.labels[split]))
        (self.folder / "class_names.txt").write_text("\n".join(self.names) + "\n")
        (self.folder / "fold_indices.txt").write_text("0 1 2 \n" * 10)
        self.accept()

    def write(self, name: str, data: bytes) -> None:
        (self.folder / name).write_bytes(data)

    def accept(self):
        """Let what the files hold now be what is expected; the unlabelled images are not there."""
        for which in ("train_list", "test_list"):
            names = [name for name, _ in getattr(self.kind, which)]
            md5 = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in self.folder.glob("*.bin")}
            self.monkeypatch.setattr(self.kind, which, [[name, md5.get(name, "0" * 32)] for name in names])

    def pack(self, path: Path) -> bytes:
        with tarfile.open(path, "w:gz") as tar:
            tar.add(self.folder, self.kind.base_folder)
        self.monkeypatch.setattr(self.kind, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
        return path.read_bytes()

    def check(self, source: DataSource, size: int):
        check_source(source, size)
        assert (source.n_cls, source.class_names) == (10, tuple(self.names))
        for split in ("train", "test"):
            assert getattr(source, f"{split}_labels").tolist() == self.labels[split].tolist()
            for got, image in zip(getattr(source, f"{split}_images"), self.images[split], strict=True):
                if size != 96:
                    image = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))
                assert np.array_equal(got, image)


@pytest.fixture
def stl(tmp_path, monkeypatch):
    return Stl(tmp_path / "root", monkeypatch)


def test_torchvision_itself_asks_for_the_unlabelled_images(stl):
    """So that reading without them is our doing."""
    assert "unlabeled_X.bin" in [name for name, _ in stl.kind.train_list]
    with pytest.raises(RuntimeError):
        stl.kind(stl.root, "train")


@pytest.mark.parametrize(("image_size", "size"), [(None, 32), (96, 96), (40, 40)])
def test_stl10(stl, image_size, size):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):  # the second time from the cache
            stl.check(load_dataset("stl10", stl.root, image_size, download=False, num_workers=size % 3), size)


def test_stl10_byte_by_byte(stl):
    raw = (stl.folder / "test_X.bin").read_bytes()
    images = load_dataset("stl10", stl.root, 96, download=False).test_images
    for n, row, column, channel in ((0, 0, 0, 0), (0, 1, 0, 0), (3, 5, 90, 2), (10, 95, 94, 1)):
        assert images[n, row, column, channel] == raw[((n * 3 + channel) * 96 + column) * 96 + row]


def test_stl10_needs_no_names_file(stl):
    (stl.folder / "class_names.txt").unlink()
    stl.check(load_dataset("stl10", stl.root, download=False), 32)


@pytest.mark.parametrize("name", ["train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin"])
@pytest.mark.parametrize("damage", ["changed", "truncated", "missing"])
def test_stl10_damaged_file_is_named(stl, name, damage):
    load_dataset("stl10", stl.root, download=False)  # a cache of the whole file helps nobody
    path = stl.folder / name
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(data[:-1] if damage == "truncated" else bytes([data[0] ^ 1]) + data[1:])
        os.utime(path, (0, 0))
    with pytest.raises(DataError) as error:
        load_dataset("stl10", stl.root, download=False)
    text = one_sentence(error)
    assert str(path) in text
    assert stl.kind.url in text and stl.kind.tgz_md5 in text and str(stl.root / stl.kind.filename) in text


CONTENTS = {
    "no whole image": ("train_X.bin", lambda data: data[:-5], "train_X.bin"),
    "an image less": ("test_X.bin", lambda data: data[: -96 * 96 * 3], "10 images"),
    "a label less": ("train_y.bin", lambda data: data[:-1], "19 labels"),
    "label 0": ("train_y.bin", lambda data: b"\0" + data[1:], "outside of 1 .. 10"),
    "label 11": ("test_y.bin", lambda data: data[:-1] + b"\x0b", "test_y.bin has a label outside of 1 .. 10"),
    "no labels": ("test_y.bin", lambda data: b"", "0 labels"),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_stl10_files_that_do_not_fit(stl, case):
    """Behind the right checksums."""
    name, change, want = CONTENTS[case]
    stl.write(name, change((stl.folder / name).read_bytes()))
    stl.accept()
    with pytest.raises(DataError, match=re.escape(want)) as error:
        load_dataset("stl10", stl.root, download=False)
    assert str(stl.folder) in one_sentence(error)


def test_stl10_is_nowhere(stl, tmp_path):
    with pytest.raises(DataError, match=r"train_X\.bin is missing"):
        load_dataset("stl10", tmp_path / "nothing", download=False)
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file"):
        load_dataset("stl10", tmp_path / "file")


def test_stl10_download(stl, server, tmp_path, capfd):
    server["body"] = stl.pack(tmp_path / "packed.tar.gz")
    stl.monkeypatch.setattr(stl.kind, "url", server["url"])
    (stl.folder / "test_X.bin").unlink()
    for root in (tmp_path / "new", stl.root):  # nothing is there; a file is missing
        asked = len(server["asked"])
        stl.check(load_dataset("stl10", root), 32)
        assert len(server["asked"]) > asked
        assert sorted(path.name for path in root.iterdir()) == ["stl10_binary", stl.kind.filename]
    asked = len(server["asked"])
    stl.check(load_dataset("stl10", stl.root, 48), 48)
    assert len(server["asked"]) == asked and capfd.readouterr() == ("", "")


def test_stl10_archive_by_hand(stl, tmp_path):
    (tmp_path / "by_hand").mkdir()
    stl.pack(tmp_path / "by_hand" / stl.kind.filename)
    stl.check(load_dataset("stl10", tmp_path / "by_hand", download=False), 32)


# --- TinyImageNet

WNIDS = ["n03", "n01", "n02"]  # unsorted, as in the archive
COUNT = 4


def picture(seed: int, mode: str = "RGB", size: int = 64) -> Image.Image:
    """Smooth, so that JPEG keeps it."""
    colours = np.random.default_rng(seed).integers(0, 256, (4, 4, len(mode)), dtype=np.uint8)
    bands = [Image.fromarray(colours[..., i]).resize((size, size)) for i in range(len(mode))]
    return Image.merge(mode, bands)


def save(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "JPEG", quality=95)


def make_tiny(root: Path) -> Path:
    """Three classes of four training images and two or three of val/, in root/tiny-imagenet-200."""
    tiny = root / "tiny-imagenet-200"
    for c, wnid in enumerate(WNIDS):
        boxes = ""
        for i, number in enumerate((0, 1, 2, 10)):
            mode = {(0, 0): "L", (1, 3): "CMYK"}.get((c, i), "RGB")
            save(tiny / "train" / wnid / "images" / f"{wnid}_{number}.JPEG", picture(10 * c + i, mode))
            boxes += f"{wnid}_{number}.JPEG\t0\t0\t63\t63\n"
        (tiny / "train" / wnid / f"{wnid}_boxes.txt").write_text(boxes)
    lines = []
    for i, wnid in enumerate(("n02", "n03", "n02", "n01", "n01", "n03", "n03")):
        save(tiny / "val" / "images" / f"val_{i}.JPEG", picture(100 + i, "L" if i == 4 else "RGB"))
        lines.append(f"val_{i}.JPEG\t{wnid}\t0\t32\t44\t62\n")
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


def slowly(path: str | Path, size: int) -> np.ndarray:
    image = Image.open(path).convert("RGB")
    return np.asarray(image if size == 64 else image.resize((size, size), Image.Resampling.BILINEAR))


def check_tiny(source: DataSource, tiny: Path, size: int):
    """Against torchvision's ImageFolder for train/, and a reading by hand of val/."""
    check_source(source, size)
    reference = torchvision.datasets.ImageFolder(tiny / "train")
    assert source.n_cls == len(reference.classes) == len(WNIDS)
    assert source.train_labels.tolist() == reference.targets
    for got, (path, _) in zip(source.train_images, reference.samples, strict=True):
        assert np.array_equal(got, slowly(path, size))
    lines = (tiny / "val" / "val_annotations.txt").read_text().splitlines()
    for got, label, line in zip(source.test_images, source.test_labels, lines, strict=True):
        name, wnid = line.split("\t")[:2]
        assert label == reference.class_to_idx[wnid]
        assert np.array_equal(got, slowly(tiny / "val" / "images" / name, size))


@pytest.mark.parametrize(("image_size", "size"), [(None, 32), (64, 64), (48, 48)])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_tinyimagenet(tiny, image_size, size, num_workers):
    modes = {Image.open(path).mode for path in tiny.rglob("*.JPEG")}
    assert modes == {"L", "CMYK", "RGB"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = load_tiny(tiny, image_size=image_size, num_workers=num_workers)
    check_tiny(source, tiny, size)
    assert source.class_names == ("goldfish", "ice lolly", "n03")  # words.txt has no n03


def test_tinyimagenet_folder_itself(tiny):
    check_equal(load_dataset("tinyimagenet", tiny), load_tiny(tiny))


def test_tinyimagenet_without_words(tiny):
    (tiny / "words.txt").unlink()
    assert load_tiny(tiny).class_names == ("n01", "n02", "n03")


def test_tinyimagenet_other_files_are_no_images(tiny):
    want = load_tiny(tiny)
    (tiny / "train" / "n01" / "images" / ".DS_Store").write_text("")
    (tiny / "val" / "images" / "Thumbs.db").write_text("")
    (tiny / "val" / "images" / "._val_1.JPEG").write_text("")
    (tiny / "train" / "n99").mkdir()  # not in wnids.txt
    check_equal(load_tiny(tiny), want)


@pytest.mark.parametrize("where", ["empty", "none"])
def test_tinyimagenet_missing_says_which_script_gets_it(tmp_path, where, monkeypatch, capfd):
    folder = tmp_path / "my data"
    if where == "empty":
        (folder / "tiny-imagenet-200").mkdir(parents=True)
    argv = ["train_teacher.py", "--dataset", "tinyimagenet", "--data_folder", str(folder), "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    assert train_teacher.main() == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1
    assert str(folder) in err and f"sh data/get_tinyimagenet.sh '{folder}'" in err and SCRIPT.is_file()


def annotations(change):
    def apply(tiny):
        path = tiny / "val" / "val_annotations.txt"
        path.write_text(change(path.read_text()))

    return apply


def cut(path, keep):
    return lambda tiny: (tiny / path).write_bytes((tiny / path).read_bytes()[:keep])


def text(path, content):
    return lambda tiny: (tiny / path).write_text(content)


def empty(path):
    def apply(tiny):
        for file in (tiny / path).iterdir():
            file.unlink()

    return apply


def gone(path):
    return lambda tiny: shutil.rmtree(tiny / path) if (tiny / path).is_dir() else (tiny / path).unlink()


IMAGE, NOTES = "train/n02/images/n02_1.JPEG", "val/val_annotations.txt"
TINY_ERRORS = {
    "no wnids": (gone("wnids.txt"), ["wnids.txt", "get_tinyimagenet.sh"]),
    "no words of utf-8": (lambda tiny: (tiny / "words.txt").write_bytes(b"n01\t\xff"), ["words.txt"]),
    "one class": (text("wnids.txt", "n01\n"), ["wnids.txt names 1 classes"]),
    "no class": (text("wnids.txt", "\n"), ["wnids.txt names 0 classes"]),
    "class twice": (text("wnids.txt", "n01\nn02\nn03\nn02\n"), ["wnids.txt names the class n02 twice"]),
    "class without folder": (text("wnids.txt", "n01\nn02\nn03\nn04\n"), ["wnids.txt", "n04", "train/n04/images"]),
    "class folder gone": (gone("train/n02"), ["wnids.txt", "n02", "train/n02/images"]),
    "empty class": (empty("train/n02/images"), ["train/n02/images has no images"]),
    "train gone": (gone("train"), ["train/n01/images"]),
    "val gone": (gone("val"), ["val/images"]),
    "val images gone": (empty("val/images"), ["val/images has no images"]),
    "no annotations": (gone(NOTES), [NOTES]),
    "empty annotations": (text(NOTES, ""), [NOTES, "val_0.JPEG"]),
    "image cut": (cut(IMAGE, 500), [IMAGE]),
    "image header cut": (cut(IMAGE, 10), [IMAGE]),
    "image empty": (cut(IMAGE, 0), [IMAGE]),
    "image no JPEG": (text(IMAGE, "no image"), [IMAGE]),
    "val image cut": (cut("val/images/val_5.JPEG", 700), ["val/images/val_5.JPEG"]),
    "val image gone": (gone("val/images/val_3.JPEG"), [f"{NOTES}, line 4", "val/images/val_3.JPEG"]),
    "val image elsewhere": (
        annotations(lambda old: old.replace("val_3.JPEG", "../../test/images/test_0.JPEG")),
        [f"{NOTES}, line 4", "test_0.JPEG"],
    ),
    "unknown class": (annotations(lambda old: old.replace("n02", "n98", 1)), [f"{NOTES}, line 1", "n98", "wnids.txt"]),
    "image twice": (annotations(lambda old: old + old.splitlines()[1]), [f"{NOTES}, line 8", "val_1.JPEG"]),
    "image without line": (annotations(lambda old: old.partition("\n")[2]), [NOTES, "val_0.JPEG"]),
    "spaces for tabs": (annotations(lambda old: old.replace("\t", " ")), [f"{NOTES}, line 1", "val_0.JPEG n02"]),
    "last line cut": (annotations(lambda old: old[:-8]), [f"{NOTES}, line 7"]),
    "annotations no text": (lambda tiny: (tiny / NOTES).write_bytes(b"\xff\xfe\0"), [NOTES]),
}


@pytest.mark.parametrize("case", TINY_ERRORS)
@pytest.mark.parametrize("before", [False, True], ids=["at once", "after a whole set was cached"])
def test_tinyimagenet_errors(tiny, case, before):
    change, want = TINY_ERRORS[case]
    if before:
        load_tiny(tiny)
    change(tiny)
    with pytest.raises(DataError) as error:
        load_tiny(tiny)
    said = one_sentence(error)
    assert str(tiny.parent) in said
    for part in want:
        assert part in said, said


# --- the cache


def cache_files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / ".distillers_cache").rglob("*"))


def kept(tiny: Path) -> Path:
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
    assert cache_files(tiny) == ["tinyimagenet_32.npz"]
    image = tiny / "train" / "n01" / "images" / "n01_0.JPEG"
    swap_pixels(image)
    assert not np.array_equal(slowly(image, 32), first.train_images[0])
    check_equal(load_tiny(tiny), first)
    shutil.rmtree(tiny / ".distillers_cache")
    assert not np.array_equal(load_tiny(tiny).train_images[0], first.train_images[0])


@pytest.mark.parametrize("name", ["stl10", "folder"])
def test_other_sets_are_cached_too(name, stl, image_folder, tmp_path):
    folder = stl.root
    if name == "folder":
        folder = shutil.copytree(image_folder, tmp_path / "images", ignore=shutil.ignore_patterns(".*"))
    where = folder / "stl10_binary" if name == "stl10" else folder
    first = load_dataset(name, folder, download=False)
    assert cache_files(where) == [f"{name}_32.npz"]
    code = (
        "import pickle, sys; from dataset import load_dataset\n"
        f"source = load_dataset({name!r}, {str(folder)!r}, download=False)\n"
        "assert not {'torchvision', 'PIL.PngImagePlugin'} & set(sys.modules)\n"  # neither is needed to read the cache
        "sys.stdout.buffer.write(pickle.dumps(tuple(source)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert done.returncode == 0 and done.stderr == b"", done.stderr.decode()
    check_equal(DataSource(*pickle.loads(done.stdout)), first)


def test_sizes_are_kept_side_by_side_and_a_moved_folder_stays_valid(tiny):
    for size in (None, 48):
        load_tiny(tiny, image_size=size)
    assert cache_files(tiny) == ["tinyimagenet_32.npz", "tinyimagenet_48.npz"]
    times = [path.stat().st_mtime_ns for path in sorted(kept(tiny).parent.iterdir())]
    moved = tiny.parent.rename(tiny.parent.with_name("moved")) / tiny.name
    for size in (None, 48):
        check_tiny(load_tiny(moved, image_size=size), moved, size or 32)
    assert [path.stat().st_mtime_ns for path in sorted(kept(moved).parent.iterdir())] == times


def new_time(path):
    def change(tiny):
        swap_pixels(tiny / path)
        os.utime(tiny / path, (1, 1))

    return change


def new_size(path):
    def change(tiny):
        stat = (tiny / path).stat()
        save(tiny / path, picture(999))
        os.utime(tiny / path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    return change


STALE = {
    "new time": new_time("train/n01/images/n01_0.JPEG"),
    "new size": new_size("train/n01/images/n01_0.JPEG"),
    "new size in val": new_size("val/images/val_2.JPEG"),
    "image more": lambda tiny: save(tiny / "train" / "n01" / "images" / "n01_11.JPEG", picture(5)),
    "image less": lambda tiny: (tiny / "train" / "n01" / "images" / "n01_2.JPEG").unlink(),
    "image renamed": lambda tiny: (tiny / "train/n01/images/n01_2.JPEG").rename(tiny / "train/n01/images/n01_9.JPEG"),
    "image of another class": lambda tiny: (tiny / "train/n01/images/n01_2.JPEG").rename(
        tiny / "train/n02/images/x.JPEG"
    ),
    "annotations": annotations(lambda old: "".join(reversed(old.splitlines(keepends=True))).replace("32", "320")),
}


@pytest.mark.parametrize("case", STALE)
def test_stale_cache_is_rebuilt(tiny, case):
    first = load_tiny(tiny)
    STALE[case](tiny)
    second = load_tiny(tiny)
    assert any(not np.array_equal(a, b) for a, b in zip(first, second, strict=True)) or "renamed" in case
    check_tiny(second, tiny, 32)
    written = kept(tiny).stat().st_mtime_ns
    check_equal(load_tiny(tiny), second)
    assert kept(tiny).stat().st_mtime_ns == written and cache_files(tiny) == ["tinyimagenet_32.npz"]


def test_changed_words_are_seen(tiny):
    load_tiny(tiny)
    (tiny / "words.txt").write_text("n01\tfish\n")
    assert load_tiny(tiny).class_names == ("fish", "n02", "n03")


def test_another_pillow_decodes_anew(tiny, monkeypatch):
    first = load_tiny(tiny)
    old = kept(tiny).read_bytes()
    monkeypatch.setattr(PIL, "__version__", "0.0")
    check_equal(load_tiny(tiny), first)
    assert kept(tiny).read_bytes() != old


def flipped(at):
    def change(data):
        data = bytearray(data)
        data[int(at * (len(data) - 1))] ^= 0xFF
        return bytes(data)

    return change


DAMAGE = {
    "empty": lambda data: b"",
    "cut by a byte": lambda data: data[:-1],
    "cut in half": lambda data: data[: len(data) // 2],
    "no npz": lambda data: b"no npz" * 100,
    **{f"a byte at {at}": flipped(at) for at in (0, 0.2, 0.4, 0.6, 0.8)},
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_cache_is_rebuilt(tiny, case):
    first = load_tiny(tiny)
    kept(tiny).write_bytes(DAMAGE[case](kept(tiny).read_bytes()))
    damaged = kept(tiny).read_bytes()
    check_equal(load_tiny(tiny), first)
    assert kept(tiny).read_bytes() != damaged
    swap_pixels(tiny / "train" / "n01" / "images" / "n01_0.JPEG")
    check_equal(load_tiny(tiny), first)  # from the new cache


def test_no_damage_of_a_cache_is_ever_believed(tiny):
    first, data = load_tiny(tiny), kept(tiny).read_bytes()
    for at in [*np.linspace(0, len(data) - 1, 100).astype(int), *range(len(data) - 600, len(data), 12)]:
        kept(tiny).write_bytes(flipped(at / (len(data) - 1))(data))
        check_equal(load_tiny(tiny), first)


@pytest.mark.parametrize("change", ["shape", "length of labels", "missing"])
def test_cache_of_another_shape_is_rebuilt(tiny, change):
    first = load_tiny(tiny)
    with np.load(kept(tiny)) as old:
        arrays = dict(old)
    if change == "shape":
        arrays["test_images"] = arrays["test_images"][:, :16]
    elif change == "missing":
        del arrays["test_images"]
    else:
        arrays["train_labels"] = arrays["train_labels"][:-1]
    np.savez(kept(tiny), **arrays)
    check_equal(load_tiny(tiny), first)


def test_cache_never_unpickles(tiny, tmp_path):
    first = load_tiny(tiny)
    with np.load(kept(tiny)) as old:
        arrays = dict(old)
    arrays["class_names"] = np.array([MakesFolder(tmp_path / "ran")], object)
    np.savez(kept(tiny), **arrays)
    with np.load(kept(tiny), allow_pickle=True) as now:
        now["class_names"]
    (tmp_path / "ran").rmdir()  # so that the check below can fail
    check_equal(load_tiny(tiny), first)
    assert not (tmp_path / "ran").exists()


def test_folder_that_cannot_be_written_means_no_cache(tiny, capfd):
    (tiny / ".distillers_cache").write_text("in the way")
    for _ in range(2):
        check_tiny(load_tiny(tiny), tiny, 32)
        out, err = capfd.readouterr()
        assert out == "" and err.startswith("note: ") and err.count("\n") == 1
    assert (tiny / ".distillers_cache").read_text() == "in the way"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_write_that_fails_leaves_the_old_cache_and_no_part(tiny, error, monkeypatch, capfd):
    load_tiny(tiny)
    old = kept(tiny).read_bytes()
    STALE["new size"](tiny)

    def fails(_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        if isinstance(error, OSError):
            check_tiny(load_tiny(tiny), tiny, 32)
            assert "No space left on device" in capfd.readouterr().err
        else:
            with pytest.raises(KeyboardInterrupt):
                load_tiny(tiny)
    assert cache_files(tiny) == ["tinyimagenet_32.npz"] and kept(tiny).read_bytes() == old
    check_tiny(load_tiny(tiny), tiny, 32)


def test_runs_at_the_same_time(tiny):
    with ThreadPoolExecutor(4) as pool:
        sources = list(pool.map(load_tiny, [tiny] * 4))
    for source in [*sources, load_tiny(tiny)]:
        check_tiny(source, tiny, 32)
    assert cache_files(tiny) == ["tinyimagenet_32.npz"]


# --- the script that gets TinyImageNet

TOOLS = ("dirname", "mkdir", "mv", "rm")
SHELL = shutil.which("dash") or shutil.which("sh")
needs_shell = pytest.mark.skipif(SHELL is None, reason="there is no POSIX shell")
DOWNLOADERS = [
    pytest.param(name, marks=pytest.mark.skipif(shutil.which(name) is None, reason=f"there is no {name}"))
    for name in ("curl", "wget")
]


def packed(source: Path, path: Path) -> bytes:
    with zipfile.ZipFile(path, "w") as file:
        for member in sorted(source.parent.rglob("*")):
            file.write(member, member.relative_to(source.parent))
    return path.read_bytes()


class Get:
    """The script, with the programs that it finds; `folder` is where it puts the data."""

    def __init__(self, tmp_path: Path, server: dict, tiny: Path):
        self.bin, self.folder, self.server = tmp_path / "bin", tmp_path / "my data", server
        self.bin.mkdir()
        self.server["body"] = packed(tiny, tmp_path / "packed.zip")
        self.archive, self.part = (self.folder / f"tiny-imagenet-200.zip{end}" for end in ("", ".part"))
        self.env = {"TINYIMAGENET_MD5": self.md5(), "PYTHON": sys.executable, "no_proxy": "127.0.0.1"}

    def md5(self) -> str:
        return hashlib.md5(self.server["body"]).hexdigest()

    def tools(self, *names: str) -> None:
        for name in (*TOOLS, *names):
            (self.bin / name).symlink_to(shutil.which(name))

    def __call__(self, *args, script: Path = SCRIPT, **env) -> subprocess.CompletedProcess:
        env = {"PATH": str(self.bin), "TINYIMAGENET_URL": self.server["url"]} | self.env | env
        args = [SHELL, str(script), *map(str, args or [self.folder])]
        done = subprocess.run(args, env=env, capture_output=True, text=True, timeout=60)
        if done.returncode:
            assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
            assert done.stderr.startswith("get_tinyimagenet.sh: ") and "Traceback" not in done.stderr
        else:
            assert done.stderr == ""
        return done

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture
def get(tmp_path, server, tiny):
    return Get(tmp_path, server, tiny)


WHOLE = ["tiny-imagenet-200", "tiny-imagenet-200.zip"]


@needs_shell
@pytest.mark.parametrize("downloader", DOWNLOADERS)
def test_get(get, downloader, tiny):
    get.tools(downloader)
    assert get().returncode == 0
    assert get.names() == WHOLE
    check_equal(load_dataset("tinyimagenet", get.folder), load_tiny(tiny))
    asked = len(get.server["asked"])
    again = get()
    assert again.returncode == 0 and "already" in again.stdout
    assert len(get.server["asked"]) == asked and get.names() == WHOLE


@needs_shell
@pytest.mark.parametrize("downloader", DOWNLOADERS)
def test_get_goes_on_after_a_cut_connection(get, downloader):
    get.tools(downloader)
    get.server["cut"] = 5000
    first = get()  # wget tries again by itself
    if downloader == "curl":
        assert first.returncode == 2 and get.server["url"] in first.stderr
        assert get.names() == [get.part.name] and get.part.read_bytes() == get.server["body"][:5000]
        assert get().returncode == 0
    assert get.server["asked"] == [None, "bytes=5000-"]
    assert get.names() == WHOLE and get.archive.read_bytes() == get.server["body"]


@needs_shell
@pytest.mark.parametrize("downloader", DOWNLOADERS)
@pytest.mark.parametrize("part", ["whole", "too long", "not the beginning", "no ranges"])
def test_get_with_a_part_from_before(get, downloader, part):
    get.tools(downloader)
    get.folder.mkdir()
    body = get.server["body"]
    get.server["ranges"] = part != "no ranges"
    get.part.write_bytes({"whole": body, "too long": body * 2, "not the beginning": b"x" * 99}.get(part, body[:99]))
    if get().returncode:  # what could not be made whole is thrown away
        assert part in ("too long", "not the beginning") and get.names() == []
        assert get().returncode == 0
    assert get.names() == WHOLE and get.archive.read_bytes() == body
    assert bool(get.server["asked"]) == (part != "whole")


@needs_shell
@pytest.mark.parametrize("downloader", DOWNLOADERS)
def test_get_with_a_wrong_checksum_keeps_nothing(get, downloader):
    get.tools(downloader)
    done = get(TINYIMAGENET_MD5="0" * 32)
    assert done.returncode == 2 and "MD5" in done.stderr and get.server["url"] in done.stderr
    assert get.names() == []


@needs_shell
@pytest.mark.parametrize("downloader", DOWNLOADERS)
def test_get_from_a_server_that_has_it_not(get, downloader):
    get.tools(downloader)
    get.server["status"] = 404
    done = get()
    assert done.returncode == 2 and get.server["url"] in done.stderr
    assert not get.archive.exists() and (not get.part.exists() or get.part.stat().st_size == 0)


@needs_shell
def test_get_without_curl_and_wget_names_the_official_archive(get):
    get.tools()
    done = get(TINYIMAGENET_URL="")
    assert done.returncode == 2 and "curl or wget" in done.stderr
    assert "http://cs231n.stanford.edu/tiny-imagenet-200.zip" in done.stderr and get.names() == []


@needs_shell
def test_get_without_python(get):
    get.tools()
    del get.env["PYTHON"]
    done = get()
    assert done.returncode == 2 and "python3" in done.stderr and not get.folder.exists()


@needs_shell
def test_get_unpacks_an_archive_put_there_by_hand(get):
    get.tools()  # nothing to download with
    get.folder.mkdir()
    get.archive.write_bytes(get.server["body"])
    assert get().returncode == 0
    assert get.names() == WHOLE and get.server["asked"] == []


@needs_shell
@pytest.mark.parametrize("downloader", DOWNLOADERS)
def test_get_replaces_a_damaged_archive(get, downloader):
    get.tools(downloader)
    get.folder.mkdir()
    get.archive.write_bytes(get.server["body"][:-1])
    assert get().returncode == 0
    assert get.names() == WHOLE and get.archive.read_bytes() == get.server["body"]


@needs_shell
@pytest.mark.parametrize("member", ["../evil", "tiny-imagenet-200/../../evil", "{root}/evil", "..\\evil"])
def test_get_refuses_members_that_lead_out_of_the_folder(get, member, tiny, tmp_path):
    member = member.format(root=tmp_path)
    with zipfile.ZipFile(tmp_path / "packed.zip", "a") as file:
        file.writestr(member, "evil")
    get.tools()
    get.folder.mkdir()
    get.archive.write_bytes((tmp_path / "packed.zip").read_bytes())
    done = get(TINYIMAGENET_MD5=hashlib.md5(get.archive.read_bytes()).hexdigest())
    assert done.returncode == 2 and "evil" in done.stderr and str(get.archive) in done.stderr
    assert get.names() == [get.archive.name] and not list(tmp_path.rglob("*evil*"))


@needs_shell
@pytest.mark.parametrize("content", ["no zip", "another zip", "a damaged zip"])
def test_get_of_something_else_leaves_no_folder(get, content, tmp_path):
    data = b"no zip"
    if content == "another zip":
        with zipfile.ZipFile(tmp_path / "other.zip", "w") as file:
            file.writestr("other/wnids.txt", "n01")
        data = (tmp_path / "other.zip").read_bytes()
    elif content == "a damaged zip":
        data = get.server["body"].replace(b"Carassius", b"Carassios")
    get.tools()
    get.folder.mkdir()
    get.archive.write_bytes(data)
    done = get(TINYIMAGENET_MD5=hashlib.md5(data).hexdigest())
    assert done.returncode == 2 and str(get.archive) in done.stderr
    assert get.names() == [get.archive.name]


@needs_shell
def test_get_into_a_folder_that_cannot_be(get, tmp_path):
    get.tools()
    (tmp_path / "file").write_text("")
    done = get(tmp_path / "file" / "data")
    assert done.returncode == 2 and "file/data" in done.stderr
    (get.folder / "tiny-imagenet-200" / "train").mkdir(parents=True)  # unpacked by hand, not to the end
    done = get()
    assert done.returncode == 2 and "wnids.txt" in done.stderr and get.names() == ["tiny-imagenet-200"]
    assert get("--help").returncode == get("a", "b").returncode == get("").returncode == 2


@needs_shell
@pytest.mark.parametrize("downloader", DOWNLOADERS[:1])
def test_get_beside_the_script_by_default(get, downloader, tmp_path):
    get.tools(downloader)
    get.folder.mkdir()
    script = shutil.copy(SCRIPT, get.folder)
    args = [SHELL, script]
    env = {"PATH": str(get.bin), "TINYIMAGENET_URL": get.server["url"]} | get.env
    done = subprocess.run(args, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert get.names() == ["get_tinyimagenet.sh", *WHOLE]


@needs_shell
def test_get_interrupted_while_unpacking_leaves_no_folder(get, tmp_path):
    get.tools()
    get.folder.mkdir()
    get.archive.write_bytes(get.server["body"])
    slow = tmp_path / "slow"  # takes its time to unpack into a folder
    slow.write_text(f'#!{SHELL}\n[ -d "$3" ] && exec {shutil.which("sleep")} 60\nexec {sys.executable} "$@"\n')
    slow.chmod(0o755)
    env = {"PATH": str(get.bin)} | get.env | {"PYTHON": str(slow)}
    with subprocess.Popen([SHELL, SCRIPT, get.folder], env=env, start_new_session=True) as running:
        deadline = time.monotonic() + 30
        while len(get.names()) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(get.names()) == 2
        os.killpg(running.pid, signal.SIGTERM)
    assert running.returncode != 0 and get.names() == [get.archive.name]
    assert get().returncode == 0 and get.names() == WHOLE


@pytest.mark.parametrize("shell", ["sh", "dash", "bash"])
def test_get_is_plain_shell(shell):
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell}")
    done = subprocess.run([shell, "-n", str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
