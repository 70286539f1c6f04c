"""Checkpoints: plain dicts of tensors and plain types, written atomically, read without running code."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import re
import struct
import warnings
from pathlib import Path

import torch
from torch import nn

from helper.audit import audited
from helper.util import RunError
from models import create_model, model_dict
from models.util import head, known_first

LARGEST_IMAGE = 1024  # pixels a side, as --image_size takes at most
LONGEST_NAME = 60
FORMATS = {"f2": "e", "f4": "f", "f8": "d", "i4": "i", "i8": "q", "b1": "?"}  # of numbers, numpy's and struct's
MOST_CLASSES = 100_000  # more in a file is damage
MOST = 1e9  # epochs, steps, percent, seconds
LARGEST_TEXT = 2**24  # bytes; metrics.jsonl grows by 400 an epoch


class Dtype:
    """Stands for numpy.dtype while a file is read: numpy's own would take its internal flags from the file."""

    def __init__(self, code: str, *_: object):
        self.code = code

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1].replace("|", "=")


def scalar(dtype: Dtype, data: bytes) -> float:
    """Stands for the function that makes numpy's scalars; gives a plain number."""
    if dtype.order not in ("<", ">", "="):
        raise ValueError("a number of no byte order")
    return struct.unpack(dtype.order + FORMATS[dtype.code], data)[0]


# What the published files hold beside tensors: their options, and learning rates and accuracies as numpy scalars.
FOREIGN = [
    argparse.Namespace,
    (Dtype, "numpy.dtype"),
    (scalar, "numpy.core.multiarray.scalar"),
    (scalar, "numpy._core.multiarray.scalar"),  # since numpy 2
]


def _channels(values: object) -> bool:
    return isinstance(values, list) and len(values) == 3 and all(isinstance(v, float) and 0 <= v <= 1 for v in values)


# What a checkpoint of ours says of its data; published ones do not, or mean something else.
SAID = {
    "dataset": lambda name: isinstance(name, str) and len(name) <= LONGEST_NAME,
    "image_size": lambda size: type(size) is int and 0 < size <= LARGEST_IMAGE,
    "mean": _channels,
    "std": _channels,
}


def save(path: Path, content: dict) -> None:
    """Write a checkpoint so that `path` holds the old file or the whole new one, never a part."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write(path, buffer.getbuffer())


def write(path: Path, content: bytes | memoryview) -> None:
    """Write a file as a whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as file:  # not through a link, nor into a pipe, of this name
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"{path}: cannot be written ({error.strerror}); what was there is as it was") from error


def read_text(path: Path, largest: int = LARGEST_TEXT) -> bytes:
    """Text that a run wrote. A pipe would be waited for, and what is too large is not ours: ValueError."""
    if not path.is_file() or path.stat().st_size > largest:
        raise ValueError(f"not a file of at most {largest:,} bytes")
    return path.read_bytes()


def load(path: str | Path) -> dict:
    """Read a checkpoint; only tensors and plain types (and FOREIGN) are accepted."""
    path = Path(path)
    if not path.is_file():
        raise RunError(f"{path}: no such checkpoint file")
    if path.stat().st_size == 0:
        raise RunError(f"{path}: the checkpoint is empty")
    try:
        with torch.serialization.safe_globals(FOREIGN), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old pickles: what can be read is read, all else is refused below
            content = torch.load(audited(path), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RunError(f"{path}: refused, not a plain checkpoint of tensors ({_reason(error)})") from error
    except Exception as error:  # torch raises a dozen kinds for a damaged file
        raise RunError(f"{path}: damaged or not a checkpoint ({_reason(error)})") from error
    if not isinstance(content, dict):
        raise RunError(f"{path}: not a checkpoint but a {type(content).__name__}")
    return content


def _reason(error: Exception) -> str:
    """Its first sentence."""
    return re.split(r"\.\s|\n", str(error).strip() or type(error).__name__)[0][:200].rstrip(".")


def arch_of(path: Path, content: dict, arch: str | None, flag: str = "--model_t") -> str:
    """The network of a checkpoint: as asked, as written in it, or after its folder (`wrn_40_2_vanilla`)."""
    opt = content.get("opt")  # RepDistiller's last checkpoints hold their options: a student's, or a teacher's
    options = vars(opt) if isinstance(opt, argparse.Namespace) else {}
    for name in (arch, content.get("arch"), options.get("model_s"), options.get("model")):
        if isinstance(name, str) and name:
            return name
    # not resolve(): a link in such a folder is named by it; RepDistiller's students are in S:<student>_T:<teacher>_...
    folder = path.absolute().parent.name.removeprefix("S:")
    fits = [name for name in model_dict if folder == name or folder.startswith(f"{name}_")]
    if not fits:
        raise RunError(f"{path}: no network is named in it nor by its folder '{folder}'; pass {flag}")
    return max(fits, key=len)


def state_of(path: Path, content: dict) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint, or of a bare state dict, without DataParallel's prefix."""
    state = content.get("model", content)
    if not isinstance(state, dict) or not all(isinstance(k, str) and _plain(v) for k, v in state.items()):
        raise RunError(f"{path}: holds no network weights")
    found = {key.removeprefix("module."): value.detach() for key, value in state.items()}
    if len(found) < len(state):
        raise RunError(f"{path}: holds a tensor with and without the prefix 'module.'")
    return found


def load_network(
    path: str | Path, arch: str | None = None, flag: str = "--model_t"
) -> tuple[str, int, nn.Module, dict]:
    """-> (architecture, classes, network in eval mode, the rest of the file), of our checkpoints and published ones.

    flag: by which the caller's user names the architecture
    """
    path = Path(path)
    content = load(path)
    arch = arch_of(path, content, arch, flag)
    if arch not in model_dict:
        known = ", ".join(known_first(arch[:LONGEST_NAME], model_dict))
        raise RunError(f"{path}: its network '{arch[:LONGEST_NAME]}' is unknown; known: {known}")
    state = state_of(path, content)
    with torch.device("meta"):  # networks without memory, to look at
        model = create_model(arch, 2)
        name = next(name for name, module in model.named_modules() if module is head(model))
        bias = state.get(f"{name}.bias")
        n_cls = len(bias) if bias is not None and bias.dim() == 1 and 0 < len(bias) <= MOST_CLASSES else 2
        own = create_model(arch, n_cls).state_dict()
    try:
        check_state(arch, own, state)
    except ValueError as error:
        raise RunError(f"{path}: {error}") from error
    model = create_model(arch, n_cls)
    model.load_state_dict(state)
    return arch, n_cls, model.eval(), _about(path, content) if "model" in content else {}


def _about(path: Path, content: dict) -> dict:
    """What a file says beside its weights; of its data, what is said as ours say it."""
    about = {key: value for key, value in content.items() if key != "model"}
    for key in [key for key, right in SAID.items() if key in about and not right(about[key])]:
        if "config_sha256" in about:
            raise RunError(f"{path}: what it says of its data cannot be read ({key})")
        del about[key]
    return about


def _plain(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def check_state(arch: str, own: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
    """Whether a state is that of a trained network like `own`; ValueError if not."""
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
            raise ValueError(f"{key} holds a variance below zero")
