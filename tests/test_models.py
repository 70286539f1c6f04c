import copy
import io
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import create_model, default_lr, model_dict
from models.util import ModelError, channel_shuffle, feature_shapes, head, known_first, replace_head
from tests.golden import recipe

GOLDEN = torch.load(Path(__file__).parent / "golden" / "golden_models.pt", weights_only=True)
FULL = GOLDEN["models"]  # 12 networks with outputs and gradients
RECORDS = {**FULL, **GOLDEN["state_only"]}  # the other 10 with names and shapes only
WRN = [name for name in RECORDS if name.startswith("wrn")]
VGG = [name for name in RECORDS if name.startswith("vgg")]

_CIFAR = [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8), (64,)]
_VGG = recipe.SHAPES["vgg8"]
SHAPES = {  # of the networks whose features are not recorded
    **dict.fromkeys(["resnet14", "resnet32", "resnet44", "resnet110", "wrn_16_1", "wrn_40_1"], _CIFAR),
    **dict.fromkeys(["vgg11", "vgg16", "vgg19"], _VGG),
    "ShuffleV2": [(24, 32, 32), (116, 16, 16), (232, 8, 8), (464, 4, 4), (1024,)],
    **{name: [tuple(f["shape"][1:]) for f in record["feat"]] for name, record in FULL.items()},
}


def filled(name):
    """A network with the recipe's weights, in eval mode."""
    return recipe.fill_module(create_model(name, 100), recipe.GAIN[name]).eval()


@pytest.fixture(scope="module", params=list(FULL))
def golden(request):
    return filled(request.param).double(), FULL[request.param], request.param


@pytest.fixture(scope="module", params=list(model_dict))
def net(request):
    net = filled(request.param)
    net.name = request.param
    return net


@pytest.fixture(scope="module")
def images():
    return recipe.images("models", 2)


def close(got, want, rtol=1e-8, atol=1e-11, what=""):
    got, want = (torch.as_tensor(v, dtype=torch.float64).detach() for v in (got, want))
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol, msg=lambda text: f"{what}: {text}")


# ---- golden records, float64


def check_features(feats, records):
    assert [list(f.shape) for f in feats] == [r["shape"] for r in records]
    for f, r in zip(feats, records, strict=True):
        flat = f.flatten()
        close(flat.mean(), r["mean"])
        close(flat.std(), r["std"])
        close(flat[:8], r["first8"])
        close(flat[-8:], r["last8"])
        close(flat.abs().sum(), r["abs_sum"])


def test_golden_input_and_fill(golden):
    net, record, _ = golden
    torch.testing.assert_close(recipe.model_input(), GOLDEN["input"], rtol=0, atol=1e-6)
    close(recipe.fill_checksum(net.state_dict()), record["fill_checksum"], rtol=1e-12)


@torch.no_grad()
def test_golden_logits(golden):
    net, record, _ = golden
    close(net(GOLDEN["input"].double()), record["logits"])


@pytest.mark.parametrize(("preact", "field"), [(False, "feat"), (True, "preact")])
@torch.no_grad()
def test_golden_features(golden, preact, field):
    net, record, _ = golden
    feats, logit = net(GOLDEN["input"].double(), is_feat=True, preact=preact)
    close(logit, record["logits"])
    check_features(feats, record[field])


@pytest.mark.parametrize("name", [name for name, record in FULL.items() if "64" in record["sizes"]])
@torch.no_grad()
def test_golden_64_pixels(name):
    want = FULL[name]["sizes"]["64"]
    feats, logit = filled(name).double()(recipe.images("model64", 2, 64).double(), is_feat=True)
    close(logit, want["logits"])
    assert [list(f.shape) for f in feats] == want["shapes"]


def test_golden_training_step(golden):
    net, record, _ = golden
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


# ---- names: what published checkpoints and two-stage methods rely on


def test_registry_is_complete():
    assert len(model_dict) == 22
    assert set(model_dict) == set(RECORDS)
    assert default_lr == {"MobileNetV2": 0.01, "ShuffleV1": 0.01, "ShuffleV2": 0.01}


def test_state_dict_names(net):
    record, state = RECORDS[net.name], net.state_dict()
    assert list(state) == record["keys"]
    assert [list(v.shape) for v in state.values()] == record["shapes"]
    assert [str(v.dtype) for v in create_model(net.name, 100).state_dict().values()] == record["dtypes"]
    assert [key for key, _ in net.named_parameters()] == record["param_keys"]
    assert sum(p.numel() for p in net.parameters()) == record["total_params"]


def test_feat_modules(net):
    record, modules = RECORDS[net.name], net.get_feat_modules()
    name_of = {id(module): name for name, module in net.named_modules()}
    assert isinstance(modules, nn.ModuleList)
    assert [name_of[id(module)] for module in modules] == record["feat_modules"]
    inside = {id(v) for v in (*modules.parameters(), *modules.buffers())}
    assert [key for key, p in net.named_parameters() if id(p) in inside] == record["feat_module_params"]
    assert [key for key, b in net.named_buffers() if id(b) in inside] == record["feat_module_buffers"]


# ---- the contract of every model


@torch.no_grad()
def test_feature_list(net, images):
    feats, logit = net(images, is_feat=True)
    assert isinstance(feats, list)
    assert [tuple(f.shape) for f in feats] == [(2, *shape) for shape in SHAPES[net.name]]
    assert torch.equal(logit, net(images))
    assert torch.equal(logit, head(net)(feats[-1]))


@torch.no_grad()
def test_preact_touches_the_middle_only(net, images):
    feats, logit = net(images, is_feat=True)
    pres, logit_pre = net(images, is_feat=True, preact=True)
    assert torch.equal(logit, logit_pre)
    assert torch.equal(feats[0], pres[0]) and torch.equal(feats[-1], pres[-1])
    for f, pre in zip(feats[1:-1], pres[1:-1], strict=True):
        if net.name == "MobileNetV2":  # linear bottlenecks
            assert torch.equal(f, pre)
            continue
        assert pre.min() < 0
        if net.name == "ShuffleV2":
            first, second = F.relu(pre).chunk(2, 1)
            assert torch.equal(f[:, 0::2], first) and torch.equal(f[:, 1::2], second)
        elif net.name not in WRN:
            assert torch.equal(f, F.relu(pre))
    if net.name in WRN:
        next_bn = [net.block2.layer[0].bn1, net.block3.layer[0].bn1, net.bn1]
        for f, pre, bn in zip(feats[1:-1], pres[1:-1], next_bn, strict=True):
            assert f.min() < 0
            assert torch.equal(pre, bn(f))


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
    for f, (c, *at_32) in zip(feats, SHAPES[net.name], strict=True):
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
def test_float32_is_close_to_float64(net, images):
    want = copy.deepcopy(net).double()(images.double())
    close(net(images), want, rtol=0, atol=1e-5 * float(want.abs().max()))


@torch.no_grad()
def test_eval_forward_changes_nothing(net, images):
    before = copy.deepcopy(net.state_dict())
    net(images, is_feat=True, preact=True)
    changed = [key for key, v in net.state_dict().items() if not torch.equal(v, before[key])]
    assert not changed


@torch.no_grad()
def test_state_dict_round_trip(net, images):
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other = create_model(net.name, 100).eval()
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(other(images), net(images))


@torch.no_grad()
def test_head_can_be_replaced(net, images):
    net, images, width = copy.deepcopy(net).double(), images.double(), SHAPES[net.name][-1][0]
    keys, old = list(net.state_dict()), head(net)
    assert (old.in_features, old.out_features) == (width, 100)
    torch.manual_seed(0)
    new = replace_head(net, 200)
    assert new is head(net) and new is not old
    assert new.weight.shape == (200, width) and float(new.weight.std()) == pytest.approx(0.01, rel=0.05)
    assert not new.bias.any()
    assert list(net.state_dict()) == keys
    feats, logit = net(images, is_feat=True)
    close(logit, feats[-1] @ new.weight.T)


def test_number_of_classes(net):
    assert head(model_dict[net.name](num_classes=7)).out_features == 7


# ---- families


@pytest.mark.parametrize("name", WRN)
def test_wrn_preact_updates_batch_norm_once_a_step(name, images):
    plain, pre = filled(name).train(), filled(name).train()
    for _ in range(2):
        plain(images, is_feat=True)
        pre(images, is_feat=True, preact=True)
    for (key, a), (_, b) in zip(plain.named_buffers(), pre.named_buffers(), strict=True):
        assert torch.equal(a, b), key
        if key.endswith("num_batches_tracked"):
            assert int(b) == 2, key


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
    feats, pres = [x], [x]
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
        pres.append(torch.cat([kept, y], 1))  # not shuffled
    pooled = conv_bn(x, "", 2).clamp(min=0).flatten(2).sum(2) / x[0, 0].numel()
    logit = pooled @ state["linear.weight"].T + state["linear.bias"]
    return [*feats, pooled], [*pres, pooled], logit


@torch.no_grad()
def test_shufflev2_equals_its_slow_form(images):
    net, images = filled("ShuffleV2").double(), images.double()
    want, want_pre, logit = shufflev2_slowly(net.state_dict(), images)
    feats, got = net(images, is_feat=True)
    close(got, logit)
    for f, w in zip(feats, want, strict=True):
        close(f, w)
    pres, _ = net(images, is_feat=True, preact=True)
    for pre, w in zip(pres, want_pre, strict=True):
        close(pre, w)


def test_shufflev2_passes_gradients_like_its_slow_form(images):
    net, images = filled("ShuffleV2").double(), images.double()
    for preact in (False, True):
        feats, logit = net(images, is_feat=True, preact=preact)
        loss = sum(f.square().mean() for f in feats) + logit.square().mean()
        got = torch.autograd.grad(loss, list(net.parameters()))

        state = net.state_dict(keep_vars=True)
        *features, logit = shufflev2_slowly(state, images)
        loss = sum(f.square().mean() for f in features[preact]) + logit.square().mean()
        for g, want in zip(got, torch.autograd.grad(loss, list(net.parameters())), strict=True):
            close(g, want, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_channel_shuffle(groups, memory_format):
    x = recipe.unit("shuffle", (2, 12, 4, 5)).contiguous(memory_format=memory_format).requires_grad_()
    out = channel_shuffle(x, groups)
    size = 12 // groups
    order = [g * size + i for i in range(size) for g in range(groups)]
    assert torch.equal(out, torch.stack([x[:, c] for c in order], 1))
    assert out.is_contiguous(memory_format=memory_format)
    weight = recipe.unit("shuffle/grad", out.shape)
    (grad,) = torch.autograd.grad((out * weight).sum(), x)
    assert torch.equal(grad[:, order], weight)


HE_INIT = [name for name in model_dict if not name.startswith("Shuffle")]


@pytest.mark.parametrize("name", HE_INIT)
def test_initial_weights(name):
    torch.manual_seed(0)
    net = create_model(name, 100)
    for key, module in net.named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 4000:
            k, _ = module.kernel_size
            assert float(module.weight.detach().std()) == pytest.approx(
                math.sqrt(2 / (k * k * module.out_channels)), rel=0.06
            ), key
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            assert not module.bias.any(), key
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and not module.bias.any(), key
    weight, bias = head(net).weight.detach(), head(net).bias
    small = name in VGG or name == "MobileNetV2"
    default = 1 / math.sqrt(3 * weight.shape[1])  # PyTorch's uniform
    assert float(weight.std()) == pytest.approx(0.01 if small else default, rel=0.05)
    assert bool(bias.any()) is not (small or name in WRN)


# ---- helpers


def test_feature_shapes(net):
    assert feature_shapes(net) == [(2, *shape) for shape in SHAPES[net.name]]


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "vgg8"])
def test_feature_shapes_leaves_no_trace(name):
    net = filled(name).double().train()
    frozen = next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d)).eval()
    before, rng = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    assert feature_shapes(net, image_size=64)[0] == (2, *SHAPES[name][0][:1], 64, 64)
    assert all(module.training is (module is not frozen) for module in net.modules())
    assert all(torch.equal(v, before[key]) for key, v in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(p.grad is None for p in net.parameters())


def test_feature_shapes_restores_the_mode_after_an_error():
    net = create_model("resnet8", 10).train()
    net.fc = nn.Linear(3, 10)
    with pytest.raises(RuntimeError):
        feature_shapes(net)
    assert all(module.training for module in net.modules())


def test_known_first():
    names = ["vgg8", "resnet8", "resnet8x4", "ResNet50"]
    assert known_first("resnet9", names)[0] == "resnet8"
    assert known_first("resnet50", names)[0] == "ResNet50"
    assert sorted(known_first("x", names)) == sorted(names)


def test_unknown_model():
    with pytest.raises(ModelError, match=r"^unknown model 'resnet9'; known: resnet8, ") as error:
        create_model("resnet9", 100)
    assert isinstance(error.value, ValueError)
    assert set(str(error.value).partition("known: ")[2].split(", ")) == set(model_dict)


def test_model_without_a_classifier():
    with pytest.raises(ModelError, match="Sequential has no linear layer"):
        head(nn.Sequential(nn.Conv2d(3, 3, 1)))
