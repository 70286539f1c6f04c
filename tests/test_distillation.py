"""Distillation, the module for loops of one's own, against the scripts' students; optimizers and schedules."""

import copy
import json
import math

import pytest
import torch

import train_teacher
from distiller_zoo import Distillation, DistillError, distiller_dict
from helper.build import distillation, new_model
from helper.loops import pretrain
from helper.student import make_optimizer
from models import create_model
from tests.common import as_teacher, calibrate, call, make_loader, make_opt, make_source, make_student

DATA = make_source()


@pytest.fixture(scope="module")
def net():
    return calibrate("resnet14", DATA)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", distiller_dict)
def test_own_loop_equals_the_scripts(name, net, tmp_path):
    """First stage and two steps: the same bits in student, method and its memories."""
    opt = make_opt(name, flags=["--init_epochs", "1"])
    teacher, loader = as_teacher(copy.deepcopy(net), "resnet14", DATA), make_loader(DATA, 20)
    student = make_student(name, opt, DATA, teacher, tmp_path)
    student.run.write_line = student.run.save_state = lambda *_: None
    kd = distillation(name, new_model("resnet8", DATA, opt), opt, DATA, teacher)

    pretrain([student], teacher, loader, opt)
    if params := kd.start_init():
        optimizer = make_optimizer(params, kd.distiller.init_lr(kd.student, opt.learning_rate), opt)
        loader.set_epoch(1)
        for images, _, _ in loader:
            optimizer.zero_grad()
            kd.init_loss(images).backward()
            optimizer.step()
        kd.end_init()
    student.begin_epoch(1)
    kd.train()
    optimizer = make_optimizer(list(kd.parameters()), opt.learning_rate, opt)
    loader.set_epoch(1)
    for images, target, index in loader:
        student.update(images, target, index, teacher(images, [student]))
        optimizer.zero_grad()
        kd(images, target, index).backward()
        optimizer.step()
        kd.after_step()
    assert same(student.model, kd.student) and same(student.distiller, kd.distiller)
    assert not same(kd.student, new_model("resnet8", DATA, opt)) and same(kd.teacher, net)


def test_own_loop_alone():
    """As in the docstring, with plain values only; then bad input."""
    student, teacher = create_model("resnet8", 10), create_model("resnet14", 10)
    kd = Distillation("crd+wttm", student, teacher, labels=list(DATA.train_labels), beta=0.5, nce_k=6)
    assert kd.weights == {"gamma": 1.0, "alpha": 0.0, "beta": 0.5} and kd.student is student
    opt = torch.optim.AdamW(kd.parameters(), 1e-3)
    before = copy.deepcopy(teacher.state_dict())
    kd.train()
    for images, target, index in make_loader(DATA, 20):
        loss = kd(images, target, index)
        opt.zero_grad()
        loss.backward()
        opt.step()
        kd.after_step()
    assert loss.isfinite() and all(p.grad is not None for p in student.parameters())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    with pytest.raises(DistillError, match="teacher"):
        Distillation("kd", student, labels=DATA.train_labels)
    with pytest.raises(DistillError, match="nce_kk"):
        Distillation("crd", student, teacher, labels=DATA.train_labels, nce_kk=3)


def test_schedules(monkeypatch, capsys, tmp_path):
    """Learning rates in metrics.jsonl against their closed form; AdamW resumed equals AdamW uninterrupted."""
    flags = ["--model", "resnet8", "--dataset", "digits", "--image_size", "16", "--batch_size", "250"]
    flags += ["--warmup_epochs", "2", "--optimizer", "adamw"]
    runs = {}
    for name, more in (
        ("cosine", ["--epochs", "5", "--schedule", "cosine"]),
        ("step", ["--epochs", "5", "--lr_decay_epochs", "3"]),
        ("resumed", ["--epochs", "3", "--lr_decay_epochs", "3"]),
        ("resumed", ["--epochs", "5", "--lr_decay_epochs", "3"]),
    ):
        code, _, err = call(train_teacher, [*flags, "--output", tmp_path / name, *more], monkeypatch, capsys)
        assert code == 0, err
        (runs[name],) = (tmp_path / name / "models").iterdir()
    lines = {n: [json.loads(line) for line in (run / "metrics.jsonl").open()] for n, run in runs.items()}
    warm = [1e-3 / 3, 2e-3 / 3]
    cosine = [1e-3 * (1 + math.cos(math.pi * i / 3)) / 2 for i in range(3)]
    assert [line["lr"] for line in lines["cosine"]] == pytest.approx(warm + cosine)
    assert [line["lr"] for line in lines["step"]] == pytest.approx([*warm, 1e-3, 1e-4, 1e-4])
    states = [torch.load(runs[name] / "resnet8_last.pth", weights_only=True)["model"] for name in ("step", "resumed")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    more = ["--epochs", "6", "--schedule", "cosine", "--output", tmp_path / "cosine"]
    code, _, err = call(train_teacher, [*flags, *more], monkeypatch, capsys)
    assert code == 2 and "epochs" in err  # every epoch's learning rate would have been another
