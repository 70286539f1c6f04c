"""A method joined to its two networks: what the scripts train, and what a training loop of one's own calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distiller_zoo.base import Distiller, DistillError
from models import is_house
from models.external import probe_images
from models.util import ModelError, eval_mode, feature_shapes, head

KD_T = 4.0  # published temperature of the KL term

Output = tuple[list[Tensor], Tensor]  # features, logits


def to_float32(f: Tensor) -> Tensor:
    return f.float() if f.dtype == torch.bfloat16 else f


def select_feats(g: list[Tensor], feats: int | slice) -> Tensor | list[Tensor]:
    """The entries of a feature list that a method asks for, in float32."""
    return [to_float32(f) for f in g[feats]] if isinstance(feats, slice) else to_float32(g[feats])


def last_stages(g: list, n: int | None) -> list:
    """A feature list, or its shapes, with the last n of its stages; the stem and the pooled features stay."""
    return g if n is None else [g[0], *g[len(g) - 1 - n :]]


def linear_head(net: nn.Module | None) -> nn.Linear | None:
    """A teacher's classifier, for the few methods that ask for it; None where it is not linear, as squeezenet's."""
    try:
        return head(net) if net is not None else None
    except ModelError:
        return None


def has_term(distiller: Distiller, weights: dict[str, float]) -> bool:
    """Whether the method adds a term of its own to the loss."""
    return type(distiller).forward is not Distiller.forward and weights["beta"] != 0


def loss_terms(
    distiller: Distiller,
    weights: dict[str, float],
    T: float,
    out_s: Output,
    out_t: Output | tuple[None, None],
    target: Tensor,
    index: Tensor | None = None,
    epoch: Tensor | None = None,
    head_t: nn.Linear | None = None,
    gather: Callable[[Any], Any] | None = None,
) -> Tensor:
    """The loss and its terms cross-entropy, KL and the method's own, unweighted: (4,).

    gather: of several processes, makes the whole batch of a process's share, for methods that look across the batch
    """
    (g_s, logit_s), (g_t, logit_t) = out_s, out_t
    cls = F.cross_entropy(logit_s, target)
    div = distiller.kl(logit_s, logit_t, T) if weights["alpha"] else torch.zeros_like(cls)
    kd = torch.zeros_like(cls)
    if has_term(distiller, weights):
        batch = {"index": index, "target": target, "logit_s": logit_s, "logit_t": logit_t}
        batch = {name: value for name, value in batch.items() if name in distiller.needs}
        f_s, f_t = select_feats(g_s, distiller.feats), select_feats(g_t, distiller.feats)
        if gather and distiller.across_batch:
            f_s, f_t, batch = gather(f_s), gather(f_t), gather(batch)
        known = {**batch, "epoch": epoch, "head_t": head_t}
        kd = distiller(f_s, f_t, **{name: known[name] for name in distiller.needs})
    loss = weights["gamma"] * cls + weights["alpha"] * div + weights["beta"] * kd
    return torch.stack([loss, cls, div, kd])


class Distillation(nn.Module):
    """A student, its method and its teacher, as one module: call it for the loss.

        kd = Distillation("crd", student, teacher, labels=labels, image_size=224)
        opt = torch.optim.AdamW(kd.parameters(), 1e-3)
        for images, target, index in loader:  # index: where the images' labels are in `labels`
            loss = kd(images, target, index)
            opt.zero_grad()
            loss.backward()
            opt.step()
            kd.after_step()

    kd.student is what to validate and save: a method may have changed how the network predicts. Methods that warm up
    ask for set_epoch(). For those with a first stage, minimise init_loss(images) over the parameters that start_init()
    returns, then call end_init().

    student, teacher: networks of the contract, as create_model() returns them; the teacher is frozen
    image_size: by default that for which the foreign networks were built, or 32
    labels: of all training images; gamma, alpha, beta, T, options: the published ones unless given
    Raises DistillError where the method is not defined for the networks.
    """

    def __init__(
        self,
        method: str,
        student: nn.Module,
        teacher: nn.Module | None = None,
        *,
        labels: Sequence[int] | np.ndarray,
        n_cls: int | None = None,
        image_size: int | None = None,
        gamma: float | None = None,
        alpha: float | None = None,
        beta: float | None = None,
        T: float | None = None,
        **options: Any,
    ):
        super().__init__()
        from distiller_zoo import create_distiller, distiller_class, method_options  # which import this module

        cls, labels = distiller_class(method), np.asarray(labels)
        if cls.has_teacher and teacher is None:
            raise DistillError(f"method {method} needs a teacher")
        nets = {"s": student} if teacher is None else {"s": student, "t": teacher}
        image_size = image_size or max(getattr(net, "image_size", 32) for net in nets.values())
        shapes = {side: feature_shapes(net, image_size) for side, net in nets.items()}
        self.n_stages = n_stages = None
        if len({len(g) for g in shapes.values()}) > 1 and not all(map(is_house, nets.values())):
            self.n_stages = n_stages = min(map(len, shapes.values())) - 2
        self.shapes = {side: last_stages(g, n_stages) for side, g in shapes.items()}
        data: dict[str, Any] = {f"{side}_shapes": g for side, g in self.shapes.items()}
        data |= {f"{side}_dim": g[-1][1] for side, g in self.shapes.items()}
        data |= {"labels": labels, "n_data": len(labels), "n_cls": n_cls or int(labels.max()) + 1}
        asked = teacher is not None and (cls.reuses_head or "head_t" in cls.needs)
        head_t = head(teacher) if asked else linear_head(teacher)  # the former says why there is none
        if head_t is not None:
            data["head_t"] = head_t
        given = {"gamma": gamma, "alpha": alpha, "beta": beta, "kd_T": T, **options}
        given = {key: value for key, value in given.items() if value is not None}
        arch_t, arch_s = (getattr(net, "arch", "") for net in (teacher, student))
        published = cls.settings(arch_t, arch_s, options) if teacher is not None else {}
        self.published = {key: value for key, value in published.items() if key not in given}
        self.weights = {"gamma": 0.0, "alpha": 0.0, "beta": 0.0, **weights_of(cls, given, self.published)}
        self.T = T or self.published.get("kd_T", KD_T)
        known = method_options(method)
        if unknown := options.keys() - known.keys():
            raise DistillError(f"method {method} has no option {min(unknown)}; it has: {', '.join(known) or 'none'}")
        self.options = {key: value for key, value in {**self.published, **options}.items() if key in known}
        self.method, self.distiller = method, create_distiller(method, self.options, **data)
        check_preact(method, self.distiller, student, teacher)
        if self.distiller.reuses_head and not is_house(teacher):
            check_pooling(method, self.distiller, teacher, image_size)
        self.student = self.distiller.predictor(student)
        self.teacher, self.head_t = teacher, (head_t,)  # a tuple: it is the teacher's module
        if teacher is not None:
            teacher.requires_grad_(False).eval()
        self.register_buffer("epoch", torch.ones(()), persistent=False)

    def train(self, mode: bool = True) -> Distillation:
        """Training mode, but for the teacher."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(self, images: Tensor, target: Tensor, index: Tensor | None = None) -> Tensor:
        """The weighted loss of a batch."""
        method, known = self.distiller, {"index": index, "epoch": self.epoch, "head_t": self.head_t[0]}
        out_s, out_t = self.features(self.student, images, method.preact_s), (None, None)
        if self.teacher is not None:
            with torch.no_grad():
                out_t = self.features(self.teacher, images, method.preact_t)
        return loss_terms(method, self.weights, self.T, out_s, out_t, target, **known)[0]

    def features(self, net: nn.Module, images: Tensor, preact: bool) -> Output:
        g, logit = net(images, is_feat=True, preact=preact)
        return last_stages(g, self.n_stages), logit

    def after_step(self) -> None:
        """Update memories and queues."""
        if has_term(self.distiller, self.weights):
            self.distiller.after_step()

    def set_epoch(self, epoch: int) -> None:
        """From 1."""
        self.epoch.fill_(epoch)

    def start_init(self) -> list[nn.Parameter]:
        """Training mode for what a first stage trains -> its parameters; none for methods without one."""
        self.eval()
        modules = self.distiller.init_modules(self.student) or []
        for module in modules:
            module.train()
        return list(dict.fromkeys(p for module in modules for p in module.parameters()))

    def init_loss(self, images: Tensor) -> Tensor:
        """The loss of a first stage."""
        method = self.distiller
        g_s, _ = self.features(self.student, images, method.preact_s)
        with torch.no_grad():
            g_t, _ = self.features(self.teacher, images, method.preact_t)
        return method.init_loss(select_feats(g_s, method.feats), select_feats(g_t, method.feats))

    def end_init(self) -> None:
        """Freeze the method's own modules that only the first stage trains; train() comes next."""
        self.distiller.freeze(self.distiller.init_modules(self.student) or [])


def weights_of(
    cls: type[Distiller], given: dict[str, Any], published: dict[str, Any] | None = None
) -> dict[str, float]:
    """A method's weights: the user's, else those published for the pair of networks, else the method's defaults."""
    found = {}
    for key, default in cls.weights.items():
        value = given.get(key)
        found[key] = (published or {}).get(key, default) if value is None else value
    return found


@torch.no_grad()
def check_pooling(name: str, distiller: Distiller, teacher: nn.Module, image_size: int) -> None:
    """Raise DistillError unless the teacher's classifier is given the mean of its last map's ReLU, and nothing else."""
    weight = next(teacher.parameters())
    images = probe_images(image_size).to(weight)
    with eval_mode(teacher):
        feats, _ = teacher(images, is_feat=True, preact=distiller.preact_t)
    if not torch.allclose(feats[-2].relu().mean((2, 3)), feats[-1], 1e-3, 1e-3 * float(feats[-1].abs().max())):
        raise DistillError(
            f"method {name} reuses the teacher's classifier, but {getattr(teacher, 'arch', 'the teacher')} gives it "
            "other than the mean of the ReLU of its last map (as with a class token, or a norm behind the pooling)"
        )


def check_preact(name: str, distiller: Distiller, student: nn.Module, teacher: nn.Module | None) -> None:
    """Foreign networks do not give the maps before the last ReLU of a stage.

    Raises DistillError if the method compares them; methods that only prefer the teacher's take those after the ReLU.
    """
    without = [net for net in (student, teacher) if not getattr(net, "has_preact", True)]
    if without and distiller.preact_s:
        raise DistillError(
            f"method {name} compares maps before a stage's last ReLU, {without[0].arch} does not give them"
        )
    if teacher in without:
        distiller.preact_t = False
