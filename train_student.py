"""Train students of one teacher: one for each method of --distill, side by side."""

import argparse
import sys
from pathlib import Path

from distiller_zoo import aliases, distiller_dict
from helper.build import build_students, describe, load_source, load_teacher, make_loaders, move_teacher, set_up
from helper.loops import Result, fit, pretrain, validate
from helper.options import (
    PRECISIONS,
    add_engine_options,
    add_method_options,
    add_weights,
    check_methods,
    finish,
    method,
    network,
    number,
    parser_for,
    trial,
)
from helper.run import opened
from helper.util import cli_errors


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser, weight = parser_for(__doc__), number(float, 0)
    model: dict = {"type": network, "metavar": "NAME"}
    methods = f"{', '.join(distiller_dict)}; {', '.join(f'{new} = {old}' for new, old in aliases.items())}"
    add = parser.add
    add("--model_s", **model, default="resnet8", help="the student's network, see below (resnet8)")
    add("--path_t", free=True, type=Path, metavar="FILE", help="the teacher's checkpoint, ours or a published one")
    add("--model_t", free=True, **model, help="the teacher's network (read from the checkpoint or its folder's name)")
    add("--part_t", free=True, metavar="KEY", help="which network of a checkpoint that holds several")
    methods += "; crd+wttm, crd:0.5+wttm: the terms of several in one student"
    stages: dict = {"type": lambda names: names.split(","), "metavar": "NAME,NAME"}
    add("--stages_s", **stages, help="the modules whose outputs are the stages of a foreign student")
    add("--stages_t", **stages, help="... and of a foreign teacher (chosen by resolution)")
    add_weights(parser)
    add("--describe", free=True, action="store_true", help="print both networks' features and their pairing, and stop")
    add("--distill", free=True, type=method, nargs="+", default=["kd"], metavar="METHOD", help=f"{methods} (kd)")
    add("--trial", type=trial, default="1", help="number or name of the run (1)")
    add("--init_epochs", type=number(int, 1), default=30, help="epochs of a method's first stage (30)")
    add("-r", "--gamma", free=True, type=weight, help="weight of cross-entropy (the method's published one)")
    add("-a", "--alpha", free=True, type=weight, help="weight of KD's KL term (the method's published one)")
    add("-b", "--beta", free=True, type=weight, help="weight of the method's own term (the method's published one)")
    add("--kd_T", free=True, type=number(float, 1e-3), help="temperature of the KL term (4)")
    add_engine_options(parser)
    add("--precision_t", choices=PRECISIONS, help="precision of the teacher (as --precision)")
    takers = add_method_options(parser)
    return check_methods(parser, finish(parser, argv, "model_s"), takers)


def main(argv: list[str] | None = None) -> list[Result]:
    opt = parse(argv)
    device = set_up(opt)
    teacher = load_teacher(opt)  # before any data is fetched
    source = load_source(opt)
    teacher.check(source)
    train_loader, test_loader, val_loader = make_loaders(source, opt, device)
    if opt.describe:
        describe(opt, source, teacher)
        return []
    students = build_students(opt, source, device, teacher)
    move_teacher(teacher, device, opt)  # last: in bfloat16 it is a copy, which needs the data set's normalisation
    with opened([student.run for student in students]):
        if teacher.model is not None:
            teacher.compare(validate([teacher.model], test_loader)[0]["acc"])
        pretrain(students, teacher, train_loader, opt)
        results = fit(students, teacher, train_loader, test_loader, val_loader, opt)
    print(*results, sep="\n")
    return results


if __name__ == "__main__":
    sys.exit(cli_errors(main))
