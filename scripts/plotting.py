"""What the pictures share: how they look and are written, and the runs and networks that they are of."""

from __future__ import annotations

import argparse
import io
import json
import textwrap
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import nn

from dataset import DataSource, dataset_dict, load_dataset
from dataset.loader import DeviceLoader, large_batch
from helper import checkpoint
from helper.options import Parser, named, number
from helper.util import RunError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with any colour vision. Styles and markers repeat the distinction; 8, 5 and 7 have
# no common factor, so that 280 lines differ.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#999999")
STYLES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SUFFIXES = (".png", ".pdf")

LONGEST, LARGEST = 120, 1e30  # of a name and of a number that is shown
RESULTS = ("train_acc", "train_loss", "test_acc", "test_loss", "seconds")  # of an epoch's line in metrics.jsonl


def look(i: int) -> dict:
    """Colour, style and marker of the i-th line."""
    return {
        "color": COLOURS[i % len(COLOURS)],
        "linestyle": STYLES[i % len(STYLES)],
        "marker": MARKERS[i % len(MARKERS)],
    }


def plain(name: str, width: int = 40) -> str:
    """A name as matplotlib shows it: in lines of this many characters, not as a formula, not left out of a legend."""
    text = "\n".join(textwrap.wrap(name, width)).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def picture_file(text: str) -> Path:
    """The type of --output."""
    path = Path(text)
    if path.suffix.lower() not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a picture: {' or '.join(SUFFIXES)}")
    return path


def new_figure(width: float, height: float) -> Figure:
    """A figure that needs no display; matplotlib is imported here, as --help need not wait for it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # inches
    return figure


def write_picture(figure: Figure, path: Path) -> None:
    """Render in memory, then write as a whole; a missing folder is made."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"pdf.fonttype": 42}):  # TrueType: journals refuse matplotlib's Type 3
        figure.savefig(buffer, format=path.suffix[1:].lower(), dpi=150)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{path}: its folder cannot be made ({error.strerror})") from error
    checkpoint.write(path, buffer.getbuffer())
    print(f"picture: {path}")


def read_runs(roots: list[Path]) -> list[dict]:
    """Every run at or below the folders, once: in their order, of each teachers first, then in order of training."""
    runs = {}
    for root in roots:
        found = [run for path in root.rglob("config.json") if (run := read_run(path.parent))["epochs"]]
        if not found:
            raise RunError(f"{root} holds no run with a finished epoch")
        for run in sorted(found, key=lambda run: run["order"]):
            runs.setdefault(run["folder"].resolve(), run)
    runs = list(runs.values())
    apart = [[run[key] for run in runs] for key in ("trial", "dataset", "folder")]
    for run, name in zip(runs, distinct([run["name"] for run in runs], *apart), strict=True):
        run["name"] = name
    return runs


def read_run(folder: Path) -> dict:
    """What a run's folder says: of the network, and line by line of its epochs and those of its first stage."""
    epochs = read_lines(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []
    first, main = ([line for line in epochs if ("init_epoch" in line) is is_first] for is_first in (True, False))
    config = read_config(folder) if epochs else {}
    return {**config, "folder": folder, "first": first, "epochs": main}


def read_config(folder: Path) -> dict:
    """Name and place of a run, from its config.json."""
    path = folder / "config.json"
    try:
        config = json.loads(checkpoint.read_text(path))
        return {
            "name": shown(name_of(config)),
            "trial": shown(f"trial {config['opt']['trial']}"),
            "dataset": shown(config["dataset"]),
            "params": int(config["params"]),
            "order": (config["role"] != "teacher", path.stat().st_mtime_ns),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise RunError(f"{path}: not a run's configuration ({error!r})") from error


def shown(name: object) -> str:
    """A name from a file, as far as a table and a picture have place for it."""
    return "".join(c if c.isprintable() else " " for c in str(name)[:LONGEST])


def name_of(config: dict) -> str:
    """Its network, and how it was trained."""
    if config["role"] != "student":
        of = f" of {config['student']}" if "student" in config else ""
        return f"{config['arch']}, {config['role']}{of}"
    weights = config["weights"]
    with_kd = " + kd" if weights.get("alpha") and weights.get("beta") else ""
    return f"{config['arch']}, {config['method'] if config['distilled'] else 'alone'}{with_kd}"


def read_lines(path: Path) -> list[dict]:
    """Lines of metrics.jsonl."""
    lines = []
    try:
        texts = checkpoint.read_text(path).splitlines()
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({error})") from error
    for n, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            needed = ("init_epoch", "init_train_loss") if "init_epoch" in line else ("epoch", *RESULTS)
            if not all(isinstance(line[key], int | float) and abs(line[key]) < LARGEST for key in needed):
                raise TypeError("not a number that can be drawn")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise RunError(f"{path}: line {n} is damaged ({error!r})") from error
        lines.append(line)
    return lines


def distinct(names: list[str], *apart: list) -> list[str]:
    """Names; those that are not unique followed by what tells them apart, from one list after the other."""
    for more in apart:
        count = Counter(names)
        pairs = zip(names, more, strict=True)
        names = [f"{name}, {what}" if count[name] > 1 and what else name for name, what in pairs]
    return names


class Network(NamedTuple):
    """A trained network and what its file says of it."""

    path: Path
    name: str
    trial: str
    n_cls: int
    model: nn.Module
    data: dict  # what its file says of checkpoint.SAID


def load_network(path: Path, arch: str | None, flag: str) -> Network:
    """A checkpoint, ours or a published one, named after the run in whose folder it is or after its folder.

    arch, flag: as of helper.checkpoint.load_network
    """
    arch, n_cls, model, about = checkpoint.load_network(path, arch, flag)
    run = {"name": f"{arch}, {path.absolute().parent.name}", "trial": ""}
    with suppress(RunError):  # not in a run's folder
        run = read_config(path.parent)
    data = {key: about[key] for key in checkpoint.SAID if key in about}
    return Network(path, run["name"], run["trial"], n_cls, model, data)


def add_data_options(parser: Parser) -> None:
    """Whose test images the networks see."""
    add = parser.add_argument
    add("--dataset", **named("data set", dataset_dict), help="(the one it was trained on, or cifar100)")
    add("--data_folder", type=Path, default=Path("data"), help="where the data set is or is put (./data)")
    add("--download", action=argparse.BooleanOptionalAction, default=True, help="fetch a missing data set (on)")
    add("--image_size", type=number(int, 8, 1024), help="resize all images to this (that of its training)")
    add("--num_workers", type=number(int, 0), default=8, help="threads that decode image files (8)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")


def load_data(opt: argparse.Namespace, network: Network) -> DataSource:
    """The data set asked for, or that of the network; --dataset then says which it is."""
    opt.dataset = opt.dataset or network.data.get("dataset", "cifar100")
    size = opt.image_size or network.data.get("image_size")
    return load_dataset(opt.dataset, opt.data_folder, size, opt.download, opt.num_workers)


def check_classes(network: Network, n_cls: int, other: str) -> None:
    if network.n_cls != n_cls:
        raise RunError(f"{network.path}: was trained for {network.n_cls} classes, {other} has {n_cls}")


@torch.inference_mode()
def outputs(network: Network, source: DataSource, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """Pooled features (N, C) and logits (N, n_cls) of the test images, normalised as in the network's training."""
    moments = {key: network.data.get(key, getattr(source, key)) for key in ("mean", "std")}
    batch = large_batch(source.test_images)
    model, found = network.model.to(device, memory_format=torch.channels_last), []
    for images, _, _ in DeviceLoader(source.test_images, source.test_labels, batch, **moments, device=device):
        feats, logit = model(images, is_feat=True)
        found.append((feats[-1].cpu(), logit.cpu()))
    features, logits = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
    if not np.isfinite(features).all() or not np.isfinite(logits).all():
        raise RunError(f"{network.path}: what it makes of these images is not finite")
    return features, logits
