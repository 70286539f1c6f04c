"""A run's folder and its progress."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import nn

from helper import checkpoint
from helper.ranks import ranks
from helper.util import InUse, RunError, code_version, versions

# How far a run has got: whole epochs of the first and of the main stage, steps of the next one; and what it reached.
PROGRESS = ("init_epoch", "epoch", "step", "last", "best", "best_epoch", "chosen", "chosen_val", "chosen_epoch")
PROGRESS += ("seconds",)
# entries of config.json; the options in `opt` are compared one by one
NOT_COMPARED = {"opt", "parts", "class_names", "published"}
# what runs of 0.1.0 did, whose config.json does not say so; other entries that are missing there are not compared
BEFORE = {"--augment": "crop", "--optimizer": "sgd", "--schedule": "step", "--warmup_epochs": 0, "--weights": None}
BEFORE |= {"--tf32": True, "batch_norm_shares": 1}


class Run:
    """The folder of a network in training: lock, config.json, metrics.jsonl, TensorBoard events, checkpoints.

    free: options that may change when a run is resumed, as they do not affect results
    """

    def __init__(self, folder: Path, arch: str, config: dict, free: Iterable[str] = (), part: dict | None = None):
        self.folder, self.arch, self.config, self.free = folder, arch, config, set(free)
        self.part = {"code": code_version(), "versions": versions(), **(part or {})}
        self.parts: list[dict] = []  # earlier parts of the run, if it was interrupted
        self.lock: FileLock | None = None
        self.writer: Any = None
        self.init_epoch = self.epoch = self.step = self.best_epoch = self.chosen_epoch = 0
        self.last = self.best = self.chosen = self.seconds = 0.0
        self.chosen_val = -1.0
        self.since = time.perf_counter()  # when `seconds` was brought up to date
        self.failed = ""  # why the run was given up

    def find(self, mode: str) -> dict | None:
        """State of an earlier part of this run in its folder -> None if there is none.

        mode: 'never' takes a new folder instead. Raises InUse, or RunError if the folder holds another run.
        """
        if mode == "never":
            names = chain([self.folder], (self.folder.with_name(f"{self.folder.name}_{n}") for n in count(2)))
            self.folder = next(folder for folder in names if not folder.exists())
        parts = self.check()
        if not parts:
            return None
        if ranks.rank == 0:  # before the state is read
            last = parts[-1]
            holder = f"process {last['pid']} on {last.get('host')}" if "pid" in last else "another process"
            self.lock = lock(self.folder, holder)
        if not (self.folder / "resume.pth").exists():
            return None
        self.parts = parts
        return checkpoint.load(self.folder / "resume.pth")

    def check(self) -> list[dict]:
        """The parts of the run in the folder; none if there is none. Raises RunError if it is another run."""
        path = self.folder / "config.json"
        if not path.exists():
            return []
        try:
            config = json.loads(checkpoint.read_text(path))
            before, epochs, parts = (
                BEFORE | self.identity(config),
                int(config["opt"]["epochs"]),
                list(map(dict, config["parts"])),
            )
            if not parts:
                raise ValueError("no parts")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OSError) as error:
            raise RunError(f"{path}: damaged ({error}): choose another --trial or --output") from error
        now = self.identity(json.loads(json.dumps(self.config)))
        differ = [
            f"{key}: {before[key]} there, {now[key]} here" for key in now if before.get(key, now[key]) != now[key]
        ]
        if differ:
            raise RunError(
                f"{self.folder} holds a run with other options ({'; '.join(differ)}): choose another --trial"
            )
        if epochs > self.config["opt"]["epochs"]:
            raise RunError(f"{self.folder} holds a run of {epochs} epochs: --epochs may be raised, not lowered")
        return parts

    def restore(self, state: dict) -> None:
        for name in PROGRESS:
            kind = type(getattr(self, name))
            if type(state[name]) is not kind or not -1 <= state[name] <= checkpoint.MOST:  # NaN is not, either
                raise ValueError(f"{name} {state[name]}")
            setattr(self, name, state[name])

    def open(self) -> None:
        """Make the folder, or take it up again where the run was interrupted; nothing if the run is complete."""
        if self.epoch >= self.config["opt"]["epochs"] or ranks.rank:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = self.lock or lock(self.folder)
            self.part |= {"from_epoch": self.epoch + 1, "pid": os.getpid(), "host": socket.gethostname()}
            self.write_config()
            self.drop_later_lines()
        except OSError as error:
            raise RunError(f"{self.folder}: cannot be written ({error.strerror})") from error

    def write_config(self) -> None:
        config = {**self.config, "parts": [*self.parts, self.part]}
        checkpoint.write(self.folder / "config.json", (json.dumps(config, indent=1) + "\n").encode())

    def drop_later_lines(self) -> None:
        """Drop lines of epochs that will be repeated: the run ended before its state was saved."""
        path = self.folder / "metrics.jsonl"
        if path.exists():
            try:
                lines = [line for line in checkpoint.read_text(path).splitlines(keepends=True) if line.endswith(b"}\n")]
                kept = [line for line in lines if self.is_done(json.loads(line))]
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
                raise RunError(f"{path}: damaged ({error}): choose another --trial or --output") from error
            checkpoint.write(path, b"".join(kept))

    def is_done(self, line: dict) -> bool:
        return line["init_epoch"] <= self.init_epoch if "init_epoch" in line else line["epoch"] <= self.epoch

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Add points to TensorBoard's curves. It is imported here, as that takes a second."""
        if ranks.rank:
            return
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder))
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)

    def write_line(self, values: dict) -> None:
        """A line of metrics.jsonl."""
        if ranks.rank == 0:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(values) + "\n")

    def save(self, name: str, model: nn.Module) -> None:
        """Write a checkpoint that describes itself, of the last completed epoch."""
        if ranks.rank:
            return
        keys = ("dataset", "n_cls", "class_names", "mean", "std", "image_size", "stages", "opt")
        about = {key: self.config[key] for key in keys if key in self.config}
        about["config_sha256"] = self.sha256()
        state = {key: value.cpu() for key, value in model.state_dict().items()}  # readable without a GPU
        content = {"model": state, "arch": self.arch, "epoch": self.epoch, "accuracy": self.last, **about}
        checkpoint.save(self.folder / f"{name}.pth", content)

    def save_state(self, state: dict) -> None:
        """Write resume.pth, from which the run continues."""
        self.tick()
        progress = {name: getattr(self, name) for name in PROGRESS}
        if ranks.rank == 0:
            checkpoint.save(self.folder / "resume.pth", {**state, **progress})

    def tick(self) -> None:
        now = time.perf_counter()
        self.seconds, self.since = self.seconds + now - self.since, now

    def fail(self, reason: str) -> None:
        """Give the run up, and note why in config.json; those beside it go on."""
        self.failed = self.part["failed"] = reason
        if self.lock is not None:  # it is open
            self.write_config()
        self.close()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        if self.lock is not None:
            self.lock.release()

    def identity(self, config: dict) -> dict:
        """What must be the same in all parts of a run."""
        options = {f"--{key}": value for key, value in config["opt"].items() if key not in self.free}
        return {**options, **{key: value for key, value in config.items() if key not in NOT_COMPARED}}

    def sha256(self) -> str:
        """Digest of everything that the run's numbers depend on."""
        return hashlib.sha256(json.dumps(self.identity(self.config), sort_keys=True).encode()).hexdigest()


@contextmanager
def opened(runs: Sequence[Run]) -> Iterator[None]:
    """Open runs, and close them whatever happens: another call may be made in this process."""
    try:
        check_ranks(runs)
        for run in runs:
            run.open()
        yield
    finally:
        for run in runs:
            run.close()


def check_ranks(runs: Sequence[Run]) -> None:
    """Raise RunError if processes differ in what they run: another disk, other data, another teacher."""
    seen = [(run.folder.name, run.sha256(), run.init_epoch, run.epoch, run.step) for run in runs]
    crc32 = torch.tensor(zlib.crc32(repr(seen).encode()))
    if ranks.sum(crc32.clone()) != ranks.world * crc32:
        raise RunError(
            "the processes differ in options, data, teacher or the state of the run: --data_folder, --path_t and "
            "--output must lead to the same files everywhere"
        )


def lock(folder: Path, holder: str = "another process") -> FileLock:
    """Lock a folder until release(), or until the process ends. Raises InUse if another holds it."""
    held = FileLock(folder / ".lock", timeout=0)
    try:
        held.acquire()
    except Timeout:
        raise InUse(f"{folder} is in use by {holder}") from None
    return held
