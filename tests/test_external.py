"""Networks of timm, torchvision and one's own files, offline, at 64 pixels."""

import copy
from urllib.error import URLError

import pytest
import torch

from dataset.torchvision_import import torchvision
from models.external import External, check_external, create_external, file_name, is_external, runs_code
from models.reused import Reused
from models.stages import as_map
from models.util import ModelError, feature_shapes, head, replace_head

SIZE, N_CLS = 64, 7
TIMM = ["test_resnet", "test_convnext", "test_efficientnet", "test_vit", "test_nfnet", "test_maxvit"]
TORCHVISION = [
    "resnet18",
    "mobilenet_v3_small",
    "shufflenet_v2_x0_5",
    "densenet121",
    "vgg11_bn",
    "swin_t",
    "googlenet",
    "squeezenet1_1",
    "efficientnet_b0",
    "regnet_x_400mf",
    "mnasnet0_5",
    "convnext_tiny",
]
NETS = """
import torch, torchvision
from torch import nn

class CNN(nn.Module):
    # a network for small images: the stem and the first stage have the same resolution
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    def __init__(self, n_cls=10):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.layer1, self.layer2 = self.stage(8, 8, 1), self.stage(8, 16, 2)
        self.squeeze = nn.Conv2d(16, 16, 1)
        self.layer3, self.unit = self.stage(16, 32, 2), nn.ModuleDict({"last": nn.Linear(32, n_cls)})
        self.act = nn.ReLU(inplace=True)
    def stage(self, i, o, s):
        return nn.Sequential(nn.Conv2d(i, o, 3, s, 1), nn.BatchNorm2d(o), nn.ReLU(True))
    def forward(self, x):
        x = self.layer2(self.layer1(self.conv(x).relu_()))
        x = x * self.squeeze(x.mean((2, 3), keepdim=True)).sigmoid()
        return self.unit["last"](self.layer3(x).mean((2, 3)))

class Same(CNN):
    def forward(self, x, is_feat=False, preact=False):
        f1 = self.layer1(self.conv(x))
        f2 = self.layer2(f1)
        f = [f1, f2, f2.mean((2, 3))]
        logit = self.fc(f[-1])
        return (f, logit) if is_feat else logit
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.fc = nn.Linear(16, num_classes)
    def get_feat_modules(self):
        return nn.ModuleList([self.conv, self.layer1, self.layer2])

class Wrong(Same):
    def forward(self, x, is_feat=False, preact=False):
        f, logit = super().forward(x, True)
        return (f, 2 * logit) if is_feat else logit

class Changes(CNN):
    calls = 0
    def forward(self, x):
        self.calls += 1
        return super().forward(x[..., :32] if self.calls > 4 else x)

class Raises(CNN):
    def __init__(self): raise OSError("no such disk\\nmore")

class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3 * 64 * 64, 7)
    def forward(self, x): return self.fc(x.flatten(1))

def vit(num_classes):
    return torchvision.models.VisionTransformer(64, 16, 6, 2, 32, 64, num_classes=num_classes)
def wrong_size(): return CNN(5)
def no_module(): return 3
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    file = tmp_path_factory.mktemp("own") / "my_nets.py"
    file.write_text(NETS)
    return file


def create(name, **options):
    torch.manual_seed(0)
    return create_external(name, N_CLS, SIZE, **options)


@pytest.fixture(scope="module", params=[*(f"timm:{n}" for n in TIMM), *(f"torchvision:{n}" for n in TORCHVISION)])
def net(request):
    return create(request.param)


@pytest.fixture
def images():
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def clones(net, run):
    """The outputs of all submodules, copied at once."""
    seen = {}

    def keep(name):
        return lambda module, given, out: seen.update({name: out.clone()}) if isinstance(out, torch.Tensor) else None

    hooks = [module.register_forward_hook(keep(name)) for name, module in net.named_modules()]
    run()
    for hook in hooks:
        hook.remove()
    return seen


def test_same_network(net, images):
    plain = net.net.eval()
    with torch.no_grad():
        logit = plain(images)
        seen = clones(plain, lambda: net(images))
        feats, own = net(images, is_feat=True)
        assert torch.equal(own, logit) and torch.equal(net(images), logit) and logit.shape == (2, N_CLS)
        assert not net.caught, "nothing outlives the call"
        for name, f in zip((net.chosen.stem, *net.stages), feats, strict=False):
            assert torch.equal(f, as_map(seen[name], name in net.chosen.nhwc)), f"{name} was overwritten"
    sizes = [f.shape[2] for f in feats[:-1]]
    assert (
        len(sizes) >= 4 and sizes == sorted(sizes, reverse=True) and all(f.shape[2] == f.shape[3] for f in feats[:-1])
    )
    assert feats[-1].dim() == 2 and [tuple(f.shape) for f in feats] == feature_shapes(net)
    if "squeezenet" in net.arch:
        with pytest.raises(ModelError):
            head(net)
    else:
        torch.testing.assert_close(head(net)(feats[-1]), logit)
    with pytest.raises(ModelError):
        net(images, is_feat=True, preact=True)


def test_construction_leaves_no_trace(net):
    """Neither in the random numbers nor in the statistics of batch norm."""
    source, _, name = net.arch.partition(":")
    again = create(net.arch)
    after = torch.rand(1)
    torch.manual_seed(0)
    if source == "timm":
        import timm

        size = {"img_size": SIZE} if timm.get_pretrained_cfg(name).fixed_input_size else {}
        plain = timm.create_model(name, num_classes=N_CLS, **size)
    else:
        aux = {"aux_logits": False, "init_weights": True} if name == "googlenet" else {}
        plain = torchvision.models.get_model(name, num_classes=N_CLS, **aux)
    assert torch.equal(after, torch.rand(1)) and again.training and again.stages == net.stages
    state = again.state_dict()
    assert list(state) == list(plain.state_dict())
    assert all(torch.equal(value, state[key]) for key, value in plain.state_dict().items())
    plain.load_state_dict(state)
    again.load_state_dict(dict(plain.state_dict()))


def test_gradient_reaches_all(net, images):
    net.train().zero_grad()
    feats, logit = net(images, is_feat=True)
    (logit.sum() + sum(f.square().mean() for f in feats)).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []
    feats, _ = net(images, is_feat=True)
    net.zero_grad()
    feats[-2].square().mean().backward()
    reached = {id(p) for p in net.parameters() if p.grad is not None}
    assert reached <= {id(p) for p in net.get_feat_modules().parameters()} | {id(p) for p in net.net.parameters(False)}
    net.zero_grad()


def test_copy_and_autocast(net, images):
    twin = copy.deepcopy(net.eval())
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
        feats, logit = net(images, is_feat=True)
        silent, _ = twin(images, is_feat=True)
        assert feats[-2].any() and not torch.equal(silent[-2], feats[-2]) and torch.equal(net(images), logit)
        with torch.autocast("cpu", torch.bfloat16):
            low, own = net(images, is_feat=True)
        assert own.dtype == torch.float32
        if "squeezenet" not in net.arch:
            assert torch.equal(own, head(net)(low[-1].float()))


@pytest.mark.parametrize("name", ["timm:test_vit", "torchvision:resnet18", "CNN"])
def test_compile_and_export(own, name, images):
    net = create(name if name != "CNN" else f"{own}:CNN").eval()
    want, logit = net(images, is_feat=True)
    torch.testing.assert_close(torch.export.export(net.net, (images,)).module()(images), logit)
    got, own = torch.compile(net, backend="aot_eager", fullgraph=True)(images, is_feat=True)
    torch.testing.assert_close([*got, own], [*want, logit])
    assert not net.caught


def test_reused(net, images):
    """As a part of SimKD's student: no tail, and the state under its own prefix."""
    if "mnasnet" in net.arch:
        pytest.skip("torchvision's MNASNet cannot be loaded without the metadata of its own state")
    student = Reused(copy.deepcopy(net), 48, N_CLS).train()
    student(images).sum().backward()
    assert [name for name, p in student.named_parameters() if p.grad is None] == ["fc.weight", "fc.bias"]
    state = student.state_dict()
    assert {key for key in state if key.startswith("net.")} < {f"net.{key}" for key in net.state_dict()}
    other = Reused(copy.deepcopy(net), 48, N_CLS)
    other.load_state_dict(state)
    assert torch.equal(other.eval()(images), student.eval()(images)) and head(other) is other.fc


def test_load_refuses_other_names():
    net = create("timm:test_resnet")
    state = net.state_dict()
    state["more"] = state.pop("fc.bias")
    with pytest.raises(RuntimeError, match=r"fc\.bias"):
        net.load_state_dict(state)


def test_new_head_keeps_pooled(images):
    net = create("torchvision:mobilenet_v3_small").eval()
    layer = replace_head(net, 3)
    feats, logit = net(images, is_feat=True)
    assert logit.shape == (2, 3) and torch.equal(layer(feats[-1]), logit)


def test_normalisation(own, images):
    pixels = images.sigmoid()
    for name in ("timm:test_vit", "torchvision:resnet18", f"{own}:CNN"):
        net = create(name).eval()
        mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
        normalise = torchvision.transforms.functional.normalize
        want = net.net(normalise(pixels, net.mean, net.std))
        net.renormalise(mean, std)
        torch.testing.assert_close(net(normalise(pixels, mean, std)), want)
        net.renormalise(list(net.mean), list(net.std))
        assert net.scale is None and list(net.state_dict()) == list(net.net.state_dict())


@pytest.mark.parametrize("name", ["timm:test_resnet", "torchvision:resnet18"])
def test_stages_by_hand(name, images):
    net = create(name, stages=["layer2", "layer4"]).eval()
    seen = clones(net.net, lambda: net(images))
    feats, logit = net(images, is_feat=True)
    assert len(feats) == 4 and torch.equal(feats[1], seen["layer2"]) and torch.equal(feats[2], seen["layer4"])
    assert torch.equal(logit, net.net(images))


def test_own_classes(own, images):
    net = create(f"{own}:CNN").eval()
    assert (net.chosen.stem, net.stages, net.chosen.classifier) == ("layer1", ["layer2", "layer3"], "unit.last")
    vit = create(f"{own}:vit").eval()
    assert vit.chosen.stem == "conv_proj" and [name[-1] for name in vit.stages] == list("0235")
    feats, logit = vit(images, is_feat=True)
    seen = clones(vit.net, lambda: vit(images))
    tokens = seen[vit.stages[1]][:, 1:]  # (2, 16, 32) behind the class token
    assert torch.equal(feats[2][:, :, 1, 2], tokens[:, 1 * 4 + 2]) and torch.equal(logit, vit.net(images))
    same = create(f"{own}:Same")
    assert not isinstance(same, External) and same.arch == f"{own}:Same"
    assert isinstance(create(f"{own}:Same", stages=["layer1"]), External)


@pytest.mark.parametrize("leaf", ["Missing", "Wrong", "Raises", "Dense", "wrong_size", "no_module", "CNN+", "Changes"])
def test_bad_classes(own, leaf, images):
    with pytest.raises(ModelError) as caught:
        net = create(f"{own}:{leaf.rstrip('+')}", pretrained=leaf.endswith("+"))
        for _ in range(3):
            net(images)
    assert "my_nets.py" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["raise SystemExit(3)", "import nothing_of_this_name", "def (", "x = 1"])
def test_bad_files(tmp_path, text):
    file = tmp_path / "mine.py"
    file.write_text(text)
    for name in (f"{file}:Net", f"{tmp_path / 'absent.py'}:Net"):
        with pytest.raises(ModelError, match=r"\.py: "):
            check_external(name)


@pytest.mark.parametrize(
    ("stages", "said"),
    [(["layer9"], "layer4"), (["bn1"], "bn1"), (["fc"], "fc"), (["layer1.0.relu"], "2 times")],
)
def test_bad_stages(stages, said):
    """Unknown, overwritten in place, not a map, run twice."""
    with pytest.raises(ModelError, match=said):
        create("torchvision:resnet18", stages=stages)


def test_names(monkeypatch):
    assert all(map(is_external, ["timm:resnet50.a1_in1k", "torchvision:resnet18", "a/b.py:Net"]))
    assert not any(map(is_external, ["resnet8x4", "resnet8x4-simkd256f2", "b.py", "hf-hub:timm/x"]))
    assert runs_code("a.py:Net-simkd48f2") and not runs_code("timm:resnet50")
    names = {"timm:resnet50.a1_in1k": "timm-resnet50.a1_in1k", "dir/my_nets.py:Small": "my_nets-Small", "wrn": "wrn"}
    assert all(file_name(name) == file for name, file in names.items())
    check_external("timm:resnet50.a1_in1k")
    bad = {"timm:resnet5O": "resnet50", "torchvision:resnet19": "resnet18", "timm:hf-hub:timm/resnet18": "resnet18"}
    for name, closest in bad.items():
        with pytest.raises(ModelError, match=closest):
            check_external(name)
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ModelError, match=r"requirements-extra\.txt"):
        check_external("timm:resnet50")


def test_too_small_images():
    for name in ("torchvision:inception_v3", "torchvision:maxvit_t", "timm:crossvit_tiny_240"):
        with pytest.raises(ModelError, match=f"{name}: .*64-pixel"):
            create(name)


def test_pretrained(monkeypatch):
    """The file that would be downloaded is made here; without it, a sentence."""
    whole = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda *_, **__: whole)
    for n_cls in (N_CLS, 1000):
        net = create_external("torchvision:resnet18", n_cls, SIZE, pretrained=True)
        state = net.state_dict()
        assert all(torch.equal(state[key], whole[key]) for key in whole if not key.startswith("fc."))
        assert state["fc.weight"].shape == (n_cls, 512) and not torch.equal(
            state["fc.weight"][:7], whole["fc.weight"][:7]
        )

    def fail(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", fail)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("torchvision:resnet18", "timm:test_resnet"):
        with pytest.raises(ModelError, match=f"{name}: no pretrained weights"):
            create(name, pretrained=True)
