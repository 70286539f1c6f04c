"""Checkpoints: plain dicts of tensors and plain types, written atomically, read without running code."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from helper.util import RunError
from models import create_model, model_dict
from models.util import known_first

# What the published files hold beside tensors: their options, and learning rates and accuracies as numpy scalars.
scalar = np.float64(0).__reduce__()[0]  # it has moved within numpy
FOREIGN = [
    argparse.Namespace,
    np.dtype,
    np.dtypes.Float64DType,
    np.dtypes.Float32DType,
    (scalar, "numpy.core.multiarray.scalar"),
    (scalar, "numpy._core.multiarray.scalar"),
]

MOST_CLASSES = 100_000  # more in a file is damage


def save(path: Path, content: dict) -> None:
    """Write a checkpoint so that `path` holds the old file or the whole new one, never a part."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write(path, buffer.getbuffer())


def write(path: Path, content: bytes | memoryview) -> None:
    """Write a file as a whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"{path}: cannot be written ({error.strerror}); what was there is as it was") from error


def load(path: str | Path) -> dict:
    """Read a checkpoint; only tensors and plain types (and FOREIGN) are accepted."""
    path = Path(path)
    if not path.is_file():
        raise RunError(f"{path}: no such checkpoint file")
    if path.stat().st_size == 0:
        raise RunError(f"{path}: the checkpoint is empty")
    try:
        # torch.load does not look at the archive's checksums: a flipped bit would pass
        if zipfile.is_zipfile(path) and (member := zipfile.ZipFile(path).testzip()):
            raise RunError(f"{path}: damaged ({member} does not match its checksum)")
        with torch.serialization.safe_globals(FOREIGN):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RunError(f"{path}: refused, not a plain checkpoint of tensors: {_reason(error)}") from error
    except RunError:
        raise
    except (
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
        zipfile.BadZipFile,
    ) as error:
        raise RunError(f"{path}: damaged or not a checkpoint ({_reason(error)})") from error
    if not isinstance(content, dict):
        raise RunError(f"{path}: not a checkpoint but a {type(content).__name__}")
    return content


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".")


def arch_of(path: Path, content: dict, arch: str | None) -> str:
    """The network of a checkpoint: as asked, as written in it, or after its folder (`wrn_40_2_vanilla`)."""
    if arch:
        return arch
    if isinstance(content.get("arch"), str):
        return content["arch"]
    folder = path.absolute().parent.name  # not resolve(): a link in such a folder is named by it
    fits = [name for name in model_dict if folder == name or folder.startswith(f"{name}_")]
    if not fits:
        raise RunError(f"{path}: no network is named in it nor by its folder '{folder}'; pass --model_t")
    return max(fits, key=len)


def load_network(path: str | Path, arch: str | None = None) -> tuple[str, int, nn.Module, dict]:
    """-> (architecture, classes, network in eval mode, the rest of the file), of our checkpoints and published ones."""
    path = Path(path)
    content = load(path)
    arch = arch_of(path, content, arch)
    if arch not in model_dict:
        raise RunError(f"{path}: its network '{arch}' is unknown; known: {', '.join(known_first(arch, model_dict))}")
    state = content.pop("model", content)
    if not isinstance(state, dict) or not all(isinstance(k, str) and _plain(v) for k, v in state.items()):
        raise RunError(f"{path}: holds no network weights")
    state = {key.removeprefix("module."): value for key, value in state.items()}  # of DataParallel
    model = create_model(arch, 2)
    bias = next((state[key] for key, own in model.state_dict().items() if own.shape == (2,) and key in state), None)
    n_cls = len(bias) if bias is not None and bias.dim() == 1 and 0 < len(bias) <= MOST_CLASSES else 2
    model = create_model(arch, n_cls)
    _check_state(path, arch, model.state_dict(), state)
    model.load_state_dict(state)
    return arch, n_cls, model.eval(), content


def _plain(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def _check_state(path: Path, arch: str, own: dict, state: dict) -> None:
    absent, foreign = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if absent or foreign:
        what = f"lacks {absent[0]}" if absent else f"has {foreign[0]} besides"
        raise RunError(f"{path}: not a {arch}: {what} ({len(absent)} tensors missing, {len(foreign)} unknown)")
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise RunError(f"{path}: {key} is {list(value.shape)}, a {arch} has {list(own[key].shape)}")
        if value.is_floating_point() != own[key].is_floating_point() or not value.isfinite().all():
            raise RunError(f"{path}: {key} holds what no trained network does (NaN, infinity, or another type)")
