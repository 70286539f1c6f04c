"""Whole training steps and epochs for benchmark.py: a plain loop, ours, and the cases in which they are compared."""

import argparse
import contextlib
import copy
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import count, islice
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import train_student
from dataset import DataSource
from dataset.cifar import CIFAR100_MOMENTS
from dataset.loader import PAD, normalize
from dataset.torchvision_import import torchvision
from distiller_zoo import BASELINE, Distiller, DistillError, distiller_class, distiller_dict
from helper.build import build_students, make_loaders, move_teacher
from helper.cuda_graph import WARM_UP, CudaGraph
from helper.loops import graph_of, train, validate
from helper.student import Teacher, forward_of
from helper.util import RunError, has_native_bf16, seed_all
from models import create_model
from scripts.bench.losses import N_CLS, REFERENCES

FIRST = 10  # losses that are compared
VARIANTS = {  # what our side is called with, as train_student.py
    "fp32": ["--precision", "fp32"],
    "bf16": ["--precision", "bf16"],
    "compiled": ["--precision", "fp32", "--compile"],
    "compiled_bf16": ["--precision", "bf16", "--compile"],
    "no_graph": ["--precision", "fp32", "--no-graph"],
    "nchw": ["--precision", "fp32", "--no-channels_last"],
}
METHODS = {"steps": ["kd", "nst", "crd"], "epoch": ["kd"]}
METHODS["cost"] = [name for name in distiller_dict if name != "kd"]
METHODS["together"] = [name for name in distiller_dict if name not in (BASELINE, "kdsvd")]  # of run_cifar_distill.sh
MACRO = (1, 2, 4, 8)  # batches that a teacher is given at once

Batch = Sequence[Tensor]  # images, target, index; of the plain loop for CRD the samples drawn instead of the index


class Setting(NamedTuple):
    """What both sides share."""

    source: DataSource
    teacher: Teacher
    batches: list[Batch]  # the first
    device: torch.device
    num_workers: int  # of the plain loop


class Case(NamedTuple):
    """What is compared: a side does its loops one after another."""

    what: str
    on: str
    sides: dict[str, list[Callable[[], "Loop"]]]
    epochs: int  # of a whole training


class Loop:
    """Students in training: at the start of their first stage, or of the main one."""

    losses: list[float]  # of the first batches
    steps: Callable[[], Iterator]  # does the steps of one epoch after another, and yields after each
    epoch: Callable[[], None]  # all training images, then all test images

    def __init__(self, setting: Setting, opt: argparse.Namespace, first_stage: bool):
        self.opt, self.device, self.first_stage = opt, setting.device, first_stage
        self.teacher = replace(setting.teacher, model=copy.deepcopy(setting.teacher.model))
        move_teacher(self.teacher, setting.device, opt)
        self.students = build_students(opt, setting.source, setting.device, self.teacher)
        for student in self.students:
            if not first_stage:
                student.run.init_epoch = opt.init_epochs
                student.start(opt)
            student.begin_epoch(1)

    @contextlib.contextmanager
    def going(self, warm_up: int) -> Iterator[Callable[[], object]]:
        """-> a function that does one step, after some have been done; loader workers end with it."""
        steps = self.steps()
        for _ in range(warm_up):
            next(steps)
        yield partial(next, steps)
        steps.close()


class PlainLoop(Loop):
    """One student as the reference trains it.

    Images through PIL in worker processes; eager float32 networks in the contiguous memory format, cuDNN's algorithms
    by trial; the KL term whether it counts or not; losses in the reference's form; SGD in torch's default
    implementation; and a wait for the loss and both accuracies in every step.
    """

    def __init__(self, setting: Setting, opt: argparse.Namespace, first_stage: bool):
        super().__init__(setting, opt, first_stage)
        (self.student,) = self.students
        method, source = self.student.distiller, setting.source
        own = method.init_loss if first_stage else method
        self.own_loss = partial(REFERENCES[opt.distill[0]], method) if opt.distill[0] in REFERENCES else own
        (group,) = self.student.optimizer.param_groups
        self.optimizer = torch.optim.SGD(
            group["params"], float(group["lr"]), opt.momentum, weight_decay=opt.weight_decay
        )
        self.bank = getattr(method, "contrast", None)
        moments, workers = (source.mean, source.std), setting.num_workers
        images = Images(source.train_images, source.train_labels, moments, True, self.bank.K if self.bank else 0)
        self.loader = DataLoader(images, opt.batch_size, shuffle=True, num_workers=workers)
        images = Images(source.test_images, source.test_labels, moments)
        self.test_loader = DataLoader(images, max(1, opt.batch_size // 2), num_workers=workers // 2)
        self.losses = []
        for images, target, index in setting.batches:  # with the negatives that our side draws
            self.losses.append(self.step(images.contiguous(), target, self.bank.draw(index) if self.bank else index))

    def steps(self) -> Iterator[float]:
        while True:
            for batch in self.loader:
                yield self.step(*batch)

    def step(self, *batch: Tensor) -> float:
        """-> the loss"""
        images, target, index = (tensor.to(self.device) for tensor in batch)
        loss, logit = self.loss(images, target, index)
        value = loss.item() if self.first_stage else readings(loss, logit, target)[0]
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.student.has_term and not self.first_stage:
            self.student.distiller.after_step()
        return value

    def loss(self, images: Tensor, target: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """-> the loss, the student's logits; index: for CRD the samples drawn, (B, 1 + K)"""
        student, method, w = self.student, self.student.distiller, self.student.weights
        g_s, logit_s = student.model(images, is_feat=True, preact=method.preact_s)
        if method.has_teacher:
            with torch.no_grad():
                g_t, logit_t = self.teacher.model(images, is_feat=True, preact=method.preact_t)
        if self.first_stage:
            return self.own_loss(g_s[method.feats], g_t[method.feats]), logit_s
        loss = w["gamma"] * F.cross_entropy(logit_s, target)
        if method.has_teacher:
            loss = loss + w["alpha"] * method.kl(logit_s, logit_t, student.T)
        if student.has_term:
            known = {"index": index, "target": target, "logit_s": logit_s, "logit_t": logit_t}
            known |= {"epoch": student.epoch, "head_t": student.head_t}
            needs = {name: known[name] for name in method.needs}
            loss = loss + w["beta"] * self.own_loss(g_s[method.feats], g_t[method.feats], **needs)
        return loss, logit_s

    def epoch(self) -> None:
        self.student.begin_epoch(1)
        for batch in self.loader:
            self.step(*batch)
        self.student.model.eval()
        with torch.no_grad():
            for images, target, _ in self.test_loader:
                logit, target = self.student.model(images.to(self.device)), target.to(self.device)
                readings(F.cross_entropy(logit, target), logit, target)


class OurLoop(Loop):
    """What train_student.py does, but for its files."""

    def __init__(self, setting: Setting, opt: argparse.Namespace, first_stage: bool):
        super().__init__(setting, opt, first_stage)
        self.loader, self.test_loader, _ = make_loaders(setting.source, opt, setting.device)
        self.graph, losses = graph_of(self.students, opt), []
        for _ in islice(self.steps(), FIRST):
            losses.append([student.meters.read()["loss"] for student in self.students])
            for student in self.students:
                student.meters.reset()
        self.losses = [loss for of_student in zip(*losses, strict=True) for loss in of_student]

    def steps(self) -> Iterator[None]:
        for epoch in count(1):
            self.loader.set_epoch(epoch)
            for plan in self.loader.plans():
                self.graph(self.step, plan, self.students) if self.graph else self.step(plan)
                yield

    def step(self, plan: Tensor) -> None:
        images, target, index = self.loader.batch(plan)
        out_t = self.teacher(images, self.students)
        for student in self.students:
            student.update(images, target, index, out_t)

    def epoch(self) -> None:
        if len(train(1, self.loader, self.teacher, self.students, self.opt, self.graph)) < len(self.students):
            raise RunError("a loss is not finite any more")
        validate([student.model for student in self.students], self.test_loader)


class Images(Dataset):
    """-> image, label, index or, with K, the index and K samples of other classes."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, moments: tuple, augment: bool = False, K: int = 0):
        of = torchvision.transforms
        crop = [of.RandomCrop(images.shape[1], padding=PAD), of.RandomHorizontalFlip()] if augment else []
        self.transform = of.Compose([*crop, of.ToTensor(), of.Normalize(*moments)])
        self.images, self.labels, self.K = images, labels, K
        self.others = [np.flatnonzero(labels != c) for c in range(N_CLS)] if K else []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple:
        image, label = self.transform(Image.fromarray(self.images[i])), int(self.labels[i])
        if not self.K:
            return image, label, i
        others = self.others[label]
        return image, label, np.append(i, np.random.choice(others, self.K, replace=len(others) < self.K))


def readings(loss: Tensor, logit: Tensor, target: Tensor) -> tuple[float, float, float]:
    """Loss, top-1 and top-5 accuracy of a batch in percent; each waits for the device."""
    hit = logit.topk(5, dim=1).indices == target[:, None]
    return loss.item(), 100 * hit[:, 0].float().mean().item(), 100 * hit.any(1).float().mean().item()


def synthetic(n: int) -> DataSource:
    """Random images in the shape of CIFAR-100, n to train and a fifth of it to test."""
    n_all = n + max(1, n // 5)
    images = np.random.default_rng(0).integers(0, 256, (n_all, 32, 32, 3), dtype=np.uint8)
    labels, names = np.arange(n_all) % N_CLS, tuple(map(str, range(N_CLS)))
    return DataSource(images[:n], labels[:n], images[n:], labels[n:], N_CLS, *CIFAR100_MOMENTS, names)


def random_teacher(arch: str, source: DataSource, device: torch.device) -> Teacher:
    """Random weights, with the batch statistics of some images: else a deep one's features grow without bound."""
    seed_all(0, "teacher")
    model = create_model(arch, source.n_cls).requires_grad_(False).to(device)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.momentum = 1.0
    model.train()(normalize(torch.from_numpy(source.train_images[:64]).to(device), source.mean, source.std))
    return Teacher(arch, model.eval(), source.n_cls)


def student_options(
    pair: tuple[str, str], batch_size: int, methods: list[str], flags: Sequence[str] = ()
) -> argparse.Namespace:
    """What train_student.py would be called with, without what it writes in an epoch."""
    same = ["--path_t", "-", "--model_s", pair[1], "--batch_size", str(batch_size), "--output", os.devnull]
    opt = train_student.parse([*same, "--distill", *methods, *flags])
    opt.tb_freq = opt.print_freq = opt.save_minutes = math.inf
    return opt


def groups(part: str, opt: argparse.Namespace) -> Iterator[tuple[str, list[str], bool]]:
    """-> what is measured, its methods, whether in their first stage"""
    methods = opt.methods or METHODS[part]
    if part == "together":
        for n in opt.together:
            yield f"{n} methods together", methods[:n], False
        return
    for name in methods:
        if part == "steps" and distiller_class(name).init_modules is not Distiller.init_modules:
            yield f"{name}, first stage", [name], True
        yield name, [name], False


def sensible(part: str, device: torch.device) -> list[str]:
    """The variants that --all measures; to compile takes a minute or more for each network, so one pair must do."""
    few = ["fp32", "bf16"]
    if device.type == "cuda":
        few += {"steps": ["nchw", "no_graph"], "together": [], "epoch": ["compiled_bf16"]}[part]
    return [name for name in few if "bf16" not in VARIANTS[name] or has_native_bf16(device)]


def cases(part: str, opt: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    """part: steps, together or epoch; of --all, the last two on one pair only."""
    variants = opt.variants or (sensible(part, device) if opt.all else ["fp32"])
    for pair in opt.pairs[:1] if opt.all and part != "steps" else opt.pairs:
        options, setting = partial(student_options, pair, opt.batch_size), make_setting(pair, opt, device)
        for what, names, first_stage in groups(part, opt):
            plain = ["--no-channels_last", "--no-graph"]
            sides = {"plain": [partial(PlainLoop, setting, options([name], plain), first_stage) for name in names]}
            for variant in variants:
                sides[variant] = [partial(OurLoop, setting, options(names, VARIANTS[variant]), first_stage)]
            epochs = options(names).init_epochs if first_stage else options(names).epochs
            yield Case(what, ":".join(pair), sides, epochs)


def make_setting(pair: tuple[str, str], opt: argparse.Namespace, device: torch.device) -> Setting:
    source = synthetic(opt.images)
    loader, _, _ = make_loaders(source, student_options(pair, opt.batch_size, [BASELINE]), device)
    batches = list(islice(endless(loader), FIRST))
    return Setting(source, random_teacher(pair[0], source, device), batches, device, opt.num_workers)


def costs(opt: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, str, str, Loop, Loop]]:
    """-> method, pair, variant, our loop of it, and that of KD; methods that are undefined on a pair are left out."""
    for pair in opt.pairs[-1:] if opt.all else opt.pairs:
        setting = make_setting(pair, opt, device)
        for variant in opt.variants or ["fp32"]:
            options = partial(student_options, pair, opt.batch_size, flags=VARIANTS[variant])
            kd = OurLoop(setting, options(["kd"]), False)
            for name in opt.methods or METHODS["cost"]:
                with contextlib.suppress(DistillError):
                    yield name, ":".join(pair), variant, OurLoop(setting, options([name]), False), kd


def endless(loader) -> Iterator[Batch]:
    """The batches of a DeviceLoader's epochs one after another."""
    for epoch in count(1):
        loader.set_epoch(epoch)
        yield from loader


def teachers(opt: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, str, list[Callable[[], None]]]]:
    """-> teacher, precision, its forward pass of as many batches at once as MACRO says, as a training step does it."""
    for arch in dict.fromkeys(pair[0] for pair in opt.pairs):
        model = random_teacher(arch, synthetic(64), device).model.to(memory_format=torch.channels_last)
        for precision in ("fp32", "bf16")[: 1 + has_native_bf16(device)]:
            yield arch, precision, [forward(model, precision, n * opt.batch_size, device) for n in MACRO]


def forward(model: nn.Module, precision: str, n: int, device: torch.device) -> Callable[[], object]:
    """A pass of n images without gradients; on CUDA from a recording."""
    network = forward_of(model, precision)
    images = torch.randn(n, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def run(images: Tensor) -> None:
        network(images, False)

    if device.type != "cuda":
        return partial(run, images)
    recorded = partial(CudaGraph(device, images.size(-1)), run, images, [])
    for _ in range(WARM_UP + 1):
        recorded()
    return recorded
