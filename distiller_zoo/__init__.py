"""The methods by name. To add one: a file with a Distiller, and its line in `distiller_dict`."""

from __future__ import annotations

import inspect

from torch import nn

from distiller_zoo.AB import ABLoss
from distiller_zoo.AT import Attention
from distiller_zoo.base import Baseline, Distiller, DistillError, kd_loss
from distiller_zoo.CC import Correlation
from distiller_zoo.CRD import CRDLoss
from distiller_zoo.FitNet import HintLoss
from distiller_zoo.FSP import FSP
from distiller_zoo.FT import FactorTransfer
from distiller_zoo.ICD import ICDLoss
from distiller_zoo.KD import DistillKL
from distiller_zoo.KDSVD import KDSVD
from distiller_zoo.NST import NSTLoss
from distiller_zoo.PKT import PKT
from distiller_zoo.RKD import RKDLoss
from distiller_zoo.RRD import RRDLoss
from distiller_zoo.SP import Similarity
from distiller_zoo.VID import VIDLoss
from models.util import known_first

BASELINE = "none"
distiller_dict: dict[str, type[Distiller]] = {
    BASELINE: Baseline,
    "kd": DistillKL,
    "hint": HintLoss,
    "attention": Attention,
    "similarity": Similarity,
    "correlation": Correlation,
    "vid": VIDLoss,
    "rkd": RKDLoss,
    "pkt": PKT,
    "abound": ABLoss,
    "factor": FactorTransfer,
    "fsp": FSP,
    "nst": NSTLoss,
    "crd": CRDLoss,
    "rrd": RRDLoss,
    "icd": ICDLoss,
    "kdsvd": KDSVD,
}
aliases = {
    "fitnet": "hint",
    "at": "attention",
    "sp": "similarity",
    "cc": "correlation",
    "ab": "abound",
    "ft": "factor",
}

__all__ = [
    "BASELINE",
    "DistillError",
    "Distiller",
    "aliases",
    "create_distiller",
    "distiller_dict",
    "kd_loss",
    "method_name",
    "method_options",
]


def method_name(name: str) -> str:
    """The registry's name of a method that may be called by its paper's."""
    known = aliases.get(name.lower(), name.lower())
    if known not in distiller_dict:
        near = known_first(name, [*distiller_dict, *aliases])
        raise DistillError(f"unknown method '{name}'; known: {', '.join(near)}")
    return known


def signature(name: str) -> dict[str, inspect.Parameter]:
    """What a method's constructor takes: data (no default) and options (with one)."""
    init = distiller_dict[name].__init__
    return (
        {} if init is nn.Module.__init__ else dict(list(inspect.signature(init, eval_str=True).parameters.items())[1:])
    )


def method_options(name: str) -> dict[str, inspect.Parameter]:
    """The options of a method, from its signature."""
    return {key: p for key, p in signature(name).items() if p.default is not p.empty}


def create_distiller(name: str, options: dict | None = None, **data) -> Distiller:
    """Build a method, passing by name what its constructor asks for of `data` and of `options`.

    data: s_shapes, t_shapes (feature lists, batch included), s_dim, t_dim, labels, n_data, n_cls.
    """
    name = method_name(name)
    cls, params, given = distiller_dict[name], signature(name), {**data, **(options or {})}
    missing = [key for key, p in params.items() if p.default is p.empty and key not in given]
    if missing:
        raise DistillError(f"method {name} asks for {', '.join(missing)}; what there is: {', '.join(data)}")
    _check_lists(name, cls, data.get("s_shapes", ()), data.get("t_shapes", ()))
    try:
        return cls(**{key: given[key] for key in params if key in given})
    except DistillError as error:
        raise DistillError(f"method {name}: {error}") from error


def _check_lists(name: str, cls: type[Distiller], s_shapes, t_shapes) -> None:
    """Feature lists are compared entry by entry: refuse a pair of networks with unequal numbers of stages."""
    if not isinstance(cls.feats, slice):
        return
    g_s, g_t = s_shapes[cls.feats], t_shapes[cls.feats]
    if len(g_s) != len(g_t):
        shapes = [", ".join("x".join(map(str, f[1:])) for f in g) for g in (g_s, g_t)]
        raise DistillError(
            f"method {name} compares {len(g_s)} student maps ({shapes[0]}) with {len(g_t)} teacher maps ({shapes[1]}): "
            "choose a pair with equal numbers of stages"
        )
