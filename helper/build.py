"""From options to what trains: device, teacher, data, loaders, students."""

from __future__ import annotations

import argparse
import copy
import os
import platform
import shutil
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dataset import DataSource, ImageFiles, load_dataset
from dataset.loader import DeviceLoader, Loader, large_batch
from dataset.stream import StreamLoader
from distiller_zoo import BASELINE, Distillation, method_options
from helper.checkpoint import load_network, load_weights
from helper.options import WEIGHTS, plain
from helper.ranks import ranks, sync_batch_norm
from helper.run import Run
from helper.student import Student, Teacher, forward_of
from helper.util import RunError, choose_device, has_native_bf16, keep_buffers, seed_all, stream
from models import create_model, file_name
from models.external import renormalise, stages_of
from models.util import feature_shapes


def set_up(opt: argparse.Namespace) -> torch.device:
    """What is set once for the process -> the device, which also decides what `auto` precision is."""
    device = choose_device(opt.device)
    if ranks.world > 1 and device.type == "cuda":
        if device.index is not None or int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
            raise RunError(f"--device {opt.device}: each process needs a GPU of its own, by --device cuda")
        device = torch.device("cuda", ranks.local_rank)
    ranks.start(device)
    if device.type == "cpu":
        keep_buffers()
    torch.autograd.set_detect_anomaly(opt.detect_anomaly)
    if opt.compile and device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise RunError("--compile: needs a C++ compiler, g++ or the one that the variable CXX names")
    if opt.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as PyTorch asks for
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not opt.deterministic  # the fastest algorithms, by trial
    torch.backends.cudnn.allow_tf32 = opt.tf32  # not the newer fp32_precision, which torch.compile cannot read
    for key in ("precision", "precision_t"):
        if getattr(opt, key, None) == "auto":
            setattr(opt, key, "bf16" if has_native_bf16(device) else "fp32")  # as accurate: docs/benchmarks.md
    if opt.schedule == "step" and opt.lr_decay_epochs and min(opt.lr_decay_epochs) >= opt.epochs:
        print(f"note: the learning rate does not decay within {opt.epochs} epochs, see --lr_decay_epochs")
    return device


def load_teacher(opt: argparse.Namespace) -> Teacher:
    """The frozen network of --path_t, on the CPU; no teacher without it."""
    if opt.path_t is None:
        return Teacher()
    arch, n_cls, model, about = load_network(
        opt.path_t, opt.model_t, part=opt.part_t, stages=opt.stages_t, image_size=opt.image_size
    )
    return Teacher(arch, model.requires_grad_(False), n_cls, checksum(model), about, opt.path_t)


def move_teacher(teacher: Teacher, device: torch.device, opt: argparse.Namespace) -> None:
    if teacher.model is not None:
        model, precision = teacher.model.to(device, memory_format=memory_format(opt)), opt.precision_t or opt.precision
        if precision == "bf16":
            model = copy.deepcopy(model)  # the validation is in float32
            for module in model.modules():
                if type(module) is nn.Conv2d:  # a subclass may compute its weights in float32
                    module.bfloat16()  # once, instead of by autocast in every step
        teacher.forward = forward_of(model, precision, opt.compile)


def load_source(opt: argparse.Namespace) -> DataSource:
    """The data set of --dataset, with --val_split's share of every class's training images held out.

    opt.stream becomes what was chosen; it is part of a run's identity, as a streamed set's mean and std are estimates.
    """
    args = opt.dataset, opt.data_folder, opt.image_size, opt.download, opt.num_workers, opt.test_folder, opt.stream
    with ranks.after(first=ranks.local_rank == 0):  # on each machine one downloads and decodes
        source = load_dataset(*args)
    opt.stream = isinstance(source.train_images, ImageFiles)
    if opt.val_split and source.val_images is not None:
        raise RunError("--val_split: the data set has held-out images of its own")
    crc32 = zlib.crc32("\0".join(source.class_names).encode())
    arrays = [source.train_images, source.train_labels, source.test_images, source.test_labels]
    for array in arrays if source.val_images is None else [*arrays, source.val_images, source.val_labels]:
        crc32 = zlib.crc32(array.listing() if isinstance(array, ImageFiles) else np.ascontiguousarray(array), crc32)
    source = source._replace(crc32=crc32)
    return hold_out(source, opt.val_split, opt.seed) if opt.val_split else source


def hold_out(source: DataSource, share: float, seed: int) -> DataSource:
    order = np.random.default_rng(stream(seed, "val_split")).permutation(len(source.train_labels))
    order = order[np.argsort(source.train_labels[order], kind="stable")]  # random within each class
    counts = np.bincount(source.train_labels, minlength=source.n_cls)
    taken = [round(share * n) for n in counts]
    if not any(taken) or any(n and n == of for n, of in zip(taken, counts, strict=True)):
        raise RunError(f"--val_split {share:g}: leaves a class without training images, or holds out none")
    rank = np.arange(len(order)) - np.repeat(counts.cumsum() - counts, counts)
    held = rank < np.repeat(taken, counts)
    kept, held = np.sort(order[~held]), np.sort(order[held])
    images, labels = source.train_images, source.train_labels
    return source._replace(
        train_images=images[kept], train_labels=labels[kept], val_images=images[held], val_labels=labels[held]
    )


def make_loaders(
    source: DataSource, opt: argparse.Namespace, device: torch.device
) -> tuple[Loader, Loader, Loader | None]:
    """Loaders of augmented training batches, of test images and of held-out images, if there are any."""
    n, share = len(source.train_labels), (ranks.rank, ranks.world)
    if ranks.world > 1 and (last := (n - 1) % opt.batch_size + 1) < 2 * ranks.world:
        raise RunError(
            f"--batch_size {opt.batch_size}: leaves {last} of the {n} training images for the last batch, and each of "
            f"the {ranks.world} processes needs two for batch norm; change --batch_size"
        )
    for labels, what in ((source.test_labels, "test"), (source.val_labels, "held-out")):
        if labels is not None and len(labels) < ranks.world:
            raise RunError(f"there are {len(labels)} {what} images for {ranks.world} processes")
    loader: Any = DeviceLoader
    if isinstance(source.train_images, ImageFiles):
        loader = partial(StreamLoader, num_workers=opt.num_workers)
    same: dict[str, Any] = {"mean": source.mean, "std": source.std, "device": device, "n_cls": source.n_cls}
    same |= {"layout": memory_format(opt), "share": share}
    drawn = {"augment": opt.augment, "flip": source.flip, "seed": opt.seed}
    train = loader(source.train_images, source.train_labels, opt.batch_size, **drawn, **same)
    large = large_batch(source.test_images) * ranks.world
    test = loader(source.test_images, source.test_labels, large, **same)
    if source.val_images is None:
        return train, test, None
    return train, test, loader(source.val_images, source.val_labels, large, **same)


def build_students(
    opt: argparse.Namespace, source: DataSource, device: torch.device, teacher: Teacher
) -> list[Student]:
    """A student for each method of --distill; all start from the same weights."""
    students: list[Student] = []
    for method in opt.distill:
        kd = distillation(method, new_model(opt.model_s, source, opt, opt.stages_s), opt, source, teacher)
        if kd.published:
            said = ", ".join(f"{key} {value:g}" for key, value in kd.published.items())
            print(f"{method}: published for {teacher.arch} -> {opt.model_s}: {said}")
        if kd.n_stages and not students:
            print(f"compared: the last {kd.n_stages} stages of both networks, see --describe")
        folder = student_folder(method, kd.weights, teacher.arch, opt)
        students.append(build(kd, folder, opt, source, device, teacher))
    return students


def student_folder(method: str, weights: dict[str, float], arch_t: str, opt: argparse.Namespace) -> Path:
    """The folder of a student's run; weights: those that the method has of gamma, alpha and beta."""
    gamma, alpha, beta = (f"{weights.get(key, 0):g}" for key in WEIGHTS)
    name = f"S_{file_name(opt.model_s)}_T_{file_name(arch_t)}_{opt.dataset}_{method}_r_{gamma}_a_{alpha}_b_{beta}"
    return opt.output / "student_model" / f"{name}_{opt.trial}"


def teacher_folder(opt: argparse.Namespace) -> Path:
    """The folder of a teacher's run."""
    name = f"{file_name(opt.model)}_{opt.dataset}_lr_{opt.learning_rate:g}_decay_{opt.weight_decay:g}_trial_{opt.trial}"
    return opt.output / "models" / name


def describe(opt: argparse.Namespace, source: DataSource, teacher: Teacher) -> None:
    """Print the features of both networks, and which of their stages are compared."""
    kd = distillation(BASELINE, new_model(opt.model_s, source, opt, opt.stages_s), opt, source, teacher)
    for side, net in (("student", kd.student), ("teacher", kd.teacher)):
        if net is not None:
            print(f"{side} {net.arch}")
            shapes = feature_shapes(net, source.train_images.shape[1])
            stages = [f"stage {i}" for i in range(1, len(shapes) - 1)]
            compared = stages[-kd.n_stages :] if kd.n_stages else stages
            modules = dict(zip(stages, stages_of(net) or [""] * len(stages), strict=True))
            for name, shape in zip(["stem", *stages, "pooled"], shapes, strict=True):
                about = ("compared  " if name in compared else " " * 10) + modules.get(name, "")
                print(f"  {name:<8} {' x '.join(map(str, shape[1:])):<16} {about}".rstrip())


def new_model(arch: str, source: DataSource, opt: argparse.Namespace, stages: Sequence[str] | None = None) -> nn.Module:
    """A network with fresh weights, or with those of --weights."""
    seed_all(opt.seed, "model")
    pretrained = opt.weights == "pretrained"
    size = source.train_images.shape[1]
    model = create_model(arch, source.n_cls, size, stages, pretrained)
    if opt.weights and not pretrained:
        load_weights(model, Path(opt.weights), size)
    return model


def distillation(
    method: str, model: nn.Module, opt: argparse.Namespace, source: DataSource, teacher: Teacher | None = None
) -> Distillation:
    """A network with a method and its teacher. Each is seeded by itself: nothing depends on what trains beside it."""
    seed_all(opt.seed, "method", method)
    options = {key: value for key, value in getattr(opt, "options", {}).items() if key in method_options(method)}
    nets = [model] if teacher is None or teacher.model is None else [model, teacher.model]
    for net in nets:
        renormalise(net, source.mean, source.std)
    kd = Distillation(
        method,
        *nets,
        labels=source.train_labels,
        n_cls=source.n_cls,
        image_size=source.train_images.shape[1],
        T=getattr(opt, "kd_T", None),
        **{key: getattr(opt, key, None) for key in WEIGHTS},  # a teacher has no such flags
        **options,
    )
    check_last_batch(kd, len(source.train_labels), opt)
    return kd


def build(
    kd: Distillation,
    folder: Path,
    opt: argparse.Namespace,
    source: DataSource,
    device: torch.device,
    teacher: Teacher | None = None,
    role: str = "student",
    **about: object,
) -> Student:
    """A student and its run's folder, restored if the folder holds an earlier part of the run.

    about: more entries of config.json
    """
    teacher = teacher or Teacher()
    distiller, model = kd.distiller.to(device), kd.student
    stages = stages_of(model)
    if opt.sync_bn and ranks.world > 1:
        sync_batch_norm(model, device)
        if not distiller.across_batch:  # that is given the whole batch
            sync_batch_norm(distiller, device)
    config = {
        "role": role,
        **about,
        "method": kd.method,
        "distilled": distiller.has_teacher,
        "arch": model.arch,
        **({"stages": stages} if stages else {}),
        "teacher": teacher.arch,
        "teacher_crc32": teacher.crc32,
        **({"compared_stages": kd.n_stages} if kd.n_stages else {}),
        "params": sum(p.numel() for p in model.parameters()),
        "weights": {key: kd.weights[key] for key in distiller.weights},
        "kd_T": kd.T,
        "options": kd.options,
        "published": kd.published,
        "dataset": opt.dataset,
        "n_cls": source.n_cls,
        "class_names": list(source.class_names),
        "data_crc32": source.crc32,
        "n_train": len(source.train_labels),
        "n_test": len(source.test_labels),
        "image_size": source.train_images.shape[1],
        "mean": list(source.mean),
        "std": list(source.std),
        "device_type": device.type,
        # what is drawn on a GPU depends on the number of its multiprocessors
        **({"gpu": device_name(device)} if device.type != "cpu" and distiller.generators() else {}),
        "batch_norm_shares": 1 if opt.sync_bn else ranks.world,  # parts of a batch that it takes by themselves
        "opt": plain(opt),
    }
    part = {"argv": opt.argv, "device": device_name(device), "world_size": ranks.world}
    run = Run(folder, model.arch, config, opt.free, part)
    model = model.to(device, memory_format=memory_format(opt))
    forward = forward_of(model, opt.precision, opt.compile)
    name = kd.method if role == "student" else model.arch
    student = Student(name, model, distiller, kd.weights, run, kd.T, forward, kd.head_t[0], kd.n_stages)
    with ranks.after(first=ranks.rank == 0):  # which locks the folder
        state = run.find(opt.resume)
    if state is None:
        student.start(opt)
    else:
        restore(student, state, opt)
    return student


def restore(student: Student, state: dict, opt: argparse.Namespace) -> None:
    """Continue from the state of an earlier part of the run."""
    try:
        student.run.restore(state)
        student.start(opt)
        student.restore(state)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise RunError(f"{student.run.folder / 'resume.pth'}: does not fit this run ({error})") from error


def check_last_batch(kd: Distillation, n_data: int, opt: argparse.Namespace) -> None:
    """Batch norm has nothing to average over in one image's 1x1 maps, or its vector."""
    small = any(list(shape[2:]) == [1, 1] for g in kd.shapes.values() for shape in g)
    small |= any(isinstance(module, nn.BatchNorm1d) and module.training for module in kd.student.modules())
    if (n_data - 1) % opt.batch_size == 0 and small:
        raise RunError(
            f"--batch_size {opt.batch_size}: leaves one of the {n_data} training images for the last batch, and batch "
            "norm cannot take a single one in 1x1 maps or vectors; change --batch_size or --image_size"
        )


def memory_format(opt: argparse.Namespace) -> torch.memory_format:
    return torch.channels_last if opt.channels_last else torch.contiguous_format


def checksum(model: nn.Module) -> int:
    """CRC-32 of a network's weights and buffers."""
    crc = 0
    for tensor in model.state_dict().values():
        crc = zlib.crc32(tensor.cpu().contiguous().numpy().tobytes(), crc)
    return crc


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
