"""Convert a checkpoint of ours to RepDistiller's layout, or one of another program to ours.

    python scripts/convert_checkpoint.py save/models/.../resnet20_last.pth teachers
        writes teachers/resnet20_vanilla/ckpt_epoch_240.pth, which RepDistiller's --path_t takes
    python scripts/convert_checkpoint.py save/models/resnet56_vanilla/ckpt_epoch_240.pth resnet56.pth --dataset cifar100
        writes a checkpoint that names its network and data set, so that it can lie in any folder

Weights are kept bit for bit, epoch and accuracy as numbers. The optimizer's state and the options are left out.
docs/foreign_files.md lists the layouts that are read.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dataset import dataset_dict
from helper import checkpoint
from helper.options import Parser, named
from helper.util import RunError, cli_errors
from models import model_dict

OURS, FOREIGN = "distillers", "repdistiller"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", type=Path, metavar="IN", help="a checkpoint of ours or of another program")
    add("target", type=Path, metavar="OUT", help="a file, or (no suffix) a folder for NETWORK_vanilla/ckpt_epoch_N.pth")
    add("--to", choices=(FOREIGN, OURS), help="the layout of OUT (the one that IN does not have)")
    add("--model", **named("network", model_dict), help="the network (the one that the weights fit)")
    add("--part", help="key or prefix of the weights in IN, such as student, where it holds several networks")
    add("--dataset", **named("data set", dataset_dict), help="on which another program trained it, to be noted in OUT")
    add("--force", action="store_true", help="overwrite OUT")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    opt = parse(argv)
    arch, n_cls, state, about = checkpoint.read_network(opt.source, opt.model, "--model", opt.part)
    ours = "n_cls" in about
    layout = opt.to or (FOREIGN if ours else OURS)
    content = {"model": state, **{key: about[key] for key in ("epoch", "accuracy") if key in about}}
    if layout == OURS:
        if ours:
            raise RunError(f"{opt.source}: is a checkpoint of ours already")
        content |= {"arch": arch, "n_cls": n_cls, **({"dataset": opt.dataset} if opt.dataset else {})}
    elif opt.dataset:
        raise RunError("--dataset: RepDistiller's layout has no place for it")

    path = opt.target
    if not path.suffix or path.is_dir():
        epoch = content.get("epoch")
        path = path / f"{arch}_vanilla" / (f"{arch}_last.pth" if epoch is None else f"ckpt_epoch_{epoch:g}.pth")
    if path.exists() and not opt.force:
        raise RunError(f"{path}: exists; pass --force to overwrite it")
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(path, content)
    print(f"{path}: {arch}, {n_cls} classes, in the layout of {layout}")
    if layout == FOREIGN and not f"{path.absolute().parent.name}_".startswith(f"{arch}_"):
        print(f"note: RepDistiller takes the network's name from the folder: put the file into {arch}_vanilla")


if __name__ == "__main__":
    sys.exit(cli_errors(main))
