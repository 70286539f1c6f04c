"""The frozen teacher, and the students trained against it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from dataset import DataSource
from distiller_zoo import Distiller
from distiller_zoo.distillation import KD_T, has_term, last_stages, loss_terms, select_feats, to_float32
from helper.checkpoint import check_state
from helper.ranks import ranks
from helper.run import Run
from helper.util import RunError
from models.external import External
from models.util import head

TERMS = ("loss", "cls", "div", "kd")  # the sum, cross-entropy, KL, the method's own term; the last three unweighted

Forward = Callable[[Tensor, bool], tuple[list[Tensor], Tensor]]  # (images, preact) -> features, logits
Outputs = dict[bool, tuple[list[Tensor], Tensor]]  # preact -> features, logits


def forward_of(model: nn.Module, precision: str = "fp32", compiled: bool = False) -> Forward:
    """The forward pass of a network: in bfloat16 autocast if asked for, its kernels fused by torch.compile."""
    net = torch.compile(model) if compiled else model
    if precision == "fp32":
        return lambda images, preact: net(images, is_feat=True, preact=preact)
    # ours in float32, as the three digits of bfloat16 are too few for a logit; foreign networks see to it themselves
    classifier = None if isinstance(model, External) else head(model)

    def forward(images: Tensor, preact: bool) -> tuple[list[Tensor], Tensor]:
        # no cache: autocast frees it after the forward pass, and a captured CUDA graph would still read it
        with torch.autocast(images.device.type, torch.bfloat16, cache_enabled=False):
            g, logit = net(images, is_feat=True, preact=preact)
        return g, classifier(to_float32(g[-1])) if classifier else logit

    return forward


@dataclass
class Teacher:
    """A frozen network, and what its file says about it; model is None for a student baseline."""

    arch: str = "none"
    model: nn.Module | None = None
    n_cls: int = 0
    crc32: int = 0  # of the weights
    about: dict = field(default_factory=dict)
    path: Path | None = None
    forward: Forward | None = None

    def check(self, source: DataSource) -> None:
        """Refuse another number of classes; print how else the teacher's training data differed."""
        if self.model is None:
            return
        if self.n_cls != source.n_cls:
            raise RunError(f"{self.path}: was trained for {self.n_cls} classes, the data set has {source.n_cls}")
        names, own = self.about.get("class_names"), list(source.class_names)
        if names is not None and len(names) == len(own) and names != own:
            what = "the same classes in another order" if sorted(names) == sorted(own) else "other classes"
            i = next(i for i, name in enumerate(own) if names[i] != name)
            raise RunError(
                f"{self.path}: was trained on {what}: class {i} is '{names[i]}' there and '{own[i]}' in the data set"
            )
        now = {"image_size": source.train_images.shape[1], "mean": list(source.mean), "std": list(source.std)}
        for key, value in now.items():
            if self.about.get(key, value) != value:
                print(f"note: the teacher was trained with {key} {self.about[key]}, here it is {value}")

    def compare(self, acc: float) -> None:
        """Print the measured accuracy, and the one that the file claims where that is far higher."""
        print(f"teacher {self.arch}: test {acc:.2f}", flush=True)
        claimed = self.about.get("accuracy", acc)  # a number, as load_network() gives it
        if claimed > acc + 5:
            print(
                f"warning: the teacher's file claims an accuracy of {claimed:.2f}, here it has {acc:.2f}; "
                "are data, classes and preprocessing those of its training?",
                flush=True,
            )

    # not inference_mode: autograd may not save its tensors for backward (as the target of a mean squared error)
    @torch.no_grad()
    def __call__(self, images: Tensor, students: list[Student]) -> Outputs:
        """Features and logits of a batch, once for each kind of features (before the last ReLU or after it)."""
        kinds = {student.distiller.preact_t for student in students if student.uses_features}
        if not kinds and any(student.weights["alpha"] for student in students):
            kinds = {False}  # for the logits any will do
        return {preact: self.forward(images, preact) for preact in sorted(kinds)}


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
            if state[name].shape != tensor.shape:
                raise ValueError(f"meters.{name} of shape {list(state[name].shape)}")
            tensor.copy_(state[name])

    @torch.no_grad()
    def update(self, terms: Tensor, norm: Tensor, hits: Tensor, count: int) -> None:
        """terms (4,), norm of the gradient (), hits (2,) of a batch of so many images"""
        terms = terms.double()
        self.steps += 1
        self.count += count
        self.sums += torch.cat([terms * count, hits.double()])
        found = torch.cat([terms, norm[None].double()])
        first = ~(terms[0].isfinite() & norm.isfinite()) & (self.bad_step == 0)
        self.bad_step.copy_(torch.where(first, self.steps, self.bad_step))
        self.bad_terms.copy_(torch.where(first, found, self.bad_terms))

    def read(self) -> dict[str, float]:
        """Mean loss and terms, top-1 and top-5 accuracy in percent. Waits for the device."""
        *terms, top1, top5 = (self.sums / self.count.clamp(min=1)).tolist()
        return {**dict(zip(TERMS, terms, strict=True)), "acc": 100 * top1, "acc_top5": 100 * top5}

    def nonfinite(self) -> str:
        """Where loss or gradient first were not finite, or ''. Waits for the device."""
        step = int(self.bad_step)
        if not step:
            return ""
        *terms, norm = self.bad_terms.tolist()
        values = ", ".join(f"{name} {value:.4g}" for name, value in zip(TERMS, terms, strict=True))
        what = f"gradient is not finite (norm {norm:.4g}; " if math.isfinite(terms[0]) else "loss is not finite ("
        return f"step {step}: the {what}{values})"


@torch.no_grad()
def count_hits(logit: Tensor, target: Tensor) -> Tensor:
    """Number of samples whose label comes first, and among the first five: (2,)."""
    hit = logit.topk(min(5, logit.size(1)), dim=1).indices == target[:, None]  # (B, 5)
    return torch.stack([hit[:, 0].sum(), hit.sum()]).double()


class Student:
    """A network in training: its method, the weights of its loss, its optimizer and meters, and its run's folder."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        distiller: Distiller,
        weights: dict[str, float],
        run: Run,
        T: float = KD_T,
        forward: Forward | None = None,
        head_t: nn.Linear | None = None,
        n_stages: int | None = None,
    ):
        self.name, self.model, self.distiller, self.run, self.T = name, model, distiller, run, T
        self.weights = {"gamma": 0.0, "alpha": 0.0, "beta": 0.0, **weights}
        self.forward = forward or forward_of(model)
        self.head_t = head_t  # the teacher's classifier
        self.n_stages = n_stages  # that are compared, if the two networks have unequal numbers
        self.has_term = has_term(distiller, self.weights)
        device = next(model.parameters()).device
        self.meters = Meters(device)
        self.epoch = torch.ones((), device=device)  # for warm-ups; refilled, as a CUDA graph reads it

    def start(self, opt) -> None:
        """Begin the stage that the run is in: what trains, by which loss and which optimizer."""
        modules = self.distiller.init_modules(self.model) or []
        self.in_init = bool(modules) and self.run.init_epoch < opt.init_epochs
        if self.in_init:
            self.loss, self.trained = self.init_loss, modules
            lr = self.distiller.init_lr(self.model, opt.learning_rate)
        else:
            self.distiller.freeze(modules)
            self.loss, self.trained = self.main_loss, [self.model, self.distiller]
            lr = opt.learning_rate
        params = dict.fromkeys(p for module in self.trained for p in module.parameters() if p.requires_grad)
        self.optimizer = make_optimizer(list(params), lr, opt)
        self.uses_features = self.in_init or self.has_term
        self.trains_model = any(p in params for p in self.model.parameters())
        self.meters.reset()

    def restore(self, state: dict) -> None:
        """Continue from a saved state. The optimizer's is left out where a first stage has ended with it."""
        check_state(self.run.arch, self.model.state_dict(), state["model"])
        self.model.load_state_dict(state["model"])
        self.distiller.load_state_dict(state["distiller"])
        if self.distiller.init_modules(self.model) and not (self.in_init or self.run.epoch or self.run.step):
            return
        self.meters.load(state["meters"])
        restore_optimizer(self.optimizer, state["optimizer"]["state"])

    def state_dict(self) -> dict:
        parts = {name: getattr(self, name).state_dict() for name in ("model", "distiller", "optimizer")}
        return {**parts, "meters": vars(self.meters)}

    def begin_epoch(self, epoch: int) -> None:
        """Training mode for what trains; meters go on where an epoch was left in the middle."""
        self.model.eval()
        self.distiller.eval()
        for module in self.trained:
            module.train()
        if not self.run.step:
            self.meters.reset()
        self.epoch.fill_(epoch)
        self.run.since = time.perf_counter()

    def set_lr(self, lr: float) -> None:
        self.optimizer.param_groups[0]["lr"].fill_(lr)

    def update(self, images: Tensor, target: Tensor, index: Tensor, out_t: Outputs) -> None:
        """One step: loss, gradient, weights, memories, meters. Nothing here may wait for the device."""
        terms, logit_s = self.loss(images, target, index, out_t)
        self.optimizer.zero_grad(set_to_none=True)
        try:
            terms[0].backward(terms.new_full((), ranks.weight) if ranks.world > 1 else None)
        except RuntimeError as error:
            self.explain(error)
            raise
        hits = terms.new_zeros(2) if logit_s is None else count_hits(logit_s, target)
        count, grads = len(target), gradients(self.optimizer)
        if ranks.world > 1:
            count = sum(ranks.sizes)
            terms, hits = ranks.add_up(grads, terms, hits)
        norm = torch.stack(torch._foreach_norm(grads)).norm()
        self.optimizer.step()
        if self.has_term and not self.in_init:
            self.distiller.after_step()
        self.meters.update(terms, norm, hits, count)

    def main_loss(self, images: Tensor, target: Tensor, index: Tensor, out_t: Outputs) -> tuple[Tensor, Tensor]:
        """-> (4,) the loss and its three terms, (B, n_cls) logits"""
        method = self.distiller
        g_s, logit_s = self.forward(images, method.preact_s and self.has_term)
        g_t, logit_t = out_t.get(method.preact_t) or next(iter(out_t.values()), (None, None))
        known = {"index": index, "epoch": self.epoch, "head_t": self.head_t}
        out_s = last_stages(g_s, self.n_stages), logit_s
        out_t = last_stages(g_t, self.n_stages), logit_t
        gather = ranks.gather if ranks.world > 1 else None
        terms = loss_terms(method, self.weights, self.T, out_s, out_t, target, gather=gather, **known)
        return terms, logit_s

    def init_loss(self, images: Tensor, target: Tensor, index: Tensor, out_t: Outputs) -> tuple[Tensor, Tensor | None]:
        """The same of a first stage, which has one term; no logits where it does not train the student."""
        method, f_s, logit_s = self.distiller, None, None
        if self.trains_model:
            g_s, logit_s = self.forward(images, method.preact_s)
            f_s = select_feats(last_stages(g_s, self.n_stages), method.feats)
        g_t = last_stages(out_t[method.preact_t][0], self.n_stages)
        loss = method.init_loss(f_s, select_feats(g_t, method.feats))
        zero = torch.zeros_like(loss)
        return torch.stack([loss, zero, zero, loss]), logit_s

    def nonfinite(self) -> str:
        """What is not finite, or ''. Waits for the device."""
        if found := self.meters.nonfinite():
            return found
        state = {key: value for key, value in self.model.state_dict().items() if value.is_floating_point()}
        finite = torch.stack([value.isfinite().all() for value in state.values()]).tolist()
        bad = [key for key, well in zip(state, finite, strict=True) if not well]
        return f"step {self.run.step}: {bad[0]} is not finite" if bad else ""

    def explain(self, error: RuntimeError) -> None:
        """Raise RunError for a failed backward pass that --detect_anomaly or --deterministic asked for."""
        if torch.is_anomaly_enabled():  # PyTorch has warned of where the operation was called
            raise RunError(f"--detect_anomaly: {self.name}, step {self.run.step + 1}: {error}") from error
        if "deterministic" in str(error):
            raise RunError(f"--deterministic: {self.name}: {str(error).splitlines()[0]}") from error


def gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def make_optimizer(params: list[nn.Parameter], lr: float, opt) -> torch.optim.Optimizer:
    """The published optimizer is SGD with momentum; weight decay on everything that trains; one kernel for all tensors.

    The learning rate is a tensor, so that a captured CUDA graph reads it anew in every step.
    """
    device = params[0].device
    lr = torch.tensor(lr, device=device, dtype=torch.float32 if device.type == "cuda" else torch.float64)
    if opt.optimizer == "adamw":
        # capturable: or its step refuses to be captured
        return torch.optim.AdamW(params, lr=lr, weight_decay=opt.weight_decay, fused=True, capturable=True)
    return torch.optim.SGD(params, lr=lr, momentum=opt.momentum, weight_decay=opt.weight_decay, fused=True)


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[int, dict]) -> None:
    """Copy the saved state of every parameter, checked. Raises ValueError."""
    sgd = isinstance(optimizer, torch.optim.SGD)
    names = {"momentum_buffer"} if sgd else {"step", "exp_avg", "exp_avg_sq"}
    for i, p in enumerate(optimizer.param_groups[0]["params"]):
        saved = {name: value for name, value in state.get(i, {}).items() if value is not None}
        if saved and saved.keys() != names:
            raise ValueError(f"an optimizer's state of {', '.join(saved)}")
        for name, value in saved.items():
            # copied into the parameter's memory format, as the fused kernel goes through both alike
            own = torch.zeros((), device=p.device) if name == "step" else torch.empty_like(p.detach())
            if value.shape != own.shape:
                raise ValueError(f"{name} of shape {list(value.shape)} for a parameter of {list(p.shape)}")
            optimizer.state[p][name] = own.copy_(value)
