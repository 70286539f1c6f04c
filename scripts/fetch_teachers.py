"""Fetch the published CIFAR-100 teachers into save/models/<name>_vanilla/ckpt_epoch_240.pth.

    python scripts/fetch_teachers.py                           all six
    python scripts/fetch_teachers.py wrn_40_2 vgg13 --evaluate

They come from one archive (364 MB) or, where that fails, from RepDistiller's site one by one; called again, it goes on
with what was cut off. Each is read without running code, and compared with its published SHA-256, or with that of its
first download: teachers.lock beside them records it (in save/models, `sha256sum -c teachers.lock` reads it, too).
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import sys
import tarfile
import urllib.request
from collections.abc import Iterator
from contextlib import closing, suppress
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dataset import dataset_dict, load_dataset
from helper import checkpoint
from helper.build import Teacher, loaders
from helper.loops import validate
from helper.options import Parser, named
from helper.run import lock
from helper.util import RunError, choose_device, cli_errors

ARCHIVE = "https://github.com/megvii-research/mdistiller/releases/download/checkpoints/cifar_teachers.tar"
MIRROR = "http://shape2prog.csail.mit.edu/repo"

# Accuracy on CIFAR-100's test images in percent, from RepDistiller's README.
PUBLISHED = {
    "wrn_40_2": 75.61,
    "resnet56": 72.34,
    "resnet110": 74.31,
    "resnet32x4": 79.42,
    "vgg13": 74.64,
    "ResNet50": 79.34,
}
SHA256 = {"resnet32x4": "22aa12e2b632b19ddde155ccf2388671842ddd304824b3095e0a7fff364beb4f"}  # what users reported
N_CLS = 100

FILE = "{}_vanilla/ckpt_epoch_240.pth"  # of a network: on the site, in the archive and here
LARGEST = 2**28  # bytes of a teacher: ResNet50 and its optimizer's momentum have 190 MB
LARGEST_ARCHIVE = 2**30
BLOCK = 2**20  # bytes
TRIES = 10  # of a download that is cut off again and again
TIMEOUT = 30  # seconds without a byte


class SourceError(RunError):
    """A source does not give what is asked of it."""


class CutError(SourceError):
    """A download ended early; what came is kept."""


def download(url: str, part: Path, limit: int) -> None:
    """Fetch a file into `part`, going on from what an earlier call left there."""
    for _ in range(TRIES):
        with suppress(CutError):
            return fetch(url, part, limit)
    raise SourceError(f"cut off {TRIES} times")


def fetch(url: str, part: Path, limit: int) -> None:
    """One request for what `part` lacks, answered by the whole file if that is not the same any more."""
    start, size, tag = resume_point(url, part)
    if start and start == size:
        return
    headers = {"Range": f"bytes={start}-", **({"If-Range": tag} if tag else {})} if start else {}
    with respond(url, headers, part) as response:
        length = response.headers.get("Content-Length", "")
        if response.status != 206:
            start, size = 0, int(length) if length.isdecimal() else 0  # 0: not said
        elif response.headers["Content-Range"] != f"bytes {start}-{size - 1}/{size}":
            discard(part)
            raise CutError("another range than asked for")
        if size > limit:
            raise SourceError(f"{size:,} bytes, at most {limit:,} are expected")
        try:
            if not start:
                discard(part)
                note = (url, str(size), strong_tag(response))
                checkpoint.write(origin_of(part), "\n".join(note).encode())
            append(response, part, start, size, limit)
        except OSError as error:  # the disk's: the network's are SourceErrors by now
            raise RunError(f"{part}: cannot be written ({error.strerror})") from error


def respond(url: str, headers: dict[str, str], part: Path) -> HTTPResponse:
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == 416:  # `part` is no beginning of that file
            discard(part)
            raise CutError("another range than asked for") from error
        raise SourceError(f"HTTP {error.code} {error.reason}") from error
    except (OSError, HTTPException, ValueError) as error:
        raise SourceError(str(getattr(error, "reason", error))) from error


def append(response: HTTPResponse, part: Path, start: int, size: int, limit: int) -> None:
    """Write what arrives behind the first `start` bytes."""
    style = {"unit": "B", "unit_scale": True, "leave": False, "disable": not sys.stderr.isatty(), "dynamic_ncols": True}
    with open(part, "ab") as file, tqdm(desc=part.stem, total=size or None, initial=start, **style) as bar:
        for block in blocks(response):
            file.write(block)
            bar.update(len(block))
            start += len(block)
            if start > limit:
                break
    if start > limit:
        discard(part)
        raise SourceError(f"more than the {limit:,} bytes that are expected")
    if start < size:
        raise CutError(f"{size - start:,} bytes did not come")


def blocks(response: HTTPResponse) -> Iterator[bytes]:
    try:
        while block := response.read1(BLOCK):
            yield block
    except (OSError, HTTPException) as error:
        raise CutError(str(error)) from error


def strong_tag(response: HTTPResponse) -> str:
    """What tells one version of a file from another byte for byte; '' if the server says nothing of that kind."""
    tag = response.headers.get("ETag", "W/")
    return response.headers.get("Last-Modified", "") if tag.startswith("W/") else tag


def origin_of(part: Path) -> Path:
    """Beside a partial download, a line each: its address, the whole file's size and tag."""
    return part.with_name(f"{part.name}.origin")


def resume_point(url: str, part: Path) -> tuple[int, int, str]:
    """-> bytes that are there, of how many, of the file of which tag; (0, 0, '') if there is nothing to go on from."""
    try:
        origin, size, tag = checkpoint.read_text(origin_of(part)).decode().split("\n")
        if origin == url and int(size):
            return part.stat().st_size, int(size), tag
    except (FileNotFoundError, ValueError):
        pass
    return 0, 0, ""


def discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    origin_of(part).unlink(missing_ok=True)


class Teachers:
    """The teachers of a folder, and their recorded SHA-256."""

    def __init__(self, folder: Path):
        self.folder, self.lock = folder, folder / "teachers.lock"
        self.recorded = {}
        if self.lock.exists():
            try:
                lines = checkpoint.read_text(self.lock).decode(errors="replace").splitlines()
            except ValueError as error:
                raise RunError(f"{self.lock}: cannot be read ({error})") from error
            for line in lines:
                if not (found := re.fullmatch(r"([0-9a-f]{64}) [ *](\S+)", line)):
                    raise RunError(f"{self.lock}: not lines of SHA-256 and file: {line[:80]!r}")
                self.recorded[found[2]] = found[1]

    def path(self, name: str) -> Path:
        return self.folder / FILE.format(name)

    def has(self, name: str) -> bool:
        """Whether a teacher is in its place; it is checked as if it came now."""
        path = self.path(name)
        if not path.exists():
            return False
        try:
            self.record(name, self.checked(name, path))
        except SourceError as error:
            raise RunError(f"{path}: {error}; move it away to fetch the teacher again") from error
        print(f"{name}: {path} is there already")
        return True

    def put(self, name: str, file: Path) -> None:
        """Move a file into its place, if it is that teacher."""
        digest = self.checked(name, file)
        self.path(name).parent.mkdir(parents=True, exist_ok=True)
        file.replace(self.path(name))
        self.record(name, digest)
        print(f"{name}: {self.path(name)}, SHA-256 {digest}")

    def checked(self, name: str, file: Path) -> str:
        """SHA-256 of a file that holds the teacher of this name."""
        if not file.is_file():
            raise SourceError("not a file")
        digest, expected = sha256(file), SHA256.get(name, self.recorded.get(FILE.format(name)))
        if expected and digest != expected:
            raise SourceError(f"its SHA-256 is {digest}, not {expected}")
        try:
            _, n_cls, _, _ = checkpoint.load_network(file, name)
        except RunError as error:
            raise SourceError(str(error).removeprefix(f"{file}: ")) from error
        if n_cls != N_CLS:
            raise SourceError(f"has {n_cls} classes, not {N_CLS}")
        return digest

    def record(self, name: str, digest: str) -> None:
        if self.recorded.get(FILE.format(name)) != digest:
            self.recorded[FILE.format(name)] = digest
            text = "".join(f"{digest}  {file}\n" for file, digest in self.recorded.items())
            checkpoint.write(self.lock, text.encode())


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def from_archive(url: str, names: list[str], teachers: Teachers) -> dict[str, str]:
    """Put teachers out of an archive into their places; -> for those that cannot be, why."""
    part = teachers.folder / "cifar_teachers.tar.part"
    try:
        download(url, part, LARGEST_ARCHIVE)
    except SourceError as error:
        return dict.fromkeys(names, str(error))
    wanted = {f"cifar_teachers/{FILE.format(name)}": name for name in names}
    failed = dict.fromkeys(names, "not in the archive")
    try:
        with tarfile.open(part, "r:") as tar:
            for member in tar:
                name = wanted.get(member.name)
                if name in failed:
                    try:
                        unpack(tar, member, name, teachers)
                        del failed[name]
                    except SourceError as error:
                        failed[name] = str(error)
    except RunError:
        raise
    except (tarfile.TarError, EOFError, MemoryError, OverflowError, ValueError) as error:  # sizes in it may be lies
        discard(part)
        return dict.fromkeys(failed, f"not a readable archive ({error})")
    if not failed:
        discard(part)
    return {name: f"{why} ({part} is kept; remove it to fetch it anew)" for name, why in failed.items()}


def unpack(tar: tarfile.TarFile, member: tarfile.TarInfo, name: str, teachers: Teachers) -> None:
    """Put a member of the archive into its place; nothing is written where the archive says."""
    if not member.isreg() or not 0 < member.size <= LARGEST:
        raise SourceError(f"not a regular file of at most {LARGEST:,} bytes")
    file = teachers.folder / f".{name}.tmp"
    try:
        with tar.extractfile(member) as stream, open(file, "wb") as out:
            shutil.copyfileobj(stream, out, BLOCK)
        teachers.put(name, file)
    finally:
        file.unlink(missing_ok=True)


def from_mirror(url: str, names: list[str], teachers: Teachers) -> dict[str, str]:
    """Fetch teachers one by one; -> for those that cannot be had, why."""
    failed = {}
    for name in names:
        part = teachers.folder / f"{name}.pth.part"
        try:
            download(f"{url.rstrip('/')}/{FILE.format(name)}", part, LARGEST)
        except SourceError as error:
            failed[name] = str(error)
            continue
        try:
            teachers.put(name, part)
        except SourceError as error:
            failed[name] = str(error)
        discard(part)
    return failed


def fetch_all(names: list[str], teachers: Teachers, opt: argparse.Namespace) -> None:
    """Put teachers into their places, from the first source that gives them."""
    first = from_archive(opt.archive, names, teachers)
    if not first:
        return
    print(f"note: no {', '.join(first)} from {opt.archive} ({reasons(first)}); trying {opt.mirror}", flush=True)
    if second := from_mirror(opt.mirror, list(first), teachers):
        why = f"{opt.archive}: {reasons({name: first[name] for name in second})}; {opt.mirror}: {reasons(second)}"
        raise RunError(f"could not fetch {', '.join(second)} ({why})")


def reasons(failed: dict[str, str]) -> str:
    """Why which teachers failed; what all have in common is said once."""
    if len(set(failed.values())) == 1:
        return next(iter(failed.values()))
    return "; ".join(f"{name} {why}" for name, why in failed.items())


def evaluate(names: list[str], teachers: Teachers, opt: argparse.Namespace, device: torch.device) -> None:
    """Print the accuracy of each teacher on the test images, beside the published one."""
    source = load_dataset(opt.dataset, opt.data_folder)
    _, test = loaders(source, argparse.Namespace(batch_size=1, seed=0), device)  # of the training batches
    for name in names:
        arch, n_cls, model, about = checkpoint.load_network(teachers.path(name), name)
        Teacher(arch, model, n_cls, about=about, path=teachers.path(name)).fit_for(source, device)
        acc = validate(model, test)["acc"]
        print(f"{name:<10}  {opt.dataset} {acc:6.2f}  published {PUBLISHED[name]:.2f}", flush=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("names", **named("teacher", PUBLISHED), nargs="*", help=f"{' '.join(PUBLISHED)} (all of them)")
    add("--output", type=Path, default=Path("save"), help="folder of all results (./save)")
    add("--archive", metavar="URL", default=ARCHIVE, help="the archive's address, instead of the published one")
    add("--mirror", metavar="URL", default=MIRROR, help="what stands before /<name>_vanilla/ckpt_epoch_240.pth")
    add("--evaluate", action="store_true", help="print test accuracies beside the published ones")
    add("--dataset", **named("data set", dataset_dict), default="cifar100", help="to evaluate on (cifar100)")
    add("--data_folder", type=Path, default=Path("data"), help="where the data set is or is put (./data)")
    add("--device", default="auto", help="to evaluate on: auto, cpu, cuda or cuda:N (auto)")
    opt = parser.parse_args(argv)
    opt.names = list(dict.fromkeys(opt.names)) or list(PUBLISHED)
    return opt


def main(argv: list[str] | None = None) -> None:
    opt = parse(argv)
    device = choose_device(opt.device)
    teachers = Teachers(opt.output / "models")
    missing = [name for name in opt.names if not teachers.has(name)]
    if missing:
        teachers.folder.mkdir(parents=True, exist_ok=True)
        with closing(lock(teachers.folder)):  # two would write into one part
            fetch_all(missing, teachers, opt)
    if opt.evaluate:
        evaluate(opt.names, teachers, opt, device)


if __name__ == "__main__":
    sys.exit(cli_errors(main))
