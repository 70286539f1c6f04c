"""Command lines: the published flags and defaults, and the options that the methods declare themselves."""

from __future__ import annotations

import argparse
import math
import re
import sys
import zlib
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, get_args, get_origin

from dataset import dataset_dict
from dataset.loader import AUGMENTS
from distiller_zoo import Distiller, DistillError, distiller_class, distiller_dict, method_name, method_options
from distiller_zoo.distillation import weights_of
from helper.ranks import ranks
from models import check_name, default_lr, model_dict
from models.util import ModelError

LR = 0.05  # published; default_lr names the networks that are trained with another
LR_ADAMW = 1e-3  # PyTorch's
PRECISIONS = ("fp32", "bf16", "auto")
OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("step", "cosine")
NETWORKS = f"""{" ".join(model_dict)}
  timm:NAME, torchvision:NAME, FILE.py:CLASS (a class in a file of yours)"""
WEIGHTS = ("gamma", "alpha", "beta")
on_off = argparse.BooleanOptionalAction


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, exit code 2.

    `free` collects the options that do not affect results: they may change when a run is resumed.
    """

    def __init__(self, **kwargs):
        self.free: set[str] = set()
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, **kwargs})

    def add(self, *names: str, free: bool = False, **kwargs) -> None:
        dest = self.add_argument(*names, **kwargs).dest
        if free:
            self.free.add(dest)

    def fix(self, **values) -> None:
        """Options that the other scripts have, and this one does not."""
        self.free |= values.keys()
        self.set_defaults(**values)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n" if ranks.is_first_to_fail() else None)


def named(what: str, registry: Iterable[str]) -> dict:
    """An argument that is a name of a registry; of an unknown one, the closest are listed first."""

    def convert(text: str) -> str:
        if text not in registry:
            known = ", ".join(get_close_matches(text, registry, len(registry), 0))
            raise argparse.ArgumentTypeError(f"unknown {what} '{text}'; known: {known}")
        return text

    return {"type": convert, "metavar": "NAME"}


def network(text: str) -> str:
    """A network by its name, ours or a foreign one."""
    try:
        check_name(text)
    except ModelError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def method(text: str) -> str:
    """A method by its name in the registry or by an alias."""
    try:
        return method_name(text)
    except DistillError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def number(kind: type, low: float = -math.inf, high: float = math.inf) -> Callable[[str], float]:
    """A finite number within bounds."""

    def convert(text: str) -> float:
        try:
            value = kind(text)
            float(value)
        except (ValueError, OverflowError) as error:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {'an integer' if kind is int else 'a number'}"
            ) from error
        if not math.isfinite(value) or not low <= value <= high:
            bounds = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise argparse.ArgumentTypeError(
                f"{text} is out of range ({bounds})" if low > -math.inf else f"{text} is not finite"
            )
        return value

    return convert


def epochs_list(text: str) -> list[int]:
    """'150,180,210' -> [150, 180, 210]"""
    try:
        epochs = [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of epochs like 150,180,210") from error
    if len(set(epochs)) < len(epochs) or min(epochs, default=1) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} names an epoch twice, or one below 1")
    return epochs


def parser_for(description: str, **defaults) -> Parser:
    """The options that all entry scripts share; defaults: other ones than the published."""
    sets = "\n".join(
        f"  {name:<13} {(load.__doc__ or '').partition(chr(10))[0]}" for name, load in dataset_dict.items()
    )
    parser = Parser(description=description, epilog=f"data sets:\n{sets}\nnetworks:\n  {NETWORKS}")
    positive, share = number(int, 1), number(float, 0, 1)
    lrs = [f"{lr} for {name}" for name, lr in default_lr.items()]
    lr = defaults.get("learning_rate") or f"{LR}; {', '.join(lrs)}; {LR_ADAMW:g} with adamw"
    size = defaults.get("image_size") or "the data set's default"
    add = parser.add
    add("--print_freq", free=True, type=positive, default=100, help="steps between two printed losses (100)")
    add(
        "--tb_freq",
        free=True,
        type=positive,
        default=500,
        help="steps between two training losses in TensorBoard (500)",
    )
    add("--save_freq", free=True, type=positive, default=40, help="epochs between two checkpoints (%(default)s)")
    add("--batch_size", type=positive, default=64, help="images per step, of all processes together (64)")
    add("--num_workers", free=True, type=number(int, 0), default=8, help="threads or processes that decode images (8)")
    add("--epochs", free=True, type=positive, default=240, help="(%(default)s)")
    add("--learning_rate", type=number(float, 0), help=f"({lr})")
    add("--optimizer", choices=OPTIMIZERS, default="sgd", help="(%(default)s)")
    add("--schedule", choices=SCHEDULES, default="step", help="of the learning rate, by epochs (%(default)s)")
    add("--warmup_epochs", type=number(int, 0), default=0, help="epochs in which it grows linearly (0)")
    add("--lr_decay_epochs", type=epochs_list, default="150,180,210", help="epochs after which it decays (%(default)s)")
    add("--lr_decay_rate", type=number(float, 0, 10), default=0.1, help="(0.1)")
    add("--weight_decay", type=number(float, 0), default=5e-4, help="(%(default)s)")
    add("--momentum", type=share, default=0.9, help="of sgd (0.9)")
    add("--dataset", **named("data set", dataset_dict), default="cifar100", help="see below (%(default)s)")
    add("--data_folder", free=True, type=Path, default=Path("data"), help="where the data set is or is put (./data)")
    add("--test_folder", free=True, metavar="NAME", help="of --dataset folder: its test images (test/, or val/)")
    add("--download", free=True, action=on_off, default=True, help="fetch a missing data set (on)")
    add("--image_size", type=number(int, 8, 1024), help=f"resize the middle square of all images to this ({size})")
    add("--stream", action=on_off, help="read image files again in every epoch (if all would take over 4 GB)")
    add("--augment", choices=AUGMENTS, default="crop", help="views of training images (crop: padded and mirrored)")
    add("--seed", type=number(int, 0), help="of initialisation, order and augmentation (the trial's number)")
    add(
        "--val_split",
        type=number(float, 0, 0.9),
        default=0.0,
        help="share of the training images held out to select the best epoch (0)",
    )
    add(
        "--save_minutes",
        free=True,
        type=number(float, 0.01),
        default=10.0,
        help="minutes between two saved states (10)",
    )
    add("--deterministic", action="store_true", help="on CUDA, only kernels that repeat their bits (slower)")
    add("--tf32", action=on_off, default=True, help="on CUDA, float32 convolutions round their inputs to TF32 (on)")
    add("--detect_anomaly", free=True, action="store_true", help="name the operation whose gradient is NaN (very slow)")
    add("--device", free=True, default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    add(
        "--resume",
        free=True,
        choices=("auto", "never"),
        default="auto",
        help="resume a run, or take a new folder (auto)",
    )
    add("--output", free=True, type=Path, default=Path("save"), help="folder of all results (./save)")
    parser.set_defaults(**defaults)
    return parser


def add_engine_options(parser: Parser) -> None:
    """How networks are computed."""
    add = parser.add
    add(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="of the networks; fp32: convolutions in TF32 on CUDA, see --tf32; auto: bf16 where it is native (fp32)",
    )
    add("--compile", action="store_true", help="fuse kernels with torch.compile; for runs of more than some minutes")
    add("--graph", free=True, action=on_off, default=True, help="on CUDA, capture whole steps as a graph (on)")
    add("--sync_bn", action="store_true", help="under torchrun: batch norm over all processes, not in each by itself")
    add("--channels_last", action=on_off, default=True, help="the channels_last memory format (on)")


def add_weights(parser: Parser) -> None:
    parser.add("--weights", metavar="FILE", help="initial weights; 'pretrained' takes a foreign network's from its hub")


def add_method_options(parser: Parser) -> dict[str, list[str]]:
    """A flag for every option that a method's constructor declares; -> {flag: methods that take it}."""
    group = parser.add_argument_group("options of the methods")
    takers: dict[str, list[str]] = {}
    for name in distiller_dict:
        for key in method_options(name):
            takers.setdefault(key, []).append(name)
    taken = parser.parse_args([])
    for key, methods in takers.items():
        if hasattr(taken, key):
            raise DistillError(f"method {methods[0]}: its option {key} is a flag of the script's own, rename it")
        first = method_options(methods[0])[key]
        values = get_args(first.annotation) if get_origin(first.annotation) is Literal else None
        if values:
            kind = {"choices": values, "type": type(values[0])}
        elif isinstance(first.default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        elif isinstance(first.default, str):
            kind = {"type": str}
        else:
            kind = {"type": number(type(first.default), *getattr(first.annotation, "__metadata__", ()))}
        said = re.search(rf"^\s*{key}: (.+)$", distiller_dict[methods[0]].__doc__ or "", re.MULTILINE)
        defaults = ", ".join(f"{m} {method_options(m)[key].default}" for m in methods)
        group.add_argument(f"--{key}", help=f"{said[1] if said else ''} ({defaults})", **kind)
    return takers


def check_methods(parser: Parser, opt: argparse.Namespace, takers: dict[str, list[str]]) -> argparse.Namespace:
    """Gather the methods' options; refuse what none of the chosen methods takes."""
    opt.distill = list(dict.fromkeys(opt.distill))
    classes = {name: distiller_class(name) for name in opt.distill}
    known = {key for name in opt.distill for key in method_options(name)}
    for key in WEIGHTS:
        if getattr(opt, key) is not None and not any(key in cls.weights for cls in classes.values()):
            parser.error(f"--{key}: not an option of {', '.join(opt.distill)}, but of the methods with a teacher")
    for key, methods in takers.items():
        if getattr(opt, key) is not None and key not in known:
            parser.error(f"--{key}: not an option of {', '.join(opt.distill)}, but of {', '.join(methods)}")
    parser.free.add("options")  # compared separately, like the teacher, the method and its weights
    opt.options = {key: value for key in takers if (value := getattr(opt, key)) is not None}
    for key in takers:
        delattr(opt, key)
    for name, cls in classes.items():
        weights = weights_of(cls, vars(opt))
        if cls.forward is Distiller.forward:
            weights["beta"] = 0  # there is no term for it to weigh
        if not any(weights.values()):
            parser.error(f"-r -a -b: nothing is left of the loss of {name}")
        if opt.batch_size < cls.min_batch and weights.get("beta"):
            parser.error(
                f"--batch_size {opt.batch_size}: {name} compares the samples of a batch, {cls.min_batch} or more"
            )
    if opt.path_t is None and any(cls.has_teacher for cls in classes.values()):
        parser.error("--path_t: a teacher's checkpoint is needed, for example save/models/<teacher>/<arch>_last.pth")
    return opt


def finish(parser: Parser, argv: list[str] | None, model: str) -> argparse.Namespace:
    """Parse, then fill in defaults that depend on other options."""
    opt = parser.parse_args(argv)
    if opt.learning_rate is None:
        opt.learning_rate = LR_ADAMW if opt.optimizer == "adamw" else default_lr.get(getattr(opt, model), LR)
    if opt.warmup_epochs >= opt.epochs:
        parser.error(f"--warmup_epochs {opt.warmup_epochs}: leaves none of the {opt.epochs} epochs")
    if opt.schedule == "cosine":
        parser.free.discard("epochs")  # the learning rate of every epoch depends on it
    if opt.seed is None:
        opt.seed = int(opt.trial) if opt.trial.isdecimal() and opt.trial.isascii() else zlib.crc32(opt.trial.encode())
    opt.free = parser.free
    opt.argv = sys.argv if argv is None else [parser.prog, *argv]
    return opt


def trial(text: str) -> str:
    """Part of a folder's name."""
    if not re.fullmatch(r"\w([\w.-]*\w)?", text, re.ASCII) or len(text) > 60:
        raise argparse.ArgumentTypeError(f"{text!r} is not a name for a folder: letters, digits, '.', '_', '-'")
    return text


def plain(opt: argparse.Namespace) -> dict:
    """Options as plain types, for config.json and checkpoints."""
    options = {key: value for key, value in vars(opt).items() if key not in ("free", "argv")}
    return {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
