"""Training and validation, the same for teachers, students alone and distilled students."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from helper.interrupt import interrupt
from helper.student import Track, TrainStep, correct


def learning_rate(opt, epoch: int) -> float:
    """Step schedule: times lr_decay_rate after each of lr_decay_epochs; epochs count from 1."""
    return opt.learning_rate * opt.lr_decay_rate ** sum(epoch > e for e in opt.lr_decay_epochs)


@contextmanager
def deferred() -> Iterator[None]:
    """A signal waits for the end of the step, see pause()."""
    interrupt.deferred = True
    try:
        yield
    finally:
        interrupt.deferred = False


def train(epoch: int, loader: Iterable, step: TrainStep, opt, stage: str = "") -> None:
    """One epoch, or what is left of it. Meters are read, and so the device waited for, every print_freq and tb_freq
    steps.

    Raises Interrupted, with all tracks saved, after the step in which a signal came.
    """
    name = f"{stage}epoch {epoch}"
    seekable = hasattr(loader, "set_epoch")  # a plain DataLoader begins anew
    for track in step.live:
        track.train()
        track.since = time.perf_counter()
        if not (seekable and track.step):
            track.step = 0
            track.meters.reset()
    first = min(track.step for track in step.live)
    if seekable:
        loader.set_epoch(epoch, first)
    saved = time.monotonic()
    for i in progress(step.over(loader, first), name, len(loader) - first):
        if i % opt.tb_freq == 0:
            for track in step.running:
                track.run.scalars(
                    {f"{stage}step_train_loss": track.meters.read()["loss"]}, (epoch - 1) * len(loader) + i
                )
        if i % opt.print_freq == 0:
            close_failed(step, epoch)
            if not step.live:
                return
            say_step(f"{name} step {i}/{len(loader)}", [track for track in step.running if not track.failed])
        if interrupt.signal or time.monotonic() - saved > 60 * opt.save_minutes:
            pause(step, epoch)
            saved = time.monotonic()
    close_failed(step, epoch)
    for track in step.live:
        track.step = 0


def pause(step: TrainStep, epoch: int) -> None:
    """Save every track in the middle of an epoch; end here if a signal asked for it."""
    close_failed(step, epoch)  # what is not finite is not worth going on from
    for track in step.live:
        track.run.save_state(track.state_dict())
    interrupt.check()


def close_failed(step: TrainStep, epoch: int) -> None:
    """A track that is no longer finite ends here."""
    for track in step.live:
        if trouble := track.trouble():
            stop(track, f"epoch {epoch}, {trouble}")
    step.live = [track for track in step.live if not track.failed]


def stop(track: Track, reason: str) -> None:
    track.fail(reason)
    print(f"{track.name}: stopped, {reason}", file=sys.stderr)


@torch.inference_mode()
def validate(model: nn.Module, loader: Iterable) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent and mean cross-entropy over every image of a loader, each once."""
    model.eval()
    sums, count = 0.0, 0
    device = next(model.parameters()).device
    for batch in loader:
        images, target, _ = (tensor.to(device, non_blocking=True) for tensor in batch)
        logit = model(images)
        loss = F.cross_entropy(logit, target, reduction="sum").double()
        sums = sums + torch.cat([correct(logit, target), loss[None]])
        count += len(target)
    top1, top5, loss = (sums / count).tolist()
    return {"acc": 100 * top1, "acc_top5": 100 * top5, "loss": loss}


def fit(
    step: TrainStep, train_loader: Iterable, test_loader: Iterable, opt, val_loader: Iterable | None = None
) -> None:
    """All epochs that a track has not done yet: train, validate, record, save.

    val_loader: of images held out of training, by which an epoch is chosen
    """
    tracks = [track for track in step.tracks if not track.failed]
    for track in tracks:
        track.start(opt)
        if track.epoch:
            print(f"{track.name}: {track.epoch} of {opt.epochs} epochs are done already, in {track.run.folder}")
    with deferred():
        for epoch in range(1, opt.epochs + 1):
            # A run that was cut off may have left some of its tracks an epoch behind the others.
            step.live = [track for track in tracks if not track.failed and track.epoch < epoch]
            if step.live:
                run_epoch(epoch, step, train_loader, test_loader, opt, val_loader)
            if epoch < opt.epochs:
                interrupt.check()
    for track in tracks:
        track.run.close()


def run_epoch(epoch: int, step: TrainStep, train_loader, test_loader, opt, val_loader) -> None:
    lr = learning_rate(opt, epoch)
    for track in step.live:
        track.set_lr(lr)
    train(epoch, train_loader, step, opt)
    results = [validate(track.model, test_loader) for track in step.live]
    held_out = [validate(track.model, val_loader) if val_loader else {} for track in step.live]
    for track, test, val in zip(step.live, results, held_out, strict=True):
        track.tick()
        if math.isfinite(test["loss"]):
            record(track, epoch, opt, lr, test, val)
        else:
            stop(track, f"epoch {epoch}: the loss on the test images is not finite")


def record(track: Track, epoch: int, opt, lr: float, test: dict[str, float], val: dict[str, float]) -> None:
    """An epoch's line, curves and checkpoints; resume.pth comes last, and so stands for all of them."""
    means = track.meters.read()
    track.epoch, track.last = epoch, test["acc"]
    better = test["acc"] > track.best or epoch == 1
    if better:
        track.best, track.best_epoch = test["acc"], epoch
    chosen = bool(val) and val["acc"] > track.chosen_val
    if chosen:
        track.chosen, track.chosen_val, track.chosen_epoch = test["acc"], val["acc"], epoch
    line = {
        "epoch": epoch,
        "lr": lr,
        "train_acc": means["acc"],
        "train_acc_top5": means["acc_top5"],
        **{f"train_{name}": means[name] for name in ("loss", "cls", "div", "kd")},
        **{f"test_{name}": value for name, value in test.items()},
        "best_acc": track.best,
        **{f"val_{name}": value for name, value in val.items()},
        **({"chosen_acc": track.chosen} if val else {}),
        "seconds": track.seconds,
    }
    track.run.epoch({key: float(f"{value:.7g}") if key != "epoch" else value for key, value in line.items()})
    if better:
        track.run.save(f"{track.run.arch}_best", track.model, epoch, test["acc"])
    if chosen:
        track.run.save(f"{track.run.arch}_chosen", track.model, epoch, test["acc"])
    if epoch % opt.save_freq == 0:
        track.run.save(f"ckpt_epoch_{epoch}", track.model, epoch, test["acc"])
    if epoch == opt.epochs:
        track.run.save(f"{track.run.arch}_last", track.model, epoch, test["acc"])
    track.run.save_state(track.state_dict())
    print(
        f"epoch {epoch}/{opt.epochs}  {track.name:<12} loss {means['loss']:8.4f}  train {means['acc']:6.2f}  "
        f"test {test['acc']:6.2f}  best {track.best:6.2f}  {track.seconds:6.0f} s",
        flush=True,
    )


def progress(parts: Iterable, name: str, n: int | None = None) -> Iterable:
    """A bar on a terminal; nothing elsewhere, where say_step's plain lines serve."""
    return tqdm(parts, desc=name, total=n, leave=False, disable=not sys.stderr.isatty(), dynamic_ncols=True)


def say_step(where: str, tracks: list[Track]) -> None:
    means = "  ".join(f"{t.name} {m['loss']:.4f} {m['acc']:.2f}%" for t in tracks for m in [t.meters.read()])
    if sys.stderr.isatty():
        tqdm.write(f"{where}  {means}", file=sys.stderr)
    else:
        print(f"{where}  {means}", flush=True)


def summary(track: Track) -> str:
    """The closing line of one network."""
    if track.failed:
        return f"{track.name}: failed, {track.failed}; its files so far: {track.run.folder}"
    chosen = (
        f"chosen by held-out images {track.chosen:.2f} (epoch {track.chosen_epoch}), " if track.chosen_epoch else ""
    )
    return (
        f"{track.name}: last {track.last:.2f}, best {track.best:.2f} (epoch {track.best_epoch}), {chosen}"
        f"{track.seconds:.0f} s, results in {track.run.folder}"
    )
