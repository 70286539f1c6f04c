"""Whole training steps and epochs for benchmark.py: the plain loop, ours, and in which cases they are compared."""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
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

from dataset import DataSource
from dataset.cifar import CIFAR100_MOMENTS
from dataset.loader import PAD, normalize
from dataset.torchvision_import import torchvision
from distiller_zoo import ALONE, Distiller, distiller_dict, kd_loss
from helper.build import DTYPES, Teacher, layout_of, loaders, student_tracks, train_step
from helper.cuda_graph import WARM_UP, CudaGraphs, RecordedStep
from helper.loops import train, validate
from helper.options import parse_student
from helper.pretrain import InitTrack
from helper.student import Engine, Track
from helper.util import RunError, native_bf16, seed_all
from models import create_model
from scripts.bench.losses import FORMS, N_CLS

FIRST = 10  # losses that are compared

# of our side: what train_student.py is called with
VARIANTS = {
    "fp32": ["--precision", "fp32"],
    "bf16_teacher": ["--precision", "fp32", "--precision_t", "bf16"],
    "bf16": ["--precision", "bf16"],
    "compiled": ["--precision", "fp32", "--compile"],
    "compiled_bf16": ["--precision", "bf16", "--compile"],
    "no_graph": ["--precision", "fp32", "--no-graph"],
    "nchw": ["--precision", "fp32", "--no-channels_last"],
    "streams": ["--precision", "fp32", "--streams"],
}
METHODS = {"steps": ["kd", "nst", "crd"], "epoch": ["kd"]}
METHODS["together"] = [name for name in distiller_dict if name not in (ALONE, "kdsvd")]  # of run_cifar_distill.sh

MACRO = (1, 2, 4, 8)  # batches that a teacher is given at once

Batch = Sequence[Tensor]  # images, target, index; of the plain loop for CRD also what is drawn


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
    sides: dict[str, list[Callable[[], Loop]]]
    epochs: int  # of a whole training


class Loop:
    """Students in training."""

    losses: list[float]  # of the first batches
    n_steps: int  # of an epoch
    steps: Callable[[], Iterator]  # does the steps of one epoch after another, and yields after each
    epoch: Callable[[], None]  # all training images, then all test images

    @contextlib.contextmanager
    def going(self, warm_up: int) -> Iterator[Callable[[], object]]:
        """-> what does a step, when some are done and loader workers are at work; the workers end with it."""
        steps = self.steps()
        for _ in range(warm_up):
            next(steps)
        yield partial(next, steps)
        steps.close()


class PlainLoop(Loop):
    """One student as the reference trains it.

    Images through PIL in worker processes; eager float32 networks with channels first, cuDNN's algorithms by trial;
    the KL term whether it counts or not; losses in the reference's form; SGD as torch has it by default; and a wait
    for the loss and both accuracies in every step.
    """

    def __init__(self, setting: Setting, opt: argparse.Namespace, first_stage: bool):
        (self.track,) = started(setting, opt, setting.teacher, first_stage)
        self.opt, self.device, self.first_stage = opt, setting.device, first_stage
        self.teacher = copy.deepcopy(setting.teacher.model)
        for net in (self.track.model, self.teacher):
            net.to(memory_format=torch.contiguous_format)
        method = self.track.distiller
        form = partial(FORMS[self.track.name], method) if self.track.name in FORMS else None
        self.own_loss = form or (method.init_loss if first_stage else method)
        (trained,) = self.track.optimizer.param_groups
        self.optimizer = torch.optim.SGD(
            trained["params"], float(trained["lr"]), opt.momentum, weight_decay=opt.weight_decay
        )
        self.bank = getattr(method, "contrast", None)
        self.loader, self.test_loader = self.loaders(setting.source, opt.batch_size, setting.num_workers)
        self.n_steps = len(self.loader)
        self.losses = [self.first_step(*batch) for batch in setting.batches]

    def loaders(self, source: DataSource, batch_size: int, num_workers: int) -> tuple[DataLoader, DataLoader]:
        """Of training and of test images; the second with half the batch and half the workers."""
        moments = source.mean, source.std
        train = Images(source.train_images, source.train_labels, moments, True, self.bank.K if self.bank else 0)
        test = Images(source.test_images, source.test_labels, moments)
        return (
            DataLoader(train, batch_size, shuffle=True, num_workers=num_workers),
            DataLoader(test, max(1, batch_size // 2), num_workers=num_workers // 2),
        )

    def first_step(self, images: Tensor, target: Tensor, index: Tensor) -> float:
        """With the negatives that our side draws."""
        drawn = [self.bank.draw(index)] if self.bank else []
        return self.step(images.contiguous(), target, index, *drawn)

    def steps(self) -> Iterator[float]:
        for batch in endless(self.loader):
            yield self.step(*batch)

    def step(self, *batch: Tensor) -> float:
        """-> the loss"""
        images, target, *index = (tensor.to(self.device) for tensor in batch)
        with tried_algorithms():
            loss, logit = self.loss(images, target, index[-1])
            value = loss.item() if self.first_stage else readings(loss, logit, target)[0]
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        self.track.after_step()
        return value

    def loss(self, images: Tensor, target: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """-> the loss, the student's logits; index: for CRD the samples drawn, (B, 1 + K)"""
        track, method, w = self.track, self.track.distiller, self.track.weights
        g_s, logit_s = track.model(images, is_feat=True, preact=method.preact_s)
        if method.has_teacher:
            with torch.no_grad():
                g_t, logit_t = self.teacher(images, is_feat=True, preact=method.preact_t)
        if self.first_stage:
            return self.own_loss(g_s[method.feats], g_t[method.feats]), logit_s
        loss = w["gamma"] * F.cross_entropy(logit_s, target)
        if method.has_teacher:
            loss = loss + w["alpha"] * kd_loss(logit_s, logit_t, self.opt.kd_T)
        if track.own_term:
            known = {"index": index, "target": target, "logit_s": logit_s, "logit_t": logit_t}
            needs = {name: known[name] for name in method.needs}
            loss = loss + w["beta"] * self.own_loss(g_s[method.feats], g_t[method.feats], **needs)
        return loss, logit_s

    def epoch(self) -> None:
        self.track.train()
        for batch in self.loader:
            self.step(*batch)
        self.track.model.eval()
        with torch.no_grad(), tried_algorithms():
            for images, target, _ in self.test_loader:
                logit, target = self.track.model(images.to(self.device)), target.to(self.device)
                readings(F.cross_entropy(logit, target), logit, target)


class OurLoop(Loop):
    """What train_student.py does, but for its files."""

    def __init__(self, setting: Setting, opt: argparse.Namespace, first_stage: bool):
        model = copy.deepcopy(setting.teacher.model).to(memory_format=layout_of(opt))
        teacher = replace(setting.teacher, model=model)
        self.opt, self.epochs = opt, 0  # epochs begun
        self.tracks = started(setting, opt, teacher, first_stage)
        self.loader, self.test_loader = loaders(setting.source, opt, setting.device)
        self.n_steps = len(self.loader)
        self.step = train_step(opt, self.tracks, teacher.model)
        losses = list(islice(map(self.read, self.steps()), FIRST))
        self.losses = [loss for of_track in zip(*losses, strict=True) for loss in of_track]

    def read(self, _: object) -> list[float]:
        """-> the loss of each track since it was read last"""
        losses = [track.meters.read()["loss"] for track in self.tracks]
        for track in self.tracks:
            track.meters.reset()
        return losses

    def begin_epoch(self) -> int:
        """Also where the last one was not gone through."""
        self.epochs += 1
        for track in self.tracks:
            track.step = 0
        return self.epochs

    def steps(self) -> Iterator[int]:
        while True:
            self.loader.set_epoch(self.begin_epoch())
            yield from self.step.over(self.loader)

    def epoch(self) -> None:
        train(self.begin_epoch(), self.loader, self.step, self.opt)
        for track in self.tracks:
            if track.failed:
                raise RunError(f"method {track.name}: stopped within the epoch, {track.failed}")
            validate(track.model, self.test_loader)


class Images(Dataset):
    """-> image, label, index and, with K, the index and K samples of other classes."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, moments: tuple, augment: bool = False, K: int = 0):
        of = torchvision.transforms
        crop = [of.RandomCrop(images.shape[1], padding=PAD), of.RandomHorizontalFlip()] if augment else []
        self.transform = of.Compose([*crop, of.ToTensor(), of.Normalize(*moments)])
        self.images, self.labels, self.K = images, labels, K
        self.others = [np.flatnonzero(labels != c) for c in range(N_CLS)] if K else []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple:
        item = self.transform(Image.fromarray(self.images[i])), int(self.labels[i]), i
        if not self.K:
            return item
        others = self.others[item[1]]
        return *item, np.append(i, np.random.choice(others, self.K, replace=len(others) < self.K))


def started(setting: Setting, opt: argparse.Namespace, teacher: Teacher, first_stage: bool) -> list[Track]:
    """Tracks in training: at the beginning of their first stage, or of the main one."""
    tracks = student_tracks(opt, setting.source, setting.device, teacher)
    stages = [track.distiller.init_modules(track.model) or [] for track in tracks]
    if first_stage:
        tracks = [InitTrack(track, modules, opt) for track, modules in zip(tracks, stages, strict=True)]
    for track, modules in zip(tracks, stages, strict=True):
        if not first_stage:
            track.distiller.freeze(modules)
            track.start(opt)
        track.train()
    return tracks


def endless(loader: Iterable[Batch]) -> Iterator[Batch]:
    """The batches of one epoch after another."""
    for epoch in count(1):
        if hasattr(loader, "set_epoch"):  # a plain DataLoader has none
            loader.set_epoch(epoch)
        yield from loader


@contextlib.contextmanager
def tried_algorithms() -> Iterator[None]:
    """cuDNN's fastest algorithm for each shape, as the reference asks for."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


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
    teacher = Teacher(arch, create_model(arch, source.n_cls).requires_grad_(False), source.n_cls)
    teacher.fit_for(source, device)
    norms = [m for m in teacher.model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    images = torch.from_numpy(source.train_images[:64]).to(device)
    teacher.model.train()(normalize(images, source.mean, source.std))
    teacher.model.eval()
    return teacher


def student_options(
    pair: tuple[str, str], batch_size: int, methods: list[str], flags: Sequence[str] = ()
) -> argparse.Namespace:
    """What train_student.py would be called with, without what it writes in an epoch."""
    same = ["--path_t", "-", "--model_s", pair[1], "--batch_size", str(batch_size)]
    opt = parse_student([*same, "--output", os.devnull, "--distill", *methods, *flags])  # no folder of earlier runs
    opt.tb_freq = opt.save_minutes = math.inf
    return opt


def groups(part: str, opt: argparse.Namespace) -> Iterator[tuple[str, list[str], bool]]:
    """-> what is measured, its methods, whether in their first stage"""
    methods = opt.methods or METHODS[part]
    if part == "together":
        for n in opt.together:
            yield f"{n} methods together", methods[:n], False
        return
    for name in methods:
        if part == "steps" and distiller_dict[name].init_modules is not Distiller.init_modules:
            yield f"{name}, first stage", [name], True
        yield name, [name], False


def sensible(part: str, device: torch.device) -> list[str]:
    """The variants that --all measures; to compile takes a minute or more for each network, so one pair must do."""
    few = ["fp32", "bf16"] if part != "steps" else ["fp32", "bf16_teacher", "bf16"]
    if device.type == "cuda":
        few += {"steps": ["nchw", "no_graph"], "together": ["streams"], "epoch": ["compiled_bf16"]}[part]
    return [name for name in few if "bf16" not in VARIANTS[name] or native_bf16(device)]


def cases(part: str, opt: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    """part: steps, together or epoch; of --all, the last two on one pair only."""
    source = synthetic(opt.images)
    variants = opt.variants or (sensible(part, device) if opt.all else ["fp32"])
    for pair in opt.pairs[:1] if opt.all and part != "steps" else opt.pairs:
        options = partial(student_options, pair, opt.batch_size)
        loader, _ = loaders(source, options([ALONE]), device)
        batches = list(islice(endless(loader), FIRST))
        setting = Setting(source, random_teacher(pair[0], source, device), batches, device, opt.num_workers)
        for what, names, first_stage in groups(part, opt):
            sides = {"plain": [partial(PlainLoop, setting, options([name]), first_stage) for name in names]}
            for variant in variants:
                sides[variant] = [partial(OurLoop, setting, options(names, VARIANTS[variant]), first_stage)]
            epochs = options(names).init_epochs if first_stage else options(names).epochs
            yield Case(what, ":".join(pair), sides, epochs)


def teachers(opt: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, str, list[Callable[[], None]]]]:
    """-> teacher, precision, its forward pass of as many batches at once as MACRO says, as a training step does it."""
    for arch in dict.fromkeys(pair[0] for pair in opt.pairs):
        model = random_teacher(arch, synthetic(64), device).model
        for precision in ("fp32", "bf16")[: 1 + native_bf16(device)]:
            network = Engine().network(model, DTYPES[precision])
            yield arch, precision, [forward(network, n * opt.batch_size, device) for n in MACRO]


def forward(network: Callable, n: int, device: torch.device) -> Callable[[], None]:
    """A pass of n images without gradients; on CUDA from a recording."""

    @torch.no_grad()
    def run(images: Tensor) -> None:
        network(images, False)

    images = torch.randn(n, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    if device.type != "cuda":
        return partial(run, images)
    recorded = partial(RecordedStep(run, images.size(-1), [], CudaGraphs(device)), images)
    for _ in range(WARM_UP + 1):
        recorded()
    return recorded
