"""A small data set, networks and students that several tests share."""

import sys

import numpy as np
import torch
from torch import nn

from dataset import DataSource
from dataset.loader import DeviceLoader
from helper.build import build, distillation, new_model
from helper.student import Teacher
from helper.util import cli_errors
from models import create_model
from train_student import parse

CPU = torch.device("cpu")


def make_source(n=60, n_cls=10, size=32):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (n, size, size, 3), np.uint8), np.arange(n) % n_cls
    names = tuple(map(str, range(n_cls)))
    return DataSource(images, labels, images[:18], labels[:18], n_cls, (0.5,) * 3, (0.25,) * 3, names)


def make_loader(source, batch_size=4):
    same = {"mean": source.mean, "std": source.std}
    return DeviceLoader(source.train_images, source.train_labels, batch_size, augment="crop", seed=3, **same)


def calibrate(arch, source):
    """A teacher with random weights and the batch-norm statistics of real inputs, else deep features explode."""
    torch.manual_seed(0)
    net = create_model(arch, source.n_cls).train().requires_grad_(False)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    net(next(iter(make_loader(source, 18)))[0])
    for norm in norms:
        norm.momentum = 0.1
    return net.eval()


def as_teacher(net, arch, source):
    return Teacher(arch, net, source.n_cls, forward=lambda images, preact: net(images, is_feat=True, preact=preact))


def make_opt(*names, flags=()):
    few = ["--nce_k", "6"] if {"crd", "rrd"} & set(names) else []
    return parse(["--path_t", "x", "--distill", *names, "--batch_size", "4", "--device", "cpu", *few, *flags])


def make_student(name, opt, source, teacher, out, arch="resnet8", device=CPU):
    """A student that has begun, with a run that writes nothing unless it is opened."""
    student = build(
        distillation(name, new_model(arch, source, opt), opt, source, teacher), out / name, opt, source, device, teacher
    )
    student.run.scalars = lambda *_: None
    return student


def skip_first_stage(student, opt):
    student.run.init_epoch = opt.init_epochs
    student.start(opt)
    return student


def call(script, args, monkeypatch, capsys):
    """-> exit code, stdout, stderr of a script, in this process."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, args)])
    try:
        code = cli_errors(script.main)
    except SystemExit as stop:  # argparse
        code = stop.code
    out = capsys.readouterr()
    return code, out.out, out.err
