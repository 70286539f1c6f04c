"""Golden records of the networks, the contract of every network, and slow forms where there is no record."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import create_model, model_dict
from models.util import ModelError, channel_shuffle, feature_shapes, head, replace_head
from tests.golden import recipe

GOLDEN = torch.load(Path(__file__).parent / "golden" / "golden_models.pt", weights_only=True)
FULL = GOLDEN["models"]  # 12 networks with outputs and gradients
RECORDS = {**FULL, **GOLDEN["state_only"]}  # the other 10 with names and shapes only
WRN = [name for name in RECORDS if name.startswith("wrn")]
VGG = [name for name in RECORDS if name.startswith("vgg")]
LIKE = {  # networks without recorded features have the shapes of these; ShuffleV2 has its slow form below
    **dict.fromkeys(["resnet14", "resnet32", "resnet44", "resnet110", "wrn_16_1", "wrn_40_1"], "resnet8"),
    **dict.fromkeys(["vgg11", "vgg16", "vgg19"], "vgg8"),
}


def filled(name):
    """A network with the recipe's weights, in eval mode."""
    net = recipe.fill_module(create_model(name, 100), recipe.GAIN.get(name, 1.0)).eval()
    net.name = name
    return net


@pytest.fixture(scope="module", params=list(FULL))
def golden(request):
    return filled(request.param).double(), FULL[request.param]


@pytest.fixture(scope="module", params=list(model_dict))
def net(request):
    return filled(request.param)


@pytest.fixture(scope="module")
def images():
    return recipe.images("models", 2)


def close(got, want, rtol=1e-8, atol=1e-11, what=""):
    got, want = (torch.as_tensor(v, dtype=torch.float64).detach() for v in (got, want))
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize(("preact", "field"), [(False, "feat"), (True, "preact")])
@torch.no_grad()
def test_golden_features(golden, preact, field):
    net, record = golden
    feats, logit = net(GOLDEN["input"].double(), is_feat=True, preact=preact)
    close(logit, record["logits"])
    assert [list(f.shape) for f in feats] == [r["shape"] for r in record[field]]
    for f, r in zip(feats, record[field], strict=True):
        flat = f.flatten()
        for got, key in ((flat.mean(), "mean"), (flat.std(), "std"), (flat.abs().sum(), "abs_sum")):
            close(got, r[key], what=key)
        close(flat[:8], r["first8"])
        close(flat[-8:], r["last8"])


@pytest.mark.parametrize("name", [name for name, record in FULL.items() if "64" in record["sizes"]])
@torch.no_grad()
def test_golden_64_pixels(name):
    want = FULL[name]["sizes"]["64"]
    feats, logit = filled(name).double()(recipe.images("model64", 2, 64).double(), is_feat=True)
    close(logit, want["logits"])
    assert [list(f.shape) for f in feats] == want["shapes"]


def test_golden_training_step(golden):
    net, record = golden
    net, want = copy.deepcopy(net).train(), record["train"]
    logit = net(recipe.images("train", 8).double())
    loss = F.cross_entropy(logit, recipe.labels("train", 8, 100))
    loss.backward()

    close(logit, want["logits"], 1e-6, 1e-9)
    close(loss, want["loss"], 1e-7)
    top = max(want["grad_norms"])
    for (key, p), norm in zip(net.named_parameters(), want["grad_norms"], strict=True):
        close(p.grad.norm(), norm, 1e-5, 1e-7 * top, what=key)
    first = next(net.parameters()).grad.flatten()[:8]
    close(first, want["first_param_grad_first8"], 1e-5, 1e-7 * float(first.norm()))
    for leaf in ("running_mean", "running_var"):
        buffers = [b for key, b in net.named_buffers() if key.endswith(leaf)]
        close(sum(b.abs().sum() for b in buffers), want[f"{leaf}_abs_sum"], 1e-7)
    tracked = {int(b) for key, b in net.named_buffers() if key.endswith("num_batches_tracked")}
    assert sorted(tracked) == want["num_batches_tracked"]


@pytest.mark.parametrize("name", list(RECORDS))
def test_names(name):
    net, record = create_model(name, 100), RECORDS[name]
    state, modules = net.state_dict(), net.get_feat_modules()
    assert list(state) == record["keys"]
    assert [list(v.shape) for v in state.values()] == record["shapes"]
    assert [str(v.dtype) for v in state.values()] == record["dtypes"]
    assert [key for key, _ in net.named_parameters()] == record["param_keys"]
    name_of = {id(module): name for name, module in net.named_modules()}
    assert isinstance(modules, nn.ModuleList)
    assert [name_of[id(module)] for module in modules] == record["feat_modules"]
    inside = {id(v) for v in (*modules.parameters(), *modules.buffers())}
    assert [key for key, p in net.named_parameters() if id(p) in inside] == record["feat_module_params"]
    assert [key for key, b in net.named_buffers() if id(b) in inside] == record["feat_module_buffers"]


@torch.no_grad()
def test_feature_list(net, images):
    feats, logit = net(images, is_feat=True)
    shapes = [tuple(f.shape) for f in feats]
    assert shapes == feature_shapes(net)
    if net.name in LIKE:
        assert shapes == [tuple(f["shape"]) for f in FULL[LIKE[net.name]]["feat"]]
    assert torch.equal(logit, net(images))
    assert torch.equal(logit, head(net)(feats[-1]))


@torch.no_grad()
def test_preact_touches_the_middle_only(net, images):
    feats, logit = net(images, is_feat=True)
    preacts, logit_pre = net(images, is_feat=True, preact=True)
    assert torch.equal(logit, logit_pre)
    assert torch.equal(feats[0], preacts[0]) and torch.equal(feats[-1], preacts[-1])
    for f, pre in zip(feats[1:-1], preacts[1:-1], strict=True):
        if net.name == "MobileNetV2":  # linear bottlenecks
            assert torch.equal(f, pre)
            continue
        assert pre.min() < 0
        if net.name not in (*WRN, "ShuffleV2"):  # ShuffleV2 has its slow form below
            assert torch.equal(f, F.relu(pre))
    if net.name in WRN:
        next_bn = [net.block2.layer[0].bn1, net.block3.layer[0].bn1, net.bn1]
        assert all(torch.equal(pre, bn(f)) for f, pre, bn in zip(feats[1:-1], preacts[1:-1], next_bn, strict=True))


@pytest.mark.parametrize("preact", [False, True])
def test_every_parameter_gets_a_finite_gradient(net, images, preact):
    net = copy.deepcopy(net).train()
    logit = net(images)
    feats, logit_feat = net(images, is_feat=True, preact=preact)
    logit.logsumexp(1).sum().backward()
    missing = [key for key, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing, f"no gradient for {missing}"
    # autograd refuses this one if an in-place operation has overwritten a feature or what led to it
    sum(f.square().mean() for f in [*feats, logit_feat]).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("size", [(28, 28), (48, 64), (96, 40)], ids=str)
@torch.no_grad()
def test_other_image_sizes(net, size):
    x = recipe.unit(f"img/{size}", (1, 3, *size))
    feats, logit = net(x, is_feat=True)
    for f, (_, c, *at_32) in zip(feats, feature_shapes(net), strict=True):
        down = [n / (32 // m) for n, m in zip(size, at_32, strict=True)] if at_32 else []
        rounded = math.floor if net.name in VGG else math.ceil  # max pooling drops an odd row, a convolution keeps it
        assert tuple(f.shape) == (1, c, *map(rounded, down))
    assert logit.shape == (1, 100) and logit.isfinite().all()
    if net.name not in (*WRN, "MobileNetV2", "ShuffleV2"):  # these pool something other than their last feature map
        torch.testing.assert_close(feats[-1], feats[-2].mean((2, 3)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", VGG)
@torch.no_grad()
def test_vgg_pools_once_more_at_64_rows_only(name):
    net = create_model(name, 10).eval()
    for (h, w), last in {(64, 64): (4, 4), (64, 32): (4, 2), (32, 64): (4, 8), (96, 96): (12, 12)}.items():
        feats, _ = net(torch.zeros(1, 3, h, w), is_feat=True)
        assert tuple(feats[-2].shape[2:]) == last


@torch.no_grad()
def test_channels_last_gives_the_same_values(net, images):
    want, logit = net(images, is_feat=True)
    last = copy.deepcopy(net).to(memory_format=torch.channels_last)
    got, logit_last = last(images.contiguous(memory_format=torch.channels_last), is_feat=True)
    for g, w in zip([*got, logit_last], [*want, logit], strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5 * float(w.abs().max()))
    assert all(f.is_contiguous(memory_format=torch.channels_last) for f in got[:-1])


@torch.no_grad()
def test_head_can_be_replaced(net, images):
    net, images = copy.deepcopy(net).double(), images.double()
    keys, old = list(net.state_dict()), head(net).weight
    torch.manual_seed(0)
    new = replace_head(net, 200)
    assert new is head(net) and new.weight is not old and list(net.state_dict()) == keys
    assert new.weight.shape == (200, old.shape[1]) and not new.bias.any()
    assert float(new.weight.std()) == pytest.approx(0.01, rel=0.05)
    assert net(images).shape == (2, 200)


@pytest.mark.parametrize("name", WRN)
def test_wrn_preact_updates_batch_norm_once_per_step(name, images):
    plain, pre = filled(name).train(), filled(name).train()
    for _ in range(2):
        plain(images, is_feat=True)
        pre(images, is_feat=True, preact=True)
    for (key, a), (_, b) in zip(plain.named_buffers(), pre.named_buffers(), strict=True):
        assert torch.equal(a, b) and (b.dim() or int(b) == 2), key  # the 0-dim ones count the batches


def shufflev2_slowly(state, images):
    """ShuffleV2 written out from its weights alone -> features, pre-activations, logits."""

    def conv_bn(x, prefix, i, stride=1):
        w = state[f"{prefix}conv{i}.weight"]
        depthwise = w.shape[2] == 3
        x = F.conv2d(x, w, stride=stride, padding=w.shape[2] // 2, groups=len(w) if depthwise else 1)
        bn = [state[f"{prefix}bn{i}.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias")]
        mean, var, weight, bias = (v[:, None, None] for v in bn)
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def interleave(a, b):
        return torch.stack([half[:, c] for c in range(a.shape[1]) for half in (a, b)], 1)

    x = conv_bn(images, "", 1).clamp(min=0)
    feats, preacts = [x], [x]
    for stage, n_basic in ((1, 3), (2, 7), (3, 3)):
        down = f"layer{stage}.0."
        left = conv_bn(conv_bn(x, down, 1, stride=2), down, 2).clamp(min=0)
        right = conv_bn(conv_bn(x, down, 3).clamp(min=0), down, 4, stride=2)
        x = interleave(left, conv_bn(right, down, 5).clamp(min=0))
        for i in range(1, n_basic + 1):
            block, half = f"layer{stage}.{i}.", x.shape[1] // 2
            kept, y = x[:, :half], x[:, half:]
            y = conv_bn(conv_bn(conv_bn(y, block, 1).clamp(min=0), block, 2), block, 3)
            x = interleave(kept, y.clamp(min=0))
        feats.append(x)
        preacts.append(torch.cat([kept, y], 1))  # not shuffled
    pooled = conv_bn(x, "", 2).clamp(min=0).flatten(2).sum(2) / x[0, 0].numel()
    logit = pooled @ state["linear.weight"].T + state["linear.bias"]
    return [*feats, pooled], [*preacts, pooled], logit


@pytest.mark.parametrize("preact", [False, True])
def test_shufflev2_equals_its_slow_form(images, preact):
    net, images = filled("ShuffleV2").double(), images.double()
    feats, logit = net(images, is_feat=True, preact=preact)
    *features, slow_logit = shufflev2_slowly(net.state_dict(keep_vars=True), images)
    for got, want in zip([*feats, logit], [*features[preact], slow_logit], strict=True):
        close(got, want)
    grads = [
        torch.autograd.grad(sum(f.square().mean() for f in [*fs, out]), list(net.parameters()))
        for fs, out in ((feats, logit), (features[preact], slow_logit))
    ]
    for got, want in zip(*grads, strict=True):
        close(got, want, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_channel_shuffle(groups, memory_format):
    x = recipe.unit("shuffle", (2, 12, 4, 5)).contiguous(memory_format=memory_format)
    out = channel_shuffle(x, groups)
    size = 12 // groups
    order = [g * size + i for i in range(size) for g in range(groups)]
    assert torch.equal(out, torch.stack([x[:, c] for c in order], 1))
    assert out.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("name", [name for name in RECORDS if not name.startswith("Shuffle")])
def test_initial_weights(name):
    torch.manual_seed(0)
    net = create_model(name, 100)
    for key, conv in net.named_modules():
        if isinstance(conv, nn.Conv2d) and conv.weight.numel() > 4000:
            he = math.sqrt(2 / (conv.kernel_size[0] ** 2 * conv.out_channels))
            assert float(conv.weight.detach().std()) == pytest.approx(he, rel=0.06), key
            assert conv.bias is None or not conv.bias.any(), key
    weight, bias = head(net).weight.detach(), head(net).bias
    small = name in VGG or name == "MobileNetV2"
    default = 1 / math.sqrt(3 * weight.shape[1])  # PyTorch's uniform
    assert float(weight.std()) == pytest.approx(0.01 if small else default, rel=0.05)
    assert bool(bias.any()) is not (small or name in WRN)


def test_feature_shapes_leaves_no_trace():
    net = filled("wrn_16_1").double().train()
    frozen = next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d)).eval()
    before = copy.deepcopy(net.state_dict())
    assert feature_shapes(net, image_size=64)[0] == (2, 16, 64, 64)
    assert all(module.training is (module is not frozen) for module in net.modules())
    assert all(torch.equal(v, before[key]) for key, v in net.state_dict().items())


def test_bad_requests_are_refused():
    with pytest.raises(ModelError, match="resnet8"):
        create_model("resnet9", 100)
    with pytest.raises(ModelError, match="Sequential"):
        head(nn.Sequential(nn.Conv2d(3, 3, 1)))
