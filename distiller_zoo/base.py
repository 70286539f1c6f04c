"""What a distillation method is: one subclass of Distiller in a file of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Types of options, with their smallest and largest sensible value
Size = Annotated[int, 1, 2**22]
Temperature = Annotated[float, 1e-3, 1e3]
Share = Annotated[float, 0.0, 1.0]
Weight = Annotated[float, 0.0, 1e6]
Epochs = Annotated[int, 0, 100_000]

Shapes = Sequence[Sequence[int]]  # of a feature list, batch dimension included


class DistillError(ValueError):
    """A method cannot be used as asked; the message is one sentence for the user."""


def kd_loss(logit_s: Tensor, logit_t: Tensor, T: float) -> Tensor:
    """T^2 KL(p_t || p_s) with p = softmax(logit / T), mean over the batch."""
    log_p_s = F.log_softmax(logit_s / T, dim=1)  # (B, n_cls)
    p_t = F.softmax(logit_t / T, dim=1)
    return F.kl_div(log_p_s, p_t, reduction="batchmean") * T**2


def standardise(logit: Tensor) -> Tensor:
    """Logits with mean 0 and standard deviation 1 over the classes of each sample.

    Logit Standardization in Knowledge Distillation, CVPR 2024. https://arxiv.org/abs/2403.01427
    """
    mean, std = logit.mean(1, keepdim=True), logit.std(1, keepdim=True)  # std divides by n_cls - 1, as published
    return (logit - mean) / (std + 1e-7)


def drop_class(logit: Tensor, which: Tensor) -> Tensor:
    """Logits (B, n_cls) without that of class which (B,) of each sample: (B, n_cls - 1)."""
    others = torch.arange(logit.size(1) - 1, device=logit.device).expand(len(logit), -1)
    return logit.gather(1, others + (others >= which[:, None]))


def warm_up(epoch: Tensor, epochs: int) -> Tensor:
    """Factor that grows linearly to 1 in the first `epochs` epochs: 1 / epochs in the first one."""
    return (epoch / epochs).clamp(max=1)


class Distiller(nn.Module):
    """A method: its own loss term and the modules that it trains.

    The loop minimises gamma * cross-entropy + alpha * kl(logits) + beta * forward(f_s, f_t).
    A constructor takes data by name (`s_shapes t_shapes s_dim t_dim labels n_data n_cls head_t`) and
    the method's options, which have defaults: each becomes a flag of the command line.
    head_t is the teacher's linear classifier, frozen; epoch is a tensor () that counts from 1.
    """

    feats: int | slice = slice(1, -1)  # entries of the feature list that forward() and init_loss() are given
    preact_s = preact_t = False  # whether the student's and the teacher's maps are taken before a stage's last ReLU
    needs: tuple[str, ...] = ()  # what else forward() takes, by name: index target logit_s logit_t epoch head_t
    weights = {"gamma": 1.0, "alpha": 0.0, "beta": 1.0}  # published; those named here can be set by -r -a -b
    has_teacher = True
    capturable = True  # whether a step can be captured as a CUDA graph
    reuses_head = False  # whether the student predicts through the teacher's classifier
    across_batch = False  # whether samples are compared or stored: each of several processes is given the whole batch
    min_batch = 1  # samples that the term compares at least; a last batch of fewer adds a constant
    published: dict[tuple[str, str], dict] = {}  # (teacher, student): weights and options of the authors' for that pair

    @classmethod
    def settings(cls, arch_t: str, arch_s: str, options: dict) -> dict:
        """Weights, options and kd_T published for a pair of networks; options: those that the user set."""
        return dict(cls.published.get((arch_t, arch_s), {}))

    def forward(self, f_s, f_t, **needs) -> Tensor | float:
        """The method's own term; 0 for methods that live in the first stage or in the KL term."""
        return 0.0

    def kl(self, logit_s: Tensor, logit_t: Tensor, T: float) -> Tensor:
        """The term that alpha weighs."""
        return kd_loss(logit_s, logit_t, T)

    def predictor(self, model_s: nn.Module) -> nn.Module:
        """The network that is trained, validated and saved, if the method changes how the student predicts."""
        return model_s

    def after_step(self) -> None:
        """Update memories and queues, after backward and the optimizer's step."""

    def generators(self) -> list[torch.Generator]:
        """Generators of the random numbers that forward() draws."""
        return []

    def init_modules(self, model_s: nn.Module) -> list[nn.Module] | None:
        """Modules that a first stage trains; None if the method has no first stage."""
        return None

    def init_loss(self, f_s, f_t) -> Tensor:
        """Loss of the first stage; f_s is None where init_modules has nothing of the student."""
        raise NotImplementedError(f"{type(self).__name__} has no first stage")

    def init_lr(self, model_s: nn.Module, lr: float) -> float:
        """Constant learning rate of the first stage, where the main one's first is lr."""
        return lr

    def freeze(self, modules: Sequence[nn.Module]) -> None:
        """End of the first stage: those of `modules` that are the method's own are trained no more."""
        own = set(self.modules())
        for module in modules:
            if module in own:
                module.requires_grad_(False)
                module.zero_grad(set_to_none=True)  # their memory would be held through the main stage

    def train(self, mode: bool = True) -> Distiller:
        """Training mode for the parts that train; frozen ones keep their batch statistics."""
        super().train(mode)
        for part in self.children():
            params = list(part.parameters())
            if params and not any(p.requires_grad for p in params):
                part.eval()
        return self


class Baseline(Distiller):
    """No distillation: the student baseline, trained on labels alone."""

    feats = slice(0)
    weights = {"gamma": 1.0}
    has_teacher = False


def pool_to_smaller(f_s: Tensor, f_t: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool the larger of two maps to the height and width of the smaller."""
    size = [min(a, b) for a, b in zip(f_s.shape[2:], f_t.shape[2:], strict=True)]
    return pool(f_s, size), pool(f_t, size)


def pool(f: Tensor, size: list[int]) -> Tensor:
    if list(f.shape[2:]) == size:
        return f
    times = [divmod(a, b) for a, b in zip(f.shape[2:], size, strict=True)]
    if any(rest for _, rest in times):
        return F.adaptive_avg_pool2d(f, size)
    return F.avg_pool2d(f, [n for n, _ in times])  # the same, without leaving channels_last
