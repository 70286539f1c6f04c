"""Checkpoints: dicts of tensors and plain values, written atomically, read with weights_only=True."""

from __future__ import annotations

import argparse
import functools
import io
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import nn

from helper.util import RunError
from models import check_name, create_model, inner_name, is_known, model_dict, runs_code
from models.external import is_external, stages_of
from models.util import ModelError

OLD = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."  # how files of torch before 1.6 begin
SUFFIXES = "", ".pth", ".pt", ".ckpt", ".tar", ".bin", ".safetensors"
WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")  # of DataParallel and torch.compile
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
How = tuple[int, tuple[str, ...]]  # image size and stages for which a foreign network is built


def _number(dtype: np.dtype, data: bytes) -> float:
    """A numpy scalar as a plain number. numpy's own function would trust the flags that a file gives its dtype."""
    return np.frombuffer(data, dtype.str).item()


# Published files hold their options and, as numpy scalars, learning rates and accuracies.
FOREIGN = [argparse.Namespace, np.dtype, *(type(np.dtype(code)) for code in "?befdilq")]
FOREIGN += [(_number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]  # numpy 1 and 2


def _channels(values: Any) -> bool:
    return isinstance(values, list) and len(values) == 3 and all(isinstance(v, float) and 0 <= v <= 1 for v in values)


def _names(values: Any) -> bool:
    few = isinstance(values, list) and len(values) <= 100_000
    return few and all(isinstance(name, str) and len(name) <= 200 for name in values)


# What our checkpoints say about their data. In others these keys are missing or mean something else.
SAID = {
    "dataset": lambda name: _names([name]),
    "class_names": _names,
    "image_size": lambda size: type(size) is int and 0 < size <= 1024,  # as --image_size
    "mean": _channels,
    "std": _channels,
    "stages": _names,
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


def read_text(path: Path, largest: int = 2**28) -> bytes:
    """Read a text file of a run. Raises ValueError where it is too large or not a regular file (a pipe would block)."""
    if not path.is_file() or path.stat().st_size > largest:
        raise ValueError(f"not a file of at most {largest:,} bytes")
    return path.read_bytes()


def load(path: Path) -> dict:
    """Read a checkpoint: tensors, plain values and FOREIGN. Raises RunError for anything else, and says what it is."""
    if path.is_dir():
        inside = [file.relative_to(path) for pattern in ("*", "*/*") for file in sorted(path.glob(pattern))]
        names = [
            str(file)
            for file in inside
            if file.suffix in SUFFIXES and file.name[0] != "." and file.name != "resume.pth"
        ][:5]
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


def load_network(
    path: Path,
    arch: str | None = None,
    flag: str = "--model_t",
    part: str | None = None,
    image_size: int | None = None,
    stages: Sequence[str] | None = None,
) -> tuple[str, int, nn.Module, dict]:
    """Read a network from a checkpoint -> (architecture, classes, network in eval mode, the rest of the file).

    Arguments as of read_network.
    """
    arch, n_cls, state, about = read_network(path, arch, flag, part, image_size, stages)
    try:
        model = create_model(arch, n_cls, _size(about, image_size), stages or about.get("stages"))
    except ValueError as error:
        raise RunError(f"{path}: {error}") from error
    model.load_state_dict(state)
    return arch, n_cls, model.eval(), about


def load_weights(model: nn.Module, path: Path, image_size: int) -> None:
    """Start a network from the weights in a file; its classifier stays fresh where the file's is for other classes."""
    content, own = load(path), model.state_dict()
    states = [state for _, state in _states(content)]
    state = max(states, key=lambda state: sum(key in own for key in state))
    wide = _own(model.arch, image_size, tuple(stages_of(model) or ()))[1]
    fresh = any(key not in state or not _plain(state[key]) or state[key].shape != own[key].shape for key in wide)
    kept = {key: value for key, value in state.items() if not (fresh and key in wide)}
    try:
        check_state(model.arch, {key: value for key, value in own.items() if not (fresh and key in wide)}, kept)
    except ValueError as error:
        raise RunError(f"--weights {path}: {error}") from error
    model.load_state_dict(kept, strict=not fresh)
    if fresh:
        print(f"note: {path}: its classifier is for other classes, the network's starts fresh")


def read_network(
    path: Path,
    arch: str | None = None,
    flag: str = "--model_t",
    part: str | None = None,
    image_size: int | None = None,
    stages: Sequence[str] | None = None,
) -> tuple[str, int, dict[str, torch.Tensor], dict]:
    """Find a known network's weights in a checkpoint -> (architecture, classes, state, the rest of the file).

    Names and shapes decide; a note says what was taken where that was not clear. The rest of the file has `epoch` and
    `accuracy` as plain numbers, and the keys of SAID only as our checkpoints have them.

    flag: the caller's option for the architecture, for messages; that for the part is named alike (--part_t)
    part: key or prefix of the weights, where a file holds several networks
    image_size, stages: of a foreign network, the first only where the file does not say
    """
    content = load(path)
    states = {key: state for key, state in _states(content) if part in (None, key, key.rpartition(".")[2])}
    if not any(_plain(value) for state in states.values() for value in state.values()):
        raise RunError(f"{path}: holds no network weights" + (f" under '{part}'" if part else ""))
    said = content.get("arch")
    if not arch and isinstance(said, str) and is_external(said):
        if runs_code(said):
            raise RunError(
                f"{path}: is a {said:.200}; name the file and class with {flag}, as code is never run from a checkpoint"
            )
        try:
            check_name(inner_name(said))
        except ModelError as error:  # timm is not installed, for one
            raise RunError(f"{path}: {error}") from error
    if arch and isinstance(said, str) and runs_code(said) and inner_name(arch) == arch:
        arch += said.removeprefix(inner_name(said))  # a student of SimKD's is named by the class that it is made from
    if not stages and "stages" in content and SAID["stages"](content["stages"]):
        stages = content["stages"]
    named, how = arch or _named(path, content), (_size(content, image_size), tuple(stages or ()))
    try:
        archs = [named] if named else model_dict
        fits = _fits(archs, states, how) or _fits([] if arch else model_dict, states, how)
        if len(fits) > 1:
            found = ", ".join(f"{name} in '{key}'" if key else name for name, key in fits)
            option = flag if len({key for _, key in fits}) == 1 else flag.replace("model", "part")
            raise ValueError(f"could be several networks: {found}; choose one with {option}")
        pairs = fits or [max(product(archs, states), key=lambda pair: _alike(pair[0], states[pair[1]], how))]
        arch, key = pairs[0]
        n_cls, own = _own_like(arch, states[key], how)
        check_state(arch if fits or named else f"known network (closest: {arch})", own, states[key])
    except ValueError as error:  # ModelError, where the network is unknown
        raise RunError(f"{path}: {error}") from error
    elsewhere = f", from '{key}'" if part is None and key not in ("", "model") else ""
    if arch != named or elsewhere:
        print(f"note: {path}: read as a {arch}{elsewhere}", file=sys.stderr)
    return arch, n_cls, states[key], _about(path, content, key.partition(".")[0])


def _size(content: dict, image_size: int | None) -> int:
    """The image size for which a network was built."""
    size: Any = content.get("image_size")
    return size if SAID["image_size"](size) else image_size or 32


def _states(content: dict, name: str = "", depth: int = 3) -> Iterator[tuple[str, dict]]:
    """All that could be the state of a network -> (its key or prefix in the file, state); '' is the file itself."""
    keys = [key for key in content if isinstance(key, str) and key != "n_averaged"]  # of AveragedModel
    state = {WRAPPERS.sub("", key): content[key] for key in keys}
    if len(state) < len(keys):  # a tensor with its prefix and without
        return
    if not any(key.endswith("num_batches_tracked") for key in state):  # torch before 0.4.1
        norms = [key.removesuffix("running_var") for key in state if key.endswith("running_var")]
        state |= {f"{norm}num_batches_tracked": torch.tensor(0) for norm in norms}
    yield name, {key: value.detach() if isinstance(value, torch.Tensor) else value for key, value in state.items()}
    for first in {key.partition(".")[0]: None for key in state} if depth else ():
        inner = state.get(first)
        if not isinstance(inner, dict):
            inner = {key[len(first) + 1 :]: value for key, value in state.items() if key.startswith(f"{first}.")}
        if inner:
            yield from _states(inner, f"{name}.{first}".removeprefix("."), depth - 1)


def _named(path: Path, content: dict) -> str | None:
    """The network that a file names, or else its folder."""
    opt = content.get("opt")  # RepDistiller's last checkpoints hold their options: a student's, or a teacher's
    options = vars(opt) if isinstance(opt, argparse.Namespace) else {}
    for name in (content.get("arch"), options.get("model_s"), options.get("model")):
        if isinstance(name, str) and is_known(name):
            return name
    # absolute(), not resolve(): where the folder is a link, its own name counts. Students are in S:<student>_T:...
    folder = path.absolute().parent.name.removeprefix("S:")
    return max((name for name in model_dict if f"{folder}_".startswith(f"{name}_")), key=len, default=None)


def _fits(archs: Iterable[str], states: dict[str, dict], how: How) -> list[tuple[str, str]]:
    """The networks whose names and shapes a state has -> [(architecture, key of the state)]."""
    pairs = [(arch, key) for arch, key in product(archs, states) if len(states[key]) == len(_own(arch, *how)[0])]
    return [(arch, key) for arch, key in pairs if _alike(arch, states[key], how)[0] == len(states[key])]


@functools.cache
def _own(arch: str, size: int, stages: tuple[str, ...]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """-> (state without memory of a network of 2 classes, names of the tensors that have an entry for each class)."""
    with torch.random.fork_rng(devices=[]):
        named = stages if stages and arch not in model_dict else None
        two, three = (create_model(arch, n, size, named).state_dict() for n in (2, 3))
    wide = [key for key, value in two.items() if value.shape != three[key].shape]
    return {key: value.to("meta") for key, value in two.items()}, wide


def _own_like(arch: str, state: dict, how: How) -> tuple[int, dict[str, torch.Tensor]]:
    """-> (classes of a state, state without memory of the network with as many)."""
    own, wide = _own(arch, *how)
    weight = state.get(wide[0]) if wide else None
    n_cls = len(weight) if _plain(weight) and weight.dim() and len(weight) else 2
    return n_cls, own | {key: own[key].new_empty(n_cls, *own[key].shape[1:]) for key in wide}


def _alike(arch: str, state: dict, how: How) -> tuple[int, int]:
    """-> (tensors of a state with a name and shape of the network's, all its tensors)."""
    _, own = _own_like(arch, state, how)
    plain = {key: value.shape for key, value in state.items() if _plain(value)}
    return sum(key in own and shape == own[key].shape for key, shape in plain.items()), len(plain)


def _plain(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def _about(path: Path, content: dict, key: str) -> dict:
    """What a file says besides the weights under `key`."""
    about = {k: value for k, value in content.items() if k != key} if key in content else {}
    for k in [k for k, valid in SAID.items() if k in about and not valid(about[k])]:
        if "config_sha256" in about:  # is ours
            raise RunError(f"{path}: what it says about its data cannot be read ({k})")
        del about[k]
    for k, value in (("epoch", about.pop("epoch", None)), ("accuracy", about.pop("accuracy", about.get("best_acc")))):
        number = value.item() if _plain(value) and value.numel() == 1 else value
        if type(number) in (int, float) and abs(number) <= MOST:
            about[k] = number
    return about


def check_state(arch: str, own: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
    """Check that `state` is that of a trained network with the names and shapes of `own`. Raises ValueError."""
    if stray := [key for key, value in state.items() if not _plain(value)]:
        raise ValueError(f"has an entry '{stray[0]:.60}' among its weights that is not a dense tensor; remove it")
    absent, foreign = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if absent or foreign:
        what = f"lacks {absent[0]}" if absent else f"has {foreign[0]:.60} besides"
        raise ValueError(f"not a {arch}: {what} ({len(absent)} tensors missing, {len(foreign)} unknown)")
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise ValueError(f"{key} is {list(value.shape)}, a {arch} has {list(own[key].shape)}")
    for key, value in state.items():
        same_kind = value.is_floating_point() == own[key].is_floating_point()
        if not same_kind or not value.to(own[key].dtype).isfinite().all():
            raise ValueError(f"{key} holds what no trained network does (NaN, infinity, or another type)")
        if key.endswith("running_var") and (value < 0).any():
            raise ValueError(f"{key} holds a negative variance")
