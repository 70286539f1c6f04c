"""A training step: one frozen teacher, any number of students in training against it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset.loader import DeviceLoader
from distiller_zoo import Distiller
from helper.checkpoint import MOST, check_state
from helper.cuda_graph import CudaGraphs, RecordedStep, in_turn
from helper.run import Run
from helper.util import RunError
from models.util import head

TERMS = ("loss", "cls", "div", "kd")  # the sum, cross-entropy, KL, the method's own; the last three unweighted


# where a track is: epochs of the first stage and of the main one that are done, steps of the next; and what it reached
REACHED = (
    "init_epoch",
    "epoch",
    "step",
    "last",
    "best",
    "best_epoch",
    "chosen",
    "chosen_val",
    "chosen_epoch",
    "seconds",
)


LIMITS = {"last": (0, 100), "best": (0, 100), "chosen": (0, 100), "chosen_val": (-1, 100)}  # percent; -1: none yet


class Meters:
    """Means over an epoch. They stay on the device: a step never waits for it, read() does."""

    def __init__(self, device: torch.device | str):
        self.sums = torch.zeros(len(TERMS) + 2, dtype=torch.float64, device=device)  # terms, top-1, top-5
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.steps = torch.zeros((), dtype=torch.int64, device=device)
        self.bad_step = torch.zeros((), dtype=torch.int64, device=device)  # first with a non-finite loss; 0: none
        self.bad_terms = torch.zeros(len(TERMS) + 1, dtype=torch.float64, device=device)  # ... and the gradient's norm

    def reset(self) -> None:
        for tensor in vars(self).values():
            tensor.zero_()

    def load(self, state: dict[str, Tensor]) -> None:
        for name, tensor in vars(self).items():
            value = state[name].detach()
            if value.shape != tensor.shape or value.dtype != tensor.dtype or not value.isfinite().all():
                raise ValueError(f"{name} is {value.dtype} {list(value.shape)}, or not finite")
            tensor.copy_(value)
        if min(self.count, self.steps) < 0 or self.bad_step:  # a track in trouble is closed, not saved
            raise ValueError("meters that count what cannot be")

    @torch.no_grad()
    def update(self, terms: Tensor, norm: Tensor, logit: Tensor | None, target: Tensor) -> None:
        """terms (4,), norm of the gradient (), logit (B, n_cls), target (B,)"""
        terms = terms.double()
        hits = terms.new_zeros(2) if logit is None else correct(logit, target)
        self.steps += 1
        self.count += len(target)
        self.sums += torch.cat([terms * len(target), hits])
        found = torch.cat([terms, norm[None].double()])
        first = ~(terms[0].isfinite() & norm.isfinite()) & (self.bad_step == 0)
        self.bad_step.copy_(torch.where(first, self.steps, self.bad_step))
        self.bad_terms.copy_(torch.where(first, found, self.bad_terms))

    def read(self) -> dict[str, float]:
        """Mean loss and terms, top-1 and top-5 in percent. Waits for the device."""
        *terms, top1, top5 = (self.sums / self.count.clamp(min=1)).tolist()
        return {**dict(zip(TERMS, terms, strict=True)), "acc": 100 * top1, "acc_top5": 100 * top5}

    def trouble(self) -> str:
        """Where loss or gradient first were not finite, or ''. Waits for the device."""
        step = int(self.bad_step)
        if not step:
            return ""
        *terms, norm = self.bad_terms.tolist()
        values = ", ".join(f"{name} {value:.4g}" for name, value in zip(TERMS, terms, strict=True))
        what = f"gradient is not finite (norm {norm:.4g}; " if math.isfinite(terms[0]) else "loss is not finite ("
        return f"step {step}: the {what}{values})"


def correct(logit: Tensor, target: Tensor) -> Tensor:
    """Numbers of samples whose label is the first, and among the first five: (2,)."""
    hit = logit.topk(min(5, logit.size(1)), dim=1).indices == target[:, None]  # (B, 5)
    return torch.stack([hit[:, 0].sum(), hit.sum()]).double()


@dataclass(frozen=True)
class Engine:
    """How networks are computed; losses, memories and the optimizer stay in float32."""

    dtype_s: torch.dtype = torch.float32  # autocast's, of a student
    dtype_t: torch.dtype = torch.float32  # of the teacher
    compiled: bool = False
    recorder: Callable[[torch.device], CudaGraphs] | None = None  # records whole steps, see cuda_graph.py
    each: Callable[[list[Track], Callable[[Track], None]], None] = in_turn  # updates all tracks, see cuda_graph.py

    def network(self, model: nn.Module, dtype: torch.dtype) -> Callable:
        """(images, preact) -> features, logits; its kernels fused by torch.compile if asked for."""
        run = torch.compile(model) if self.compiled else model
        # of bfloat16's three digits a logit has too few: the classifier is computed in float32
        classifier = head(model) if dtype != torch.float32 else None

        def forward(images: Tensor, preact: bool) -> tuple[list[Tensor], Tensor]:
            # no cache: every weight is cast once a step anyway, and a graph could not hold what the cache frees
            with torch.autocast(images.device.type, dtype, dtype != torch.float32, cache_enabled=False):
                g, logit = run(images, is_feat=True, preact=preact)
            return g, classifier(widened(g[-1])) if classifier else logit

        return forward


def widened(f: Tensor) -> Tensor:
    """What autocast computed in bfloat16, in float32."""
    return f.float() if f.dtype == torch.bfloat16 else f


def taken(g: list[Tensor], feats: int | slice) -> Tensor | list[Tensor]:
    """What a method takes of a feature list."""
    return [widened(f) for f in g[feats]] if isinstance(feats, slice) else widened(g[feats])


class Track:
    """One network in training: with its method, the weights of its loss, its optimizer, meters and folder."""

    def __init__(self, name: str, model: nn.Module, distiller: Distiller, weights: dict[str, float], run: Run):
        self.name, self.model, self.distiller, self.run = name, model, distiller, run
        self.network = Engine().network(model, torch.float32)
        self.weights = {"gamma": 0.0, "alpha": 0.0, "beta": 0.0, **weights}
        # whether the method has a term of its own in this stage, and so needs features
        self.own_term = type(distiller).forward is not Distiller.forward and self.weights["beta"] != 0
        self.meters = Meters(next(model.parameters()).device)
        self.optimizer: torch.optim.Optimizer | None = None
        self.init_epoch = self.epoch = self.step = 0
        self.last, self.best, self.best_epoch, self.seconds = 0.0, 0.0, 0, 0.0
        self.chosen, self.chosen_val, self.chosen_epoch = 0.0, -1.0, 0  # by held-out images, with --val_split
        self.since = time.perf_counter()  # when `seconds` was read
        self.failed = ""  # why it was closed
        self.resumed: dict | None = None  # state of the optimizer to go on with

    def open(self, opt) -> None:
        """Take up its folder, unless all is done already."""
        if self.epoch < opt.epochs:
            self.run.open(self.epoch, self.init_epoch)

    def start(self, opt) -> None:
        """Its optimizer, over all that still trains."""
        trained = [p for module in (self.model, self.distiller) for p in module.parameters() if p.requires_grad]
        self.optimizer = sgd(trained, opt.learning_rate, opt)
        self.go_on()

    def begin(self) -> None:
        """Leave nothing of a first stage to the main one."""
        self.resumed, self.step = None, 0
        self.meters.reset()

    def go_on(self) -> None:
        """Take the optimizer's state of an earlier part of the run; its learning rate stays that of the options."""
        if self.resumed is None:
            return
        (group,) = self.optimizer.param_groups
        unused = set() if self.own_term else set(self.distiller.parameters())
        try:
            for i, p in enumerate(group["params"]):
                momentum = self.resumed["state"].get(i, {}).get("momentum_buffer")
                if momentum is None and (p in unused or not group["momentum"]):
                    continue
                if momentum.shape != p.shape or momentum.dtype != p.dtype or not momentum.isfinite().all():
                    raise ValueError(f"no momentum of shape {list(p.shape)}")
                # a copy that lies in memory as the parameter does: one kernel goes through both
                self.optimizer.state[p]["momentum_buffer"] = torch.empty_like(p.detach()).copy_(momentum.detach())
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise RunError(f"{self.run.folder / 'resume.pth'}: does not fit this run ({error})") from error
        self.resumed = None  # its copies would be held through the run

    def state_dict(self) -> dict:
        """All that the next epochs depend on, and what has been reached."""
        self.tick()
        parts = {name: getattr(self, name).state_dict() for name in ("model", "distiller", "optimizer")}
        return {**parts, "meters": vars(self.meters), **{name: getattr(self, name) for name in REACHED}}

    def load_state_dict(self, state: dict) -> None:
        """Go on from an earlier state; the optimizer's waits for start(), as parameters may be frozen before."""
        for name in ("model", "distiller", "optimizer", "meters"):
            if not isinstance(state[name], dict):
                raise TypeError(f"{name} is no dictionary")
        check_state(self.run.arch, self.model.state_dict(), state["model"])
        self.model.load_state_dict(dict(state["model"]))  # without a state dict's own attributes
        self.distiller.load_state_dict(dict(state["distiller"]))
        self.resumed = state["optimizer"]
        self.meters.load(state["meters"])
        for name in REACHED:
            kind = type(getattr(self, name))
            least, most = LIMITS.get(name, (0, MOST))
            if type(state[name]) is not kind or not least <= state[name] <= most:  # NaN is not, either
                raise TypeError(f"{name} is no {kind.__name__} that can be reached")
            setattr(self, name, state[name])

    def tick(self) -> None:
        """Count the time since it was counted last."""
        now = time.perf_counter()
        self.seconds += now - self.since
        self.since = now

    def set_lr(self, lr: float) -> None:
        self.optimizer.param_groups[0]["lr"].fill_(lr)

    def train(self) -> None:
        self.model.train()
        self.distiller.train()

    def trouble(self) -> str:
        """What is not finite, or ''. Waits for the device."""
        if said := self.meters.trouble():
            return said
        state = {key: value for key, value in self.model.state_dict().items() if value.is_floating_point()}
        finite = torch.stack([value.isfinite().all() for value in state.values()]).tolist()
        bad = [key for key, well in zip(state, finite, strict=True) if not well]
        return f"step {self.step}: {bad[0]} is not finite" if bad else ""

    def fail(self, reason: str) -> None:
        """Close this track; those beside it go on."""
        self.failed = reason
        self.run.close()

    def update(self, images: Tensor, target: Tensor, index: Tensor, teacher: dict, T: float) -> None:
        """One step of this network. teacher: {preact: (features, logits)}; empty if no track asks for it."""
        terms, logit_s = self.loss(images, target, index, teacher, T)
        self.optimizer.zero_grad(set_to_none=True)
        self.backward(terms[0])
        norm = gradient_norm(self.optimizer)
        self.optimizer.step()
        self.after_step()
        self.meters.update(terms, norm, logit_s, target)

    def backward(self, loss: Tensor) -> None:
        try:
            loss.backward()
        except RuntimeError as error:
            if torch.is_anomaly_enabled():  # PyTorch has warned of where the operation was called
                raise RunError(f"--detect_anomaly: {self.name}, step {self.step + 1}: {error}") from error
            if "deterministic" in str(error):
                raise RunError(f"--deterministic: {self.name}: {str(error).splitlines()[0]}") from error
            raise

    def after_step(self) -> None:
        if self.own_term:
            self.distiller.after_step()

    def loss(self, images: Tensor, target: Tensor, index: Tensor, teacher: dict, T: float) -> tuple[Tensor, Tensor]:
        """-> (loss and its three terms (4,), logits of the student)."""
        method, w = self.distiller, self.weights
        g_s, logit_s = self.network(images, method.preact_s and self.own_term)
        g_t, logit_t = teacher.get(method.preact_t) or next(iter(teacher.values()), (None, None))
        cls = F.cross_entropy(logit_s, target)
        div = method.kl(logit_s, logit_t, T) if w["alpha"] else torch.zeros_like(cls)
        kd = torch.zeros_like(cls)
        if self.own_term:
            known = {"index": index, "target": target, "logit_s": logit_s, "logit_t": logit_t}
            f_s, f_t = taken(g_s, method.feats), taken(g_t, method.feats)
            kd = method(f_s, f_t, **{name: known[name] for name in method.needs})
        total = w["gamma"] * cls + w["alpha"] * div + w["beta"] * kd
        return torch.stack([total, cls, div, kd]), logit_s


def gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return torch.stack(torch._foreach_norm(grads)).norm()


class TrainStep:
    """One batch: the teacher once, then every track that is still open."""

    def __init__(
        self, tracks: list[Track], teacher: nn.Module | None = None, T: float = 4.0, engine: Engine | None = None
    ):
        self.tracks, self.teacher, self.T, self.engine = tracks, teacher, T, engine or Engine()
        self.live = list(tracks)  # those in training in this epoch
        self.running = self.live  # those of them that have not done the present step yet
        self.recorded, self.recorded_for = None, []
        self.network_t = teacher and self.engine.network(teacher, self.engine.dtype_t)
        for track in tracks:
            track.network = self.engine.network(track.model, self.engine.dtype_s)

    def __call__(self, images: Tensor, target: Tensor, index: Tensor) -> None:
        teacher = self.know(images)
        self.engine.each(self.running, lambda track: track.update(images, target, index, teacher, self.T))

    def over(self, loader: Iterable, first: int = 0) -> Iterator[int]:
        """Do the steps of an epoch, of which `first` are done; yields the number that are done after each.

        A run that was cut off may have left tracks at different steps: each joins in where it stopped.
        """
        device = next(self.live[0].model.parameters()).device
        recorded = self.engine.recorder and isinstance(loader, DeviceLoader)
        for i, given in enumerate(loader.plans() if recorded else loader, first):
            self.running = [track for track in self.live if track.step <= i]
            if not self.running:  # those that had stopped here have ended
                continue
            if recorded:
                self._record_for(loader, device)
                self.recorded(given)
            else:  # a DeviceLoader's batches are on the device already, a plain DataLoader's are not
                self(*(tensor.to(device, non_blocking=True) for tensor in given))
            for track in self.running:
                track.step = i + 1
            yield i + 1

    def _record_for(self, loader: DeviceLoader, device: torch.device) -> None:
        """A new recording if a track has joined or ended."""
        if self.recorded_for == self.running:
            return
        self.recorded_for = self.running
        methods = [track.distiller for track in self.running if track.own_term]
        self.recorded = RecordedStep(
            lambda plan: self(*loader.batch(plan)),
            loader.batch_size,
            [generator for method in methods for generator in method.generators()],
            self.engine.recorder(device),
            next((f"{type(m).__name__} is not capturable" for m in methods if not m.capturable), ""),
        )

    # not inference_mode: what autograd saves for backward (the target of a mean squared error) may not come from it
    @torch.no_grad()
    def know(self, images: Tensor) -> dict[bool, tuple[list[Tensor], Tensor]]:
        """What the teacher says of a batch: once for each kind of features (preact or not) that is asked for."""
        kinds = {track.distiller.preact_t for track in self.running if track.own_term}
        if not kinds and any(track.weights["alpha"] for track in self.running):
            kinds = {False}  # any will do for the logits
        return {preact: self.network_t(images, preact) for preact in sorted(kinds)}


def sgd(params: list[nn.Parameter], lr: float, opt) -> torch.optim.SGD:
    """The published optimizer: momentum, and weight decay on everything that trains; one kernel for all tensors.

    Its learning rate is a tensor, that a recorded graph reads anew at every step.
    """
    device = params[0].device
    lr = torch.tensor(lr, device=device, dtype=torch.float32 if device.type == "cuda" else torch.float64)
    return torch.optim.SGD(params, lr=lr, momentum=opt.momentum, weight_decay=opt.weight_decay, fused=True)
