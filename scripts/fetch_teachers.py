"""Download the published CIFAR-100 teachers to save/models/<name>_vanilla/ckpt_epoch_240.pth.

    python scripts/fetch_teachers.py                           all six
    python scripts/fetch_teachers.py wrn_40_2 vgg13 --evaluate

All six are in one archive (364 MB); RepDistiller's site is the fallback. A download that was cut off is resumed. Each
file is loaded with weights_only=True and must be that network with 100 classes. Its SHA-256 must be the published one
or, where none is known, that of the first download, which is recorded in save/models/teachers.lock.
"""

import argparse
import hashlib
import shutil
import sys
import tarfile
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from urllib.request import Request, urlopen

import torch
from tqdm import tqdm

from dataset import dataset_dict, load_dataset
from dataset.loader import DeviceLoader, large_batch
from helper import checkpoint
from helper.loops import validate
from helper.options import Parser
from helper.run import lock
from helper.student import Teacher
from helper.util import RunError, choose_device, cli_errors

ARCHIVE = "https://github.com/megvii-research/mdistiller/releases/download/checkpoints/cifar_teachers.tar"
MIRROR = "http://shape2prog.csail.mit.edu/repo"
FILE = "{}_vanilla/ckpt_epoch_240.pth"  # in the archive, on the mirror and in save/models
# Test accuracy in percent, from RepDistiller's README; the only SHA-256 that is known, as users report it.
PUBLISHED = dict(wrn_40_2=75.61, resnet56=72.34, resnet110=74.31, resnet32x4=79.42, vgg13=74.64, ResNet50=79.34)
SHA256 = {"resnet32x4": "22aa12e2b632b19ddde155ccf2388671842ddd304824b3095e0a7fff364beb4f"}
N_CLS = 100
TRIES, TIMEOUT = 10, 30  # connections of a download, seconds without a byte


def download(url: str, file: Path) -> None:
    """Download a file; resume what was cut off before, if the server still has the same version of it."""
    part, tag = (file.with_name(f"{file.name}.{kind}") for kind in ("part", "etag"))
    for _ in range(TRIES):
        start = max(part.stat().st_size - 1, 0) if part.exists() and tag.exists() else 0  # -1: never an empty range
        headers = {"Range": f"bytes={start}-", "If-Range": tag.read_text()} if start else {}
        cut_off = suppress(ConnectionError, HTTPException, TimeoutError)
        with cut_off, urlopen(Request(url, headers=headers), timeout=TIMEOUT) as response:
            start = start if response.status == 206 else 0  # 200: the whole file
            n = int(response.headers.get("Content-Length", 0))  # bytes to come
            with open(part, "ab") as out, tqdm.wrapattr(response, "read", n, desc=file.name, disable=None) as stream:
                out.truncate(start)
                tag.write_text(response.headers["ETag"] or response.headers["Last-Modified"] or "unknown")
                shutil.copyfileobj(stream, out)
            if part.stat().st_size >= start + n:
                part.replace(file)
                return tag.unlink()
    raise RunError(f"cut off {TRIES} times; the same command resumes the download")


def extract(archive: Path, file: Path) -> None:
    """Write the teacher that `file` is named after; the archive has no say in where."""
    with tarfile.open(archive, "r:") as tar, open(file, "wb") as out:
        shutil.copyfileobj(tar.extractfile(f"cifar_teachers/{FILE.format(file.stem)}"), out)


def install(name: str, file: Path, folder: Path, recorded: dict[str, str]) -> None:
    """Move a file to its place if it is that teacher, and record its SHA-256; RunError if it is not."""
    place, digest = FILE.format(name), hashlib.sha256(file.read_bytes()).hexdigest()
    expected = SHA256.get(name) or recorded.get(place, digest)
    if digest != expected:
        raise RunError(f"{file}: SHA-256 is {digest}, expected {expected}")
    _, n_cls, _, _ = checkpoint.load_network(file, name)
    if n_cls != N_CLS:
        raise RunError(f"{file}: has {n_cls} classes, expected {N_CLS}")
    (folder / place).parent.mkdir(exist_ok=True)
    file.replace(folder / place)
    recorded[place] = digest
    lines = "".join(f"{digest}  {place}\n" for place, digest in recorded.items())
    checkpoint.write(folder / "teachers.lock", lines.encode())
    print(f"{name}: {folder / place}, SHA-256 {digest}", flush=True)


def fetch(names: list[str], folder: Path, recorded: dict[str, str], opt: argparse.Namespace) -> None:
    """Install teachers from the archive, and those that it does not provide from the mirror."""
    tar, reasons = folder / "cifar_teachers.tar", []
    try:
        download(opt.archive, tar)
    except Exception as error:  # urllib, http and tarfile raise a dozen kinds
        reasons.append(f"{opt.archive}: {error}")
    for name in names:
        file, url = folder / f"{name}.pth", f"{opt.mirror}/{FILE.format(name)}"
        sources = [(opt.archive, extract, tar)] if tar.exists() else []
        for source, get, origin in (*sources, (url, download, url)):
            try:
                get(origin, file)
                install(name, file, folder, recorded)
                break
            except Exception as error:
                reasons.append(f"{source}: {error}")
                file.unlink(missing_ok=True)
    tar.unlink(missing_ok=True)
    if failed := [name for name in names if not (folder / FILE.format(name)).is_file()]:
        raise RunError(f"could not fetch {', '.join(failed)} ({'; '.join(reasons)})")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"{' '.join(PUBLISHED)} (all of them)")
    add("--output", type=Path, default=Path("save"), help="folder of all results (./save)")
    add("--archive", metavar="URL", default=ARCHIVE, help="another address of the archive")
    add("--mirror", metavar="URL", default=MIRROR, help="another address of the folders <name>_vanilla")
    add("--evaluate", action="store_true", help="print test accuracies beside the published ones")
    add("--dataset", choices=dataset_dict, default="cifar100", help="data set to evaluate on (cifar100)")
    add("--data_folder", type=Path, default=Path("data"), help="where the data set is or is downloaded to (./data)")
    add("--device", default="auto", help="device to evaluate on: auto, cpu, cuda or cuda:N (auto)")
    opt = parser.parse_args(argv)
    if unknown := set(opt.names) - PUBLISHED.keys():
        parser.error(f"unknown teacher {min(unknown)!r}; known: {', '.join(PUBLISHED)}")
    device, folder = choose_device(opt.device), opt.output / "models"
    places = {name: folder / FILE.format(name) for name in opt.names or PUBLISHED}
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder):  # two downloads to one file would damage it
        record = folder / "teachers.lock"
        lines = [line.split() for line in record.read_text(errors="replace").splitlines()] if record.is_file() else []
        if any(len(line) != 2 or len(line[0]) != 64 for line in lines):
            raise RunError(f"{record}: damaged, its lines should be a SHA-256 and a file each")
        recorded = {file: digest for digest, file in lines}
        for name, path in places.items():
            if path.is_file():
                install(name, path, folder, recorded)
        if missing := [name for name, path in places.items() if not path.is_file()]:
            fetch(missing, folder, recorded, opt)
    if opt.evaluate:
        source = load_dataset(opt.dataset, opt.data_folder)
        data = {"mean": source.mean, "std": source.std, "device": device, "n_cls": source.n_cls}
        loader = DeviceLoader(source.test_images, source.test_labels, large_batch(source.test_images), **data)
        for name, path in places.items():
            arch, n_cls, model, about = checkpoint.load_network(path, name)
            Teacher(arch, model, n_cls, about=about, path=path).check(source)
            (found,) = validate([model.to(device, memory_format=torch.channels_last)], loader)
            print(f"{name:<10}  {opt.dataset} {found['acc']:6.2f}  published {PUBLISHED[name]:.2f}", flush=True)


if __name__ == "__main__":
    sys.exit(cli_errors(main))
