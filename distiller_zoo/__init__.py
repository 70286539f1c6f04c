"""The methods by name. To add one: a file with a Distiller, and its line in `distiller_dict`.

Names joined by + stand for the terms of several methods in one student, each with its published weight or the one that
follows it: crd+wttm, crd:0.5+wttm. The canonical form, legal in file names, is sorted: crd_0.5+wttm.
"""

from __future__ import annotations

import inspect
import re
from difflib import get_close_matches

from torch import nn

from distiller_zoo.AB import ABLoss
from distiller_zoo.AT import Attention
from distiller_zoo.base import Baseline, Distiller, DistillError, kd_loss
from distiller_zoo.CC import Correlation
from distiller_zoo.combined import Combined, combine, weight_of
from distiller_zoo.CRD import CRDLoss
from distiller_zoo.DIST import DISTLoss
from distiller_zoo.distillation import Distillation
from distiller_zoo.DKD import DKDLoss
from distiller_zoo.FitNet import HintLoss
from distiller_zoo.FSP import FSP
from distiller_zoo.FT import FactorTransfer
from distiller_zoo.ICD import ICDLoss
from distiller_zoo.ITRD import ITRDLoss
from distiller_zoo.KD import DistillKL
from distiller_zoo.KDSVD import KDSVD
from distiller_zoo.NKD import NKDLoss
from distiller_zoo.NST import NSTLoss
from distiller_zoo.PKT import PKT
from distiller_zoo.ReviewKD import ReviewKD
from distiller_zoo.RKD import RKDLoss
from distiller_zoo.RLD import RLDLoss
from distiller_zoo.RRD import RRDLoss
from distiller_zoo.SimKD import SimKD
from distiller_zoo.SP import Similarity
from distiller_zoo.SRRL import SRRLLoss
from distiller_zoo.TTM import TTM, WTTM
from distiller_zoo.VID import VIDLoss

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
    "dkd": DKDLoss,
    "reviewkd": ReviewKD,
    "simkd": SimKD,
    "dist": DISTLoss,
    "ttm": TTM,
    "wttm": WTTM,
    "itrd": ITRDLoss,
    "rld": RLDLoss,
    "srrl": SRRLLoss,
    "nkd": NKDLoss,
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
    "Distillation",
    "Distiller",
    "aliases",
    "create_distiller",
    "distiller_class",
    "distiller_dict",
    "kd_loss",
    "method_name",
    "method_options",
]


def method_name(name: str) -> str:
    """The canonical name of a method, or of a combination; DistillError if there is none such."""
    distiller_class(name)
    terms = sorted(split(name).items())
    return "+".join(part if weight is None else f"{part}_{weight:.12g}" for part, weight in terms)


def split(name: str) -> dict[str, float | None]:
    """The methods in a name, with their weights where it has them: crd:0.5+wttm -> {"crd": 0.5, "wttm": None}."""
    terms = {}
    for term in name.lower().split("+"):
        part, weight = aliases.get(term, term), None
        if part not in distiller_dict and (weighed := re.fullmatch(r"(.+)[:_](\d+(?:\.\d+)?(?:e-\d+)?)", term)):
            part, weight = aliases.get(weighed[1], weighed[1]), float(weighed[2])
            if not 0 < weight < 1e9:
                raise DistillError(f"'{name}': {weighed[2]} is not a weight")
        before, _, after = part.partition(":")
        if after and aliases.get(before, before) in distiller_dict:
            raise DistillError(f"'{name}': {after} is not a weight")
        if part not in distiller_dict:
            known = [*distiller_dict, *aliases]
            near = get_close_matches(part, known, len(known), 0)
            raise DistillError(f"unknown method '{part}'; known: {', '.join(near)}")
        if part in terms:
            raise DistillError(f"'{name}' has method {part} twice")
        terms[part] = weight
    if len(terms) == 1 and weight is not None:
        raise DistillError(f"'{name}': a single method is weighed by --beta")
    return terms


def distiller_class(name: str) -> type[Distiller]:
    """The class of a method; of a combination, one with what its parts ask for (needs, min_batch, ...)."""
    terms = split(name)
    if len(terms) == 1:
        return distiller_dict[next(iter(terms))]
    given = {part: weight for part, weight in terms.items() if weight is not None}
    return combine({part: distiller_dict[part] for part in sorted(terms)}, given)


def signature(cls: type[Distiller]) -> dict[str, inspect.Parameter]:
    """What a method's constructor takes: data (no default) and options (with one)."""
    init = cls.__init__
    return (
        {} if init is nn.Module.__init__ else dict(list(inspect.signature(init, eval_str=True).parameters.items())[1:])
    )


def method_options(name: str) -> dict[str, inspect.Parameter]:
    """The options of a method, from its signature; of a combination also the weight of each part."""
    cls = distiller_class(name)
    if not issubclass(cls, Combined):
        return {key: p for key, p in signature(cls).items() if p.default is not p.empty}
    options = {key: p for part in cls.parts for key, p in method_options(part).items()}
    for part, weight in cls.part_weights().items():
        options[weight_of(part)] = inspect.Parameter(weight_of(part), inspect.Parameter.KEYWORD_ONLY, default=weight)
    return options


def create_distiller(name: str, options: dict | None = None, **data) -> Distiller:
    """Build a method, passing by name what its constructor asks for of `data` and of `options`.

    data: s_shapes, t_shapes (feature lists, batch included), s_dim, t_dim, labels, n_data, n_cls, head_t.
    """
    name, options = method_name(name), options or {}
    cls = distiller_class(name)
    if issubclass(cls, Combined):
        methods = {part: create_distiller(part, options, **data) for part in cls.parts}
        return cls(methods, {part: options.get(weight_of(part), w) for part, w in cls.part_weights().items()})
    params, given = signature(cls), {**data, **options}
    missing = [key for key, p in params.items() if p.default is p.empty and key not in given]
    if missing:
        raise DistillError(f"method {name} asks for {', '.join(missing)}; what there is: {', '.join(data)}")
    check_lists(name, cls, data.get("s_shapes", ()), data.get("t_shapes", ()))
    try:
        return cls(**{key: given[key] for key in params if key in given})
    except DistillError as error:
        raise DistillError(f"method {name}: {error}") from error


def check_lists(name: str, cls: type[Distiller], s_shapes, t_shapes) -> None:
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
