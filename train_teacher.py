"""Train one network on labels alone."""

import argparse
import sys

from distiller_zoo import BASELINE
from helper.build import build, distillation, load_source, make_loaders, new_model, set_up, teacher_folder
from helper.loops import Result, fit
from helper.options import add_engine_options, add_weights, finish, network, parser_for, trial
from helper.run import opened
from helper.student import Teacher
from helper.util import cli_errors


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = parser_for(__doc__)
    add = parser.add
    add("--model", type=network, metavar="NAME", default="resnet110", help="network, see below (resnet110)")
    add_weights(parser)
    add("-t", "--trial", type=trial, default="0", help="number or name of the run (0)")
    add_engine_options(parser)
    return finish(parser, argv, "model")


def main(argv: list[str] | None = None) -> list[Result]:
    opt = parse(argv)
    device = set_up(opt)
    source = load_source(opt)
    train_loader, test_loader, val_loader = make_loaders(source, opt, device)
    kd = distillation(BASELINE, new_model(opt.model, source, opt), opt, source)
    student = build(kd, teacher_folder(opt), opt, source, device, role="teacher")
    with opened([student.run]):
        results = fit([student], Teacher(), train_loader, test_loader, val_loader, opt)
    print(*results, sep="\n")
    return results


if __name__ == "__main__":
    sys.exit(cli_errors(main))
