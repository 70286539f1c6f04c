"""Checkpoints: dicts of tensors and plain values, written atomically, read with weights_only=True."""

from __future__ import annotations

import argparse
import io
import os
import re
import warnings
import zipfile
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import nn

from helper.util import RunError
from models import create_model, model_dict
from models.util import head

OLD = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."  # how files of torch before 1.6 begin
SUFFIXES = "", ".pth", ".pt", ".ckpt", ".tar", ".bin", ".safetensors"
ARCHIVE = "an archive; unpack it and pass a checkpoint from it"
PROTOCOLS = rb"\x80[\x04\x05]"
OTHERS = {  # how other kinds of files begin, and what they are
    rb"\Z": "an empty file",
    rb"version https://git-lfs": "a git-LFS pointer, not the file itself; run `git lfs pull` in its repository",
    rb"(?i)\s*<(!doctype|html|head|\?xml)": "a web page, not the file; download it from its direct address",
    rb"(?s)\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|.{257}ustar": ARCHIVE,
    PROTOCOLS: "of pickle protocol 4 or 5, which is not read; write it with torch.save's default, protocol 2",
}
MOST = 1e9  # epochs, steps, percent, seconds


def _number(dtype: np.dtype, data: bytes) -> float:
    """A numpy scalar as a plain number. numpy's own function would trust the flags that a file gives its dtype."""
    return np.frombuffer(data, dtype.str).item()


# Published files hold their options and, as numpy scalars, learning rates and accuracies.
FOREIGN = [argparse.Namespace, np.dtype, *(type(np.dtype(code)) for code in "?befdilq")]
FOREIGN += [(_number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]  # numpy 1 and 2


def _channels(values: object) -> bool:
    return isinstance(values, list) and len(values) == 3 and all(isinstance(v, float) and 0 <= v <= 1 for v in values)


# What our checkpoints say about their data. In others these keys are missing or mean something else.
SAID = {
    "dataset": lambda name: isinstance(name, str) and len(name) <= 60,
    "image_size": lambda size: type(size) is int and 0 < size <= 1024,  # as --image_size
    "mean": _channels,
    "std": _channels,
}


def save(path: Path, content: dict) -> None:
    """Write a checkpoint atomically."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write(path, buffer.getbuffer())


def write(path: Path, content: bytes | memoryview) -> None:
    """Write a file atomically: `path` keeps its old content until all of the new is on the disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"{path}: cannot be written ({error.strerror}); the old file, if any, is unchanged") from error


def read_text(path: Path, largest: int = 2**24) -> bytes:
    """Read a text file of a run. Raises ValueError where it is too large or not a regular file (a pipe would block)."""
    if not path.is_file() or path.stat().st_size > largest:
        raise ValueError(f"not a file of at most {largest:,} bytes")
    return path.read_bytes()


def load(path: Path) -> dict:
    """Read a checkpoint: tensors, plain values and FOREIGN. Raises RunError for anything else, and says what it is."""
    if path.is_dir():
        inside = [file.relative_to(path) for pattern in ("*", "*/*") for file in sorted(path.glob(pattern))]
        names = [str(file) for file in inside if file.suffix in SUFFIXES and file.name[0] != "."][:5]
        raise RunError(f"{path}: a folder; pass a checkpoint in it ({', '.join(names) or 'there is none'})")
    if not path.is_file():
        raise RunError(f"{path}: no such checkpoint file")
    with open(path, "rb") as file:
        start = file.read(512)
    if kind := next((kind for pattern, kind in OTHERS.items() if re.match(pattern, start)), None):
        raise RunError(f"{path}: {kind}")
    try:
        if re.match(rb"(?s).{8}\{", start):  # the length of a JSON header, and the header
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals(FOREIGN), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about old pickles
            old = start.startswith(OLD)
            file = io.BytesIO(path.read_bytes()) if old else _verified(path)
            content = torch.load(file, map_location="cpu", weights_only=True)
            if old and file.read(1):
                raise ValueError("not all of its tensors were read")
    except RunError:
        raise
    except Exception as error:  # a dozen kinds for damaged files, MemoryError and RecursionError among them
        what = "damaged or not a checkpoint"
        if asked := re.search(r"GLOBAL (\S+)", str(error)):
            what = f"needs {asked[1]:.100}, but only tensors and plain values are read"
            what += "; if it is a whole model, save its state_dict() instead"
        raise RunError(f"{path}: {what}") from error
    if not isinstance(content, dict):
        raise RunError(f"{path}: not a checkpoint but a {type(content).__name__}")
    return content


def _verified(path: Path) -> io.BytesIO:
    """A zip file in memory, with its checksums verified: torch would load a flipped bit without a word."""
    copy = io.BytesIO()  # not the file itself: torch and zipfile may disagree about a damaged directory
    with zipfile.ZipFile(path) as members, zipfile.ZipFile(copy, "w") as verified:
        names = {name.rpartition("/")[2] for name in members.namelist()}
        if "constants.pkl" in names:
            raise RunError(f"{path}: a TorchScript archive; open it with torch.jit.load and save its state_dict()")
        if "data.pkl" not in names:
            raise RunError(f"{path}: {ARCHIVE}")
        for member in members.infolist():
            content = members.read(member)  # BadZipFile if the checksum differs
            if member.filename.endswith("data.pkl") and re.match(PROTOCOLS, content):
                raise RunError(f"{path}: {OTHERS[PROTOCOLS]}")
            verified.writestr(member.filename, content)
    copy.seek(0)
    return copy


def arch_of(path: Path, content: dict, arch: str | None, flag: str = "--model_t") -> str:
    """The architecture of a checkpoint: `arch`, else as named in the file, else as in its folder's name."""
    opt = content.get("opt")  # RepDistiller's last checkpoints hold their options: a student's, or a teacher's
    options = vars(opt) if isinstance(opt, argparse.Namespace) else {}
    for name in (arch, content.get("arch"), options.get("model_s"), options.get("model")):
        if isinstance(name, str) and name:
            return name
    # absolute(), not resolve(): where the folder is a link, its own name counts. Students are in S:<student>_T:...
    folder = path.absolute().parent.name.removeprefix("S:")
    fits = [name for name in model_dict if folder == name or folder.startswith(f"{name}_")]
    if not fits:
        raise RunError(f"{path}: neither the file nor its folder '{folder}' names the network; pass {flag}")
    return max(fits, key=len)


def state_of(path: Path, content: dict) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint, or of a bare state dict, without DataParallel's prefix."""
    state = content.get("model", content)
    values = state.values() if isinstance(state, dict) else [None]
    plain = all(isinstance(v, torch.Tensor) and (v.device.type, v.layout) == ("cpu", torch.strided) for v in values)
    if not plain or not all(isinstance(key, str) for key in state):
        raise RunError(f"{path}: holds no network weights")
    return {key.removeprefix("module."): value.detach() for key, value in state.items()}


def load_network(path: Path, arch: str | None = None, flag: str = "--model_t") -> tuple[str, int, nn.Module, dict]:
    """Read our checkpoints and published ones -> (architecture, classes, network in eval mode, the rest of the file).

    flag: the caller's option for the architecture, for messages
    """
    content = load(path)
    arch, state = arch_of(path, content, arch, flag), state_of(path, content)
    try:
        with torch.device("meta"):  # only names and shapes
            model = create_model(arch, 2)
            name = next(name for name, module in model.named_modules() if module is head(model))
            n_cls = state.get(f"{name}.bias", torch.empty(2)).numel() or 2
            own = create_model(arch, n_cls).state_dict()
        check_state(arch, own, state)
    except ValueError as error:  # ModelError, where the network is unknown
        raise RunError(f"{path}: {error}") from error
    model = create_model(arch, n_cls)
    model.load_state_dict(state)
    about = {key: value for key, value in content.items() if key != "model"} if "model" in content else {}
    for key in [key for key, valid in SAID.items() if key in about and not valid(about[key])]:
        if "config_sha256" in about:  # is ours
            raise RunError(f"{path}: what it says about its data cannot be read ({key})")
        del about[key]
    return arch, n_cls, model.eval(), about


def check_state(arch: str, own: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
    """Check that `state` is that of a trained network with the names and shapes of `own`. Raises ValueError."""
    absent, foreign = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if absent or foreign:
        what = f"lacks {absent[0]}" if absent else f"has {foreign[0]} besides"
        raise ValueError(f"not a {arch}: {what} ({len(absent)} tensors missing, {len(foreign)} unknown)")
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise ValueError(f"{key} is {list(value.shape)}, a {arch} has {list(own[key].shape)}")
        same_kind = value.is_floating_point() == own[key].is_floating_point()
        if not same_kind or not value.to(own[key].dtype).isfinite().all():
            raise ValueError(f"{key} holds what no trained network does (NaN, infinity, or another type)")
        if key.endswith("running_var") and (value < 0).any():
            raise ValueError(f"{key} holds a negative variance")
