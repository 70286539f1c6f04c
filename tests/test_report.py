"""The report's page: its numbers against plain loops and other libraries, what it says of runs, and its check."""

from torch import nn

import train_student
from helper.options import plain, weights_of
from helper.run import Run, opened
from helper.util import cli_errors
from scripts import report

PAIRS = [("wrn_40_2", "wrn_16_2"), ("vgg13", "vgg8"), ("resnet32x4", "ShuffleV1"), ("resnet56", "resnet20")]
EPOCHS = 6


def call(*args):
    """-> exit code"""
    try:
        return cli_errors(lambda: report.main([*map(str, args)]))
    except SystemExit as stop:
        return stop.code


def make_run(out, method, pair, trial, acc, *flags, epochs=EPOCHS, done=None, failed="", options=None, **entries):
    """A run's folder, written as training does; its accuracy rises to `acc`, with the best in the last epoch but one."""
    args = ["--path_t", "x", "--model_s", pair[1], "--distill", method, "--trial", trial, "--epochs", epochs, *flags]
    opt = train_student.parse([str(arg) for arg in args])
    weights = {"gamma": 0, "alpha": 0, "beta": 0, **weights_of(method, opt)}
    config = {"role": "student", "method": method, "arch": pair[1], "teacher": pair[0], "params": 77_000}
    config |= {"weights": weights, "kd_T": 4.0, "options": opt.options, "published": {}, "dataset": opt.dataset}
    config |= {"n_cls": 100, "class_names": [f"c{i}" for i in range(100)], "image_size": 32, "mean": [0.5] * 3}
    config |= {"std": [0.25] * 3, "opt": plain(opt), **entries}
    folder = out / "student_model" / f"S_{pair[1]}_T_{pair[0]}_{method}_{len(list(out.rglob('config.json')))}_{trial}"
    run = Run(folder, pair[1], config, opt.free, {"argv": opt.argv, "device": "CPU"})
    with opened([run]):
        done = epochs if done is None else done
        for epoch in range(1, done + 1):
            value = acc - 40 * (1 - epoch / epochs) ** 3 + 0.25 * (epoch == epochs - 1)
            line = {"epoch": epoch, "train_acc": value + 5, "train_loss": 4 / epoch, "test_acc": round(value, 4)}
            run.write_line({**line, "test_loss": 1.2, "seconds": 12.5 * epoch})
            run.epoch = epoch
        if failed:
            run.fail(failed)
        elif done == epochs:
            run.save(f"{pair[1]}_last", nn.Linear(2, int(trial) % 7 + 1))
    return folder
