"""Batches of image files that processes decode while the device trains."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dataset.base import DataError, ImageFiles
from dataset.image_files import decode
from dataset.loader import Loader, crop, draw_windows, normalize, share_of

FORKED = sys.platform == "linux"
SIGNALS = {signal.SIGINT, signal.SIGTERM}  # that are sent to whole groups of processes
if FORKED:
    SIGNALS |= {signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}


class StreamLoader(Loader):
    """Batches of images that are read from their files in every epoch, by num_workers processes of a DataLoader.

    Order and views are drawn here and only carried out there, so the number of workers changes nothing. Batches equal
    those of a DeviceLoader, except for resized_crop: its windows are cut from the picture in its full size, where a
    DeviceLoader has only the middle square at image_size.

    Plans are (index (B,), target (B,), images (B, H, W, 3) uint8), pinned for CUDA. Iteration raises DataError for
    files that cannot be read.
    """

    def __init__(self, images: ImageFiles, labels: np.ndarray, batch_size: int, num_workers: int = 0, **options: Any):
        super().__init__(images, labels, batch_size, **options)
        cpus = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        self.images, self.labels, self.num_workers = images, labels, min(num_workers, cpus)

    def plans(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches of the epoch on the CPU; the iteration after this one begins at the first batch.

        Workers are forked on Linux, as it takes milliseconds. That is safe beside torch's threads: a worker only runs
        Pillow and numpy, and operators of torch on one thread, and so never waits for a thread that is not there.
        """
        step, self.step = self.step, 0
        order, views = self.draw(self.epoch)
        starts = range(step * self.batch_size, self.n_data, self.batch_size)
        batches = (torch.arange(start, min(start + self.batch_size, self.n_data)) for start in starts)
        columns = (c for batch in batches if len(c := share_of(batch, self.share).numpy()))
        parts = ((order[c], self.labels[order[c]], self.images[order[c]], views[:, c]) for c in columns)
        workers = DataLoader(
            Reader(self.augment),
            batch_size=None,
            sampler=parts,
            num_workers=self.num_workers,
            multiprocessing_context="fork" if self.num_workers and FORKED else None,
            worker_init_fn=begin_worker,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # the global one is not to be drawn from
        )
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS) if FORKED else set()  # see begin_worker()
        try:
            return receive(iter(workers))
        finally:
            if FORKED:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def batch(self, plan: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Move a plan to the device and normalise its images."""
        index, target, images = (part.to(self.device, non_blocking=True) for part in plan)
        images = normalize(images, self.mean, self.std)
        return images.contiguous(memory_format=self.layout), target, index


class Reader(Dataset):
    """Carries out a part of a plan: (index, labels, ImageFiles, draws) -> (index, target, images), or a DataError.

    The error is returned, as a DataLoader would add a traceback to one that is raised.
    """

    def __init__(self, augment: str | None):
        self.augment = augment

    def __getitem__(self, part) -> tuple[Tensor, Tensor, Tensor] | DataError:
        index, target, images, draws = part

        def cut(image: Image.Image, i: int) -> Image.Image:
            top, left, h, w = draw_windows(draws[:-1, i : i + 1], image.height, image.width)[:, 0].tolist()
            image = image.crop((left, top, left + w, top + h))
            return image.resize((images.size, images.size), Image.Resampling.BILINEAR)

        try:
            pixels = decode(images.files, images.size, view=cut if self.augment == "resized_crop" else None)
        except DataError as error:
            return error
        if self.augment == "resized_crop":
            pixels = np.where(draws[-1, :, None, None, None], pixels[:, :, ::-1], pixels)
        views = torch.from_numpy(pixels)
        if self.augment == "crop":
            views = crop(views, *torch.from_numpy(draws))
        return torch.from_numpy(index), torch.from_numpy(target), views


def receive(batches: Iterator) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Raise the errors of workers here."""
    error = None
    try:
        for batch in batches:
            if isinstance(batch, DataError):
                error = batch
                break
            yield tuple(batch)
    except (RuntimeError, OSError, EOFError) as lost:  # a DataLoader's, or a connection's
        error = DataError(f"a process that decodes images was killed, try a smaller --num_workers ({lost})")
    del batches  # and with it the workers, which the traceback of an error would keep
    if error:
        raise error


def begin_worker(worker: int) -> None:
    """Leave signals to the main process, and end with it."""
    if FORKED:
        os.setpgrp()  # Ctrl-C and schedulers signal the whole group
        while signal.sigtimedwait(SIGNALS, 0):  # those that came while it was being forked
            pass
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG; a worker also holds the lock of the run's folder
