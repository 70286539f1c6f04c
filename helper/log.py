"""What a run leaves in its folder."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from torch import nn

from helper import checkpoint
from helper.util import RunError, code_version, versions


class Run:
    """Folder of one network in training: config.json, metrics.jsonl, TensorBoard events, checkpoints."""

    def __init__(self, folder: Path, arch: str, config: dict):
        self.folder, self.arch, self.config = folder, arch, config
        self.writer = None

    def check_free(self) -> None:
        """A folder that holds a run is never written into."""
        if (self.folder / "config.json").exists():
            raise RunError(f"{self.folder} already holds a run: choose another --trial or --output")

    def open(self) -> None:
        """Make the folder. TensorBoard is imported here: it takes a second that wrong options need not wait for."""
        from torch.utils.tensorboard import SummaryWriter

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            about = {**self.config, "code": code_version(), "versions": versions(), "argv": sys.argv}
            write_atomically(self.folder / "config.json", json.dumps(about, indent=1) + "\n")
            self.writer = SummaryWriter(str(self.folder))
        except OSError as error:
            raise RunError(f"{self.folder}: cannot be written ({error.strerror})") from error

    def scalars(self, values: dict[str, float], step: int) -> None:
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
        content = {"model": model.state_dict(), "arch": self.arch, "epoch": epoch, "accuracy": accuracy, **about}
        checkpoint.save(self.folder / f"{name}.pth", content)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
