"""Training and validation, the same for teachers, student baselines and distilled students."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from dataset.loader import DeviceLoader
from helper.cuda_graph import CudaGraph
from helper.interrupt import interrupt
from helper.ranks import ranks
from helper.student import Student, Teacher, count_hits


class Result(NamedTuple):
    """The outcome of a run: accuracies in percent on the test images."""

    name: str
    last: float
    best: float
    epoch: int  # of the best accuracy
    seconds: float
    folder: Path
    failed: str = ""  # why it ended early
    chosen: float = 0.0  # test accuracy at the epoch selected on the held-out images
    chosen_epoch: int = 0

    def __str__(self) -> str:
        if self.failed:
            return f"{self.name}: failed, {self.failed}; its files so far: {self.folder}"
        chosen = f"chosen by held-out images {self.chosen:.2f} (epoch {self.chosen_epoch}), "
        return (
            f"{self.name}: last {self.last:.2f}, best {self.best:.2f} (epoch {self.epoch}), "
            f"{chosen if self.chosen_epoch else ''}{self.seconds:.0f} s, results in {self.folder}"
        )


def train(
    epoch: int, loader: DeviceLoader, teacher: Teacher, students: list[Student], opt, graph=None, stage: str = ""
) -> list[Student]:
    """One epoch, or what is left of it -> the students that are still finite.

    graph: replays whole steps, see cuda_graph.py. Raises Interrupted, with all students saved, after the step in which
    a signal arrived. Waits for the device only every print_freq and tb_freq steps.
    """
    for student in students:
        student.begin_epoch(epoch)
    first = min(student.run.step for student in students)
    loader.set_epoch(epoch, first)
    active: list[Student] = []
    saved = time.monotonic()

    def step(plan: Tensor) -> None:
        images, target, index = loader.batch(plan)
        out_t = teacher(images, active)
        for student in active:
            student.update(images, target, index, out_t)

    for i, plan in enumerate(progress(loader.plans(), f"{stage}epoch {epoch}", len(loader) - first), first + 1):
        # after a kill, students may stand at different steps: each joins where it was saved
        active = [student for student in students if student.run.step < i]
        if ranks.world > 1:
            ranks.split(min(loader.batch_size, loader.n_data - (i - 1) * loader.batch_size))
        graph(step, plan, active) if graph else step(plan)
        for student in active:
            student.run.step = i
        if i % opt.tb_freq == 0:
            for student in active:
                means = student.meters.read()
                student.run.scalars({f"{stage}step_train_loss": means["loss"]}, (epoch - 1) * len(loader) + i)
        now_save = ranks.any(bool(interrupt.signal) or time.monotonic() - saved > 60 * opt.save_minutes)
        if now_save or i % opt.print_freq == 0:
            students = drop_nonfinite(students, epoch)
            if not students:
                return []
        if i % opt.print_freq == 0:
            print_step(f"{stage}epoch {epoch} step {i}/{len(loader)}", [s for s in students if s in active])
        if now_save:
            for student in students:
                student.run.save_state(student.state_dict())
            interrupt.check()
            saved = time.monotonic()
    students = drop_nonfinite(students, epoch)
    for student in students:
        student.run.step = 0
        ranks.share_buffers(student.model)
    return students


@torch.inference_mode()
def validate(model: nn.Module, loader: Iterable) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent and mean cross-entropy over every image of a loader, each once."""
    model.eval()
    sums, count = torch.zeros(3, dtype=torch.float64, device=next(model.parameters()).device), 0
    for images, target, _ in loader:
        logit = model(images)
        loss = F.cross_entropy(logit, target, reduction="sum").double()
        sums += torch.cat([count_hits(logit, target), loss[None]])
        count += len(target)
    top1, top5, loss = (ranks.sum(sums) / ranks.sum(torch.tensor(count))).tolist()
    return {"acc": 100 * top1, "acc_top5": 100 * top5, "loss": loss}


def pretrain(students: list[Student], teacher: Teacher, loader: DeviceLoader, opt) -> None:
    """The first stage of the methods that have one, at a constant learning rate."""
    students = [student for student in students if student.in_init]
    graph = graph_of(students, opt)
    with interrupt.deferred():
        for epoch in range(1, opt.init_epochs + 1):
            active = [s for s in students if s.run.init_epoch < epoch and not s.run.failed]
            if active:
                active = train(epoch, loader, teacher, active, opt, graph, stage="init_")
            for student in active:
                run, loss = student.run, student.meters.read()["loss"]
                run.init_epoch = epoch
                run.scalars({"init_train_loss": loss}, epoch)
                run.write_line({"init_epoch": epoch, "init_train_loss": round(loss, 6)})
                run.save_state(student.state_dict())
                print(f"first stage, epoch {epoch}/{opt.init_epochs}  {student.name:<12} loss {loss:10.4f}", flush=True)
            interrupt.check()
    for student in students:
        if not student.run.failed:
            student.start(opt)


def fit(
    students: list[Student],
    teacher: Teacher,
    train_loader: DeviceLoader,
    test_loader: Iterable,
    val_loader: Iterable | None,
    opt,
) -> list[Result]:
    """All epochs that are still to do: train, validate, record, save."""
    for student in students:
        if student.run.epoch:
            done = f"{student.run.epoch} of {opt.epochs} epochs are done already"
            print(f"{student.name}: {done}, in {student.run.folder}", flush=True)
    graph = graph_of(students, opt)
    with interrupt.deferred():
        for epoch in range(1, opt.epochs + 1):
            # after a kill, some students may be an epoch behind the others
            active = [s for s in students if s.run.epoch < epoch and not s.run.failed]
            if active:
                lr = opt.learning_rate * opt.lr_decay_rate ** sum(epoch > e for e in opt.lr_decay_epochs)
                for student in active:
                    student.set_lr(lr)
                active = train(epoch, train_loader, teacher, active, opt, graph)
            tests = [validate(student.model, test_loader) for student in active]
            vals = [validate(student.model, val_loader) if val_loader else {} for student in active]
            for student, test, val in zip(active, tests, vals, strict=True):
                if math.isfinite(test["loss"]):
                    record(student, epoch, lr, test, val, opt)
                else:
                    fail(student, f"epoch {epoch}: the loss on the test images is not finite")
            if epoch < opt.epochs:
                interrupt.check()
    runs = [student.run for student in students]
    return [
        Result(s.name, r.last, r.best, r.best_epoch, r.seconds, r.folder, r.failed, r.chosen, r.chosen_epoch)
        for s, r in zip(students, runs, strict=True)
    ]


def graph_of(students: list[Student], opt) -> CudaGraph | None:
    """What captures whole steps: on CUDA, in one process, unless --no-graph or --detect_anomaly is given."""
    devices = {student.meters.count.device for student in students}
    asked = opt.graph and not opt.detect_anomaly and ranks.world == 1
    captured = asked and all(device.type == "cuda" for device in devices)
    return CudaGraph(devices.pop(), opt.batch_size) if captured and devices else None


def record(student: Student, epoch: int, lr: float, test: dict[str, float], val: dict[str, float], opt) -> None:
    """An epoch's line, curves and checkpoints; resume.pth comes last, and so stands for all of them."""
    run, means = student.run, student.meters.read()
    run.tick()
    run.epoch, run.last = epoch, test["acc"]
    better = test["acc"] > run.best or epoch == 1
    if better:
        run.best, run.best_epoch = test["acc"], epoch
    chosen = bool(val) and val["acc"] > run.chosen_val
    if chosen:
        run.chosen, run.chosen_val, run.chosen_epoch = test["acc"], val["acc"], epoch
    line = {
        "epoch": epoch,
        "lr": lr,
        "train_acc": means["acc"],
        "train_acc_top5": means["acc_top5"],
        **{f"train_{name}": means[name] for name in ("loss", "cls", "div", "kd")},
        **{f"test_{name}": value for name, value in test.items()},
        "best_acc": run.best,
        **{f"val_{name}": value for name, value in val.items()},
        **({"chosen_acc": run.chosen} if val else {}),
        "seconds": run.seconds,
    }
    run.write_line({key: float(f"{value:.7g}") if key != "epoch" else value for key, value in line.items()})
    run.scalars(
        {tag: line[tag] for tag in ("train_acc", "train_loss", "test_acc", "test_acc_top5", "test_loss")}, epoch
    )
    names = {
        f"{run.arch}_best": better,
        f"{run.arch}_chosen": chosen,
        f"ckpt_epoch_{epoch}": epoch % opt.save_freq == 0,
    }
    for name, wanted in {**names, f"{run.arch}_last": epoch == opt.epochs}.items():
        if wanted:
            run.save(name, student.model)
    run.save_state(student.state_dict())
    print(
        f"epoch {epoch}/{opt.epochs}  {student.name:<12} loss {means['loss']:8.4f}  train {means['acc']:6.2f}  "
        f"test {test['acc']:6.2f}  best {run.best:6.2f}  {run.seconds:6.0f} s",
        flush=True,
    )


def drop_nonfinite(students: list[Student], epoch: int) -> list[Student]:
    """Close the runs whose loss, gradient or weights are not finite -> the other students."""
    for student in students:
        found = student.nonfinite()
        if ranks.any(bool(found) and ranks.rank == 0):  # only batch statistics may differ, and the first one's are kept
            fail(student, f"epoch {epoch}, {found}")
    return [student for student in students if not student.run.failed]


def fail(student: Student, reason: str) -> None:
    student.run.fail(reason)
    print(f"{student.name}: stopped, {reason}", file=sys.stderr)


def progress(parts: Iterable, name: str, n: int | None = None) -> Iterable:
    """A progress bar on a terminal; elsewhere print_step's plain lines serve."""
    return tqdm(parts, desc=name, total=n, leave=False, disable=not sys.stderr.isatty(), dynamic_ncols=True)


def print_step(where: str, students: list[Student]) -> None:
    means = "  ".join(f"{s.name} {m['loss']:.4f} {m['acc']:.2f}%" for s in students for m in [s.meters.read()])
    tqdm.write(f"{where}  {means}", file=sys.stderr if sys.stderr.isatty() else sys.stdout)
    sys.stdout.flush()
