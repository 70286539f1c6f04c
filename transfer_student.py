"""Train a linear classifier on the features of a frozen student, on another data set."""

import argparse
import re
import sys
from pathlib import Path

from distiller_zoo import BASELINE
from helper.build import build, checksum, distillation, load_source, make_loaders, set_up
from helper.checkpoint import load_network
from helper.loops import Result, fit
from helper.options import LR, finish, network, on_off, parser_for, trial
from helper.probe import Probe, cache_features
from helper.ranks import ranks
from helper.run import opened
from helper.student import Teacher
from helper.util import RunError, cli_errors, seed_all


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    schedule = {"epochs": 100, "lr_decay_epochs": "30,60,90", "learning_rate": LR, "weight_decay": 0.0, "save_freq": 50}
    parser = parser_for(__doc__, **schedule, dataset="stl10", image_size=32)
    add = parser.add
    add("--path_s", free=True, type=Path, metavar="FILE", required=True, help="the student's checkpoint")
    add("--model_s", free=True, type=network, metavar="NAME", help="its network (read from the checkpoint)")
    add("--part_s", free=True, metavar="KEY", help="which network of a checkpoint that holds several")
    add("-t", "--trial", type=trial, default="0", help="number or name of the run (0)")
    add("--cache_features", free=True, action=on_off, help="compute features once (if they fit half the free memory)")
    parser.fix(precision="fp32", compile=False, graph=False, channels_last=True, sync_bn=False)
    return finish(parser, argv, "model_s")


def main(argv: list[str] | None = None) -> list[Result]:
    opt = parse(argv)
    if ranks.world > 1:
        raise RunError("a probe is trained by one process: start it without torchrun")
    device = set_up(opt)
    _, _, net, _ = load_network(opt.path_s, opt.model_s, "--model_s", opt.part_s, image_size=opt.image_size)
    source = load_source(opt)
    train_loader, test_loader, val_loader = make_loaders(source, opt, device)
    origin = re.sub(r"[^\w.+-]", "_", opt.path_s.absolute().parent.name)  # not every system takes RepDistiller's ':'
    name = f"{origin}_to_{opt.dataset}_lr_{opt.learning_rate:g}_decay_{opt.weight_decay:g}_trial_{opt.trial}"
    about = {"student": origin, "student_crc32": checksum(net)}
    seed_all(opt.seed, "model")
    kd = distillation(BASELINE, Probe(net, source.n_cls), opt, source)
    student = build(kd, opt.output / "transfer" / name, opt, source, device, role="transfer", **about)

    with opened([student.run]):
        # also of epochs that are done: a feature's last bits may depend on those that are computed with it
        epochs = range(1, opt.epochs + 1) if student.run.epoch < opt.epochs else range(0)
        train_loader, test_loader = cache_features(train_loader, test_loader, student.model, epochs, opt.cache_features)
        results = fit([student], Teacher(), train_loader, test_loader, val_loader, opt)
    print(*results, sep="\n")
    return results


if __name__ == "__main__":
    sys.exit(cli_errors(main))
