"""From options to what trains: loaders, the teacher's track, the students' tracks."""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dataset import DataSource
from dataset.loader import DeviceLoader, large_batch
from distiller_zoo import ALONE, create_distiller, method_options
from helper.checkpoint import load_network
from helper.cuda_graph import CudaGraphs, CudaStreams, in_turn
from helper.interrupt import interrupt
from helper.options import plain, weights_of
from helper.probe import Probe
from helper.run import Run
from helper.student import Engine, Track, TrainStep
from helper.util import RunError, choose_device, keep_buffers, native_bf16, seed_all, stream
from models import create_model
from models.util import feature_shapes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Teacher:
    """A frozen network, and what its file says of it."""

    arch: str = "none"
    model: nn.Module | None = None
    n_cls: int = 0
    crc32: int = 0  # tells one set of weights from another
    about: dict = field(default_factory=dict)
    path: Path | None = None

    def fit_for(
        self, source: DataSource, device: torch.device, layout: torch.memory_format = torch.channels_last
    ) -> None:
        """Refuse other classes; say what else the teacher was trained on than it will see; move to the device."""
        if self.model is None:
            return
        if self.n_cls != source.n_cls:
            raise RunError(f"{self.path}: was trained for {self.n_cls} classes, the data set has {source.n_cls}")
        now = {"image_size": source.train_images.shape[1], "mean": list(source.mean), "std": list(source.std)}
        for key, value in now.items():
            if self.about.get(key, value) != value:
                print(f"note: the teacher was trained with {key} {self.about[key]}, here it is {value}")
        self.model.to(device, memory_format=layout)


NO_TEACHER = Teacher()


def load_teacher(opt: argparse.Namespace) -> Teacher:
    """The network of --path_t, on the CPU, before anything else is fetched or made."""
    arch, n_cls, model, about = load_network(opt.path_t, opt.model_t)
    return Teacher(arch, model.requires_grad_(False), n_cls, fingerprint(model), about, opt.path_t)


def start(opt: argparse.Namespace) -> torch.device:
    """What is set once for the process; -> the device. Precisions of `opt` that were left to us are chosen for it."""
    interrupt.listen()
    device = choose_device(opt.device)
    if device.type == "cpu":
        keep_buffers()
    torch.autograd.set_detect_anomaly(opt.detect_anomaly)
    if getattr(opt, "compile", False) and device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise RunError("--compile: needs a C++ compiler, g++ or that of the variable CXX")
    if opt.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as PyTorch asks for
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not opt.deterministic  # the fastest algorithms, by trial
    for key in ("precision", "precision_t"):
        if getattr(opt, key, None) == "auto":
            setattr(opt, key, "bf16" if native_bf16(device) else "fp32")  # as accurate: docs/benchmarks.md
    return device


def train_step(opt: argparse.Namespace, tracks: list[Track], teacher: nn.Module | None = None) -> TrainStep:
    """The step of these tracks, computed as the options say."""
    device = next(tracks[0].model.parameters()).device
    recorder = CudaGraphs if opt.graph and device.type == "cuda" and not opt.detect_anomaly else None
    dtype_s, dtype_t = DTYPES[opt.precision], DTYPES[getattr(opt, "precision_t", None) or opt.precision]
    each = CudaStreams(device) if getattr(opt, "streams", False) and device.type == "cuda" else in_turn
    engine = Engine(dtype_s, dtype_t, opt.compile, recorder, each)
    return TrainStep(tracks, teacher, getattr(opt, "kd_T", 4.0), engine)


def layout_of(opt: argparse.Namespace) -> torch.memory_format:
    """How images, weights and maps lie in memory."""
    return torch.channels_last if getattr(opt, "channels_last", True) else torch.contiguous_format


def loaders(source: DataSource, opt: argparse.Namespace, device: torch.device) -> tuple[DeviceLoader, DeviceLoader]:
    """-> (augmented training batches, test batches in file order), both on the device."""
    same = {"mean": source.mean, "std": source.std, "device": device, "n_cls": source.n_cls, "layout": layout_of(opt)}
    train = DeviceLoader(
        source.train_images, source.train_labels, opt.batch_size, augment=True, flip=source.flip, seed=opt.seed, **same
    )
    return train, DeviceLoader(source.test_images, source.test_labels, large_batch(source.test_images), **same)


def hold_out(source: DataSource, opt: argparse.Namespace) -> tuple[DataSource, tuple[np.ndarray, np.ndarray] | None]:
    """-> (the set without --val_split's share of every class's training images, those images and labels or None)."""
    if not opt.val_split:
        return source, None
    order = np.random.default_rng(stream(opt.seed, "val_split")).permutation(len(source.train_labels))
    order = order[np.argsort(source.train_labels[order], kind="stable")]  # random within each class
    counts = np.bincount(source.train_labels, minlength=source.n_cls)
    taken = [round(opt.val_split * n) for n in counts]
    if not any(taken) or any(n and n == of for n, of in zip(taken, counts, strict=True)):
        raise RunError(f"--val_split {opt.val_split:g}: leaves a class without training images, or holds out none")
    rank = np.arange(len(order)) - np.repeat(counts.cumsum() - counts, counts)
    held = rank < np.repeat(taken, counts)
    kept, held = np.sort(order[~held]), np.sort(order[held])
    images, labels = source.train_images, source.train_labels
    return source._replace(train_images=images[kept], train_labels=labels[kept]), (images[held], labels[held])


def held_out_loader(held_out, source: DataSource, opt: argparse.Namespace, device: torch.device) -> DeviceLoader | None:
    """Batches of what hold_out() held out."""
    if held_out is None:
        return None
    same = {"mean": source.mean, "std": source.std, "device": device, "n_cls": source.n_cls, "layout": layout_of(opt)}
    return DeviceLoader(*held_out, large_batch(held_out[0]), **same)


def teacher_track(opt: argparse.Namespace, source: DataSource, device: torch.device) -> Track:
    """A network that learns from labels alone, for train_teacher.py."""
    name = f"{opt.model}_{opt.dataset}_lr_{opt.learning_rate:g}_decay_{opt.weight_decay:g}_trial_{opt.trial}"
    folder = opt.output / "models" / name
    track = make_track(ALONE, opt.model, folder, opt, source, device, NO_TEACHER, role="teacher")
    track.name = opt.model
    return track


def student_tracks(opt: argparse.Namespace, source: DataSource, device: torch.device, teacher: Teacher) -> list[Track]:
    """One track for each method of --distill. All students start from the same weights."""
    tracks = []
    for method in opt.distill:
        w = {"gamma": 0, "alpha": 0, "beta": 0, **weights_of(method, opt)}
        name = (
            f"S_{opt.model_s}_T_{teacher.arch}_{opt.dataset}_{method}"
            f"_r_{w['gamma']:g}_a_{w['alpha']:g}_b_{w['beta']:g}_{opt.trial}"
        )
        folder = opt.output / "student_model" / name
        tracks.append(make_track(method, opt.model_s, folder, opt, source, device, teacher))
    return tracks


def transfer_track(
    opt: argparse.Namespace, source: DataSource, device: torch.device, arch: str, student: nn.Module
) -> Track:
    """A new classifier for a frozen student, for transfer_student.py."""
    origin = re.sub(r"[^\w.+-]", "_", opt.path_s.absolute().parent.name)  # not every system takes RepDistiller's ':'
    name = f"{origin}_to_{opt.dataset}_lr_{opt.learning_rate:g}_decay_{opt.weight_decay:g}_trial_{opt.trial}"
    about = {"student": origin, "student_crc32": fingerprint(student)}
    build, folder = partial(Probe, student), opt.output / "transfer" / name
    track = make_track(ALONE, arch, folder, opt, source, device, NO_TEACHER, "transfer", build, **about)
    track.name = arch
    return track


def make_track(
    method: str,
    arch: str,
    folder: Path,
    opt: argparse.Namespace,
    source: DataSource,
    device: torch.device,
    teacher: Teacher,
    role: str = "student",
    build: Callable[[int], nn.Module] | None = None,
    **about,
) -> Track:
    """A network, its method and its folder. Each is seeded by itself: nothing depends on what trains beside it.

    build: makes the network for a number of classes, where it is not a new `arch`; about: more that config.json says.
    """
    image_size = source.train_images.shape[1]
    seed_all(opt.seed, "model")
    model = (build or partial(create_model, arch))(source.n_cls)
    data = {"labels": source.train_labels, "n_data": len(source.train_labels), "n_cls": source.n_cls}
    for side, net in (("s", model), ("t", teacher.model)):
        if net is not None:
            data[f"{side}_shapes"] = feature_shapes(net, image_size)
            data[f"{side}_dim"] = data[f"{side}_shapes"][-1][1]
    check_last_batch([*data["s_shapes"], *data.get("t_shapes", ())], data["n_data"], opt)
    options = {key: value for key, value in getattr(opt, "options", {}).items() if key in method_options(method)}
    seed_all(opt.seed, "method", method)
    distiller = create_distiller(method, options, **data).to(device)
    weights = weights_of(method, opt)
    config = {
        "role": role,
        **about,
        "method": method,
        "distilled": distiller.has_teacher,
        "arch": arch,
        "teacher": teacher.arch,
        "teacher_crc32": teacher.crc32,
        "params": sum(p.numel() for p in model.parameters()),
        "weights": weights,
        "options": options,
        "dataset": opt.dataset,
        "n_cls": source.n_cls,
        "n_train": len(source.train_labels),
        "n_test": len(source.test_labels),
        "image_size": image_size,
        "mean": list(source.mean),
        "std": list(source.std),
        "device_type": device.type,  # CRD draws on the device
        "opt": plain(opt),
    }
    model = model.to(device, memory_format=layout_of(opt))
    run = Run(folder, arch, config, device_name(device))
    track = Track(method, model, distiller, weights, run)
    if (state := run.resume(opt.resume)) is not None:
        try:
            track.load_state_dict(state)
            n_steps = -(-data["n_data"] // opt.batch_size)
            if track.epoch > opt.epochs or track.step > n_steps:
                raise ValueError(f"epoch {track.epoch} of {opt.epochs}, step {track.step} of {n_steps}")
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise RunError(f"{folder / 'resume.pth'}: does not fit this run ({error})") from error
    return track


def check_last_batch(shapes: Sequence[Sequence[int]], n_data: int, opt: argparse.Namespace) -> None:
    """Batch norm has nothing to average over in one image's 1x1 maps."""
    if (n_data - 1) % opt.batch_size == 0 and any(list(shape[2:]) == [1, 1] for shape in shapes):
        raise RunError(
            f"--batch_size {opt.batch_size}: leaves one of the {n_data} training images for the last batch, and batch "
            "norm cannot take a single one where the networks have 1x1 maps; change --batch_size or --image_size"
        )


def fingerprint(model: nn.Module) -> int:
    """Tells one set of weights from another."""
    crc = 0
    for tensor in model.state_dict().values():
        crc = zlib.crc32(tensor.cpu().contiguous().numpy().tobytes(), crc)
    return crc


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
