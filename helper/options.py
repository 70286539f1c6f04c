"""Command lines: the published flags and defaults, and the options that the methods declare themselves."""

from __future__ import annotations

import argparse
import math
import re
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, get_args, get_origin

from dataset import dataset_dict
from distiller_zoo import DistillError, aliases, distiller_dict, method_name, method_options
from models import default_lr, model_dict
from models.util import known_first

LR = 0.05  # published; default_lr names the networks that are trained with another
PRECISIONS = ("fp32", "bf16", "auto")
OPEN = ("gamma", "alpha", "beta")
# where transfer_student.py differs
PROBE = {"save_freq": 50, "epochs": 100, "lr_decay_epochs": "30,60,90", "weight_decay": 0.0}
PROBE |= {"dataset": "stl10", "image_size": 32, "learning_rate": LR}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, exit code 2."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


def named(what: str, registry: Iterable[str]) -> dict:
    """How an argument is read that is a name of a registry."""

    def convert(text: str) -> str:
        if text not in registry:
            known = ", ".join(known_first(text, registry))
            raise argparse.ArgumentTypeError(f"unknown {what} '{text}'; known: {known}")
        return text

    return {"type": convert, "metavar": "NAME"}


def method(text: str) -> str:
    """A method's name, the registry's or its paper's."""
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
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of epochs like 150,180,210") from error


def parser_for(description: str, **defaults) -> Parser:
    """What the entry scripts take; defaults: other ones than the published."""
    sets = "\n".join(f"  {name:<13} {(load.__doc__ or '').splitlines()[0]}" for name, load in dataset_dict.items())
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"data sets:\n{sets}\nnetworks:\n  {' '.join(model_dict)}",
    )
    positive, share = number(int, 1), number(float, 0, 1)
    lr = defaults.get("learning_rate") or f"{LR}; {', '.join(f'{lr} for {name}' for name, lr in default_lr.items())}"
    size = defaults.get("image_size") or "the data set's default"
    add = parser.add_argument
    add("--print_freq", type=positive, default=100, help="steps between two readings of the losses (100)")
    add("--tb_freq", type=positive, default=500, help="steps between two training losses in TensorBoard (500)")
    add("--save_freq", type=positive, default=40, help="epochs between two checkpoints (%(default)s)")
    add("--batch_size", type=positive, default=64, help="images per step (64)")
    add("--num_workers", type=number(int, 0), default=8, help="threads that decode image files, once at start (8)")
    add("--epochs", type=positive, default=240, help="(%(default)s)")
    add("--learning_rate", type=number(float, 0), help=f"({lr})")
    add("--lr_decay_epochs", type=epochs_list, default="150,180,210", help="epochs after which it decays (%(default)s)")
    add("--lr_decay_rate", type=number(float, 0, 10), default=0.1, help="(0.1)")
    add("--weight_decay", type=number(float, 0), default=5e-4, help="(%(default)s)")
    add("--momentum", type=share, default=0.9, help="(0.9)")
    add("--dataset", **named("data set", dataset_dict), default="cifar100", help="see below (%(default)s)")
    add("--data_folder", type=Path, default=Path("data"), help="where the data set is or is put (./data)")
    add("--download", action=argparse.BooleanOptionalAction, default=True, help="fetch a missing data set (on)")
    add("--image_size", type=number(int, 8, 1024), help=f"resize all images to this, once ({size})")
    add("--seed", type=number(int, 0), help="of initialisation, order and augmentation (the trial's number)")
    add(
        "--val_split",
        type=number(float, 0, 0.9),
        default=0.0,
        help="share of the training images to choose an epoch by",
    )
    add(
        "--save_minutes",
        type=number(float, 0.01),
        default=10.0,
        help="minutes between two saved states in an epoch (10)",
    )
    add("--deterministic", action="store_true", help="on CUDA, only kernels that give the same bits again (slower)")
    add("--detect_anomaly", action="store_true", help="name the operation whose gradient is NaN (very slow)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    add(
        "--resume",
        choices=("auto", "never"),
        default="auto",
        help="go on with an unfinished run; or use a new folder (auto)",
    )
    add("--output", type=Path, default=Path("save"), help="folder of all results (./save)")
    parser.set_defaults(**defaults)
    return parser


def add_engine_options(parser: Parser) -> None:
    """How networks are computed."""
    add = parser.add_argument_group("engine").add_argument
    add(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="of the networks (fp32); auto: bf16 where the device computes in it",
    )
    add("--compile", action="store_true", help="fuse the networks' kernels; pays for runs of more than some minutes")
    add("--graph", action=argparse.BooleanOptionalAction, default=True, help="on CUDA, record whole steps (on)")
    add(
        "--channels_last",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="a pixel's channels beside each other in memory (on)",
    )


def parse_teacher(argv: list[str] | None = None) -> argparse.Namespace:
    """Options of train_teacher.py."""
    parser = parser_for("Train one network on labels alone.")
    model = named("network", model_dict)
    parser.add_argument("--model", **model, default="resnet110", help="network, see below (resnet110)")
    parser.add_argument("-t", "--trial", type=trial, default="0", help="number or name of the run (0)")
    add_engine_options(parser)
    return finish(parser.parse_args(argv), "model")


def parse_transfer(argv: list[str] | None = None) -> argparse.Namespace:
    """Options of transfer_student.py."""
    parser = parser_for("Train a linear classifier on the features of a frozen student.", **PROBE)
    add = parser.add_argument
    add("--path_s", type=Path, metavar="FILE", required=True, help="the student's checkpoint, ours or a foreign one")
    add("--model_s", **named("network", model_dict), help="its network (read from the file, or its folder's name)")
    add("-t", "--trial", type=trial, default="0", help="number or name of the run (0)")
    add(
        "--cache_features",
        action=argparse.BooleanOptionalAction,
        help="compute the features of every view once and keep them (where half the free memory holds them)",
    )
    return finish(parser.parse_args(argv), "model_s")


def parse_student(argv: list[str] | None = None) -> argparse.Namespace:
    """Options of train_student.py."""
    parser = parser_for("Train students of one teacher: one for each method named, side by side.")
    model = named("network", model_dict)
    names = ", ".join(distiller_dict)
    also = ", ".join(f"{new} = {old}" for new, old in aliases.items())
    add = parser.add_argument
    add("--model_s", **model, default="resnet8", help="the student's network, see below (resnet8)")
    add("--path_t", type=Path, metavar="FILE", help="the teacher's checkpoint, ours or a published one")
    add("--model_t", **model, help="the teacher's network (read from the checkpoint, or from its folder's name)")
    add(
        "--distill",
        type=method,
        nargs="+",
        default=["kd"],
        metavar="METHOD",
        help=f"{names}; {also} (kd)",
    )
    add("--trial", type=trial, default="1", help="number or name of the run (1)")
    add("--init_epochs", type=number(int, 1), default=30, help="epochs of a method's first stage (30)")
    add("-r", "--gamma", type=number(float, 0), help="weight of cross-entropy (the method's published one)")
    add("-a", "--alpha", type=number(float, 0), help="weight of KD's KL term (the method's published one)")
    add("-b", "--beta", type=number(float, 0), help="weight of the method's own term (the method's published one)")
    add("--kd_T", type=number(float, 1e-3), default=4.0, help="temperature of the KL term (4)")
    add_engine_options(parser)
    add("--precision_t", choices=PRECISIONS, help="of the teacher (as --precision)")
    add("--streams", action="store_true", help="on CUDA, students at once, on streams of their own (not yet measured)")
    takers = add_method_options(parser)
    opt = parser.parse_args(argv)
    return finish(check_student(parser, opt, takers), "model_s")


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


def check_student(parser: Parser, opt: argparse.Namespace, takers: dict[str, list[str]]) -> argparse.Namespace:
    """Gather the methods' options; refuse what none of the chosen methods takes."""
    opt.distill = list(dict.fromkeys(opt.distill))
    for key in OPEN:
        if getattr(opt, key) is not None and not any(key in distiller_dict[name].weights for name in opt.distill):
            parser.error(f"--{key}: not an option of {', '.join(opt.distill)}, but of the methods with a teacher")
    for key, methods in takers.items():
        if getattr(opt, key) is not None and not set(methods) & set(opt.distill):
            parser.error(f"--{key}: not an option of {', '.join(opt.distill)}, but of {', '.join(methods)}")
    opt.options = {key: value for key in takers if (value := getattr(opt, key)) is not None}
    for key in takers:
        delattr(opt, key)
    for name in opt.distill:
        weights, least = weights_of(name, opt), distiller_dict[name].min_batch
        if not any(weights.values()):
            parser.error(f"-r -a -b: nothing is left of the loss of {name}")
        if opt.batch_size < least and weights.get("beta"):
            parser.error(f"--batch_size {opt.batch_size}: {name} compares the samples of a batch, at least {least}")
    if opt.path_t is None and any(distiller_dict[name].has_teacher for name in opt.distill):
        parser.error("--path_t: a teacher's checkpoint is needed, for example save/models/<teacher>/<arch>_last.pth")
    return opt


def finish(opt: argparse.Namespace, model: str) -> argparse.Namespace:
    """Defaults that depend on other options."""
    if opt.learning_rate is None:
        opt.learning_rate = default_lr.get(getattr(opt, model), LR)
    if opt.seed is None:
        opt.seed = int(opt.trial) if opt.trial.isdecimal() and opt.trial.isascii() else zlib.crc32(opt.trial.encode())
    return opt


def trial(text: str) -> str:
    """Part of a folder's name."""
    if not re.fullmatch(r"\w([\w.-]*\w)?", text, re.ASCII) or len(text) > 60:
        raise argparse.ArgumentTypeError(f"{text!r} is not a name for a folder: letters, digits, '.', '_', '-'")
    return text


def weights_of(name: str, opt: argparse.Namespace) -> dict[str, float]:
    """A method's weights: the published ones, or what the user passed for those that it has."""
    given = {key: getattr(opt, key, None) for key in OPEN}  # a teacher has no such flags
    return {key: value if given[key] is None else given[key] for key, value in distiller_dict[name].weights.items()}


def plain(opt: argparse.Namespace) -> dict:
    """Options as plain types, for config.json and checkpoints."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(opt).items()}
