"""Training and validation, the same for teachers, student baselines and distilled students."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from dataset.loader import Loader
from helper.cuda_graph import CudaGraph
from helper.interrupt import interrupt
from helper.ranks import ranks
from helper.student import Student, Teacher
from helper.util import stream
from models import file_name


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
    epoch: int, loader: Loader, teacher: Teacher, students: list[Student], opt, graph=None, stage: str = ""
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
            torch.default_generator.manual_seed(seed)  # of dropout: on a CPU, independent of what trains beside it
            student.update(images, target, index, out_t)

    for i, plan in enumerate(progress(loader.plans(), f"{stage}epoch {epoch}", len(loader) - first), first + 1):
        # after a kill, students may stand at different steps: each joins where it was saved
        active = [student for student in students if student.run.step < i]
        seed = stream(opt.seed, "step", stage, f"{epoch}", f"{i}", f"{ranks.rank}")
        for generator in torch.cuda.default_generators:  # none on the CPU
            generator.manual_seed(seed)
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
        for module in student.trained if stage else [student.model]:  # what is used or saved as it is from now on
            ranks.share_buffers(module)
    return students


@torch.inference_mode()
def validate(models: Sequence[nn.Module], loader: Iterable) -> list[dict[str, Any]]:
    """Test networks on every image of a loader, each once. Waits for the device only at the end.

    acc, acc_top5, macro_f1 (the mean F1 of the classes that have images) and recall (a list with one entry per class,
    NaN for a class without images) are in percent; loss is the mean cross-entropy.
    """
    for model in models:
        model.eval()
    tallies: list[Any] = [0] * len(models)
    for images, target, _ in loader if models else ():
        tallies = [sums + tally(model(images), target) for sums, model in zip(tallies, models, strict=True)]
    return [summary(ranks.sum(sums)) for sums in tallies]


def tally(logit: Tensor, target: Tensor) -> Tensor:
    """(3 + 3 n_cls,) of a batch: its size, top-5 hits, loss; of every class the hits, images, predictions."""
    top = logit.topk(min(5, logit.size(1)), dim=1).indices  # (B, 5)
    hit = top == target[:, None]
    loss = F.cross_entropy(logit, target, reduction="sum").double()
    zeros, one = target.new_zeros(logit.size(1)), torch.ones_like(target)
    classes = [(target, hit[:, 0].long()), (target, one), (top[:, 0], one)]
    counts = [zeros.index_add(0, which, n).double() for which, n in classes]
    return torch.cat([torch.stack([one.sum().double(), hit.sum().double(), loss]), *counts])


def summary(sums: Tensor) -> dict[str, Any]:
    """What validate() returns, from the tallies of all batches. Waits for the device."""
    n, top5, loss, *counts = sums.tolist()
    right, actual, predicted = np.array(counts).reshape(3, -1)
    with np.errstate(invalid="ignore"):  # of classes without images
        recall, f1 = right / actual, 2 * right / (actual + predicted)
    return {
        "acc": 100 * float(right.sum()) / n,
        "acc_top5": 100 * top5 / n,
        "loss": loss / n,
        "macro_f1": 100 * float(f1[actual > 0].mean()),
        "recall": (100 * recall).tolist(),
    }


def pretrain(students: list[Student], teacher: Teacher, loader: Loader, opt) -> None:
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
    train_loader: Loader,
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
                lr = learning_rate(epoch, opt)
                for student in active:
                    student.set_lr(lr)
                active = train(epoch, train_loader, teacher, active, opt, graph)
            models = [student.model for student in active]
            tests = validate(models, test_loader)
            vals = validate(models, val_loader) if val_loader else [{} for _ in models]
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


def learning_rate(epoch: int, opt) -> float:
    """Of an epoch (from 1): grown linearly in the first --warmup_epochs, then lowered in steps or along a cosine."""
    if epoch <= opt.warmup_epochs:
        return opt.learning_rate * epoch / (opt.warmup_epochs + 1)
    if opt.schedule == "cosine":
        done = (epoch - 1 - opt.warmup_epochs) / (opt.epochs - opt.warmup_epochs)
        return opt.learning_rate * (1 + math.cos(math.pi * done)) / 2
    return opt.learning_rate * opt.lr_decay_rate ** sum(epoch > e for e in opt.lr_decay_epochs)


def graph_of(students: list[Student], opt) -> CudaGraph | None:
    """What captures whole steps: on CUDA, in one process, unless --no-graph or --detect_anomaly is given."""
    devices = {student.meters.count.device for student in students}
    asked = opt.graph and not opt.detect_anomaly and ranks.world == 1
    captured = asked and all(device.type == "cuda" for device in devices)
    return CudaGraph(devices.pop(), opt.batch_size) if captured and devices else None


def record(student: Student, epoch: int, lr: float, test: dict[str, Any], val: dict[str, Any], opt) -> None:
    """An epoch's line, curves and checkpoints; resume.pth comes last, and so stands for all of them."""
    run, means, device = student.run, student.meters.read(), student.epoch.device
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
        **({"peak_mib": torch.cuda.max_memory_allocated(device) / 2**20} if device.type == "cuda" else {}),
    }
    run.write_line({key: rounded(value) for key, value in line.items()})
    tags = ("train_acc", "train_loss", "test_acc", "test_acc_top5", "test_macro_f1", "test_loss")
    run.scalars({tag: line[tag] for tag in tags}, epoch)
    arch = file_name(run.arch)
    names = {
        f"{arch}_best": better,
        f"{arch}_chosen": chosen,
        f"ckpt_epoch_{epoch}": epoch % opt.save_freq == 0,
    }
    for name, wanted in {**names, f"{arch}_last": epoch == opt.epochs}.items():
        if wanted:
            run.save(name, student.model)
    run.save_state(student.state_dict())
    print(
        f"epoch {epoch}/{opt.epochs}  {student.name:<12} loss {means['loss']:8.4f}  train {means['acc']:6.2f}  "
        f"test {test['acc']:6.2f}  best {run.best:6.2f}  {run.seconds:6.0f} s",
        flush=True,
    )


def rounded(value: Any) -> Any:
    """A value as metrics.jsonl has it: numbers with 7 digits, percentages in a list with 2 decimals, null for NaN."""
    if isinstance(value, list):
        return [None if math.isnan(percent) else round(percent, 2) for percent in value]
    return value if isinstance(value, int) else float(f"{value:.7g}")


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
