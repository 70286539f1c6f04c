"""Deterministic data recipe shared by golden_models.pt and golden_losses.pt.

Everything here is self-made and depends on torch only.  It is the single
source of truth for every weight and every input of the golden data: a later
implementation re-creates them with these functions and compares its outputs
with the recorded numbers.

Bit-exactness: only torch.rand / torch.randperm / torch.randint on a CPU
generator are used for weights and loss inputs.  torch.rand float32 draws
24-bit integers / 2**24, so values do not depend on the CPU's vector width
(torch.randn goes through log/cos and may differ in the last bit between
machines).  The one exception is the model input, torch.randn from seed 0;
a copy of it is stored in golden_models.pt["input"].
"""

import math
import zlib

import torch

SQRT3 = 3.0**0.5  # sqrt(3)*U(-1,1) has unit variance


# ------------------------------------------------------------------ streams
def gen(key):
    """CPU generator whose seed is crc32 of the (utf-8) key."""
    return torch.Generator().manual_seed(zlib.crc32(key.encode("utf-8")))


def u01(key, shape):
    """float32 uniform [0,1)."""
    return torch.rand(tuple(shape), generator=gen(key), dtype=torch.float32)


def unit(key, shape):
    """float32, zero mean, unit variance, bounded by sqrt(3)."""
    return (u01(key, shape) * 2.0 - 1.0) * SQRT3


def ints(key, shape, high):
    """int64 uniform in [0, high)."""
    return torch.randint(0, high, tuple(shape), generator=gen(key))


def distinct(key, n, high):
    """n distinct int64 in [0, high)."""
    return torch.randperm(high, generator=gen(key))[:n]


# ------------------------------------------------------------------ weights
# Multiplier of 1/sqrt(fan_in) for convolution weights (parameters with >= 3
# dims).  Eval-mode batch norm does not renormalise, so one number cannot keep
# a plain 19-layer net and a 110-layer residual net both O(1); the value per
# model was picked once by scanning (0.05 steps) and is part of the recipe.
DEFAULT_GAIN = 1.0
GAIN = {
    # model registry
    "resnet8": 1.3,
    "resnet14": 1.0,
    "resnet20": 0.95,
    "resnet32": 0.9,
    "resnet44": 0.85,
    "resnet56": 0.8,
    "resnet110": 0.65,
    "resnet8x4": 1.3,
    "resnet32x4": 0.9,
    "ResNet50": 1.0,
    "wrn_16_1": 1.0,
    "wrn_16_2": 1.1,
    "wrn_40_1": 0.9,
    "wrn_40_2": 1.0,
    "vgg8": 1.3,
    "vgg11": 1.45,
    "vgg13": 1.45,
    "vgg16": 1.45,
    "vgg19": 1.5,
    "MobileNetV2": 1.2,
    "ShuffleV1": 1.05,
    "ShuffleV2": 1.3,
    # reachable in the model files but not in the registry
    "ResNet18": 1.1,
    "ResNet34": 1.0,
    "ResNet101": 0.9,
    "ResNet152": 0.8,
    "vgg8_nobn": 1.3,
    "vgg13_nobn": 1.45,
    "vgg19_nobn": 1.5,
    "ShuffleV2_x0.2": 1.3,
    "ShuffleV2_x0.3": 1.35,
    "ShuffleV2_x0.5": 1.35,
    "ShuffleV2_x1.5": 1.3,
    "ShuffleV2_x2": 1.3,
    "MobileNetV2_T6_W1.0": 1.2,
    "MobileNetV2_T6_W1.4": 1.2,
    "MobileNetV2_T3_W0.5": 1.2,
    "wrn_28_4": 0.95,
    "resnet29_bottleneck": 1.1,
    "resnet20_bottleneck": 1.15,
}


def fan_in(shape):
    """prod(shape[1:]); used for Linear, Conv2d and ConvTranspose2d alike."""
    return int(math.prod(shape[1:]))


def fill_value(key, shape, dtype=torch.float32, gain=DEFAULT_GAIN):
    """Value of one state_dict entry.  Rules in order, by last dotted name:

    num_batches_tracked    -> 0 (int64)
    running_mean           -> 0.1 * unit(key)
    running_var            -> 1 + 0.1 * u01(key)
    log_scale              -> 1 + 0.1 * unit(key)            (VID only)
    ndim >= 3 (conv)       -> gain / sqrt(fan_in) * unit(key)
    ndim == 2 (linear)     -> 1 / sqrt(fan_in) * unit(key)
    1-d 'weight' (bn)      -> 1 + 0.1 * unit(key)
    1-d anything else      -> 0.1 * unit(key)                (biases)

    `key` is the full state_dict key; the stream is crc32(key), so the order in
    which entries are visited does not matter.  All arithmetic in float32;
    the scale factor is a python float rounded to float32 by the multiply.
    """
    leaf = key.rsplit(".", 1)[-1]
    shape = tuple(shape)
    if leaf == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.int64)
    if leaf == "running_mean":
        v = unit(key, shape) * 0.1
    elif leaf == "running_var":
        v = u01(key, shape) * 0.1 + 1.0
    elif leaf == "log_scale":
        v = unit(key, shape) * 0.1 + 1.0
    elif len(shape) >= 3:
        v = unit(key, shape) * (gain / math.sqrt(fan_in(shape)))
    elif len(shape) == 2:
        v = unit(key, shape) * (1.0 / math.sqrt(fan_in(shape)))
    elif leaf == "weight":
        v = unit(key, shape) * 0.1 + 1.0
    else:
        v = unit(key, shape) * 0.1
    return v.to(dtype)


def make_state_dict(shapes, gain=DEFAULT_GAIN):
    """shapes: {key: shape} -> {key: tensor} (float32 / int64)."""
    return {k: fill_value(k, s, gain=gain) for k, s in sorted(shapes.items())}


def fill_module(module, gain=DEFAULT_GAIN):
    """Overwrite every state_dict entry of `module` in place (strict)."""
    ref = module.state_dict()
    sd = make_state_dict({k: tuple(v.shape) for k, v in ref.items()}, gain)
    module.load_state_dict({k: sd[k].to(ref[k].dtype) for k in ref})
    return module


def fill_checksum(state_dict):
    """One float that identifies the fill: float64 sum of |v| over entries."""
    return float(sum(v.double().abs().sum() for _, v in sorted(state_dict.items())))


# ------------------------------------------------------------------- inputs
def model_input():
    """The 2x3x32x32 input of every model record."""
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def images(tag, n, size=32):
    return unit(f"img/{tag}", (n, 3, size, size))


def labels(tag, n, n_cls):
    return ints(f"lab/{tag}", (n,), n_cls)


# Feature shapes (without the batch dim) that the models really produce for a
# 32x32 input; index 0..n-1 is the feature list, last entry is the embedding.
SHAPES = {
    "resnet8x4": [(32, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8), (256,)],
    "resnet32x4": [(32, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8), (256,)],
    "vgg13": [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 4, 4), (512,)],
    "vgg8": [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 4, 4), (512,)],
    "MobileNetV2": [(16, 16, 16), (12, 16, 16), (16, 8, 8), (48, 4, 4), (160, 2, 2), (1280,)],
    "ResNet50": [(64, 32, 32), (256, 32, 32), (512, 16, 16), (1024, 8, 8), (2048, 4, 4), (2048,)],
}
# pair -> (teacher, student, batch)
PAIRS = {
    "A": ("resnet32x4", "resnet8x4", 8),  # same shapes everywhere
    "B": ("vgg13", "MobileNetV2", 8),  # student maps equal or smaller
    "C": ("ResNet50", "vgg8", 2),  # student maps half the teacher's
    "D": ("MobileNetV2", "vgg8", 4),  # student maps equal or larger
}


def feat(key, shape, kind="post"):
    """One synthetic feature tensor, float32, shape includes the batch.

    4-d 'post': max(0, unit(key) + unit(key/c)[N,C,1,1] + unit(key/hw)[N,1,H,W])
    4-d 'pre' : the same without the max  (pre-activation, signed)
    2-d 'post': max(0, unit(key) + 0.5)
    2-d 'pre' : unit(key)
    The channel and position terms give every sample its own structure, so that
    attention maps, Gram matrices and singular vectors are well separated.
    """
    shape = tuple(shape)
    x = unit(key, shape)
    if len(shape) == 4:
        n, c, h, w = shape
        x = x + unit(key + "/c", (n, c, 1, 1)) + unit(key + "/hw", (n, 1, h, w))
    elif kind == "post":
        x = x + 0.5
    return x.clamp(min=0) if kind == "post" else x


def feats(pair, side, kind="post", step=0):
    """The whole feature list of one side ('s' or 't') of a pair.

    Stream key of entry i: "feat/<pair>/<side>/<i>" (+ "/step<k>" for k > 0);
    every entry, the embedding included, uses `kind`, except that the embedding
    is always 'post' (global average of a rectified map is never negative).
    """
    teacher, student, n = PAIRS[pair]
    out = []
    for i, shp in enumerate(SHAPES[student if side == "s" else teacher]):
        key = f"feat/{pair}/{side}/{i}"
        if step:
            key += f"/step{step}"
        out.append(feat(key, (n, *shp), kind if len(shp) == 3 else "post"))
    return out


def logits(tag, n=8, n_cls=100, scale=3.0):
    return unit(f"logit/{tag}", (n, n_cls)) * scale


# ------------------------------------------------------- training-step data
STEP = dict(batch=8, n_cls=100, n_data=2000, nce_k=256)


def step_batch(tag, k):
    """Batch k of the training-step records; tag is 'init' or 'step'.

    -> images [8,3,32,32], labels [8], sample indices [8], and the CRD
    contrast indices [8, 1 + nce_k] whose first column is the sample index.
    """
    n, nd, nk = STEP["batch"], STEP["n_data"], STEP["nce_k"]
    name = f"{tag}/{k}"
    idx = distinct(f"{tag}/idx/{k}", n, nd)
    neg = ints(f"{tag}/neg/{k}", (n, nk), nd)
    return images(name, n), labels(name, n, STEP["n_cls"]), idx, torch.cat([idx[:, None], neg], 1)


def step_memory(which):
    """CRD memory bank of the training-step record, which in {'memory_v1','memory_v2'}."""
    return (u01("crd/step/" + which, (STEP["n_data"], 128)) * 2 - 1) * (1.0 / math.sqrt(128 / 3))


def step_queue(nce_k=None):
    """RRD / CCD queue (also used by the loss records): unit columns along dim 0."""
    nce_k = nce_k or STEP["nce_k"]
    q = unit(f"queue/{nce_k}", (nce_k, 128)).double()
    return q / q.norm(dim=0, keepdim=True)
