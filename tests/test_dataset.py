"""Every data set's reader on real files, the import of torchvision, and what they say when data is missing."""

import hashlib
import os
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import warnings
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dataset import DataError, DataSource, dataset_dict, load_dataset
from dataset.torchvision_import import torchvision

ROOT = Path(__file__).resolve().parents[1]


def check_source(source: DataSource, size: int):
    """What any data set must give."""
    for images, labels in ((source.train_images, source.train_labels), (source.test_images, source.test_labels)):
        assert images.dtype == np.uint8 and images.shape == (len(labels), size, size, 3)
        assert images.flags.c_contiguous
        assert labels.dtype == np.int64 and labels.ndim == 1
        assert labels.min() >= 0 and labels.max() < source.n_cls
    assert len(source.class_names) == source.n_cls and all(isinstance(name, str) for name in source.class_names)
    assert len(source.mean) == len(source.std) == 3 and min(source.std) > 0


def one_sentence(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


def python(code: str, *path: Path) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter, with these folders before all others."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT)))}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)


# --- by name


def test_names_and_first_lines():
    assert {"cifar100", "cifar10", "digits", "folder"} <= set(dataset_dict)
    for name, load in dataset_dict.items():
        assert (load.__doc__ or "").splitlines()[0].strip().endswith("."), name
    assert "50,000" in dataset_dict["cifar100"].__doc__ and "169 MB" in dataset_dict["cifar100"].__doc__


@pytest.mark.parametrize(("name", "closest"), [("cifar-100", "cifar100"), ("digit", "digits"), ("folders", "folder")])
def test_unknown_name_lists_the_closest_first(name, closest, tmp_path):
    with pytest.raises(DataError) as error:
        load_dataset(name, tmp_path)
    known = one_sentence(error).partition("known are: ")[2].split(", ")
    assert known[0] == closest and set(known) == set(dataset_dict)


def test_image_size_below_one(tmp_path):
    with pytest.raises(DataError, match="image_size"):
        load_dataset("digits", tmp_path, image_size=0)


# --- torchvision beside any torch


def test_torchvision_imports_in_a_fresh_interpreter():
    done = python("from dataset.torchvision_import import torchvision; print(torchvision.datasets.CIFAR10.__name__)")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "CIFAR10" and done.stderr == ""


OPERATOR = "torch.library.define('torchvision::nms', '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')"


def fake_torchvision(folder: Path, init: str) -> Path:
    (folder / "torchvision").mkdir()
    (folder / "torchvision" / "part.py").write_text("import torch\n")
    (folder / "torchvision" / "__init__.py").write_text(f"import torch\nimport torchvision.part\n{init}\n")
    return folder


def test_operators_that_load_are_left_alone(tmp_path):
    """A build that fits its torch declares nms by itself, which would fail after a declaration of ours."""
    fake = fake_torchvision(tmp_path, OPERATOR)
    done = python(
        "from dataset.torchvision_import import torchvision; import torch\n"
        "print(torchvision.__file__, hasattr(torch.ops.torchvision, 'qnms'))",
        fake,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(fake / "torchvision" / "__init__.py"), "False"]


def test_operators_that_do_not_load_are_declared(tmp_path):
    init = """
for name in ("nms", "qnms"):
    @torch.library.register_fake(f"torchvision::{name}")
    def shape(dets, scores, iou_threshold):
        return dets.new_empty(0)
complete = torchvision.part is not None  # missing from a package whose parts were imported for another
"""
    fake = fake_torchvision(tmp_path, init)
    failing = python("import torchvision", fake)
    assert "torchvision::nms does not exist" in failing.stderr  # else there is nothing to repair
    done = python("from dataset.torchvision_import import torchvision; print(torchvision.complete)", fake)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True"


def test_other_errors_of_torchvision_are_not_hidden(tmp_path):
    fake = fake_torchvision(tmp_path, "print('tried')\nraise RuntimeError('another CUDA')")
    done = python("import dataset.torchvision_import", fake)
    assert done.returncode != 0 and "another CUDA" in done.stderr
    assert done.stdout.split() == ["tried"]


def test_digits_and_folder_do_not_import_torchvision(tmp_path):
    make_folder(tmp_path)
    done = python(
        "import sys; from dataset import load_dataset; load_dataset('digits', '.')\n"
        f"load_dataset('folder', {str(tmp_path)!r})\n"
        "print([m for m in sys.modules if m.partition('.')[0] in ('torch', 'torchvision')])"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


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


def write_pickle(path: Path, content: dict) -> str:
    """-> MD5"""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        Python2Pickler(file, protocol=2).dump(content)
    data = path.read_bytes().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    path.write_bytes(data)
    return hashlib.md5(data).hexdigest()


def batch(rng, n, n_cls, name):
    return {
        "batch_label": name,
        "labels": [int(i) for i in rng.integers(0, n_cls, n)],
        "data": rng.integers(0, 256, (n, 3072), dtype=np.uint8),
        "filenames": [f"{name}_{i}.png" for i in range(n)],
    }


def write_cifar10(root: Path) -> dict:
    rng, folder = np.random.default_rng(10), root / "cifar-10-batches-py"
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    train = [batch(rng, 6, 10, f"training batch {i} of 5") for i in range(1, 6)]
    test = batch(rng, 7, 10, "testing batch 1 of 1")
    meta = {"num_cases_per_batch": 10000, "label_names": names, "num_vis": 3072}
    (folder / "readme.html").parent.mkdir(parents=True)
    (folder / "readme.html").write_text("<meta HTTP-EQUIV='REFRESH'>")
    return {
        "name": "cifar10",
        "train": [b["data"] for b in train],
        "train_labels": [label for b in train for label in b["labels"]],
        "test": test["data"],
        "test_labels": test["labels"],
        "class_names": tuple(names),
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
        "patch": {
            "train_list": [
                [f"data_batch_{i}", write_pickle(folder / f"data_batch_{i}", b)] for i, b in enumerate(train, 1)
            ],
            "test_list": [["test_batch", write_pickle(folder / "test_batch", test)]],
            "meta": torchvision.datasets.CIFAR10.meta | {"md5": write_pickle(folder / "batches.meta", meta)},
        },
    }


def write_cifar100(root: Path) -> dict:
    rng, folder = np.random.default_rng(100), root / "cifar-100-python"
    parts = [batch(rng, n, 100, f"{name} batch 1 of 1") for n, name in ((30, "training"), (7, "testing"))]
    for part in parts:
        part["fine_labels"] = part.pop("labels")
        part["coarse_labels"] = [label // 5 for label in part["fine_labels"]]
    names = [f"fine {i:02d}" for i in range(100)]
    meta = {"fine_label_names": names, "coarse_label_names": [f"coarse {i:02d}" for i in range(20)]}
    train, test = parts
    return {
        "name": "cifar100",
        "train": [train["data"]],
        "train_labels": train["fine_labels"],
        "test": test["data"],
        "test_labels": test["fine_labels"],
        "class_names": tuple(names),
        "mean": (0.5071, 0.4867, 0.4408),
        "std": (0.2675, 0.2565, 0.2761),
        "patch": {
            "train_list": [["train", write_pickle(folder / "train", train)]],
            "test_list": [["test", write_pickle(folder / "test", test)]],
            "meta": torchvision.datasets.CIFAR100.meta | {"md5": write_pickle(folder / "meta", meta)},
        },
    }


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(params=[write_cifar10, write_cifar100], ids=["cifar10", "cifar100"])
def cifar(request, tmp_path, monkeypatch):
    """A small CIFAR in root, its archive beside it, and torchvision's checksums replaced by theirs."""
    info = request.param(tmp_path / "root")
    kind = getattr(torchvision.datasets, info["name"].upper())
    info |= {"root": tmp_path / "root", "kind": kind, "folder": tmp_path / "root" / kind.base_folder}
    info["archive"] = tmp_path / "served" / kind.filename
    info["archive"].parent.mkdir()
    with tarfile.open(info["archive"], "w:gz") as tar:
        tar.add(info["folder"], kind.base_folder)
    info["patch"]["tgz_md5"] = hashlib.md5(info["archive"].read_bytes()).hexdigest()
    info["patch"]["url"] = f"http://127.0.0.1:{closed_port()}/{kind.filename}"
    for name, value in info["patch"].items():
        monkeypatch.setattr(kind, name, value)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return info


@pytest.fixture
def server(cifar, monkeypatch):
    """Serves `content["body"]` from the loopback address as the archive."""
    content = {"body": cifar["archive"].read_bytes(), "asked": 0}

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

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        monkeypatch.setattr(cifar["kind"], "url", f"http://127.0.0.1:{http.server_port}/{cifar['kind'].filename}")
        yield content
        http.shutdown()
        thread.join()


def expected_images(data: np.ndarray) -> np.ndarray:
    """The rows of the official files: 1,024 red values in reading order, 1,024 green, 1,024 blue."""
    images = np.zeros((len(data), 32, 32, 3), np.uint8)
    for channel in range(3):
        images[..., channel] = data[:, channel * 1024 : (channel + 1) * 1024].reshape(-1, 32, 32)
    return images


def check_cifar(source, cifar):
    check_source(source, 32)
    assert np.array_equal(source.train_images, expected_images(np.concatenate(cifar["train"])))
    assert np.array_equal(source.test_images, expected_images(cifar["test"]))
    assert source.train_labels.tolist() == cifar["train_labels"]
    assert source.test_labels.tolist() == cifar["test_labels"]
    assert source.class_names == cifar["class_names"]
    assert (source.mean, source.std, source.flip) == (cifar["mean"], cifar["std"], True)


def test_cifar_reads_the_official_layout_without_a_warning(cifar):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = load_dataset(cifar["name"], cifar["root"], download=False)
    check_cifar(source, cifar)


def test_cifar_present_is_not_asked_for(cifar, server):
    load_dataset(cifar["name"], cifar["root"])
    assert server["asked"] == 0


def test_cifar_resized_on_load(cifar):
    plain = load_dataset(cifar["name"], cifar["root"], download=False)
    for size, num_workers in ((16, 0), (40, 2)):
        source = load_dataset(cifar["name"], str(cifar["root"]), size, False, num_workers)
        check_source(source, size)
        for got, full in ((source.train_images, plain.train_images), (source.test_images, plain.test_images)):
            x = torch.from_numpy(full).permute(0, 3, 1, 2).float()
            want = F.interpolate(x, (size, size), mode="bilinear", antialias=True).permute(0, 2, 3, 1).numpy()
            assert np.abs(got - want).max() < 1.01  # Pillow rounds after each of its two passes


def check_says_where(text: str, cifar, root: Path):
    kind = cifar["kind"]
    assert kind.url in text and kind.tgz_md5 in text and str(root / kind.filename) in text


def test_cifar_missing_without_download(cifar, tmp_path):
    root = tmp_path / "nothing"
    with pytest.raises(DataError) as error:
        load_dataset(cifar["name"], root, download=False)
    check_says_where(one_sentence(error), cifar, root)
    assert not root.exists()


def test_cifar_download_refused(cifar, tmp_path):
    root = tmp_path / "nothing"
    with pytest.raises(DataError, match="refused") as error:
        load_dataset(cifar["name"], root)
    check_says_where(one_sentence(error), cifar, root)
    assert list(root.iterdir()) == []


def test_cifar_data_folder_is_a_file(cifar, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError) as error:
        load_dataset(cifar["name"], tmp_path / "file")
    check_says_where(one_sentence(error), cifar, tmp_path / "file")


class MakesFolder:
    """Its pickle runs code when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("part", ["train", "test", "meta"])
@pytest.mark.parametrize("damage", ["changed", "truncated", "missing"])
def test_cifar_damaged_file_is_named_and_never_unpickled(cifar, part, damage, tmp_path):
    names = {"train": cifar["kind"].train_list[-1][0], "test": cifar["kind"].test_list[0][0]}
    path = cifar["folder"] / names.get(part, cifar["kind"].meta["filename"])
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-20])
    else:  # a pickle that would run code
        path.write_bytes(pickle.dumps(MakesFolder(tmp_path / "ran")))
    with pytest.raises(DataError) as error:
        load_dataset(cifar["name"], cifar["root"], download=False)
    check_says_where(one_sentence(error), cifar, cifar["root"])
    assert not (tmp_path / "ran").exists()


def test_the_changed_pickle_would_run_code(tmp_path):
    """So that the test above can fail."""
    pickle.loads(pickle.dumps(MakesFolder(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def test_cifar_download(cifar, server, tmp_path, capfd):
    root = tmp_path / "new" / "data"
    check_cifar(load_dataset(cifar["name"], root), cifar)
    assert capfd.readouterr() == ("", "")  # a bar of progress is for terminals
    assert sorted(path.name for path in root.iterdir()) == sorted([cifar["kind"].base_folder, cifar["kind"].filename])


def test_cifar_damaged_files_are_replaced_by_a_download(cifar, server):
    (cifar["folder"] / cifar["kind"].meta["filename"]).write_bytes(b"damaged")
    (cifar["folder"] / cifar["kind"].test_list[0][0]).unlink()
    check_cifar(load_dataset(cifar["name"], cifar["root"]), cifar)


@pytest.mark.parametrize("cut", [0, 100, -1])
def test_cifar_truncated_download_leaves_nothing_and_does_not_block_the_next(cifar, server, tmp_path, cut):
    whole, root = server["body"], tmp_path / "new"
    server["body"] = whole[:cut]
    with pytest.raises(DataError) as error:
        load_dataset(cifar["name"], root)
    check_says_where(one_sentence(error), cifar, root)
    assert list(root.iterdir()) == []
    server["body"] = whole
    check_cifar(load_dataset(cifar["name"], root), cifar)


@pytest.mark.parametrize("download", [True, False])
def test_cifar_archive_put_there_by_hand(cifar, tmp_path, download):
    root = tmp_path / "by_hand"
    root.mkdir()
    shutil.copy(cifar["archive"], root)
    check_cifar(load_dataset(cifar["name"], root, download=download), cifar)


def test_cifar_damaged_archive_by_hand(cifar, server, tmp_path):
    root = tmp_path / "by_hand"
    root.mkdir()
    (root / cifar["kind"].filename).write_bytes(cifar["archive"].read_bytes()[:-1])
    with pytest.raises(DataError):
        load_dataset(cifar["name"], root, download=False)
    assert not (root / cifar["kind"].base_folder).exists()
    check_cifar(load_dataset(cifar["name"], root), cifar)  # downloaded in its place


# --- digits


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits", "nowhere")


def test_digits_shapes(digits):
    check_source(digits, 32)
    assert (len(digits.train_labels), len(digits.test_labels), digits.n_cls) == (1000, 797, 10)
    assert digits.flip is False and digits.class_names == tuple("0123456789")
    for images in (digits.train_images, digits.test_images):
        assert np.array_equal(images[..., :1].repeat(3, -1), images)


def test_digits_are_each_used_once_and_enlarged_from_the_original(digits):
    from sklearn.datasets import load_digits

    small, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(small).view(-1, 1, 8, 8).mul(255 / 16).floor().float()
    large = F.interpolate(x, (32, 32), mode="bilinear")[:, 0].numpy()  # half-pixel centres, as Pillow
    images = np.concatenate((digits.train_images, digits.test_images))[..., 0]
    classes = np.concatenate((digits.train_labels, digits.test_labels))
    # Either part is in file order: walk through the file and take each image from the part that has it next.
    ends, position = (1000, 1797), [0, 1000]
    for want, label in zip(large, labels, strict=True):
        at = [p for p, end in zip(position, ends, strict=True) if p < end and np.abs(images[p] - want).max() < 1.01]
        assert len(at) == 1 and classes[at[0]] == label
        position[position.index(at[0])] += 1
    assert position == [1000, 1797]


def test_digits_split_is_stratified(digits):
    train, test = np.bincount(digits.train_labels), np.bincount(digits.test_labels)
    assert np.abs(train - (train + test) * 1000 / 1797).max() <= 1


def test_digits_moments(digits):
    values = digits.train_images.astype(np.float64) / 255
    assert np.allclose(digits.mean, values.mean((0, 1, 2)), rtol=1e-12)
    assert np.allclose(digits.std, values.std((0, 1, 2)), rtol=1e-12)


def test_digits_are_the_same_on_every_machine(digits):
    arrays = (digits.train_images, digits.train_labels, digits.test_images, digits.test_labels)
    total = hashlib.sha256(b"".join(a.astype(a.dtype.newbyteorder("<")).tobytes() for a in arrays)).hexdigest()
    assert total == "a1999a53fa80fe522be9d3e8c88c820f42fe68115bf54d1cbc6a1b5791bd551a"
    assert (digits.mean[0], digits.std[0]) == (0.30540998774509803, 0.3240162644909455)


def test_digits_in_another_size():
    source = load_dataset("digits", "nowhere", image_size=8)
    check_source(source, 8)
    assert source.train_images.max() == 255 and source.train_images.min() == 0
    assert set(np.unique(source.train_images)) == {v * 255 // 16 for v in range(17)}  # the originals, unfiltered


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match="scikit-learn"):
        load_dataset("digits", "nowhere")


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


def test_folder_without_test_images_of_a_class(tmp_path):
    shutil.rmtree(make_folder(tmp_path) / "test" / "cat")
    assert load_folder(tmp_path).test_labels.tolist() == [1, 1]


def test_folder_threads_change_nothing(tmp_path):
    make_folder(tmp_path, n=150)
    one, three = load_folder(tmp_path), load_folder(tmp_path, num_workers=3)
    assert len(np.unique(one.train_images, axis=0)) == 300
    for a, b in zip(one, three, strict=True):
        assert np.array_equal(a, b)


def test_folder_sizes(tmp_path):
    make_folder(tmp_path)
    save(tmp_path / "train" / "cat" / "wide.png", picture(5, (90, 31)))
    for size in (None, 20):
        source = load_folder(tmp_path, image_size=size)
        check_source(source, size or 32)
        x = torch.from_numpy(np.array(picture(5, (90, 31)))).permute(2, 0, 1)[None].float()
        want = F.interpolate(x, (size or 32,) * 2, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
        assert np.abs(source.train_images[2] - want).max() < 1.01


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
    "grey16.png": (grey16(0x4D21), (77, 77, 77)),
    "white16.png": (grey16(65535), (255, 255, 255)),
    "grey16.tiff": (grey16(0x4D21), (77, 77, 77)),
    "big_endian16.tiff": (grey16(0x4D21, ">u2"), (77, 77, 77)),
    "grey16.pgm": (Image.new("I", (32, 32), 0x4D21), (77, 77, 77)),
    "grey32.tiff": (Image.new("I", (32, 32), 0x4D21), (77, 77, 77)),
}


@pytest.mark.parametrize("name", MODES)
def test_folder_modes(tmp_path, name):
    image, colour = MODES[name]
    make_folder(tmp_path)
    save(tmp_path / "train" / "cat" / name, image, **({"lossless": True} if name.endswith("webp") else {}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = load_folder(tmp_path)
    assert (source.train_images[2] == colour).all()


def test_folder_cmyk_jpeg(tmp_path):
    make_folder(tmp_path)
    save(tmp_path / "train" / "cat" / "cmyk.jpg", Image.new("CMYK", (32, 32), (0, 255, 255, 0)), quality=100)
    assert np.abs(load_folder(tmp_path).train_images[2].astype(int) - (255, 0, 0)).max() <= 2


def test_folder_with_a_wrong_suffix_is_read_by_content(tmp_path):
    make_folder(tmp_path)
    save(tmp_path / "train" / "cat" / "jpeg.png", Image.new("RGB", (32, 32), (128, 128, 128)), format="JPEG")
    assert (load_folder(tmp_path).train_images[2] == 128).all()


def test_folder_of_one_colour_has_no_zero_std(tmp_path):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            save(tmp_path / split / name / "0.png", Image.new("RGB", (32, 32), (0, 100, 255)))
    source = load_folder(tmp_path)
    assert source.mean == (0, 100 / 255, 1) and source.std == (1 / 255,) * 3


def remove(path):
    return lambda root: shutil.rmtree(root / path)


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


def cut(suffix, keep):
    def change(root):
        path = save(root / "train" / "cat" / f"cut{suffix}", picture(0, (64, 64)))
        path.write_bytes(path.read_bytes()[:keep])

    return change


def text_as_image(root):
    (root / "train" / "cat" / "cut.png").write_text("no image")


def other_format(root):
    """Pillow has decoders, and runs programs, for far more than the usual image formats."""
    save(root / "train" / "cat" / "cut.png", picture(0), format="PCX")


def float_grey(root):
    save(root / "train" / "cat" / "cut.tiff", Image.new("F", (32, 32), 0.5))


def large_grey(root):
    save(root / "train" / "cat" / "cut.tiff", Image.new("I", (32, 32), 1 << 20))


FOLDER_ERRORS = {
    "no folder": (lambda root: shutil.rmtree(root), "{root} does not exist"),
    "no train": (remove("train"), "{root} has no folder train/"),
    "no test": (remove("test"), "{root} has neither a folder test/ nor val/"),
    "no classes in train": (no_classes("train"), "{root}/train has no class folders"),
    "no classes in test": (no_classes("test"), "{root}/test has no class folders"),
    "one class": (remove("train/dog"), "{root}/train has only one class, 'cat'"),
    "empty class": (empty_class("train/dog"), "{root}/train/dog has no images"),
    "empty test class": (empty_class("test/dog"), "{root}/test/dog has no images"),
    "unknown test class": (empty_class("test/cow"), "{root}/test has a class 'cow' that {root}/train does not have"),
    "no image": (text_as_image, "{root}/train/cat/cut.png"),
    "other format": (other_format, "{root}/train/cat/cut.png"),
    "truncated jpeg": (cut(".jpg", 1000), "{root}/train/cat/cut.jpg"),
    "truncated png": (cut(".png", 1000), "{root}/train/cat/cut.png"),
    "truncated png header": (cut(".png", 20), "{root}/train/cat/cut.png"),
    "truncated gif": (cut(".gif", 1500), "{root}/train/cat/cut.gif"),
    "truncated webp": (cut(".webp", 500), "{root}/train/cat/cut.webp"),
    "truncated tiff": (cut(".tif", 500), "{root}/train/cat/cut.tif"),
    "truncated bmp": (cut(".bmp", 500), "{root}/train/cat/cut.bmp"),
    "empty file": (cut(".ppm", 0), "{root}/train/cat/cut.ppm"),
    "floating-point": (float_grey, "{root}/train/cat/cut.tiff"),
    "32-bit grey": (large_grey, "{root}/train/cat/cut.tiff"),
}


@pytest.mark.parametrize("case", FOLDER_ERRORS)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_folder_errors(tmp_path, case, num_workers):
    change, want = FOLDER_ERRORS[case]
    root = make_folder(tmp_path / "root")
    change(root)
    with pytest.raises(DataError) as error:
        load_folder(root, num_workers=num_workers)
    assert want.format(root=root).replace("/", os.sep) in one_sentence(error).replace("/", os.sep)


def test_folder_names_the_first_damaged_image_whatever_the_threads(tmp_path):
    make_folder(tmp_path, n=150)
    for i in (70, 140):
        (tmp_path / "train" / "cat" / f"{i:03d}.png").write_text("no image")
    for num_workers in (0, 4):
        with pytest.raises(DataError, match=r"070\.png"):
            load_folder(tmp_path, num_workers=num_workers)


@pytest.mark.parametrize("limit", [3000, 1500], ids=["warning", "error"])  # Pillow refuses at twice its limit
@pytest.mark.parametrize("num_workers", [0, 2])
def test_folder_decompression_bomb(tmp_path, monkeypatch, limit, num_workers):
    make_folder(tmp_path)
    path = save(tmp_path / "test" / "dog" / "bomb.png", picture(0, (64, 64)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError, match="bomb") as error:
            load_folder(tmp_path, num_workers=num_workers)
    assert str(path) in one_sentence(error)
