"""Inputs of the records in golden_newer.pt, from the seeded streams of recipe.py; float32, made double before use.

A record says in `inputs` how they are made: logits (and labels), embeddings (signed vectors) or feature lists.
"""

import torch

from tests.golden import recipe


def lift(z, y, rows):
    """Make the label the largest logit of these rows: the row's maximum plus 2."""
    z = z.clone()
    for i in rows:
        z[i, y[i]] = z[i].max() + 2.0
    return z


def logit_case(key, n, n_cls):
    """Labels, logits of the student (right in one row of three) and of the teacher (in three rows of four)."""
    y = recipe.labels(f"newer/{key}", n, n_cls)
    z_s = recipe.logits(f"newer/{key}/s", n, n_cls)
    z_t = recipe.logits(f"newer/{key}/t", n, n_cls, scale=4.0)
    return y, lift(z_s, y, [i for i in range(n) if i % 3 == 0]), lift(z_t, y, [i for i in range(n) if i % 4 != 3])


def rank_edges(z_t, y):
    """Row 0: the label is the teacher's lowest class; row 1: the lowest but one; row 2: the highest by far."""
    z_t = z_t.clone()
    z_t[0, y[0]] = z_t[0].min() - 1.0
    z_t[1, y[1]] = z_t[1].max() + 1.0  # out of the way, so that the minimum is another class
    low = z_t[1].argmin()
    z_t[1, low] = z_t[1].min() - 2.0
    z_t[1, y[1]] = z_t[1, low] + 0.5
    z_t[2, y[2]] = z_t[2].max() + 20.0
    return z_t


def embed_case(key, n, s_dim, t_dim):
    """Signed vectors with a common part, so that no column is constant and the two sides correlate."""
    e_s = recipe.feat(f"newer/{key}/e_s", (n, s_dim), "pre").clone()
    e_t = recipe.feat(f"newer/{key}/e_t", (n, t_dim), "pre")
    d = min(s_dim, t_dim)
    e_s[:, :d] = e_s[:, :d] + 0.5 * e_t[:, :d]
    return e_s, e_t


def map_case(key, n, s_shapes, t_shapes, t_kind="post"):
    """Feature lists (stem, stages, pooled): rectified, but for the teacher's maps where t_kind is "pre"."""

    def one(side, shapes, kind):
        return [
            recipe.feat(f"newer/{key}/{side}/{i}", (n, *v), kind if len(v) == 3 else "post")
            for i, v in enumerate(shapes)
        ]

    return one("s", s_shapes, "post"), one("t", t_shapes, t_kind)


def head(t_dim, n_cls):
    """The teacher's classifier in float64."""
    layer = torch.nn.Linear(t_dim, n_cls).double().requires_grad_(False)
    layer.weight.copy_(recipe.fill_value("newer/head.weight", (n_cls, t_dim)))
    layer.bias.copy_(recipe.fill_value("newer/head.bias", (n_cls,)))
    return layer


def inputs(spec):
    """-> (labels or None, of the student, of the teacher): logits, vectors or lists of features."""
    kind, edge = spec["kind"], spec.get("edge")
    args = {key: value for key, value in spec.items() if key not in ("kind", "edge", "teacher", "student")}
    if kind == "logits":
        y, z_s, z_t = logit_case(**args)
        return y, z_s, rank_edges(z_t, y) if edge else z_t
    return None, *(embed_case if kind == "embeds" else map_case)(**args)


def summary(key, g):
    """What a record keeps of a tensor: norm, inner product with a seeded direction, first and last entries."""
    g = g.detach().double().contiguous()
    probe = recipe.unit(f"newer/probe/{key}", g.shape).double()
    return {"norm": g.norm(), "dot": (g * probe).sum(), "first8": g.flatten()[:8], "last8": g.flatten()[-8:]}
