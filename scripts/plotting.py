"""What the plots and the table share: their style, and the runs and networks they show."""

import argparse
import io
import json
import textwrap
from collections import Counter, namedtuple
from pathlib import Path

import matplotlib
import numpy as np
import torch
from cycler import cycler
from matplotlib.figure import Figure

from dataset import DataSource, dataset_dict, load_dataset
from dataset.loader import DeviceLoader, large_batch
from helper import checkpoint
from helper.options import Parser, number
from helper.util import RunError, choose_device
from models.external import renormalise

# Okabe and Ito's colours, which can be told apart with any colour vision.
COLOURS = cycler(color=["#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#999999"])
matplotlib.rc("figure.constrained_layout", use=True, w_pad=0.1, h_pad=0.1)  # inches
matplotlib.rc("axes", prop_cycle=cycler(linestyle=["-", "--", "-.", ":"]) * COLOURS)
matplotlib.rcParams.update({"savefig.dpi": 150, "text.parse_math": False, "pdf.fonttype": 42})  # no Type 3 fonts
RESULTS = ("epoch", "train_acc", "train_loss", "test_acc", "test_loss", "val_acc", "seconds")  # of metrics.jsonl
DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
Network = namedtuple("Network", "path name trial n_cls model about")  # about: what its file says beside the weights


def picture_file(text: str) -> Path:
    """The type of --output."""
    if not text.lower().endswith((".png", ".pdf")):
        raise argparse.ArgumentTypeError(f"{text!r} is not a .png or .pdf file")
    return Path(text)


def write_picture(figure: Figure, path: Path) -> None:
    """Write the file as a whole; create its folder."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:].lower())
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write(path, buffer.getbuffer())
    print(f"picture: {path}")


def shown(name: object, width: int = 120) -> str:
    """A name from a file, printable and wrapped."""
    return textwrap.fill("".join(c if c.isprintable() else " " for c in str(name)[:120]), width)


def find_runs(roots: list[Path]) -> list[dict]:
    """Every run at any depth of these folders, in order of training; each folder has one with a finished epoch."""
    runs = {}
    for root in roots:
        paths = sorted(root.rglob("config.json"), key=lambda path: path.stat().st_mtime_ns)
        found = {path.parent.resolve(): read_run(path.parent) for path in paths}
        if not any(run["epochs"] for run in found.values()):
            raise RunError(f"{root} holds no run with a finished epoch")
        runs |= found
    return list(runs.values())


def read_runs(roots: list[Path]) -> list[dict]:
    """The runs with a finished epoch, named so that they can be told apart."""
    return begun(find_runs(roots))


def begun(runs: list[dict]) -> list[dict]:
    runs = [run for run in runs if run["epochs"]]
    columns = ([run[key] for run in runs] for key in ("name", "trial", "dataset", "folder"))
    return [{**run, "name": name} for run, name in zip(runs, distinct(*columns), strict=True)]


def read_run(folder: Path) -> dict:
    """What a run's folder says of its network, its epochs and those of its first stage."""
    path = folder / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        first = [line for line in lines if "init_epoch" in line]
        first = [{key: float(line[f"init_{key}"]) for key in ("epoch", "train_loss")} for line in first]
        lines = [{"val_acc": -1, **line} for line in lines if "init_epoch" not in line]
        epochs = [{key: float(line[key]) for key in RESULTS} for line in lines]
        if not all(abs(value) < 1e30 for line in (*first, *epochs) for value in line.values()):
            raise ValueError("a number that cannot be plotted")
    except DAMAGED as error:
        raise RunError(f"{path}: damaged ({error!r})") from error
    return {**describe(folder), "folder": folder, "first": first, "epochs": epochs, "final": lines[-1] if lines else {}}


def describe(folder: Path) -> dict:
    """Name, trial, data set and number of parameters of a run, and all of its config.json."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
        trial, dataset = shown(f"trial {config['opt']['trial']}"), shown(config["dataset"])
        about = {"name": shown(name_of(config)), "trial": trial, "dataset": dataset, "params": int(config["params"])}
        return {**about, "config": config}
    except DAMAGED as error:
        raise RunError(f"{path}: damaged ({error!r})") from error


def name_of(config: dict) -> str:
    """The network of a run, and how it was trained."""
    if config["role"] != "student":
        origin = f" of {config['student']}" if "student" in config else ""
        return f"{config['arch']}, {config['role']}{origin}"
    with_kd = " + kd" if config["weights"].get("alpha") and config["weights"].get("beta") else ""
    return f"{config['arch']}, {'baseline' if config['method'] == 'none' else config['method']}{with_kd}"


def distinct(names: list[str], *columns: list) -> list[str]:
    """Names; those that are not unique are followed by what tells them apart, from one column after another."""
    for column in columns:
        count = Counter(names)
        names = [f"{name}, {what}" if count[name] > 1 else name for name, what in zip(names, column, strict=True)]
    return names


def load_network(path: Path, arch: str | None, flag: str, part: str | None = None) -> Network:
    """A checkpoint, ours or a published one, named after its run or its folder; arguments as of helper.checkpoint's."""
    arch, n_cls, model, about = checkpoint.load_network(path, arch, flag, part)
    run = {"name": f"{arch}, {path.absolute().parent.name}", "trial": path.stem}
    run = describe(path.parent) if path.with_name("config.json").is_file() else run
    return Network(path, run["name"], run["trial"], n_cls, model, about)


def add_data_options(parser: Parser) -> None:
    """Whose test images the networks see."""
    add = parser.add_argument
    add("--dataset", choices=dataset_dict, help="(the one the network was trained on, or cifar100)")
    add("--data_folder", type=Path, default=Path("data"), help="where the data set is or is downloaded to (./data)")
    add("--download", action=argparse.BooleanOptionalAction, default=True, help="download a missing data set (on)")
    add("--image_size", type=number(int, 8, 1024), help="resize all images to this (the size in training)")
    add("--num_workers", type=number(int, 0), default=8, help="threads that decode image files (8)")
    add("--device", type=choose_device, default="auto", help="auto, cpu, cuda or cuda:N (auto)")


def load_data(opt: argparse.Namespace, *networks: Network, other_classes: bool = False) -> DataSource:
    """The data set of --dataset, or else of the first network; RunError if a network has other classes."""
    opt.dataset = opt.dataset or networks[0].about.get("dataset", "cifar100")
    size = opt.image_size or networks[0].about.get("image_size")
    source = load_dataset(opt.dataset, opt.data_folder, size, opt.download, opt.num_workers)
    if wrong := [network for network in networks if network.n_cls != source.n_cls and not other_classes]:
        raise RunError(f"{wrong[0].path}: was trained for {wrong[0].n_cls} classes, the data set has {source.n_cls}")
    return source


@torch.inference_mode()
def outputs(network: Network, source: DataSource, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """Pooled features (N, C) and logits (N, n_cls) of the test images, normalised as in training."""
    data = {key: network.about.get(key, getattr(source, key)) for key in ("mean", "std")} | {"device": device}
    loader = DeviceLoader(source.test_images, source.test_labels, large_batch(source.test_images), **data)
    renormalise(network.model, data["mean"], data["std"])
    model = network.model.to(device, memory_format=torch.channels_last)
    batches = [(feats[-1], logit) for feats, logit in (model(images, is_feat=True) for images, _, _ in loader)]
    features, logits = (torch.cat(parts).cpu().numpy() for parts in zip(*batches, strict=True))
    if not np.isfinite(features).all() or not np.isfinite(logits).all():
        raise RunError(f"{network.path}: its outputs for these images are not finite")
    return features, logits
