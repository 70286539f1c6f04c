"""First stage of the methods that have one."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from helper.interrupt import interrupt
from helper.loops import deferred, train
from helper.student import Track, TrainStep, sgd, taken


class InitTrack(Track):
    """A track in its first stage: the modules that it trains and its loss; all else in eval mode."""

    def __init__(self, track: Track, modules: list[nn.Module], opt):
        super().__init__(track.name, track.model, track.distiller, track.weights, track.run)
        self.track, self.modules, self.meters, self.step = track, modules, track.meters, track.step
        self.own_term = True
        params = dict.fromkeys(p for module in modules for p in module.parameters())  # each once
        self.trains_student = any(p in params for p in track.model.parameters())
        self.optimizer = sgd(list(params), track.distiller.init_lr(track.model, opt.learning_rate), opt)
        self.resumed = track.resumed
        self.go_on()

    def state_dict(self) -> dict:
        """That of the track, whose first stage this is."""
        self.track.optimizer, self.track.step, self.track.since = self.optimizer, self.step, self.since
        self.since = time.perf_counter()
        return self.track.state_dict()

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
            g_s, logit_s = self.network(images, method.preact_s)
            f_s = taken(g_s, method.feats)
        g_t, _ = teacher[method.preact_t]
        loss = method.init_loss(f_s, taken(g_t, method.feats))
        zero = torch.zeros_like(loss)
        return torch.stack([loss, zero, zero, loss]), logit_s

    def after_step(self) -> None:
        """Memories and queues belong to the main stage."""


def init(step: TrainStep, loader: Iterable, opt) -> None:
    """Run the first stage of every track that has one, all against the same teacher, at a constant learning rate."""
    stages = {track: modules for track in step.tracks if (modules := track.distiller.init_modules(track.model))}
    to_do = {track: modules for track, modules in stages.items() if track.init_epoch < opt.init_epochs}
    tracks = [InitTrack(track, modules, opt) for track, modules in to_do.items()]
    first = TrainStep(tracks, step.teacher, engine=step.engine)
    with deferred():
        for epoch in range(1, opt.init_epochs + 1):
            first.live = [t for t in tracks if not t.failed and t.track.init_epoch < epoch]
            if first.live:
                train(epoch, loader, first, opt, stage="init_")
            for track in first.live:
                record(track, epoch, opt)
            interrupt.check()
    first.recorded = None  # a cycle: its graph's memory would be held through the main stage
    for stage in tracks:
        stage.track.failed = stage.failed
    for track, modules in stages.items():
        track.distiller.freeze(modules)
        if not (track.epoch or track.step) or track in to_do:  # it begins its main stage
            track.begin()


def record(stage: InitTrack, epoch: int, opt) -> None:
    """An epoch's line and curve, and the state to go on from."""
    loss = stage.meters.read()["loss"]
    stage.track.init_epoch = epoch
    stage.run.scalars({"init_train_loss": loss}, epoch)
    stage.run.line({"init_epoch": epoch, "init_train_loss": round(loss, 6)})
    stage.run.save_state(stage.state_dict())
    print(f"first stage, epoch {epoch}/{opt.init_epochs}  {stage.name:<12} loss {loss:10.4f}", flush=True)
