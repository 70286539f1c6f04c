"""First stage of the methods that have one."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from helper.loops import train
from helper.step import Track, TrainStep, sgd, taken


class InitTrack(Track):
    """A track in its first stage: the modules that it trains and its loss; all else in eval mode."""

    def __init__(self, track: Track, modules: list[nn.Module], opt):
        super().__init__(track.name, track.model, track.distiller, track.weights, track.run)
        self.track, self.modules = track, modules
        self.own_term = True
        params = dict.fromkeys(p for module in modules for p in module.parameters())  # each once
        self.trains_student = any(p in params for p in track.model.parameters())
        self.optimizer = sgd(list(params), track.distiller.init_lr(track.model, opt.learning_rate), opt)

    def train(self) -> None:
        self.model.eval()
        self.distiller.eval()
        for module in self.modules:
            module.train()

    def loss(
        self, images: Tensor, target: Tensor, index: Tensor, teacher: dict, T: float
    ) -> tuple[Tensor, Tensor | None]:
        method = self.distiller
        f_s = logit_s = None
        if self.trains_student:
            g_s, logit_s = self.network(images, method.preact)
            f_s = taken(g_s, method.feats)
        g_t, _ = teacher[method.preact]
        loss = method.init_loss(f_s, taken(g_t, method.feats))
        zero = torch.zeros_like(loss)
        return torch.stack([loss, zero, zero, loss]), logit_s

    def after_step(self) -> None:
        """Memories and queues belong to the main stage."""


def init(step: TrainStep, loader: Iterable, opt) -> None:
    """Run the first stage of every track that has one, all against the same teacher, at a constant learning rate."""
    stages = {track: modules for track in step.tracks if (modules := track.distiller.init_modules(track.model))}
    # a track that goes on in its main stage has its first behind it
    tracks = [InitTrack(track, m, opt) for track, m in stages.items() if not track.epoch]
    first = TrainStep(tracks, step.teacher, engine=step.engine)
    for epoch in range(1, opt.init_epochs + 1):
        if not first.live:
            break
        start = time.perf_counter()
        train(epoch, loader, first, opt, stage="init_")
        for track in first.live:
            loss = track.meters.read()["loss"]
            track.track.seconds += time.perf_counter() - start
            track.run.scalars({"init_train_loss": loss}, epoch)
            track.run.line({"init_epoch": epoch, "init_train_loss": round(loss, 6)})
            print(f"first stage, epoch {epoch}/{opt.init_epochs}  {track.name:<12} loss {loss:10.4f}", flush=True)
    for stage in first.tracks:
        stage.track.failed = stage.failed
    for track, modules in stages.items():
        track.distiller.freeze(modules)
