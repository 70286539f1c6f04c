"""What a run leaves in its folder."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
import stat
import sys
import time
from itertools import chain, count
from pathlib import Path
from typing import IO

from torch import nn

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from helper import checkpoint
from helper.util import RunError, code_version, versions

# Options that may change between two parts of one run: they change no number of it.
FREE = {"print_freq", "tb_freq", "save_freq", "num_workers", "device", "download", "data_folder", "output", "resume"}
# the networks from files, the method, its options and weights are compared beside
FREE |= {
    "path_t",
    "model_t",
    "path_s",
    "model_s",
    "distill",
    "options",
    "cache_features",
    "graph",
    "streams",
    "save_minutes",
    "detect_anomaly",
}
FREE |= {"alpha", "beta", "gamma"}

ABOUT = {"opt", "parts"}  # of a configuration: said, not compared
LARGEST_CONFIG = 2**22  # bytes; every part of a run adds 600


class Run:
    """Folder of one network in training: config.json, metrics.jsonl, TensorBoard events, checkpoints."""

    def __init__(self, folder: Path, arch: str, config: dict, device: str = "cpu"):
        self.folder, self.arch, self.config, self.device = folder, arch, config, device
        self.parts: list[dict] = []  # with what the parts of a run that was cut off were done
        self.writer = self.lock = None

    def resume(self, mode: str) -> dict | None:
        """State of an earlier run of the same configuration in this folder; None if there is nothing to go on from."""
        if mode == "never":
            self.folder = unused(self.folder)
        path = self.folder / "config.json"
        if not path.exists():
            return None
        self.lock = lock(self.folder)  # before its state is read
        try:
            config = json.loads(checkpoint.read_text(path, LARGEST_CONFIG))
            before, self.parts = comparable(config), config["parts"]
            if not isinstance(self.parts, list) or not all(map(is_part, self.parts)):
                raise ValueError("what it says of the parts of the run is damaged")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
            raise RunError(f"{path}: cannot be read ({error}): choose another --trial or --output") from error
        now = comparable(json.loads(json.dumps(self.config)))
        differ = [f"{key}: {before.get(key)} there, {now.get(key)} here" for key in now if before.get(key) != now[key]]
        if differ:
            raise RunError(f"{self.folder} holds a run of other options ({'; '.join(differ)}): choose another --trial")
        state = self.folder / "resume.pth"
        if not state.exists():
            self.parts = []  # nothing of them is left
            return None
        return checkpoint.load(state)

    def open(self, epoch: int = 0, init_epoch: int = 0) -> None:
        """Make the folder, or take it up again after so many epochs, and those of a first stage."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = self.lock or lock(self.folder)
            part = {"from_epoch": epoch + 1, "code": code_version(), "versions": versions(), "argv": sys.argv}
            about = {
                **self.config,
                "parts": [*self.parts, {**part, "device": self.device}],
            }
            checkpoint.write(self.folder / "config.json", (json.dumps(about, indent=1) + "\n").encode())
            self.forget_after(epoch, init_epoch)
        except OSError as error:
            raise RunError(f"{self.folder}: cannot be written ({error.strerror})") from error

    def forget_after(self, epoch: int, init_epoch: int) -> None:
        """Drop lines of epochs that will be done again: the run was cut off before its state was saved."""
        path = self.folder / "metrics.jsonl"
        if os.path.lexists(path):  # a link to nothing would be written through
            try:
                lines = checkpoint.read_text(path).splitlines(keepends=True)
                lines = [line for line in lines if line.endswith(b"}\n")]
                kept = [line for line in lines if is_done(json.loads(line), epoch, init_epoch)]
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
                raise RunError(f"{path}: damaged ({error}): choose another --trial or --output") from error
            checkpoint.write(path, b"".join(kept))

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Points of curves. TensorBoard is imported here: it takes a second that wrong options need not wait for."""
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder))
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)

    def epoch(self, line: dict) -> None:
        """One line of metrics.jsonl, and its curves."""
        self.line(line)
        tags = ("train_acc", "train_loss", "test_acc", "test_acc_top5", "test_loss")
        self.scalars({tag: line[tag] for tag in tags}, line["epoch"])

    def line(self, values: dict) -> None:
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(values) + "\n")

    def save(self, name: str, model: nn.Module, epoch: int, accuracy: float) -> None:
        """A checkpoint that describes itself."""
        about = {key: self.config[key] for key in ("dataset", "n_cls", "mean", "std", "image_size", "opt")}
        about["config_sha256"] = digest(self.config)
        state = {key: value.cpu() for key, value in model.state_dict().items()}  # readable without a GPU
        content = {"model": state, "arch": self.arch, "epoch": epoch, "accuracy": accuracy, **about}
        checkpoint.save(self.folder / f"{name}.pth", content)

    def save_state(self, state: dict) -> None:
        """All that is needed to go on."""
        checkpoint.save(self.folder / "resume.pth", state)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        if self.lock is not None:
            self.lock.close()


def is_part(part: object) -> bool:
    """Text and numbers, and lists and dictionaries of text: more levels would be indented without end."""
    if not isinstance(part, dict):
        return False
    levels = [v.values() if isinstance(v, dict) else v if isinstance(v, list) else [v] for v in part.values()]
    return all(isinstance(value, str | int) for level in levels for value in level)


def is_done(line: dict, epoch: int, init_epoch: int) -> bool:
    return line["init_epoch"] <= init_epoch if "init_epoch" in line else line["epoch"] <= epoch


def unused(folder: Path) -> Path:
    """The folder if there is none of this name, or the first of folder_2, folder_3 ... ."""
    names = chain([folder], (folder.with_name(f"{folder.name}_{n}") for n in count(2)))
    return next(name for name in names if not name.exists())


def lock(folder: Path) -> IO[str]:
    """A file that is locked until it is closed, or its process ends; it says whose it is."""
    try:
        no_link = getattr(os, "O_NOFOLLOW", 0)  # Windows has none
        file = os.fdopen(os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | no_link, 0o666), "r+")
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode) or about.st_nlink > 1:
            raise OSError(errno.EINVAL, "it is not a file of its own")
    except OSError as error:
        raise RunError(f"{folder / '.lock'}: cannot be written ({error.strerror})") from error
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise RunError(f"{folder} is in use by {file.read(200).strip() or 'another process'}") from None
    except OSError as error:  # some file systems of clusters have no locks
        print(f"note: {folder} cannot be locked ({error.strerror}): start no second run in it", file=sys.stderr)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S %z')}\n")
    file.flush()
    return file


def digest(config: dict) -> str:
    """Of all that the numbers of a run depend on."""
    return hashlib.sha256(json.dumps(comparable(config), sort_keys=True).encode()).hexdigest()


def comparable(config: dict) -> dict:
    """What must be the same in two parts of one run."""
    options = {key: value for key, value in config["opt"].items() if key not in FREE}
    return {**options, **{key: value for key, value in config.items() if key not in ABOUT}}
