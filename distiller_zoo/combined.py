from __future__ import annotations

import torch
from torch import Tensor, nn

from distiller_zoo.base import Distiller, DistillError


class Combined(Distiller):
    """The terms of several methods in one student, each with a weight of its own.

    By default they take the place of the KL term. A subclass for the methods in question is made by combine().
    """

    feats = slice(None)  # the parts choose from it
    weights = {"gamma": 1.0, "alpha": 0.0, "beta": 1.0}
    parts: dict[str, type[Distiller]] = {}
    given: dict[str, float] = {}  # weights in the name of the combination

    def __init__(self, methods: dict[str, Distiller], weights: dict[str, float]):
        super().__init__()
        self.methods, self.weight = nn.ModuleDict(methods), weights

    @classmethod
    def part_weights(cls) -> dict[str, float]:
        """The weight of each part: the one in the combination's name, or the method's published one."""
        return {name: cls.given.get(name, part.weights["beta"]) for name, part in cls.parts.items()}

    @classmethod
    def settings(cls, arch_t: str, arch_s: str, options: dict) -> dict:
        found = {}
        for name, part in cls.parts.items():
            own = part.settings(arch_t, arch_s, options)
            if "beta" in own and name not in cls.given:
                found[weight_of(name)] = own["beta"]
            found |= {key: value for key, value in own.items() if key not in ("gamma", "alpha", "beta", "kd_T")}
        return found

    def forward(self, g_s: list[Tensor], g_t: list[Tensor], **needs) -> Tensor:
        return sum(
            self.weight[name] * part(g_s[part.feats], g_t[part.feats], **{key: needs[key] for key in part.needs})
            for name, part in self.methods.items()
        )

    def after_step(self) -> None:
        for part in self.methods.values():
            part.after_step()

    def generators(self) -> list[torch.Generator]:
        return [generator for part in self.methods.values() for generator in part.generators()]


def weight_of(name: str) -> str:
    """The option that weighs a part."""
    return f"{name}_weight"


def combine(parts: dict[str, type[Distiller]], given: dict[str, float]) -> type[Combined]:
    """A class for these methods; given: weights that take the place of the published ones."""
    for name, part in parts.items():
        if part.init_modules is not Distiller.init_modules:
            raise DistillError(f"method {name} has a first stage and cannot be combined")
        if part.predictor is not Distiller.predictor:
            raise DistillError(f"method {name} replaces the network that predicts and cannot be combined")
        if part.forward is Distiller.forward:
            raise DistillError(f"method {name} has no term of its own to combine; --alpha adds the KL term")
    classes = parts.values()
    found = {"parts": parts, "given": given, "min_batch": max(part.min_batch for part in classes)}
    found["capturable"] = all(part.capturable for part in classes)
    found["across_batch"] = any(part.across_batch for part in classes)
    found["needs"] = tuple(dict.fromkeys(key for part in classes for key in part.needs))
    for side in ("preact_s", "preact_t"):
        kinds = {getattr(part, side) for part in classes if part.feats not in (-1, slice(0))}  # those that take maps
        if len(kinds) > 1:
            raise DistillError(
                f"methods {' and '.join(parts)} cannot be combined: some take maps before the last ReLU, some after it"
            )
        found[side] = kinds == {True}
    return type("Combined", (Combined,), found)
