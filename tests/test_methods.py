"""Every method against a slow form of its formulas; degenerate input; float32; combinations; settings of pairs."""

import math
import random
import re
from collections import deque
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distiller_zoo import (
    Distiller,
    DistillError,
    create_distiller,
    distiller_class,
    distiller_dict,
    kd_loss,
    method_name,
    method_options,
)
from distiller_zoo.base import standardise
from models import ModelError, create_model, model_dict
from models.util import feature_shapes, head
from scripts.bench.losses import REFERENCES

# How a student's map differs from the teacher's, and the batch.
CASES = [("equal", 3), ("smaller", 1), ("smaller", 4), ("larger", 5), ("crossed", 2), ("crossed", 9), ("few", 4)]
LABELS = [0, 0, 1, 1, 1, 2, 2, 4, 4, 4, 4, 1, 2]  # 13 samples, class 3 has none
N_CLS = 5


# --- features and logits of two imaginary networks: stem, three maps, pooled ---


def sizes(relation, rng, regressed):
    """-> (H, W) of the student's map, (H, W) of the teacher's."""
    h, w = rng.choice([(2, 3), (3, 2), (3, 4)])
    if relation == "few":  # fewer positions than channels
        return (1, 2), (1, 2)
    if regressed:  # what ConvReg can do: double, half, or crop by any kernel
        grow = {"equal": (h, w), "smaller": (2 * h, 2 * w), "larger": (h, w), "crossed": (h, w)}[relation]
        own = {"larger": (h + rng.randint(1, 2), w + rng.randint(0, 2)), "crossed": (2 * h, 2 * w)}
        return own.get(relation, (h, w)), grow
    up = (h + rng.randint(1, 3), w + rng.randint(1, 3))
    return {
        "equal": ((h, w), (h, w)),
        "smaller": ((h, w), up),
        "larger": (up, (h, w)),
        "crossed": ((up[0], w), (h, up[1])),
    }[relation]


def features(name, relation, batch, dtype=torch.float64):
    """Random feature lists (student's with gradients, teacher's) that the method is defined on."""
    rng = random.Random(f"{name} {relation} {batch}")
    noise = torch.Generator().manual_seed(rng.randrange(2**31))
    g_s, g_t = [], []
    for i in range(4):
        c_s, c_t = rng.randint(1, 4), rng.randint(2, 4)
        if relation == "few":
            c_s, c_t = rng.randint(5, 6), rng.randint(5, 6)
        if name in ("fsp", "kdsvd", "simkd") or (i == 2 and relation == "equal"):
            c_s = c_t
        size_s, size_t = sizes(relation, rng, name in ("hint", "abound"))
        if name == "simkd":  # whose network pools a larger map itself
            size_s = min(size_s, size_t)
        g_s.append((batch, c_s, *size_s))
        g_t.append((batch, c_t, *size_t))
    g_s.append((batch, rng.randint(2, 6)))
    g_t.append((batch, g_t[-1][1] if name == "simkd" else rng.randint(2, 6)))
    draw = [[torch.randn(shape, generator=noise, dtype=torch.float64) + 0.3 for shape in g] for g in (g_s, g_t)]
    if name == "abound":  # whose boundary is zero
        draw[1] = [f * (f.abs() > 0.3) for f in draw[1]]
    return [f.to(dtype).requires_grad_() for f in draw[0]], [f.to(dtype) for f in draw[1]]


OPTIONS = {
    "correlation": {"feat_dim": 3},
    "crd": {"feat_dim": 3, "nce_k": 5, "nce_m": 0.7},
    "icd": {"feat_dim": 3},
    "rrd": {"feat_dim": 3, "nce_k": 7},
}


def head_of(g_t):
    torch.manual_seed(2)
    return nn.Linear(g_t[-1].size(1), N_CLS).to(g_t[0].dtype).requires_grad_(False)


def build(name, g_s, g_t, **options):
    """The method as a training script builds it, in the features' type."""
    torch.manual_seed(1)
    shapes = {"s_shapes": [tuple(f.shape) for f in g_s], "t_shapes": [tuple(f.shape) for f in g_t]}
    data = dict(s_dim=g_s[-1].size(1), t_dim=g_t[-1].size(1), labels=LABELS, n_data=len(LABELS), n_cls=N_CLS)
    options = {**OPTIONS.get(name, {}), **options}
    method = create_distiller(name, options, **shapes, **data, head_t=head_of(g_t)).to(g_s[0].dtype)
    return method.train()


def known_of(g_s, g_t):
    """All that a method may need besides features; the student's logits with gradients."""
    n, noise = len(g_s[0]), torch.Generator().manual_seed(4)
    logit_s, logit_t = (3 * torch.randn(n, N_CLS, generator=noise).to(g_s[0].dtype) for _ in range(2))
    known = {"index": torch.arange(n), "target": torch.tensor(LABELS[:n]), "epoch": torch.tensor(5.0)}
    return {**known, "logit_s": logit_s.requires_grad_(), "logit_t": logit_t, "head_t": head_of(g_t)}


# --- the methods, from their formulas, sample by sample: (student's features, teacher's, parameters, method, known) ---


def unit(v):
    return v / v.square().sum().sqrt()


def softmax(v):
    e = (v - v.max().detach()).exp()
    return e / e.sum()


def mean(values):
    return sum(values) / len(values)


def pooled(f_s, f_t):
    size = [min(a, b) for a, b in zip(f_s.shape[2:], f_t.shape[2:], strict=True)]
    return F.adaptive_avg_pool2d(f_s, size), F.adaptive_avg_pool2d(f_t, size)


def batch_norm(f, p, prefix):
    return F.batch_norm(f, None, None, p[f"{prefix}weight"], p[f"{prefix}bias"], training=True)


def squared_error(a, b):
    return (a - b).square().sum() / a.numel()


def smooth_l1(d):
    return 0.5 * d * d if abs(d) < 1 else abs(d) - 0.5


def divergence(p, q):
    """KL(p || q)"""
    return sum(a * (a.log() - b.log()) for a, b in zip(p, q, strict=True))


def kd(logit_s, logit_t, T):
    return T**2 * mean([divergence(softmax(t / T), softmax(s / T)) for s, t in zip(logit_s, logit_t, strict=True)])


def conv_reg(f, size, p, prefix):
    weight, bias = p[f"{prefix}conv.weight"], p[f"{prefix}conv.bias"]
    H, W = f.shape[2:]
    if (2 * size[0], 2 * size[1]) == (H, W):
        f = F.conv2d(f, weight, bias, stride=2, padding=1)
    elif tuple(size) == (2 * H, 2 * W):
        f = F.conv_transpose2d(f, weight, bias, stride=2, padding=1)
    else:
        f = F.conv2d(f, weight, bias)
    return batch_norm(f, p, f"{prefix}bn.")


def hint(f_s, f_t, p, method, known):
    return squared_error(conv_reg(f_s, f_t.shape[2:], p, "regress.").relu(), f_t)


def attention_map(f):
    """Of one sample: its channels' mean square, as a unit vector over positions."""
    return unit(mean([plane.flatten() ** 2 for plane in f]))


def attention(g_s, g_t, p, method, known):
    pairs = [pooled(f_s, f_t) for f_s, f_t in zip(g_s, g_t, strict=True)]
    return sum(squared_error(*(torch.stack([attention_map(x) for x in f]) for f in pair)) for pair in pairs)


def similarity(f_s, f_t, p, method, known):
    gram_s, gram_t = (torch.stack([unit(torch.stack([(a * b).sum() for b in f])) for a in f]) for f in (f_s, f_t))
    return squared_error(gram_s, gram_t)


def linear(f, p, prefix):
    return torch.stack([p[f"{prefix}.linear.weight"] @ x + p[f"{prefix}.linear.bias"] for x in f])


def correlation(f_s, f_t, p, method, known):
    d = (linear(f_s, p, "embed_s") - linear(f_t, p, "embed_t")).abs()
    return mean([d[n] @ d[n + 1] for n in range(len(d) - 1)]) if len(d) > 1 else 0.0


def vid(g_s, g_t, p, method, known):
    loss = 0.0
    for prefix, f_s, f_t in zip([key[:-9] for key in p if key.endswith("log_scale")], g_s, g_t, strict=True):
        mu, f_t = pooled(f_s, f_t)
        for layer in (0, 2, 4):
            mu = F.conv2d(mu if layer == 0 else mu.relu(), p[f"{prefix}regressor.{layer}.weight"])
        var = (1 + p[f"{prefix}log_scale"].exp()).log() + 1e-5
        loss = loss + mean([0.5 * ((mu[:, c] - f_t[:, c]) ** 2 / v + v.log()).mean() for c, v in enumerate(var)])
    return loss


def rkd(f_s, f_t, p, method, known):
    n = len(f_s)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]

    def distances(f):
        d = {(i, j): (f[i] - f[j]).square().sum().sqrt() for i, j in pairs}
        return {pair: value / mean(d.values()) for pair, value in d.items()}

    def angles(f):
        e = {(i, j): unit(f[j] - f[i]) for i, j in pairs}
        return [e[i, j] @ e[i, k] for i, j in pairs for k in range(n) if k != i]

    d_s, d_t = distances(f_s), distances(f_t)
    distance = sum(smooth_l1(d_s[pair] - d_t[pair]) for pair in pairs) / n**2
    angle = sum(smooth_l1(a - b) for a, b in zip(angles(f_s), angles(f_t), strict=True)) / n**3
    return 25 * distance + 50 * angle


def pkt(f_s, f_t, p, method, known):
    def neighbours(f):
        rows = [v / (v.square().sum().sqrt() + 1e-7) for v in f]
        S = torch.stack([torch.stack([(a @ b + 1) / 2 for b in rows]) for a in rows])
        return [x / row.sum() for row in S for x in row]

    pairs = zip(neighbours(f_s), neighbours(f_t), strict=True)
    return mean([t * ((t + 1e-7) / (s + 1e-7)).log() for s, t in pairs])


def abound(g_s, g_t, p, method, known):
    loss = 0.0
    for i, (f_s, f_t) in enumerate(zip(g_s, g_t, strict=True)):
        if f"connector.connectors.{i}.conv.weight" in p:
            f_s = conv_reg(f_s, f_t.shape[2:], p, f"connector.connectors.{i}.")
        above, below = (f_s + 1) ** 2 * (f_s > -1) * (f_t <= 0), (f_s - 1) ** 2 * (f_s <= 1) * (f_t > 0)
        loss = loss + (above + below).sum() * 2.0 ** (i - len(g_t) + 1) / len(f_s) / 1000 * 3
    return loss


def three(f, p, prefix, conv=F.conv2d, norm=False):
    """Three 3x3 layers, whose positions are part of their names."""
    for i in (0, 3, 6):
        f = conv(f, p[f"{prefix}.{i}.weight"], p[f"{prefix}.{i}.bias"], padding=1)
        f = F.leaky_relu(batch_norm(f, p, f"{prefix}.{i + 1}.") if norm else f, 0.1)
    return f


def factor(f_s, f_t, p, method, known):
    pair = pooled(three(f_s, p, "translator.encoder", norm=True), three(f_t, p, "paraphraser.encoder"))
    q_s, q_t = (torch.stack([attention_map(x) for x in f]) for f in pair)
    return (q_s - q_t).abs().mean()


def factor_first(f_s, f_t, p, method, known):
    code = three(f_t, p, "paraphraser.encoder")
    return squared_error(three(code, p, "paraphraser.decoder", F.conv_transpose2d), f_t)


def icd(f_s, f_t, p, method, known):
    e_s, e_t = ([unit(v) for v in linear(f, p, side)] for f, side in ((f_s, "embed_s"), (f_t, "embed_t")))
    logits = torch.stack([torch.stack([p["log_tau"].exp() * (a @ b) + p["b"] for b in e_t]) for a in e_s])
    row, column = [softmax(r) for r in logits], [softmax(r) for r in logits.T]
    contrast = -mean([p_i[i].log() for i, p_i in enumerate(row)])
    return contrast + 0.5 * mean([divergence(q, p_i) for p_i, q in zip(row, column, strict=True)])


def rrd(f_s, f_t, p, method, known):
    loss = 0.0
    for a, b in zip(linear(f_s, p, "embed_s"), linear(f_t, p, "embed_t").detach(), strict=True):
        p_s, p_t = softmax(method.queue @ unit(a) / 0.04), softmax(method.queue @ unit(b) / 0.1)
        loss = loss - (p_t * p_s.log()).sum()
    return loss / len(f_s)


def without(v, i):
    return torch.cat([v[:i], v[i + 1 :]])


def dkd(f_s, f_t, p, method, known):
    loss = []
    for s, t, y in zip(known["logit_s"] / 4, known["logit_t"] / 4, known["target"], strict=True):
        p_s, p_t = softmax(s), softmax(t)
        label = divergence([p_t[y], 1 - p_t[y]], [p_s[y], 1 - p_s[y]])
        loss.append(label + 8 * divergence(softmax(without(t, y)), softmax(without(s, y))))
    return 0.25 * 16 * mean(loss)  # in epoch 5 of a warm-up of 20


def rld(f_s, f_t, p, method, known):
    loss = []
    for s, t, y in zip(known["logit_s"], known["logit_t"], known["target"], strict=True):
        a, b = softmax(t).max(), softmax(s)[y]
        below = [c for c in range(N_CLS) if t[c] < t[y]]
        refined = divergence(softmax(t[below] / 4), softmax(s[below] / 4)) if below else 0.0
        loss.append(divergence([a, 1 - a], [b, 1 - b]) + 8 * 16 * refined)
    return 0.25 * mean(loss)


def nkd(f_s, f_t, p, method, known):
    loss = []
    for s, t, y in zip(known["logit_s"], known["logit_t"], known["target"], strict=True):
        others = zip(softmax(without(t, y)), softmax(without(s, y)), strict=True)
        loss.append(-softmax(t)[y] * softmax(s)[y].log() - 1.5 * sum(a * b.log() for a, b in others))
    return mean(loss)


def dist(f_s, f_t, p, method, known):
    def pearson(a, b):
        a, b = a - a.mean(), b - b.mean()
        return (a @ b) / (a.square().sum().sqrt() * b.square().sum().sqrt() + 1e-8)

    p_s, p_t = (torch.stack([softmax(z / 4) for z in known[side]]) for side in ("logit_s", "logit_t"))
    inter = 1 - mean([pearson(a, b) for a, b in zip(p_s, p_t, strict=True)])
    intra = 1 - mean([pearson(a, b) for a, b in zip(p_s.T, p_t.T, strict=True)]) if len(p_s) > 1 else 1.0
    return 16 * (inter + intra)


def ttm(f_s, f_t, p, method, known, power=0.1, weighted=False):
    loss = []
    for s, t in zip(known["logit_s"], known["logit_t"], strict=True):
        powers = softmax(t) ** power
        kl = divergence(powers / powers.sum(), softmax(s))
        loss.append(kl * powers.sum() if weighted else kl)
    return mean(loss)


def wttm(f_s, f_t, p, method, known):
    return ttm(f_s, f_t, p, method, known, power=0.2, weighted=True)


def itrd(f_s, f_t, p, method, known):
    e, n = linear(f_s, p, "embed"), len(f_s)

    def standard(column):
        constant = column.max() == column.min()
        return 0 * column if constant else (column - column.mean()) / (column.var() ** 0.5)

    c = [standard(e[:, j]) @ standard(f_t[:, j]) / n for j in range(f_t.size(1))]
    v = f_s if f_s.size(1) == f_t.size(1) else e
    pairs = [(i, j) for i in range(n) for j in range(n)]
    gram_s, gram_t = ({(i, j): unit(f[i]) @ unit(f[j]) for i, j in pairs} for f in (v, f_t))
    joint = {pair: gram_s[pair] * gram_t[pair] for pair in pairs}
    mutual = sum((gram_s[pair] / n) ** 2 - (joint[pair] / n) ** 2 for pair in pairs)  # traces of n
    return 2 * sum(abs(x - 1) ** 2.02 for x in c).log2() + method.lambda_mutual * mutual


def srrl(f_s, f_t, p, method, known):
    if len(f_s) == 1:
        return 0.0
    v = torch.stack([p["transfer.0.weight"][:, :, 0, 0] @ x for x in f_s])
    v = batch_norm(v, p, "transfer.1.").relu()
    logit = torch.stack([known["head_t"].weight @ x + known["head_t"].bias for x in v])
    return squared_error(v, f_t) + squared_error(logit, known["logit_t"])


def simkd(f_s, f_t, p, method, known):
    return squared_error(f_s, F.adaptive_avg_pool2d(f_t.relu(), f_s.shape[2:]))


def nearest(f, size):
    rows, columns = ([i * n // m for i in range(m)] for n, m in zip(f.shape[2:], size, strict=True))
    return f[:, :, rows][:, :, :, columns]


def reviewkd(g_s, g_t, p, method, known):
    if len(g_s[0]) == 1:
        return 0.0
    loss, review = 0.0, None
    levels = [(f[:, :, None, None] if f.dim() == 2 else f for f in pair) for pair in zip(g_s, g_t, strict=True)]
    for i, (f_s, f_t) in enumerate(reversed(levels)):
        x = batch_norm(F.conv2d(f_s, p[f"abfs.{i}.conv1.0.weight"]), p, f"abfs.{i}.conv1.1.")
        if i > 0:
            deeper = nearest(review, x.shape[2:])
            score = F.conv2d(
                torch.cat([x, deeper], 1), p[f"abfs.{i}.att_conv.0.weight"], p[f"abfs.{i}.att_conv.0.bias"]
            )
            score = 1 / (1 + (-score).exp())
            x = score[:, :1] * x + score[:, 1:] * deeper
        review = nearest(x, f_t.shape[2:])
        out = F.conv2d(review, p[f"abfs.{i}.conv2.0.weight"], padding=1)
        out = batch_norm(out, p, f"abfs.{i}.conv2.1.")
        terms = [squared_error(out, f_t)]
        for n in [n for n in (4, 2, 1) if n < out.size(2)]:
            terms.append(squared_error(*(F.adaptive_avg_pool2d(f, n) for f in (out, f_t))))
        shares = [2.0**-k for k in range(len(terms))]
        loss = loss + sum(a * b for a, b in zip(shares, terms, strict=True)) / sum(shares)
    return 0.25 * loss


def of_benchmark(name):
    """The benchmark's form, which trains the method's own parameters, not those that are passed."""

    def reference(f_s, f_t, p, method, known):
        loss = REFERENCES[name](method, f_s, f_t, **({"index": method.drawn} if name == "crd" else {}))
        for Z in (method.contrast.Z_v1, method.contrast.Z_v2) if name == "crd" else ():
            Z.zero_()  # as the product's first batch sets them, too
        return loss

    return reference


MAIN = {"hint": hint, "attention": attention, "similarity": similarity, "correlation": correlation, "vid": vid}
MAIN |= {"rkd": rkd, "pkt": pkt, "factor": factor, "icd": icd, "rrd": rrd}
MAIN |= {"dkd": dkd, "rld": rld, "nkd": nkd, "dist": dist, "ttm": ttm, "wttm": wttm, "itrd": itrd, "srrl": srrl}
MAIN |= {"simkd": simkd, "reviewkd": reviewkd}
MAIN |= {name: of_benchmark(name) for name in ("nst", "crd", "kdsvd")}
FIRST = {"abound": abound, "fsp": of_benchmark("fsp"), "factor": factor_first}
LOOP_ONLY = {"none", "kd"}  # no term of their own: kd_loss is tested below


def has(method, name):
    return getattr(distiller_dict[method], name) is not getattr(Distiller, name)


def test_every_method_has_its_reference():
    assert {name for name in distiller_dict if has(name, "forward")} == set(MAIN)
    assert {name for name in distiller_dict if has(name, "init_loss")} == set(FIRST)
    assert set(MAIN) | set(FIRST) | LOOP_ONLY == set(distiller_dict)


# --- values and gradients ---


def selected(g, feats):
    return g[feats] if isinstance(feats, slice) else [g[feats]]


def leaves_of(method, g_s, known):
    """What of the student's reaches the method."""
    return [*selected(g_s, method.feats), *([known["logit_s"]] if "logit_s" in method.needs else [])]


def own_term(stage, method, g_s, g_t, known):
    """The product's loss of what the loop would pass."""
    f_s, f_t = g_s[method.feats], g_t[method.feats]
    if stage == "first":
        return method.init_loss(f_s, f_t)
    return method(f_s, f_t, **{key: known[key] for key in method.needs})


def keep_draw(method, batch):
    """Let the CRD memory draw once, and use that draw again."""
    if hasattr(method, "contrast"):
        method.drawn = method.contrast.draw(torch.arange(batch))
        method.contrast.draw = lambda index: method.drawn


def move_off_start(method):
    """Parameters that start equal or at zero (batch norm, scales, temperatures) at general places."""
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in method.parameters():
            p += 0.1 * torch.randn(p.shape, generator=noise, dtype=p.dtype)


def near(got, want, rtol, what):
    scale = max(float(want.abs().max()), 1e-12) if want.numel() else 1.0
    worst = float((got - want).abs().max()) / scale if want.numel() else 0.0
    assert worst < rtol, f"{what}: differs by {worst:.2e} of its largest entry"


def grads_or_zeros(tensors):
    return [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors]


STAGES = [(name, "main") for name in MAIN] + [(name, "first") for name in FIRST]


@pytest.mark.parametrize(("relation", "batch"), CASES)
@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_value_and_gradients(name, stage, relation, batch):
    g_s, g_t = features(name, relation, batch)
    method, known = build(name, g_s, g_t), known_of(g_s, g_t)
    move_off_start(method)
    keep_draw(method, batch)
    params = dict(method.named_parameters())
    if name not in REFERENCES:
        params = {key: p.detach().clone().requires_grad_() for key, p in params.items()}
    reference = (MAIN if stage == "main" else FIRST)[name]
    want = torch.as_tensor(reference(g_s[method.feats], g_t[method.feats], params, method, known))
    if want.requires_grad:
        want.backward()
    leaves = leaves_of(method, g_s, known)
    wanted, wanted_params = grads_or_zeros(leaves), {key: grads_or_zeros([p])[0] for key, p in params.items()}
    method.zero_grad(set_to_none=True)
    for leaf in leaves:
        leaf.grad = None

    loss = own_term(stage, method, g_s, g_t, known)
    assert loss.shape == () and loss.dtype == torch.float64
    loss.backward()
    near(loss.detach(), want.detach().double(), 1e-10, "loss")
    for i, (got, grad) in enumerate(zip(grads_or_zeros(leaves), wanted, strict=True)):
        near(got, grad, 1e-8, f"gradient of input {i}")
    largest = max((float(grad.abs().max()) for grad in [*wanted, *wanted_params.values()]), default=0.0)
    for key, p in method.named_parameters():
        got, grad = grads_or_zeros([p])[0], wanted_params[key]
        if float(grad.abs().max()) < 1e-10 * largest:  # zero but for rounding, as a bias before batch norm
            assert float(got.abs().max()) < 1e-9 * largest, key
        else:
            near(got, grad, 1e-8, f"gradient of {key}")


LISTS = [
    (name, stage)
    for name, stage in STAGES
    if isinstance(distiller_dict[name].feats, slice) and distiller_dict[name].feats != slice(0)
]


@pytest.mark.parametrize(("name", "stage"), LISTS)
def test_lists_of_unequal_length_are_refused(name, stage):
    """No map is left out silently, neither when a method is built nor when it is called."""
    g = [torch.rand(2, 3, 4, 4) for _ in range(4)] + [torch.rand(2, 3)]
    method, known = build(name, g, g), known_of(g, g)
    for short_s, short_t in ((g, g[1:]), (g[1:], g)):
        with pytest.raises(DistillError, match=f"method {name} compares [234] student maps"):
            build(name, short_s, short_t)
        with pytest.raises(ValueError, match=r"zip\(\)"):
            own_term(stage, method, short_s, short_t, known)


@pytest.mark.parametrize("T", [1.0, 4.0, 20.0])
@pytest.mark.parametrize(("batch", "n_cls"), [(1, 3), (5, 7), (9, 2)])
@pytest.mark.parametrize("logit_stand", [False, True])
def test_kd(batch, n_cls, T, logit_stand):
    noise = torch.Generator().manual_seed(batch)
    logit_s, logit_t = (torch.randn(batch, n_cls, generator=noise, dtype=torch.float64) * 6 for _ in range(2))
    ours, slow = logit_s.clone().requires_grad_(), logit_s.clone().requires_grad_()
    forms = [slow, logit_t]
    if logit_stand:
        forms = [torch.stack([(v - v.mean()) / (v.var().sqrt() + 1e-7) for v in z]) for z in forms]
    want = kd(*forms, T)
    want.backward()
    loss = create_distiller("kd", {"logit_stand": logit_stand}).kl(ours, logit_t, T)
    loss.backward()
    near(loss.detach(), want.detach(), 1e-10, "loss")
    near(ours.grad, slow.grad, 1e-8, "gradient")


@pytest.mark.parametrize("mode", ["exact", "relax"])
def test_the_banks_of_crd_follow(mode):
    """After each step the rows of the batch, and no others, move towards its embeddings; Z stays the first batch's."""
    g_s, g_t = features("crd", "equal", 3)
    method, Z = build("crd", g_s, g_t, mode=mode), set()
    params = {key: p.detach() for key, p in method.named_parameters()}
    for step in range(3):
        index = torch.tensor([step, step + 4, 9])
        f_s, f_t = g_s[-1].detach() + step, g_t[-1] - step
        before = {bank: getattr(method.contrast, bank).clone() for bank in ("memory_v1", "memory_v2")}
        method(f_s, f_t, index=index)
        assert torch.equal(before["memory_v1"], method.contrast.memory_v1)  # not before backward
        method.after_step()
        for bank, f, side in (("memory_v1", f_s, "embed_s"), ("memory_v2", f_t, "embed_t")):
            for i, v in zip(index, linear(f, params, side), strict=True):
                before[bank][i] = unit(0.7 * before[bank][i] + 0.3 * unit(v))
            near(getattr(method.contrast, bank), before[bank], 1e-12, bank)
        Z.add((method.contrast.Z_v1.item(), method.contrast.Z_v2.item()))
    assert len(Z) == 1


@pytest.mark.parametrize("batch", [1, 5, 7, 9, 20])
def test_rrd_takes_any_batch(batch):
    """Seven places: a batch may end anywhere or be larger than the queue; from the pointer on, oldest to latest."""
    g_s, g_t = features("rrd", "equal", batch)
    method = build("rrd", g_s, g_t)
    params = {key: p.detach() for key, p in method.named_parameters()}
    near(method.queue.norm(dim=1), torch.ones(7, dtype=torch.float64), 1e-6, "norms of the first content")
    held = deque(method.queue.clone(), maxlen=7)
    for step in range(4):
        f_t = g_t[-1] + step
        before = method.queue.clone()
        method(g_s[-1], f_t).backward()
        assert torch.equal(method.queue, before)
        method.after_step()
        held.extend(unit(v) for v in linear(f_t, params, "embed_t"))
        near(method.queue.roll(-int(method.queue_ptr), 0), torch.stack(list(held)), 1e-12, "queue")
    assert method.queue.is_leaf and {"queue", "queue_ptr"} <= set(method.state_dict())


# --- properties ---


def test_gradients_of_standardised_logits():
    """They sum to zero over the classes and are orthogonal to the deviations from the mean."""
    z = (5 * torch.randn(7, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).requires_grad_()
    kd_loss(standardise(z), torch.rand(7, 11, dtype=torch.float64), 2.0).backward()
    scale = float(z.grad.abs().max())
    assert scale > 0 and float(z.grad.sum(1).abs().max()) < 1e-12 * scale
    assert (
        float((z.grad * (z - z.mean(1, keepdim=True)).detach()).sum(1).abs().max()) < 1e-5 * scale
    )  # but for the epsilon


def test_standardised_methods_see_no_scale_and_shift():
    g_s, g_t = features("dkd", "equal", 6)
    known = known_of(g_s, g_t)
    scaled = known | {"logit_s": 3 * known["logit_s"] - 7, "logit_t": 0.2 * known["logit_t"] + 40}
    for name in ("dkd", "rld"):
        plain, standard = build(name, g_s, g_t), build(name, g_s, g_t, logit_stand=True)
        values = [[own_term("main", m, g_s, g_t, k).item() for k in (known, scaled)] for m in (plain, standard)]
        assert values[0][0] != pytest.approx(values[0][1], rel=1e-2) and values[1][0] == pytest.approx(values[1][1])


def test_dist_compares_correlations():
    """A sample's probabilities may have another scale and shift than the teacher's, a class's another shift."""
    noise = torch.Generator().manual_seed(0)
    p, q, scale, shift = (torch.rand(n, 9, generator=noise, dtype=torch.float64) for n in (6, 6, 6, 1))
    p, scale, shift = p / p.sum(1, keepdim=True), scale[:, :1], 0.01 * (shift - shift.mean())
    method = create_distiller("dist")
    for method.w_inter, method.w_intra, other in ((1.0, 0.0, scale * p + (1 - scale) / 9), (0.0, 1.0, p + shift)):
        losses = [float(method([], [], logit_s=4 * x.log(), logit_t=4 * q.log())) for x in (p, other, q)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[0] > 1 > 1e-4 > losses[2]


def test_itrd_takes_a_constant_channel_as_uncorrelated():
    """On either side; it gets no gradient, and the others get theirs."""
    g_s, g_t = features("itrd", "equal", 4)
    for constant in ("student", "teacher"):
        method, f_t = build("itrd", g_s, g_t, lambda_mutual=0.0), g_t[-1].clone()
        if constant == "student":
            method.embed.linear.weight.data[0] = 0
        else:
            f_t[:, 0] = 0.7
        loss, params = method(g_s[-1], f_t), dict(method.named_parameters())
        loss.backward()
        assert loss.item() == pytest.approx(itrd(g_s[-1], f_t, params, method, {}).item(), rel=1e-10)
        grad = params["embed.linear.weight"].grad
        assert not grad[0].any() and grad[1].any()


# --- degenerate input, and float32 ---


def spoil(g_s, g_t, kind):
    g_s = [f.detach().clone() for f in g_s]
    if kind == "same":
        g_s = [f.clone() for f in g_t]
    for g, side in ((g_s, "student"), (g_t, "teacher")):
        for f in g:
            if kind in ("zeros", f"{side} zeros"):
                f.zero_()
            elif kind == "zero row":
                f[0] = 0
            elif kind == "two zero rows":
                f[:2] = 0
            elif kind == "zero channel":
                f[:, 0] = 0
            elif kind == "constant":
                f.fill_(0.7)
            elif kind == "equal samples":
                f[:] = f[:1].clone()
            elif kind == "tiny":
                f *= 1e-20
            elif kind == "large":
                f *= 1e4
            elif kind == "negative":
                f.copy_(-f.abs())
    return [f.requires_grad_() for f in g_s], g_t


KINDS = ["zeros", "student zeros", "teacher zeros", "zero row", "two zero rows", "zero channel", "constant"]
KINDS += ["equal samples", "same", "one", "tiny", "large", "negative"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_degenerate_features_stay_finite(name, stage, kind):
    for dtype in (torch.float32, torch.float64):
        for batch in (1,) if kind == "one" else (2, 5):
            shapes = [(batch, 4, *size) for size in ((4, 6), (4, 6), (2, 3), (2, 3))] + [(batch, 4)]
            noise = torch.Generator().manual_seed(batch)
            g_s, g_t = ([torch.randn(s, generator=noise).to(dtype) for s in shapes] for _ in range(2))
            g_s, g_t = spoil(g_s, g_t, kind)
            method = build(name, g_s, g_t)
            loss = own_term(stage, method, g_s, g_t, known_of(g_s, g_t))
            assert loss.isfinite(), f"{dtype}, batch {batch}: {loss}"
            loss.backward()
            for key, p in [*enumerate(g_s), *method.named_parameters()]:
                assert p.grad is None or p.grad.isfinite().all(), f"{dtype}, batch {batch}: gradient of {key}"
            method.after_step()
            assert all(b.isfinite().all() for b in method.buffers())


def spoil_logits(logit, target, kind):
    """Rows of equal logits, and the label's logit far ahead of or behind the others, in float32."""
    z, rows = logit.detach().clone(), torch.arange(len(logit))
    if kind == "constant":
        z.fill_(3.0)
    elif kind == "large":
        z *= 1e4
    elif kind == "ahead":
        z[rows, target] = 500.0
    elif kind == "far ahead":
        z[rows, target] = 1e4
    elif kind == "behind":
        z[rows, target] = -1e4
    return z


@pytest.mark.parametrize("kind_t", ["plain", "constant", "large", "ahead", "far ahead", "behind"])
@pytest.mark.parametrize("kind_s", ["plain", "constant", "large", "ahead", "far ahead", "behind"])
def test_extreme_logits_stay_finite(kind_s, kind_t):
    g_s, g_t = features("dkd", "equal", 5, torch.float32)
    known = known_of(g_s, g_t)
    plain, known["logit_t"] = known["logit_s"], spoil_logits(known["logit_t"], known["target"], kind_t)
    for name in [name for name in MAIN if "logit_s" in distiller_dict[name].needs] + ["kd"]:
        for options in [{}, {"logit_stand": True}][: 1 + ("logit_stand" in method_options(name))]:
            logit_s = spoil_logits(plain, known["target"], kind_s).requires_grad_()
            method = build(name, g_s, g_t, **options)
            if name == "kd":
                loss = method.kl(logit_s, known["logit_t"], 4.0)
            else:
                loss = own_term("main", method, g_s, g_t, known | {"logit_s": logit_s})
            loss.backward()
            assert loss.isfinite() and logit_s.grad.isfinite().all(), (name, options)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", list(MAIN))
def test_a_diverged_student_shows_in_the_loss(name, value):
    """And raises nothing: a student whose loss is not finite is stopped, and those beside it go on."""
    shapes = [(4, 3, *size) for size in ((4, 4), (4, 4), (2, 4), (2, 4))] + [(4, 3)]
    noise = torch.Generator().manual_seed(0)
    g_s, g_t = ([torch.randn(s, generator=noise) for s in shapes] for _ in range(2))
    known = known_of(g_s, g_t)
    with torch.no_grad():
        for f in [*g_s, known["logit_s"]]:
            f[1] = value
    method = build(name, g_s, g_t)
    loss = own_term("main", method, [f.requires_grad_() for f in g_s], g_t, known)
    assert not loss.isfinite()
    loss.backward()
    method.after_step()


@pytest.mark.parametrize("scale", [-200.0, 200.0])
def test_vid_of_extreme_variances(scale):
    g_s, g_t = features("vid", "equal", 3, torch.float32)
    method = build("vid", g_s, g_t)
    for key, p in method.named_parameters():
        if key.endswith("log_scale"):
            p.data.fill_(scale)
    loss = method(g_s[1:-1], g_t[1:-1])
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in method.parameters())


@pytest.mark.parametrize("name", list(MAIN))
def test_min_batch(name):
    """A smaller batch teaches nothing, one of that size does."""
    least = distiller_dict[name].min_batch
    for batch in {least, least - 1} - {0}:
        g_s, g_t = features(name, "equal", batch)
        method, known = build(name, g_s, g_t), known_of(g_s, g_t)
        own_term("main", method, g_s, g_t, known).backward()
        moved = any(g.abs().max() > 1e-9 for g in grads_or_zeros(leaves_of(method, g_s, known)))
        assert moved == (batch == least), f"{name} at {batch}"


# Twice what the methods' own differences of near equal numbers cost in float32.
COARSE = {"pkt": 1e-2}


@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_float32_is_near_float64(name, stage):
    results = []
    for dtype in (torch.float32, torch.float64):
        g_s, g_t = features(name, "equal", 8, dtype)
        g_s, g_t = ([f.detach().float().to(dtype).requires_grad_(f.requires_grad) for f in g] for g in (g_s, g_t))
        method, known = build(name, g_s, g_t), known_of(g_s, g_t)
        loss = own_term(stage, method, g_s, g_t, known)
        loss.backward()
        grads = grads_or_zeros(leaves_of(method, g_s, known))
        results.append([loss.detach().double(), *(g.double() for g in grads)])
    for got, want in zip(*results, strict=True):
        near(got, want, COARSE.get(name, 1e-3), name)


@pytest.mark.parametrize("name", ["dkd", "nkd"])
def test_two_classes_are_refused(name):
    with pytest.raises(DistillError):
        create_distiller(name, n_cls=2)


# --- SimKD's network ---


def shapes_of(student, teacher):
    return {"s_shapes": feature_shapes(student), "t_shapes": feature_shapes(teacher)}


def reuse(arch_s, arch_t, n_cls=7, **options):
    student, teacher = create_model(arch_s, n_cls), create_model(arch_t, n_cls).requires_grad_(False)
    data = {**shapes_of(student, teacher), "n_cls": n_cls, "head_t": head(teacher)}
    method = create_distiller("simkd", options, **data)
    teacher(torch.rand(8, 3, 32, 32))  # batch-norm statistics other than 0 and 1
    return method, method.predictor(student), teacher.eval()


@pytest.mark.parametrize("arch_t", ["wrn_16_1", "vgg8", "resnet14"])
@pytest.mark.parametrize("arch_s", ["resnet8", "wrn_16_2", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2"])
def test_simkd_trains_all_but_the_classifier(arch_s, arch_t):
    torch.manual_seed(0)
    method, model, teacher = reuse(arch_s, arch_t)
    images = torch.rand(4, 3, 32, 32)
    feats, logit = model.train()(images, is_feat=True)
    feats_t, logit_t = teacher(images, is_feat=True, preact=method.preact_t)
    method(feats[method.feats], feats_t[method.feats]).backward()
    for frozen in (lambda p: p.grad is None, lambda p: not p.requires_grad):
        assert {key for key, p in model.named_parameters() if frozen(p)} == {"fc.weight", "fc.bias"}
    assert torch.equal(feats[-1], feats[-2].mean((2, 3))) and torch.equal(head(model)(feats[-1]), logit)
    # had the student the teacher's map, it would predict as the teacher does
    near(model.fc(feats_t[-2].relu().mean((2, 3))), logit_t, 1e-5, "prediction")
    *before, last, _ = model.eval()(images, is_feat=True, preact=True)[0]
    assert torch.equal(last.relu(), model(images, is_feat=True)[0][-2]) and (last < 0).any()
    stages = model.net(images, is_feat=True, preact=True)[0]
    assert all(torch.equal(a, b) for a, b in zip(before, stages[:-2], strict=True))

    torch.manual_seed(1)
    again = create_model(model.arch, 7).eval()
    again.load_state_dict(model.state_dict())
    assert again.arch == model.arch and torch.equal(again(images), model(images))


def test_simkd_has_the_published_number_of_parameters():
    _, model, _ = reuse("resnet8x4", "resnet32x4")
    assert model.arch == "resnet8x4-simkd256f2" and sum(p.numel() for p in model.transfer.parameters()) == 214_016


def test_simkd_refuses_what_it_cannot_reuse():
    for arch_t in ("MobileNetV2", "ShuffleV2"):
        with pytest.raises(DistillError, match="method simkd: "):
            reuse("resnet8", arch_t)
    student, teacher = create_model("resnet8", 7), create_model("resnet14", 5)
    with pytest.raises(DistillError, match="5 classes"):
        create_distiller("simkd", **shapes_of(student, teacher), n_cls=7, head_t=head(teacher))
    for name in ("resnet9-simkd64f2", "resnet8-simkd64f0", "resnet8-simkd4f8", "resnet8-simkd"):
        with pytest.raises(ModelError):
            create_model(name, 7)


# --- combinations ---


@pytest.mark.parametrize("name", ["crd:0.5+wttm:4", "wttm+itrd", "dkd+reviewkd:0.6", "hint+nst:2+rrd"])
def test_combination_is_the_weighted_sum(name):
    g_s, g_t = features("hint", "equal", 4)
    known = known_of(g_s, g_t)
    options = {"feat_dim": 3, "nce_k": 5}
    method = build(name, g_s, g_t, **options)
    cls = distiller_class(name)
    total = 0.0
    for part, own in method.methods.items():
        weight = cls.given.get(part, distiller_dict[part].weights["beta"])
        keep_draw(own, 4)
        total = total + weight * own_term("main", own, g_s, g_t, known)
    assert own_term("main", method, g_s, g_t, known).item() == pytest.approx(total.item(), rel=1e-12)
    assert method.weights == {"gamma": 1.0, "alpha": 0.0, "beta": 1.0}
    before = {key: value.clone() for key, value in method.named_buffers() if key.endswith(("memory_v1", "queue"))}
    assert bool(before) == ("crd" in name or "rrd" in name) and len(method.generators()) == ("crd" in name)
    method.after_step()
    assert all(not torch.equal(value, method.get_buffer(key)) for key, value in before.items())
    other = build(name, g_s, g_t, **options)
    other.load_state_dict(method.state_dict())
    assert method_name(name) == method_name(method_name(name)) and ":" not in method_name(name)


def test_names_of_combinations():
    assert method_name("WTTM+crd:0.5") == "crd_0.5+wttm" and method_name("cc+AT_30") == "attention_30+correlation"
    both = distiller_class("itrd+crd")
    assert both.needs == ("index",) and both.min_batch == 2 and both.capturable and both.has_teacher
    assert distiller_class("dkd+reviewkd").preact_t and not distiller_class("dkd+reviewkd").preact_s
    for name in ("crd+crd:2", "crd:2", "crd:0+wttm", "crd:x+wttm", "crd+", "kd+crd", "fsp+crd", "crd+simkd"):
        with pytest.raises(DistillError):
            method_name(name)
    with pytest.raises(DistillError, match="before the last ReLU"):
        method_name("attention+reviewkd")


# --- published settings of pairs ---


def test_settings_are_weights_or_options():
    """Of every published pair, with and without standardised logits."""
    for name, method in [*distiller_dict.items(), ("dkd+reviewkd", distiller_class("dkd+reviewkd"))]:
        allowed = {*method.weights, "kd_T", *method_options(name)}
        for arch_t in model_dict:
            for arch_s in model_dict:
                for options in ({}, {"logit_stand": True}):
                    found = method.settings(arch_t, arch_s, options)
                    assert found.keys() <= allowed and all(value > 0 for value in found.values())


def test_settings_of_a_pair():
    pair, other = ("resnet56", "resnet20"), ("resnet14", "resnet8")
    standard = {"logit_stand": True}
    assert distiller_dict["dkd"].settings(*pair, {}) == {"dkd_beta": 2} and not distiller_dict["dkd"].settings(
        *other, {}
    )
    assert distiller_dict["dkd"].settings(*pair, standard) == {"beta": 18, "dkd_T": 3, "dkd_beta": 2}
    assert distiller_dict["kd"].settings(*other, standard) == {"kd_T": 2, "alpha": 9}
    assert distiller_class("dkd+reviewkd").settings(*pair, {}) == {"dkd_beta": 2, "reviewkd_weight": 0.6}
    assert distiller_class("dkd+reviewkd:3").settings(*pair, {}) == {"dkd_beta": 2}
    g_s, g_t = features("dkd", "equal", 2)
    built = [build("dkd+reviewkd", g_s, g_t, **options).weight for options in ({}, {"reviewkd_weight": 0.6})]
    assert built == [{"dkd": 1, "reviewkd": 5}, {"dkd": 1, "reviewkd": 0.6}]


# --- docs/add_a_method.md ---


def test_the_examples_of_the_document_work(monkeypatch):
    text = (Path(__file__).parent.parent / "docs" / "add_a_method.md").read_text()
    names = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    examples = {name: c for name, c in names.items() if isinstance(c, type) and c.__module__ == "builtins"}
    assert len(examples) == 7
    student, teacher = create_model("resnet8", N_CLS), create_model("resnet14", N_CLS).requires_grad_(False)
    for name, cls in examples.items():
        monkeypatch.setitem(distiller_dict, name.lower(), cls)
        (g_s, logit_s), (g_t, _) = (net(torch.rand(4, 3, 32, 32), is_feat=True) for net in (student, teacher))
        method, known = build(name.lower(), g_s, g_t), known_of(g_s, g_t)
        loss = own_term("main", method, g_s, g_t, known) + method.kl(logit_s, known["logit_t"], 4.0)
        loss.backward()
        assert loss > 0 and method.predictor(student) is student
    assert names["CosineOfPairs"].settings("resnet56", "resnet20", {}) == {"beta": 5.0, "sharpness": 2.0}
