"""Data sets by name, the import of torchvision, CIFAR, digits and folders of images, on real files."""

import hashlib
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
import warnings
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset import DataError, DataSource, dataset_dict, load_dataset
from dataset.torchvision_import import torchvision

ROOT = Path(__file__).resolve().parents[1]
NOWHERE = "http://127.0.0.1:9/nothing"


def check_source(source: DataSource, size: int):
    """What any data set must give."""
    for images, labels in ((source.train_images, source.train_labels), (source.test_images, source.test_labels)):
        assert images.dtype == np.uint8 and images.shape == (len(labels), size, size, 3) and images.flags.c_contiguous
        assert labels.dtype == np.int64 and 0 <= labels.min() <= labels.max() < source.n_cls
    assert len(source.class_names) == source.n_cls and all(isinstance(name, str) for name in source.class_names)
    assert len(source.mean) == len(source.std) == 3 and min(source.std) > 0
    assert source.val_images is None and source.val_labels is None


def check_equal(got: DataSource, want: DataSource):
    for name, a, b in zip(DataSource._fields, got, want, strict=True):
        assert type(a) is type(b) and np.array_equal(a, b), name
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype and a.flags.c_contiguous and a.flags.writeable, name


def refuse(*args, **options) -> str:
    """The sentence that load_dataset ends in."""
    with pytest.raises((DataError, OSError)) as error:
        load_dataset(*args, **options)
    text = str(error.value)
    assert text and "\n" not in text
    return text


def python(code: str, *path: Path) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter, with these folders before all others."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT)))}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)


@contextmanager
def serve(body: bytes, monkeypatch):
    """Serve `content["body"]` on the loopback address; count how often it is asked for."""
    content = {"body": body, "asked": 0}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            content["asked"] += 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(content["body"])))
            self.end_headers()
            with suppress(ConnectionError):
                self.wfile.write(content["body"])

        def log_message(self, *args):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        content["url"] = f"http://127.0.0.1:{http.server_port}/archive"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield content
        http.shutdown()
        thread.join()


# --- by name


def test_help_has_a_line_for_every_data_set():
    for name, load in dataset_dict.items():
        assert (load.__doc__ or "").splitlines()[0].strip().endswith("."), name


@pytest.mark.parametrize(("name", "closest"), [("cifar-100", "cifar100"), ("digit", "digits"), ("folders", "folder")])
def test_unknown_name_lists_the_closest_first(name, closest, tmp_path):
    known = refuse(name, tmp_path).partition("known are: ")[2].split(", ")
    assert known[0] == closest and set(known) == set(dataset_dict)


# --- torchvision beside any torch

FAKES = {
    # a build that fits its torch declares nms by itself, which would fail after a declaration of ours
    "loads": (
        "torch.library.define('torchvision::nms', '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')",
        "",
    ),
    "does not load": (
        "for name in ('nms', 'qnms'):\n"
        "    torch.library.register_fake(f'torchvision::{name}')(lambda dets, scores, iou_threshold: dets)\n"
        "torchvision.part  # missing from a package whose parts were imported for another",
        "",
    ),
    "fails otherwise": ("raise RuntimeError('another CUDA')", "another CUDA"),
}


@pytest.mark.parametrize("case", FAKES)
def test_torchvision_import(tmp_path, case):
    init, error = FAKES[case]
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "part.py").write_text("import torch\n")
    (tmp_path / "torchvision" / "__init__.py").write_text(f"import torch\nimport torchvision.part\n{init}\n")
    if case == "does not load":  # else there is nothing to repair
        assert "torchvision::nms does not exist" in python("import torchvision", tmp_path).stderr
    done = python("from dataset.torchvision_import import torchvision; print(torchvision.__file__)", tmp_path)
    if error:
        assert done.returncode and error in done.stderr
    else:
        assert done.stdout.strip() == str(tmp_path / "torchvision" / "__init__.py"), done.stderr


def test_digits_and_folder_do_not_import_torch(tmp_path):
    make_folder(tmp_path)
    done = python(
        "import sys; from dataset import load_dataset; load_dataset('digits', '.')\n"
        f"load_dataset('folder', {str(tmp_path)!r})\n"
        "print([m for m in sys.modules if m.partition('.')[0] in ('torch', 'torchvision')])"
    )
    assert done.stdout.strip() == "[]", done.stderr


# --- CIFAR, in the exact layout of the official files


class Python2Pickler(pickle._Pickler):
    """Byte strings and integer flags, as in the official files."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_string(self, obj):
        data = obj.encode("latin1") if isinstance(obj, str) else obj
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(obj)

    dispatch[str] = dispatch[bytes] = save_string

    def reducer_override(self, obj):
        if isinstance(obj, np.dtype):
            return np.dtype, ("u1", 0, 1), (3, "|", None, None, None, -1, -1, 0)
        return NotImplemented


class MakesFolder:
    """Its pickle runs code when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Cifar:
    """A small CIFAR in root, its archive in `archive`, and torchvision's checksums replaced by theirs."""

    def __init__(self, n_cls: int, root: Path, setattr):
        self.name, self.root, self.rng = f"cifar{n_cls}", root, np.random.default_rng(n_cls)
        self.cls = getattr(torchvision.datasets, self.name.upper())
        self.folder, self.n_cls = root / self.cls.base_folder, n_cls
        self.names = tuple(f"class {i:02d}" for i in range(n_cls))
        self.moments = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
        if n_cls == 10:
            self.moments = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
        self.folder.mkdir(parents=True)
        meta = {self.cls.meta["key"]: list(self.names), "num_vis": 3072}
        setattr(self.cls, "meta", self.cls.meta | {"md5": self.write(self.cls.meta["filename"], meta)})
        self.images, self.labels = [], []  # of training and test set
        for which in ("train_list", "test_list"):
            names = [name for name, _ in getattr(self.cls, which)]
            batches = [self.write_batch(name) for name in names]
            self.images.append(np.concatenate([images for images, _ in batches]))
            self.labels.append([label for _, labels in batches for label in labels])
            setattr(self.cls, which, [[name, self.md5(name)] for name in names])
        self.archive = root.parent / self.cls.filename
        with tarfile.open(self.archive, "w:gz") as tar:
            tar.add(self.folder, self.cls.base_folder)
        setattr(self.cls, "tgz_md5", hashlib.md5(self.archive.read_bytes()).hexdigest())
        setattr(self.cls, "url", NOWHERE)

    def md5(self, name: str) -> str:
        return hashlib.md5((self.folder / name).read_bytes()).hexdigest()

    def write(self, name: str, content: dict) -> str:
        with (self.folder / name).open("wb") as file:
            Python2Pickler(file, protocol=2).dump(content)
        data = (self.folder / name).read_bytes().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
        (self.folder / name).write_bytes(data)
        return self.md5(name)

    def write_batch(self, name: str) -> tuple[np.ndarray, list[int]]:
        """Rows of 1,024 red values in reading order, 1,024 green, 1,024 blue."""
        images = self.rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
        labels = [int(i) for i in self.rng.integers(0, self.n_cls, 6)]
        rows = np.concatenate([images[..., channel].reshape(6, 1024) for channel in range(3)], axis=1)
        key = "labels" if self.n_cls == 10 else "fine_labels"
        self.write(name, {"batch_label": name, key: labels, "coarse_labels": [0] * 6, "data": rows})
        return images, labels

    def check(self, source: DataSource):
        check_source(source, 32)
        for got, want in zip((source.train_images, source.test_images), self.images, strict=True):
            assert np.array_equal(got, want)
        assert [source.train_labels.tolist(), source.test_labels.tolist()] == self.labels
        assert (source.class_names, (source.mean, source.std), source.flip) == (self.names, self.moments, True)

    def check_says_where(self, text: str, root: Path):
        assert self.cls.url in text and self.cls.tgz_md5 in text and str(root / self.cls.filename) in text


@pytest.fixture(params=[10, 100])
def cifar(request, tmp_path, monkeypatch):
    return Cifar(request.param, tmp_path / "root", monkeypatch.setattr)


def test_cifar_reads_the_official_layout_without_a_warning(cifar):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cifar.check(load_dataset(cifar.name, cifar.root, download=False))
    check_source(load_dataset(cifar.name, str(cifar.root), 16, False, 2), 16)


@pytest.mark.parametrize("download", [True, False])
def test_cifar_is_nowhere(cifar, tmp_path, download):
    cifar.check_says_where(refuse(cifar.name, tmp_path / "new", download=download), tmp_path / "new")
    (tmp_path / "file").write_text("")
    cifar.check_says_where(refuse(cifar.name, tmp_path / "file", download=download), tmp_path / "file")


@pytest.mark.parametrize("part", ["train", "test", "meta"])
@pytest.mark.parametrize("damage", ["changed", "truncated", "missing"])
def test_cifar_damaged_file_is_never_unpickled(cifar, part, damage, tmp_path):
    names = {"train": cifar.cls.train_list[-1][0], "test": cifar.cls.test_list[0][0]}
    path = cifar.folder / names.get(part, cifar.cls.meta["filename"])
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-20])
    else:  # a pickle that would run code
        path.write_bytes(pickle.dumps(MakesFolder(tmp_path / "ran")))
    cifar.check_says_where(refuse(cifar.name, cifar.root, download=False), cifar.root)
    assert not (tmp_path / "ran").exists()
    if damage == "changed":  # it would have run
        pickle.loads(path.read_bytes())
        assert (tmp_path / "ran").exists()


def test_cifar_download(cifar, tmp_path, monkeypatch, capfd):
    with serve(cifar.archive.read_bytes(), monkeypatch) as server:
        monkeypatch.setattr(cifar.cls, "url", server["url"])
        load_dataset(cifar.name, cifar.root)
        assert server["asked"] == 0
        (cifar.folder / cifar.cls.test_list[0][0]).write_bytes(b"damaged")
        root, whole = tmp_path / "new" / "data", server["body"]
        for cut in (0, 100, -1):
            server["body"] = whole[:cut]
            cifar.check_says_where(refuse(cifar.name, root), root)
        server["body"] = whole
        for folder in (root, cifar.root):
            cifar.check(load_dataset(cifar.name, folder))
    assert capfd.readouterr() == ("", "")  # a progress bar is for terminals
    assert sorted(path.name for path in root.iterdir()) == sorted([cifar.cls.base_folder, cifar.cls.filename])


@pytest.mark.parametrize("download", [True, False])
def test_cifar_archive_put_there_by_hand(cifar, tmp_path, download):
    (tmp_path / "by_hand").mkdir()
    path = tmp_path / "by_hand" / cifar.cls.filename
    path.write_bytes(cifar.archive.read_bytes()[:-1])
    refuse(cifar.name, path.parent, download=download)
    assert not (path.parent / cifar.cls.base_folder).exists()
    shutil.copy(cifar.archive, path)
    cifar.check(load_dataset(cifar.name, path.parent, download=download))


# --- digits


def test_digits_are_the_same_on_every_machine():
    source = load_dataset("digits", "nowhere")
    check_source(source, 32)
    assert (len(source.train_labels), len(source.test_labels), source.n_cls) == (1000, 797, 10)
    assert source.flip is False and source.class_names == tuple("0123456789")
    total = hashlib.sha256(b"".join(a.astype(a.dtype.newbyteorder("<")).tobytes() for a in source[:4])).hexdigest()
    assert total == "a1999a53fa80fe522be9d3e8c88c820f42fe68115bf54d1cbc6a1b5791bd551a"
    assert (source.mean[0], source.std[0]) == (0.30540998774509803, 0.3240162644909455)
    small = load_dataset("digits", "nowhere", image_size=8)
    check_source(small, 8)
    assert set(np.unique(small.train_images)) == {v * 255 // 16 for v in range(17)}  # the originals, unfiltered


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "pip install scikit-learn" in refuse("digits", "nowhere")


# --- folders of images


def save(path: Path, image: Image.Image, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def picture(seed: int, size=(32, 32)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def make_folder(root: Path, test: str = "test", n: int = 2) -> Path:
    """Classes cat and dog with n training and n test images each."""
    for split in ("train", test):
        for label, name in enumerate(("cat", "dog")):
            for i in range(n):
                save(root / split / name / f"{i:03d}.png", picture(1000 * (split == "train") + 500 * label + i))
    return root


def load_folder(root: Path, **options) -> DataSource:
    return load_dataset("folder", root, **options)


@pytest.mark.parametrize("test", ["test", "val"])
def test_folder(tmp_path, test):
    source = load_folder(make_folder(tmp_path, test))
    check_source(source, 32)
    assert (source.n_cls, source.class_names, source.flip) == (2, ("cat", "dog"), True)
    assert source.train_labels.tolist() == source.test_labels.tolist() == [0, 0, 1, 1]
    for i, seed in enumerate((0, 1, 500, 501)):
        assert np.array_equal(source.train_images[i], np.asarray(picture(1000 + seed)))
        assert np.array_equal(source.test_images[i], np.asarray(picture(seed)))
    values = source.train_images.astype(np.float64) / 255
    assert np.allclose(source.mean, values.mean((0, 1, 2)), rtol=1e-12)
    assert np.allclose(source.std, values.std((0, 1, 2)), rtol=1e-12)


def test_folder_prefers_test_to_val(tmp_path):
    make_folder(tmp_path, "test", 2)
    make_folder(tmp_path, "val", 3)
    assert len(load_folder(tmp_path).test_labels) == 4


@pytest.mark.parametrize("path", ["0.png", "images/0.png", "unknown/0.png"])
def test_folder_reads_val_where_test_has_no_labels(tmp_path, path, capfd):
    want = load_folder(make_folder(tmp_path, "val", 3))
    save(tmp_path / "test" / path, picture(0))
    check_equal(load_folder(tmp_path), want)
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("note: ") and err.count("\n") == 1 and str(tmp_path / "val") in err
    shutil.rmtree(tmp_path / "val")
    assert str(tmp_path / "test") in refuse("folder", tmp_path)


def test_folder_test_folder_is_chosen_by_name(tmp_path, capfd):
    make_folder(tmp_path, "test", 2)
    make_folder(tmp_path, "holdout", 3)
    assert len(load_folder(tmp_path, test_folder="holdout").test_labels) == 6
    assert len(load_folder(tmp_path).test_labels) == 4
    assert "nowhere/" in refuse("folder", tmp_path, test_folder="nowhere")
    save(tmp_path / "loose" / "0.png", picture(0))
    assert str(tmp_path / "loose") in refuse("folder", tmp_path, test_folder="loose")
    assert "--test_folder" in refuse("digits", tmp_path, test_folder="test")
    assert capfd.readouterr() == ("", "")


def test_folder_nested_sorted_hidden_and_other_files(tmp_path):
    make_folder(tmp_path)
    cat = tmp_path / "train" / "cat"
    save(cat / "more" / "deep" / "0.JPEG", picture(7), quality=100)
    save(cat / "A.bmp", picture(8))
    for hidden in (cat / ".hidden.png", cat / ".cache" / "0.png", tmp_path / "train" / ".git" / "0.png"):
        save(hidden, picture(9))
    (cat / "0_boxes.txt").write_text("no image")
    (tmp_path / "train" / "list.txt").write_text("no class")
    source = load_folder(tmp_path)
    assert source.class_names == ("cat", "dog") and source.train_labels.tolist() == [0, 0, 0, 0, 1, 1]
    assert np.array_equal(source.train_images[2], np.asarray(picture(8)))  # 000 001 A more/deep/0
    assert np.array_equal(source.train_images[3], np.asarray(Image.open(cat / "more" / "deep" / "0.JPEG")))


def test_folder_follows_links_once(tmp_path):
    """Into a class folder, of a whole class, of a file; and in circles."""
    want = load_folder(make_folder(tmp_path / "plain"))
    root, elsewhere = make_folder(tmp_path / "linked"), tmp_path / "elsewhere"
    shutil.move(root / "train" / "dog", elsewhere / "dog")
    (root / "train" / "dog").symlink_to(elsewhere / "dog")
    (elsewhere / "more").mkdir()
    shutil.move(root / "train" / "cat" / "001.png", elsewhere / "more")
    (root / "train" / "cat" / "more").symlink_to(elsewhere / "more")
    (root / "test" / "cat" / "000.png").rename(elsewhere / "file.png")
    (root / "test" / "cat" / "000.png").symlink_to(elsewhere / "file.png")
    for circle in (root / "train" / "cat" / "up", elsewhere / "more" / "self", elsewhere / "dog" / "all"):
        circle.symlink_to(circle.parent if circle.name != "up" else root)
    (root / "train" / "cat" / "more_again").symlink_to(elsewhere / "more")
    check_equal(load_folder(root), want)


@pytest.mark.parametrize("path", ["train/cat/000.png", "train/cat/more", "train/cow", "test/dog/x.heic"])
def test_folder_refuses_a_dead_link(tmp_path, path):
    (make_folder(tmp_path) / path).unlink(missing_ok=True)
    (tmp_path / path).symlink_to(tmp_path / "gone")
    assert str(tmp_path / path) in refuse("folder", tmp_path)


def test_folder_says_what_is_left_out(tmp_path, capfd):
    want = load_folder(make_folder(tmp_path))
    assert capfd.readouterr() == ("", "")
    for name in ("1.heic", "2.HEIC", "3.avif", "4.jp2", "deep/5.txt", "6"):
        (tmp_path / "train" / "cat" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "train" / "cat" / name).write_text("")
    (tmp_path / "test" / "loose.png").write_text("")
    for junk in ("@eaDir/000.png", "__MACOSX/x/000.png", ".thumbnails/000.png", "Thumbs.db", ".DS_Store", "._000.png"):
        for folder in (tmp_path / "train", tmp_path / "train" / "cat", tmp_path / "test" / "dog"):
            (folder / junk).parent.mkdir(parents=True, exist_ok=True)
            (folder / junk).write_text("")
    check_equal(load_folder(tmp_path), want)
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("note: ") and err.count("\n") == 1 and str(tmp_path) in err
    said = set(err.rstrip().rpartition(": ")[2].split(", "))
    assert said == {"2 .heic", "1 .avif", "1 .jp2", "1 .txt", "1 .png", "1 without a suffix"}


def test_folder_without_test_images_of_a_class(tmp_path):
    shutil.rmtree(make_folder(tmp_path) / "test" / "cat")
    assert load_folder(tmp_path).test_labels.tolist() == [1, 1]


def test_folder_threads_change_nothing(tmp_path):
    make_folder(tmp_path, n=150)
    sources = []
    for num_workers in (0, 3):
        shutil.rmtree(tmp_path / ".distillers_cache", ignore_errors=True)
        sources.append(load_folder(tmp_path, num_workers=num_workers))
    assert len(np.unique(sources[0].train_images, axis=0)) == 300
    check_equal(*sources)


def test_folder_sizes(tmp_path):
    """A square is resized as a whole; other images give what resizing and then cropping to the middle would."""
    make_folder(tmp_path)
    square, wide = picture(5, (90, 90)), picture(6, (93, 62)).resize((930, 620), Image.Resampling.BICUBIC)
    save(tmp_path / "train" / "cat" / "a.png", square)
    save(tmp_path / "train" / "cat" / "b.png", wide)
    save(tmp_path / "train" / "cat" / "c.png", wide.transpose(Image.Transpose.ROTATE_90))
    for size in (None, 20):
        source = load_folder(tmp_path, image_size=size)
        check_source(source, size or 32)
        side = size or 32
        _, _, a, b, c = source.train_images[:5]
        assert np.array_equal(a, np.asarray(square.resize((side, side), Image.Resampling.BILINEAR)))
        resized = np.asarray(wide.resize((side * 3 // 2, side), Image.Resampling.BILINEAR))
        assert np.abs(b.astype(int) - resized[:, side // 4 : side // 4 + side]).max() <= 1
        assert np.abs(np.rot90(b).astype(int) - c).max() <= 1


def grey16(value: int, kind: str = "<u2") -> Image.Image:
    return Image.fromarray(np.full((32, 32), value, kind))


def palette(alpha: bool) -> Image.Image:
    image = Image.new("P", (32, 32), 3)
    image.putpalette([0, 0, 0, 1, 1, 1, 2, 2, 2, 200, 100, 50])
    if alpha:
        image.info["transparency"] = bytes([255, 255, 255, 10])
    return image


MODES = {
    "grey.png": (Image.new("L", (32, 32), 77), (77, 77, 77)),
    "grey.pgm": (Image.new("L", (32, 32), 77), (77, 77, 77)),
    "grey.jpg": (Image.new("L", (32, 32), 128), (128, 128, 128)),
    "bit.png": (Image.new("1", (32, 32), 1), (255, 255, 255)),
    "grey_alpha.png": (Image.new("LA", (32, 32), (77, 0)), (77, 77, 77)),
    "rgba.png": (Image.new("RGBA", (32, 32), (200, 100, 50, 0)), (200, 100, 50)),
    "rgba.webp": (Image.new("RGBA", (32, 32), (200, 100, 50, 255)), (200, 100, 50)),
    "palette.png": (palette(False), (200, 100, 50)),
    "palette_alpha.png": (palette(True), (200, 100, 50)),
    "palette.gif": (palette(False), (200, 100, 50)),
    "cmyk.tif": (Image.new("CMYK", (32, 32), (0, 255, 255, 0)), (255, 0, 0)),
    "cmyk.jpg": (Image.new("CMYK", (32, 32), (0, 255, 255, 0)), (255, 0, 0)),
    "grey16.png": (grey16(0x4D21), (77, 77, 77)),
    "white16.png": (grey16(65535), (255, 255, 255)),
    "grey16.tiff": (grey16(0x4D21), (77, 77, 77)),
    "big_endian16.tiff": (grey16(0x4D21, ">u2"), (77, 77, 77)),
    "grey16.pgm": (Image.new("I", (32, 32), 0x4D21), (77, 77, 77)),
    "grey32.tiff": (Image.new("I", (32, 32), 0x4D21), (77, 77, 77)),
}


def test_folder_modes(tmp_path):
    make_folder(tmp_path, n=0)
    for name, (image, _) in MODES.items():
        save(tmp_path / "train" / "cat" / name, image, **({"lossless": True} if name.endswith("webp") else {}))
    for path in ("train/dog", "test/dog"):  # a wrong suffix: it is read by content
        save(tmp_path / path / "jpeg.png", Image.new("RGB", (32, 32), (128, 128, 128)), format="JPEG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = load_folder(tmp_path)
    for name, image in zip(sorted(MODES), source.train_images, strict=False):
        assert np.abs(image.astype(int) - MODES[name][1]).max() <= 2 * name.endswith("jpg"), name
    assert (source.train_images[-1] == 128).all()


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
def test_folder_turns_images_as_their_exif_data_says(tmp_path, name):
    """6 is a quarter turn to the right; damaged EXIF data is no reason to refuse an image."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "camera"
    path = save(make_folder(tmp_path) / "train" / "cat" / name, picture(3), exif=exif, lossless=True)
    with Image.open(path) as image:
        stored = np.asarray(image.convert("RGB"))
    stored = np.rot90(stored) if name == "a.tif" else stored  # which Pillow has turned
    assert np.array_equal(load_folder(tmp_path).train_images[2], np.rot90(stored, -1))
    if name == "a.jpg":
        path.write_bytes(path.read_bytes().replace(b"MM\0*", b"MM\0!").replace(b"II*\0", b"II!\0"))
        assert np.array_equal(load_folder(tmp_path).train_images[2], stored)


def test_folder_compares_class_names_in_nfc(tmp_path):
    """macOS writes é as e and an accent."""
    make_folder(tmp_path)
    (tmp_path / "train" / "dog").rename(tmp_path / "train" / "caf\u00e9")
    (tmp_path / "test" / "dog").rename(tmp_path / "test" / "cafe\u0301")
    source = load_folder(tmp_path)
    assert source.class_names == ("caf\u00e9", "cat") and source.test_labels.tolist() == [0, 0, 1, 1]
    save(tmp_path / "train" / "cafe\u0301" / "0.png", picture(0))
    assert "caf\u00e9" in refuse("folder", tmp_path)


def test_folder_of_one_colour_has_no_zero_std(tmp_path):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            save(tmp_path / split / name / "0.png", Image.new("RGB", (32, 32), (0, 100, 255)))
    source = load_folder(tmp_path)
    assert source.mean == (0, 100 / 255, 1) and source.std == (1 / 255,) * 3


def remove(path):
    return lambda root: shutil.rmtree(root / path) if (root / path).is_dir() else (root / path).unlink()


def empty_class(path):
    def change(root):
        shutil.rmtree(root / path, ignore_errors=True)
        (root / path).mkdir()
        (root / path / "notes.txt").write_text("no image")

    return change


def no_classes(path):
    def change(root):
        shutil.rmtree(root / path)
        save(root / path / "loose.png", picture(0))

    return change


def odd(name, image, keep=None, **options):
    """An image in train/cat/, of which only so many bytes are kept."""

    def change(root):
        path = save(root / "train" / "cat" / name, image, **options)
        path.write_bytes(path.read_bytes()[:keep])

    return change


LARGE = picture(0, (64, 64))
FOLDER_ERRORS = {
    "no folder": (remove("."), "{root}"),
    "no train": (remove("train"), "{root} "),
    "no test": (remove("test"), "{root} "),
    "no classes in train": (no_classes("train"), "{root}/train"),
    "no classes in test": (no_classes("test"), "{root}/test"),
    "one class": (remove("train/dog"), "{root}/train has 1 class"),
    "empty class": (empty_class("train/dog"), "{root}/train/dog"),
    "empty test class": (empty_class("test/dog"), "{root}/test/dog"),
    "unknown test class": (empty_class("test/cow"), "{root}/test has a class 'cow'"),
    "text": (odd("cut.png", LARGE, 4), "{root}/train/cat/cut.png"),
    "another format": (odd("cut.png", LARGE, format="PCX"), "{root}/train/cat/cut.png"),
    "truncated jpeg": (odd("cut.jpg", LARGE, 1000), "{root}/train/cat/cut.jpg"),
    "truncated png": (odd("cut.png", LARGE, 1000), "{root}/train/cat/cut.png"),
    "floating-point": (odd("cut.tiff", Image.new("F", (32, 32), 0.5)), "{root}/train/cat/cut.tiff"),
    "32-bit grey": (odd("cut.tiff", Image.new("I", (32, 32), 1 << 20)), "{root}/train/cat/cut.tiff"),
}


@pytest.mark.parametrize("case", FOLDER_ERRORS)
def test_folder_errors(tmp_path, case):
    change, want = FOLDER_ERRORS[case]
    root = make_folder(tmp_path / "root")
    change(root)
    for num_workers in (0, 2):
        said = refuse("folder", root, num_workers=num_workers)
        assert want.format(root=root).replace("/", os.sep) in said.replace("/", os.sep)


def test_folder_reports_all_unreadable_images_together(tmp_path):
    make_folder(tmp_path, n=150)
    damaged = [tmp_path / split / "cat" / f"{i:03d}.png" for split in ("train", "test") for i in range(0, 150, 10)]
    for path in damaged:
        path.write_text("no image")
    for num_workers in (0, 4):
        said = refuse("folder", tmp_path, num_workers=num_workers)
        assert "30 of 600" in said and [str(path) in said for path in damaged] == [True] * 20 + [False] * 10
    for path in damaged[1:]:
        save(path, picture(0))
    assert "1 of 600" in refuse("folder", tmp_path)  # nothing of it was cached


def test_folder_decompression_bomb(tmp_path, monkeypatch):
    path = save(make_folder(tmp_path) / "test" / "dog" / "bomb.png", LARGE)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 3)  # Pillow refuses at twice its limit
    assert str(path) in refuse("folder", tmp_path)
