"""Every method against a slow loop over samples, channels and positions; degenerate features; float32."""

import math
import random
from collections import deque
from itertools import pairwise

import pytest
import torch

from distiller_zoo import Distiller, DistillError, create_distiller, distiller_dict, kd_loss

# How a student's map differs from the teacher's, and the batch.
CASES = [("equal", 3), ("smaller", 1), ("smaller", 4), ("larger", 5), ("crossed", 2), ("crossed", 9), ("few", 4)]
LABELS = [0, 0, 1, 1, 1, 2, 2, 4, 4, 4, 4, 1, 2]  # 13 samples, class 3 has none


# --- features of two imaginary networks: stem, three maps, pooled ---


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
        if name in ("fsp", "kdsvd") or (i == 2 and relation == "equal"):
            c_s = c_t
        size_s, size_t = sizes(relation, rng, name in ("hint", "abound"))
        g_s.append((batch, c_s, *size_s))
        g_t.append((batch, c_t, *size_t))
    g_s.append((batch, rng.randint(2, 6)))
    g_t.append((batch, rng.randint(2, 6)))
    draw = [[torch.randn(shape, generator=noise, dtype=torch.float64) + 0.3 for shape in g] for g in (g_s, g_t)]
    if name == "abound":  # whose boundary is zero
        draw[1] = [f * (f.abs() > 0.3) for f in draw[1]]
    return [f.to(dtype).requires_grad_() for f in draw[0]], [f.to(dtype) for f in draw[1]]


OPTIONS = {
    "correlation": {"feat_dim": 3},
    "crd": {"feat_dim": 3, "nce_k": 5},
    "icd": {"feat_dim": 3},
    "rrd": {"feat_dim": 3, "nce_k": 7},
}


def build(name, g_s, g_t, **options):
    """The method as a training script builds it, in the features' type."""
    torch.manual_seed(1)
    shapes = {"s_shapes": [tuple(f.shape) for f in g_s], "t_shapes": [tuple(f.shape) for f in g_t]}
    data = dict(s_dim=g_s[-1].size(1), t_dim=g_t[-1].size(1), labels=LABELS, n_data=len(LABELS), n_cls=5)
    method = create_distiller(name, {**OPTIONS.get(name, {}), **options}, **shapes, **data).to(g_s[0].dtype)
    return method.train()


def needs(method, batch):
    known = {"index": torch.arange(batch), "target": torch.tensor(LABELS[:batch])}
    return {key: known[key] for key in method.needs}


# --- plain arithmetic, on floats and on scalars that record gradients ---


def nested(t):
    """A tensor as nested lists: of floats, or of scalars that gradients flow through."""
    if not t.requires_grad:
        return t.tolist()
    return [nested(x) for x in t.unbind()] if t.dim() else t


def of_math(name):
    return lambda x: getattr(x, name)() if isinstance(x, torch.Tensor) else getattr(math, name)(x)


exp, log, sqrt = of_math("exp"), of_math("log"), of_math("sqrt")


def number(x):
    """A scalar as a constant."""
    return float(x.detach()) if isinstance(x, torch.Tensor) else x


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def unit(v):
    norm = sqrt(dot(v, v))
    return [x / norm for x in v]


def softmax(v):
    top = max(number(x) for x in v)
    e = [exp(x - top) for x in v]
    return [x / sum(e) for x in e]


def transposed(m):
    return [list(column) for column in zip(*m, strict=True)]


def flat(f):
    return [x for row in f for x in (flat(row) if isinstance(row, list) else [row])]


def smooth_l1(d):
    d = abs(d)
    return 0.5 * d * d if number(d) < 1 else d - 0.5


def pool(plane, h, w):
    """Average over the cells of an h x w grid; cells that do not fit overlap."""
    H, W = len(plane), len(plane[0])

    def cell(i, n, N):
        return range(i * N // n, -(-(i + 1) * N // n))

    return [[mean(plane[y][x] for y in cell(i, h, H) for x in cell(j, w, W)) for j in range(w)] for i in range(h)]


def pooled(f_s, f_t):
    """Two batches of maps, each plane at the smaller height and the smaller width."""
    h, w = min(len(f_s[0][0]), len(f_t[0][0])), min(len(f_s[0][0][0]), len(f_t[0][0][0]))
    return [[[pool(plane, h, w) for plane in f] for f in batch] for batch in (f_s, f_t)]


def conv(f, weight, bias=None, stride=1, pad=0):
    """Convolution of a batch, one output at a time."""
    kh, kw = len(weight[0][0]), len(weight[0][0][0])
    H, W = len(f[0][0]), len(f[0][0][0])

    def at(x, o, i, j):
        out = bias[o] if bias else 0.0
        for c, plane in enumerate(x):
            for a in range(kh):
                for b in range(kw):
                    y, z = i * stride + a - pad, j * stride + b - pad
                    if 0 <= y < H and 0 <= z < W:
                        out = out + plane[y][z] * weight[o][c][a][b]
        return out

    h, w = (H + 2 * pad - kh) // stride + 1, (W + 2 * pad - kw) // stride + 1
    return [[[[at(x, o, i, j) for j in range(w)] for i in range(h)] for o in range(len(weight))] for x in f]


def conv_transpose(f, weight, bias, stride, pad):
    """Every input spreads its kernel over the output."""
    k, H, W = len(weight[0][0]), len(f[0][0]), len(f[0][0][0])
    h, w = (H - 1) * stride - 2 * pad + k, (W - 1) * stride - 2 * pad + k
    out = [[[[bias[o]] * w for _ in range(h)] for o in range(len(bias))] for _ in f]
    for n, x in enumerate(f):
        for c, plane in enumerate(x):
            for i in range(H):
                for j in range(W):
                    for o in range(len(bias)):
                        for a in range(k):
                            for b in range(k):
                                y, z = i * stride + a - pad, j * stride + b - pad
                                if 0 <= y < h and 0 <= z < w:
                                    out[n][o][y][z] = out[n][o][y][z] + plane[i][j] * weight[c][o][a][b]
    return out


def batch_norm(f, weight, bias):
    """With the statistics of the batch."""
    out = [[None] * len(weight) for _ in f]
    for c in range(len(weight)):
        values = [v for x in f for v in flat(x[c])]
        mu = mean(values)
        sd = sqrt(mean((v - mu) ** 2 for v in values) + 1e-5)
        for n, x in enumerate(f):
            out[n][c] = [[(v - mu) / sd * weight[c] + bias[c] for v in row] for row in x[c]]
    return out


def leaky(f, slope):
    return [[[[v if v > 0 else slope * v for v in row] for row in plane] for plane in x] for x in f]


def squared_error(a, b):
    return mean((x - y) ** 2 for x, y in zip(flat(a), flat(b), strict=True))


# --- the methods, from their formulas: (student's nested features, teacher's, parameters by name, method, index) ---


def kd(logit_s, logit_t, T):
    loss = 0.0
    for s, t in zip(logit_s, logit_t, strict=True):
        q, p = softmax([x / T for x in s]), softmax([x / T for x in t])
        loss = loss + sum(b * (log(b) - log(a)) for a, b in zip(q, p, strict=True))
    return T * T * loss / len(logit_s)


def conv_reg(f, size, params, prefix, relu):
    """Which convolution, from the sizes of the maps."""
    weight, bias = params[prefix + "conv.weight"], params[prefix + "conv.bias"]
    H, W = len(f[0][0]), len(f[0][0][0])
    if (2 * size[0], 2 * size[1]) == (H, W):
        f = conv(f, weight, bias, stride=2, pad=1)
    elif size == (2 * H, 2 * W):
        f = conv_transpose(f, weight, bias, stride=2, pad=1)
    else:
        f = conv(f, weight, bias)
    f = batch_norm(f, params[prefix + "bn.weight"], params[prefix + "bn.bias"])
    return leaky(f, 0.0) if relu else f


def size_of(f):
    return len(f[0][0]), len(f[0][0][0])


def hint(f_s, f_t, params, method, index):
    return squared_error(conv_reg(f_s, size_of(f_t), params, "regress.", relu=True), f_t)


def attention_map(f, p):
    """Of one sample: its channels' mean power, as a unit vector over positions."""
    return unit([mean(flat(plane)[i] ** p for plane in f) for i in range(len(flat(f[0])))])


def attention(g_s, g_t, params, method, index):
    loss = 0.0
    for f_s, f_t in zip(g_s, g_t, strict=True):
        f_s, f_t = pooled(f_s, f_t)
        loss = loss + squared_error([attention_map(f, 2) for f in f_s], [attention_map(f, 2) for f in f_t])
    return loss


def similarity(f_s, f_t, params, method, index):
    def gram(f):
        return [unit([dot(flat(a), flat(b)) for b in f]) for a in f]

    n = len(f_s)
    return sum((a - b) ** 2 for a, b in zip(flat(gram(f_s)), flat(gram(f_t)), strict=True)) / n**2


def linear(f, params, prefix):
    weight, bias = params[prefix + ".linear.weight"], params[prefix + ".linear.bias"]
    return [[dot(x, row) + b for row, b in zip(weight, bias, strict=True)] for x in f]


def correlation(f_s, f_t, params, method, index):
    e_s, e_t = linear(f_s, params, "embed_s"), linear(f_t, params, "embed_t")
    d = [[abs(a - b) for a, b in zip(x, y, strict=True)] for x, y in zip(e_s, e_t, strict=True)]
    return mean(dot(d[n], d[n + 1]) for n in range(len(d) - 1)) if len(d) > 1 else 0.0


def vid(g_s, g_t, params, method, index):
    loss = 0.0
    names = [name[: -len("log_scale")] for name in params if name.endswith("log_scale")]
    for prefix, f_s, f_t in zip(names, g_s, g_t, strict=True):
        f_s, f_t = pooled(f_s, f_t)
        mu = f_s
        for layer in (0, 2, 4):
            mu = conv(mu if layer == 0 else leaky(mu, 0.0), params[f"{prefix}regressor.{layer}.weight"])
        terms = []
        for c, scale in enumerate(params[prefix + "log_scale"]):
            var = log(1 + exp(scale)) + 1e-5
            for x, y in zip(mu, f_t, strict=True):
                terms += [0.5 * ((a - b) ** 2 / var + log(var)) for a, b in zip(flat(x[c]), flat(y[c]), strict=True)]
        loss = loss + mean(terms)
    return loss


def rkd(f_s, f_t, params, method, index):
    n = len(f_s)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]

    def minus(a, b):
        return [x - y for x, y in zip(a, b, strict=True)]

    def distances(f):
        d = {(i, j): sqrt(dot(minus(f[i], f[j]), minus(f[i], f[j]))) for i, j in pairs}
        return {pair: value / mean(d.values()) for pair, value in d.items()}

    def angles(f):
        e = {(i, j): unit(minus(f[j], f[i])) for i, j in pairs}
        return [dot(e[i, j], e[i, k]) for i, j in pairs for k in range(n) if k != i]

    d_s, d_t = distances(f_s), distances(f_t)
    distance = sum(smooth_l1(d_s[pair] - d_t[pair]) for pair in pairs) / n**2
    angle = sum(smooth_l1(a - b) for a, b in zip(angles(f_s), angles(f_t), strict=True)) / n**3
    return 25 * distance + 50 * angle


def pkt(f_s, f_t, params, method, index):
    def probabilities(f):
        rows = [[x / (sqrt(dot(v, v)) + 1e-7) for x in v] for v in f]
        S = [[(dot(a, b) + 1) / 2 for b in rows] for a in rows]
        return [[x / sum(row) for x in row] for row in S]

    p_s, p_t = flat(probabilities(f_s)), flat(probabilities(f_t))
    return mean(t * log((t + 1e-7) / (s + 1e-7)) for s, t in zip(p_s, p_t, strict=True))


def nst(g_s, g_t, params, method, index):
    def kernel(a, b):
        return mean(dot(x, y) ** 2 for m, n in zip(a, b, strict=True) for x in m for y in n)

    loss = 0.0
    for f_s, f_t in zip(g_s, g_t, strict=True):
        f_s, f_t = ([[unit(flat(plane)) for plane in f] for f in batch] for batch in pooled(f_s, f_t))
        loss = loss + kernel(f_t, f_t) + kernel(f_s, f_s) - 2 * kernel(f_s, f_t)
    return loss


def fsp(g_s, g_t, params, method, index):
    def flow(low, high):  # of one sample, two neighbouring maps
        h, w = min(len(low[0]), len(high[0])), min(len(low[0][0]), len(high[0][0]))
        low, high = ([flat(pool(plane, h, w)) for plane in f] for f in (low, high))
        return [[dot(a, b) / (h * w) for b in high] for a in low]

    loss = 0.0
    for i in range(len(g_s) - 1):
        flows = [[flow(a, b) for a, b in zip(g[i], g[i + 1], strict=True)] for g in (g_s, g_t)]
        loss = loss + squared_error(*flows)
    return loss


def abound(g_s, g_t, params, method, index):
    loss, n_maps = 0.0, len(g_t)
    for i, (f_s, f_t) in enumerate(zip(g_s, g_t, strict=True)):
        if f"connector.connectors.{i}.conv.weight" in params:
            f_s = conv_reg(f_s, size_of(f_t), params, f"connector.connectors.{i}.", relu=False)
        term = 0.0
        for s, t in zip(flat(f_s), flat(f_t), strict=True):
            if t <= 0 and s > -1:
                term = term + (s + 1) ** 2
            elif t > 0 and s <= 1:
                term = term + (s - 1) ** 2
        loss = loss + term * 2 ** (i - n_maps + 1) / len(f_s) / 1000 * 3
    return loss


def convolutions(f, params, prefix, layers, transpose=False, norm=False):
    for i in layers:
        args = params[f"{prefix}.{i}.weight"], params[f"{prefix}.{i}.bias"], 1, 1
        f = conv_transpose(f, *args) if transpose else conv(f, *args)
        if norm:
            f = batch_norm(f, params[f"{prefix}.{i + 1}.weight"], params[f"{prefix}.{i + 1}.bias"])
        f = leaky(f, 0.1)
    return f


def paraphraser_layers(params, prefix):
    return sorted({int(name.split(".")[-2]) for name in params if name.startswith(prefix) and name.endswith("weight")})


def factor(f_s, f_t, params, method, index):
    q_s = convolutions(f_s, params, "translator.encoder", (0, 3, 6), norm=True)
    q_t = convolutions(f_t, params, "paraphraser.encoder", (0, 3, 6))
    q_s, q_t = ([attention_map(f, 2) for f in q] for q in pooled(q_s, q_t))
    return mean(abs(a - b) for a, b in zip(flat(q_s), flat(q_t), strict=True))


def factor_first(f_s, f_t, params, method, index):
    code = convolutions(f_t, params, "paraphraser.encoder", (0, 3, 6))
    layers = paraphraser_layers(params, "paraphraser.decoder")
    assert len(layers) == 3
    return squared_error(convolutions(code, params, "paraphraser.decoder", layers, transpose=True), f_t)


def crd(f_s, f_t, params, method, index):
    memory = method.contrast
    drawn = method.drawn.tolist()
    n_data, K = len(LABELS), len(drawn[0]) - 1
    c = K / n_data

    def scores(side, f, bank):
        e, bank = [unit(v) for v in linear(f, params, side)], bank.tolist()
        o = [[exp(dot(bank[k], v) / memory.T) for k in row] for v, row in zip(e, drawn, strict=True)]
        Z = mean(number(x) for x in flat(o)) * n_data  # of the first batch, and no part of the graph
        return [[x / Z for x in row] for row in o]

    loss = 0.0
    for side, f, bank in (("embed_s", f_s, memory.memory_v2), ("embed_t", f_t, memory.memory_v1)):
        for own, *others in scores(side, f, bank):
            loss = loss - log(own / (own + c + 1e-7)) - sum(log(c / (x + c + 1e-7)) for x in others)
    return loss / len(f_s)


def icd(f_s, f_t, params, method, index):
    e_s, e_t = ([unit(v) for v in linear(f, params, f"embed_{x}")] for f, x in ((f_s, "s"), (f_t, "t")))
    tau = exp(params["log_tau"])
    logits = [[tau * dot(a, b) + params["b"] for b in e_t] for a in e_s]
    row, column, n = [softmax(r) for r in logits], [softmax(c) for c in transposed(logits)], len(logits)
    contrast = -sum(log(row[i][i]) for i in range(n)) / n
    invariance = sum(q * (log(q) - log(p)) for p, q in zip(flat(row), flat(column), strict=True)) / n
    return contrast + 0.5 * invariance


def rrd(f_s, f_t, params, method, index):
    e_s, e_t = ([unit(v) for v in linear(f, params, f"embed_{x}")] for f, x in ((f_s, "s"), (f_t, "t")))
    queue, loss = method.queue.tolist(), 0.0
    for a, b in zip(e_s, e_t, strict=True):
        p_s, p_t = (softmax([dot(v, k) / tau for k in queue]) for v, tau in ((a, 0.04), (b, 0.1)))
        loss = loss - sum(number(t) * log(s) for s, t in zip(p_s, p_t, strict=True))  # the target is a constant
    return loss / len(f_s)


def jacobi(A):
    """Eigenvectors of a symmetric matrix, the largest eigenvalue's first, by rotations of two axes at a time."""
    n, A = len(A), [list(row) for row in A]
    V = [[float(i == j) for j in range(n)] for i in range(n)]
    for _ in range(30):
        for p in range(n):
            for q in range(p + 1, n):
                angle = 0.5 * math.atan2(2 * A[p][q], A[q][q] - A[p][p])
                c, s = math.cos(angle), math.sin(angle)
                for M in (A, V):
                    for row in M:
                        row[p], row[q] = c * row[p] - s * row[q], s * row[p] + c * row[q]
                for k in range(n):
                    A[p][k], A[q][k] = c * A[p][k] - s * A[q][k], s * A[p][k] + c * A[q][k]
    order = sorted(range(n), key=lambda i: -A[i][i])
    return [[V[k][i] for k in range(n)] for i in order]


def kdsvd(g_s, g_t, params, method, index):
    """In plain floats: eigenvectors by rotations pass no gradient."""

    def right_vectors(f, most):  # of one sample's (H * W, C) matrix; (C, C) products of its columns
        columns = [flat(plane) for plane in f]
        found = jacobi([[dot(a, b) for b in columns] for a in columns])
        return found[: min(most, len(columns), len(columns[0]))]

    def principal(s, t):
        v_t = right_vectors(t, 1)[0]
        v_t = v_t if sum(v_t) > 0 else [-x for x in v_t]
        v_s = max(right_vectors(s, 4), key=lambda v: abs(dot(v, v_t)))
        return v_s if dot(v_s, v_t) > 0 else [-x for x in v_s], v_t

    def kernel(low, high):
        return [math.exp(-((a - b) ** 2) / 8) for a in high for b in low]

    loss = 0.0
    for n in range(len(g_s[0])):
        found = [principal(f_s[n], f_t[n]) for f_s, f_t in zip(g_s, g_t, strict=True)]
        for (low_s, low_t), (high_s, high_t) in pairwise(found):
            loss += sum((a - b) ** 2 for a, b in zip(kernel(low_s, high_s), kernel(low_t, high_t), strict=True))
    return loss / len(g_s[0])


MAIN = dict(hint=hint, attention=attention, similarity=similarity, correlation=correlation, vid=vid, rkd=rkd, pkt=pkt)
MAIN |= dict(factor=factor, nst=nst, kdsvd=kdsvd, crd=crd, icd=icd, rrd=rrd)
FIRST = dict(abound=abound, fsp=fsp, factor=factor_first)
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


def own_term(name, stage, method, g_s, g_t):
    """The product's loss of the features that the loop would pass."""
    f_s, f_t = g_s[method.feats], g_t[method.feats]
    return method(f_s, f_t, **needs(method, len(g_s[0]))) if stage == "main" else method.init_loss(f_s, f_t)


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


ALL_STAGES = [(name, "main") for name in MAIN] + [(name, "first") for name in FIRST]
STAGES = [stage for stage in ALL_STAGES if stage[0] != "kdsvd"]


@pytest.mark.parametrize(("relation", "batch"), CASES)
@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_value_and_gradients(name, stage, relation, batch):
    g_s, g_t = features(name, relation, batch)
    method = build(name, g_s, g_t)
    move_off_start(method)
    keep_draw(method, batch)
    params = {key: p.detach().clone().requires_grad_() for key, p in method.named_parameters()}
    f_s, f_t = ([nested(f) for f in selected(g, method.feats)] for g in (g_s, g_t))
    if not isinstance(method.feats, slice):
        (f_s,), (f_t,) = f_s, f_t
    reference = (MAIN if stage == "main" else FIRST)[name]
    want = torch.as_tensor(reference(f_s, f_t, {k: nested(p) for k, p in params.items()}, method, torch.arange(batch)))
    if want.requires_grad:
        want.backward()
    leaves = selected(g_s, method.feats)
    wanted = grads_or_zeros(leaves), {key: grads_or_zeros([p])[0] for key, p in params.items()}
    for leaf in leaves:
        leaf.grad = None

    loss = own_term(name, stage, method, g_s, g_t)
    assert loss.shape == () and loss.dtype == torch.float64
    loss.backward()
    near(loss.detach(), want.detach().double(), 1e-10, "loss")
    for i, (got, grad) in enumerate(zip(grads_or_zeros(leaves), wanted[0], strict=True)):
        near(got, grad, 1e-8, f"gradient of feature {i}")
    largest = max((float(grad.abs().max()) for grad in wanted[1].values()), default=0.0)
    for key, p in method.named_parameters():
        got, grad = grads_or_zeros([p])[0], wanted[1][key]
        if float(grad.abs().max()) < 1e-10 * largest:  # zero but for rounding, as a bias before batch norm
            assert float(got.abs().max()) < 1e-9 * largest, key
        else:
            near(got, grad, 1e-8, f"gradient of {key}")


@pytest.mark.parametrize(("relation", "batch"), CASES)
def test_kdsvd_value_and_gradients(relation, batch):
    """The reference's slope by central differences, in three random directions for every map."""
    g_s, g_t = features("kdsvd", relation, batch)
    method = build("kdsvd", g_s, g_t)
    maps_s, maps_t = g_s[method.feats], [f.tolist() for f in g_t[method.feats]]

    def reference(maps):
        return kdsvd([f.tolist() for f in maps], maps_t, {}, method, None)

    loss = method(maps_s, g_t[method.feats])
    loss.backward()
    start = [f.detach() for f in maps_s]
    assert loss.item() == pytest.approx(reference(start), rel=1e-9)
    noise = torch.Generator().manual_seed(0)
    scale = max(float(f.grad.norm()) for f in maps_s)
    for i, f in enumerate(maps_s):
        for _ in range(3):
            step = torch.randn(f.shape, generator=noise, dtype=f.dtype)
            ends = [reference([*start[:i], start[i] + h * step, *start[i + 1 :]]) for h in (1e-5, -1e-5)]
            assert float((f.grad * step).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5, abs=1e-6 * scale)


LISTS = [
    (name, stage) for name, stage in ALL_STAGES if isinstance(distiller_dict[name].feats, slice) and name != "hint"
]


@pytest.mark.parametrize(("name", "stage"), LISTS)
def test_lists_of_unequal_length_are_refused(name, stage):
    """No map is left out silently, neither when a method is built nor when it is called."""
    g = [torch.rand(2, 3, 4, 4) for _ in range(4)] + [torch.rand(2, 3)]
    method = build(name, g, g)
    for short_s, short_t in ((g, g[1:]), (g[1:], g)):
        with pytest.raises(DistillError, match=f"method {name} compares [234] student maps"):
            build(name, short_s, short_t)
        with pytest.raises(ValueError, match=r"zip\(\)"):
            own_term(name, stage, method, short_s, short_t)


def test_hint_compares_one_map_of_networks_with_unequal_numbers_of_stages():
    g = [torch.rand(2, 3, 4, 4) for _ in range(4)] + [torch.rand(2, 3)]
    build("hint", g, g[1:])
    build("hint", g[1:], g)


@pytest.mark.parametrize("T", [1.0, 4.0, 20.0])
@pytest.mark.parametrize(("batch", "n_cls"), [(1, 3), (5, 7), (9, 2)])
def test_kd(batch, n_cls, T):
    noise = torch.Generator().manual_seed(batch)
    logit_s, logit_t = (torch.randn(batch, n_cls, generator=noise, dtype=torch.float64) * 6 for _ in range(2))
    ours, slow = logit_s.clone().requires_grad_(), logit_s.clone().requires_grad_()
    want = kd(nested(slow), logit_t.tolist(), T)
    want.backward()
    loss = kd_loss(ours, logit_t, T)
    loss.backward()
    near(loss.detach(), want.detach(), 1e-10, "loss")
    near(ours.grad, slow.grad, 1e-8, "gradient")


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_hint_layers(layer):
    g_s, g_t = features("hint", "larger", 3)
    method = build("hint", g_s, g_t, hint_layer=layer)
    params = {key: nested(p) for key, p in method.named_parameters()}
    want = hint(nested(g_s[layer]), nested(g_t[layer]), params, method, None)
    near(method(g_s[method.feats], g_t[method.feats]).detach(), want.detach(), 1e-10, "loss")


@pytest.mark.parametrize(("tau", "slope"), [(3.0, False), (2.2, True)])
def test_icd_clamps_its_temperature_at_ten(tau, slope):
    g_s, g_t = features("icd", "equal", 4)
    method = build("icd", g_s, g_t)
    method.log_tau.data.fill_(tau)
    loss = method(g_s[-1], g_t[-1])
    loss.backward()
    assert bool(method.log_tau.grad) == slope
    params = {key: nested(p.detach()) for key, p in method.named_parameters()}
    params["log_tau"] = min(tau, math.log(10))
    near(loss.detach(), icd(nested(g_s[-1]), nested(g_t[-1]), params, method, None).detach(), 1e-10, "loss")


def plain(method):
    return {key: nested(p.detach()) for key, p in method.named_parameters()}


def embedded(f, method, side):
    return [unit(v) for v in linear(nested(f), plain(method), f"embed_{side}")]


@pytest.mark.parametrize("mode", ["exact", "relax"])
def test_the_banks_of_crd_follow(mode):
    """After each step the batch's rows, and no others, move half way to its embeddings; Z stays the first batch's."""
    g_s, g_t = features("crd", "equal", 3)
    method, Z = build("crd", g_s, g_t, mode=mode), set()
    for step in range(3):
        index = torch.tensor([step, step + 4, 9])
        f_s, f_t = g_s[-1].detach() + step, g_t[-1] - step
        before = {bank: getattr(method.contrast, bank).tolist() for bank in ("memory_v1", "memory_v2")}
        method(f_s, f_t, index=index)
        assert before["memory_v1"] == method.contrast.memory_v1.tolist()  # not before backward
        method.after_step()
        for bank, e in (("memory_v1", embedded(f_s, method, "s")), ("memory_v2", embedded(f_t, method, "t"))):
            for i, v in zip(index.tolist(), e, strict=True):
                before[bank][i] = unit([0.5 * a + 0.5 * b for a, b in zip(before[bank][i], v, strict=True)])
            near(getattr(method.contrast, bank), torch.tensor(before[bank], dtype=torch.float64), 1e-12, bank)
        Z.add((method.contrast.Z_v1.item(), method.contrast.Z_v2.item()))
    assert len(Z) == 1


def test_rrd_scores_against_earlier_batches():
    g_s, g_t = features("rrd", "equal", 3)
    method = build("rrd", g_s, g_t)
    for step in range(3):
        f_s, f_t = g_s[-1].detach() + step, g_t[-1] - step
        before = method.queue.clone()
        want = rrd(nested(f_s), nested(f_t), plain(method), method, None)
        assert number(method(f_s, f_t)) == pytest.approx(want, rel=1e-10)
        assert torch.equal(method.queue, before)
        method.after_step()
        rows = before.tolist()
        for i, v in enumerate(embedded(f_t, method, "t")):
            rows[(3 * step + i) % len(rows)] = v
        near(method.queue, torch.tensor(rows, dtype=torch.float64), 1e-12, "queue")


@pytest.mark.parametrize("batch", [1, 5, 7, 9, 20])
def test_rrd_takes_any_batch(batch):
    """Seven places: a batch may end anywhere or be larger than the queue; from the pointer on, oldest to latest."""
    g_s, g_t = features("rrd", "equal", batch)
    method = build("rrd", g_s, g_t)
    near(method.queue.norm(dim=1), torch.ones(7, dtype=torch.float64), 1e-6, "norms of the first content")
    held = deque(method.queue.tolist(), maxlen=7)
    for step in range(4):
        f_t = g_t[-1] + step
        method(g_s[-1], f_t).backward()
        method.after_step()
        held.extend(embedded(f_t, method, "t"))
        in_order = method.queue.roll(-int(method.queue_ptr), 0)
        near(in_order, torch.tensor(list(held), dtype=torch.float64), 1e-12, "queue")
    assert method.queue.is_leaf and not method.queue.requires_grad
    assert 0 <= int(method.queue_ptr) < 7 and {"queue", "queue_ptr"} <= set(method.state_dict())


# --- degenerate features, and float32 ---


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
            elif kind == "zero channel" and f.dim() == 4:
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
@pytest.mark.parametrize(("name", "stage"), ALL_STAGES)
def test_degenerate_features_stay_finite(name, stage, kind):
    for dtype in (torch.float32, torch.float64):
        for batch in (1,) if kind == "one" else (2, 5):
            shapes = [(batch, 4, *size) for size in ((4, 6), (4, 6), (2, 3), (2, 3))] + [(batch, 4)]
            noise = torch.Generator().manual_seed(batch)
            g_s, g_t = ([torch.randn(s, generator=noise).to(dtype) for s in shapes] for _ in range(2))
            g_s, g_t = spoil(g_s, g_t, kind)
            method = build(name, g_s, g_t)
            try:
                loss = own_term(name, stage, method, g_s, g_t)
            except DistillError:
                assert kind == "one"  # a method may refuse to compare one sample with nothing
                continue
            assert loss.isfinite(), f"{dtype}, batch {batch}: {loss}"
            loss.backward()
            for key, p in [*enumerate(g_s), *method.named_parameters()]:
                assert p.grad is None or p.grad.isfinite().all(), f"{dtype}, batch {batch}: gradient of {key}"
            method.after_step()
            assert all(b.isfinite().all() for b in method.buffers())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", list(MAIN))
def test_a_diverged_student_shows_in_the_loss(name, value):
    """And raises nothing: a track whose loss is not finite is closed, and those beside it go on."""
    shapes = [(4, 3, *size) for size in ((4, 4), (4, 4), (2, 4), (2, 4))] + [(4, 3)]
    noise = torch.Generator().manual_seed(0)
    g_s, g_t = ([torch.randn(s, generator=noise) for s in shapes] for _ in range(2))
    for f in g_s:
        f[1] = value
    method = build(name, g_s, g_t)
    loss = own_term(name, "main", method, [f.requires_grad_() for f in g_s], g_t)
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
    loss = own_term("vid", "main", method, g_s, g_t)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in method.parameters())


def test_kd_of_certain_logits():
    logit = torch.tensor([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0]], requires_grad=True)
    for other in (logit.detach(), -logit.detach(), torch.zeros(2, 3)):
        loss = kd_loss(logit, other, 4.0)
        loss.backward()
        assert loss.isfinite() and logit.grad.isfinite().all()


@pytest.mark.parametrize("name", [name for name, stage in ALL_STAGES if stage == "main"])
def test_min_batch(name):
    """A smaller batch teaches nothing, one of that size does."""
    least = distiller_dict[name].min_batch
    for batch in {least, least - 1} - {0}:
        g_s, g_t = features(name, "equal", batch)
        method = build(name, g_s, g_t)
        own_term(name, "main", method, g_s, g_t).backward()
        moved = any(g.abs().max() > 1e-9 for g in grads_or_zeros(selected(g_s, method.feats)))
        assert moved == (batch == least), f"{name} at {batch}"


# Twice what the methods' own differences of near equal numbers cost in float32.
COARSE = {"pkt": 1e-2}


@pytest.mark.parametrize(("name", "stage"), ALL_STAGES)
def test_float32_is_near_float64(name, stage):
    results = []
    for dtype in (torch.float32, torch.float64):
        g_s, g_t = features(name, "equal", 8, dtype)
        g_s, g_t = ([f.detach().float().to(dtype).requires_grad_(f.requires_grad) for f in g] for g in (g_s, g_t))
        method = build(name, g_s, g_t)
        loss = own_term(name, stage, method, g_s, g_t)
        loss.backward()
        results.append([loss.detach().double(), *(g.double() for g in grads_or_zeros(selected(g_s, method.feats)))])
    for got, want in zip(*results, strict=True):
        near(got, want, COARSE.get(name, 1e-3), name)
