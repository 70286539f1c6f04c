"""From options to what trains: device, teacher, data, loaders, students."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dataset import DataSource, load_dataset
from dataset.loader import DeviceLoader, large_batch
from distiller_zoo import Distiller, create_distiller, distiller_class, method_options
from helper.checkpoint import load_network
from helper.options import plain, weights_of
from helper.run import Run
from helper.student import Student, Teacher, forward_of
from helper.util import RunError, choose_device, has_native_bf16, keep_buffers, seed_all, stream
from models import create_model
from models.util import feature_shapes, head

KD_T = 4.0  # published temperature of the KL term


def set_up(opt: argparse.Namespace) -> torch.device:
    """What is set once for the process -> the device, which also decides what `auto` precision is."""
    device = choose_device(opt.device)
    if device.type == "cpu":
        keep_buffers()
    torch.autograd.set_detect_anomaly(opt.detect_anomaly)
    if opt.compile and device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise RunError("--compile: needs a C++ compiler, g++ or the one that the variable CXX names")
    if opt.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as PyTorch asks for
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not opt.deterministic  # the fastest algorithms, by trial
    for key in ("precision", "precision_t"):
        if getattr(opt, key, None) == "auto":
            setattr(opt, key, "bf16" if has_native_bf16(device) else "fp32")  # as accurate: docs/benchmarks.md
    if opt.lr_decay_epochs and min(opt.lr_decay_epochs) >= opt.epochs:
        print(f"note: the learning rate does not decay within {opt.epochs} epochs, see --lr_decay_epochs")
    return device


def load_teacher(opt: argparse.Namespace) -> Teacher:
    """The frozen network of --path_t, on the CPU; no teacher without it."""
    if opt.path_t is None:
        return Teacher()
    arch, n_cls, model, about = load_network(opt.path_t, opt.model_t, part=opt.part_t)
    return Teacher(arch, model.requires_grad_(False), n_cls, checksum(model), about, opt.path_t)


def move_teacher(teacher: Teacher, device: torch.device, opt: argparse.Namespace) -> None:
    if teacher.model is not None:
        model = teacher.model.to(device, memory_format=memory_format(opt))
        teacher.forward = forward_of(model, opt.precision_t or opt.precision, opt.compile)


def load_source(opt: argparse.Namespace) -> DataSource:
    """The data set of --dataset, with --val_split's share of every class's training images held out."""
    source = load_dataset(opt.dataset, opt.data_folder, opt.image_size, opt.download, opt.num_workers, opt.test_folder)
    crc32 = zlib.crc32("\0".join(source.class_names).encode())
    for array in (source.train_images, source.train_labels, source.test_images, source.test_labels):
        crc32 = zlib.crc32(np.ascontiguousarray(array), crc32)
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
) -> tuple[DeviceLoader, DeviceLoader, DeviceLoader | None]:
    """Loaders of augmented training batches, of test images and of held-out images, if there are any."""
    same: dict[str, Any] = {"mean": source.mean, "std": source.std, "device": device, "n_cls": source.n_cls}
    same["layout"] = memory_format(opt)
    train = DeviceLoader(
        source.train_images, source.train_labels, opt.batch_size, augment=True, flip=source.flip, seed=opt.seed, **same
    )
    test = DeviceLoader(source.test_images, source.test_labels, large_batch(source.test_images), **same)
    if source.val_images is None:
        return train, test, None
    return train, test, DeviceLoader(source.val_images, source.val_labels, large_batch(source.val_images), **same)


def build_students(
    opt: argparse.Namespace, source: DataSource, device: torch.device, teacher: Teacher
) -> list[Student]:
    """A student for each method of --distill; all start from the same weights."""
    students = []
    for method in opt.distill:
        published = settings_of(method, opt, teacher)
        if published:
            said = ", ".join(f"{key} {value:g}" for key, value in published.items())
            print(f"{method}: published for {teacher.arch} -> {opt.model_s}: {said}")
        folder = student_folder(method, weights_of(method, opt, published), teacher.arch, opt)
        model = new_model(opt.model_s, source, opt)
        students.append(build(method, opt.model_s, model, folder, opt, source, device, teacher))
    return students


def student_folder(method: str, weights: dict[str, float], arch_t: str, opt: argparse.Namespace) -> Path:
    """The folder of a student's run; weights: those that the method has of gamma, alpha and beta."""
    w = {"gamma": 0, "alpha": 0, "beta": 0, **weights}
    name = f"S_{opt.model_s}_T_{arch_t}_{opt.dataset}_{method}_r_{w['gamma']:g}_a_{w['alpha']:g}_b_{w['beta']:g}"
    return opt.output / "student_model" / f"{name}_{opt.trial}"


def teacher_folder(opt: argparse.Namespace) -> Path:
    """The folder of a teacher's run."""
    name = f"{opt.model}_{opt.dataset}_lr_{opt.learning_rate:g}_decay_{opt.weight_decay:g}_trial_{opt.trial}"
    return opt.output / "models" / name


def settings_of(method: str, opt: argparse.Namespace, teacher: Teacher) -> dict[str, float]:
    """Weights, options and temperature that are published for a pair of networks, except where the user set them."""
    if teacher.model is None:
        return {}
    published = distiller_class(method).settings(teacher.arch, opt.model_s, opt.options)
    given = {**opt.options, **{key: getattr(opt, key) for key in ("gamma", "alpha", "beta", "kd_T")}}
    return {key: value for key, value in published.items() if given.get(key) is None}


def new_model(arch: str, source: DataSource, opt: argparse.Namespace) -> nn.Module:
    seed_all(opt.seed, "model")
    return create_model(arch, source.n_cls)


def build(
    method: str,
    arch: str,
    model: nn.Module,
    folder: Path,
    opt: argparse.Namespace,
    source: DataSource,
    device: torch.device,
    teacher: Teacher | None = None,
    role: str = "student",
    **about: object,
) -> Student:
    """A network with its method and its run's folder, restored if the folder holds an earlier part of the run.

    Each is seeded by itself: nothing depends on what trains beside it. about: more entries of config.json
    """
    teacher = teacher or Teacher()
    distiller, settings = build_method(method, model, opt, source, teacher)
    distiller = distiller.to(device)
    model = distiller.predictor(model)
    arch = getattr(model, "arch", arch)  # predictor() may have changed it
    config = {
        "role": role,
        **about,
        "method": method,
        "distilled": distiller.has_teacher,
        "arch": arch,
        "teacher": teacher.arch,
        "teacher_crc32": teacher.crc32,
        "params": sum(p.numel() for p in model.parameters()),
        **settings,
        "dataset": opt.dataset,
        "n_cls": source.n_cls,
        "class_names": list(source.class_names),
        "data_crc32": source.crc32,
        "n_train": len(source.train_labels),
        "n_test": len(source.test_labels),
        "image_size": source.train_images.shape[1],
        "mean": list(source.mean),
        "std": list(source.std),
        "device_type": device.type,  # CRD draws on the device
        "opt": plain(opt),
    }
    run = Run(folder, arch, config, opt.free, {"argv": opt.argv, "device": device_name(device)})
    model = model.to(device, memory_format=memory_format(opt))
    forward = forward_of(model, opt.precision, opt.compile)
    name = method if role == "student" else arch
    head_t = head(teacher.model) if teacher.model is not None else None
    student = Student(name, model, distiller, settings["weights"], run, settings["kd_T"], forward, head_t)
    if (state := run.find(opt.resume)) is None:
        student.start(opt)
    else:
        restore(student, state, opt)
    return student


def build_method(
    method: str, model: nn.Module, opt: argparse.Namespace, source: DataSource, teacher: Teacher
) -> tuple[Distiller, dict[str, Any]]:
    """A method for a pair of networks -> (the method, its weights, temperature and options for config.json)."""
    data: dict[str, Any] = {"labels": source.train_labels, "n_data": len(source.train_labels), "n_cls": source.n_cls}
    for side, net in (("s", model), ("t", teacher.model)):
        if net is not None:
            data[f"{side}_shapes"] = feature_shapes(net, source.train_images.shape[1])
            data[f"{side}_dim"] = data[f"{side}_shapes"][-1][1]
    if teacher.model is not None:
        data["head_t"] = head(teacher.model)
    check_last_batch([*data["s_shapes"], *data.get("t_shapes", ())], data["n_data"], opt)
    published = settings_of(method, opt, teacher)
    options = {**published, **getattr(opt, "options", {})}
    options = {key: value for key, value in options.items() if key in method_options(method)}
    seed_all(opt.seed, "method", method)
    distiller = create_distiller(method, options, **data)
    return distiller, {
        "weights": weights_of(method, opt, published),
        "kd_T": published.get("kd_T", getattr(opt, "kd_T", None) or KD_T),
        "options": options,
        "published": published,
    }


def restore(student: Student, state: dict, opt: argparse.Namespace) -> None:
    """Continue from the state of an earlier part of the run."""
    try:
        student.run.restore(state)
        student.start(opt)
        student.restore(state)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise RunError(f"{student.run.folder / 'resume.pth'}: does not fit this run ({error})") from error


def check_last_batch(shapes: Sequence[Sequence[int]], n_data: int, opt: argparse.Namespace) -> None:
    """Batch norm has nothing to average over in one image's 1x1 maps."""
    if (n_data - 1) % opt.batch_size == 0 and any(list(shape[2:]) == [1, 1] for shape in shapes):
        raise RunError(
            f"--batch_size {opt.batch_size}: leaves one of the {n_data} training images for the last batch, and batch "
            "norm cannot take a single one where the networks have 1x1 maps; change --batch_size or --image_size"
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
