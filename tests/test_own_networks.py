"""Foreign networks in the scripts: every method, groups, resume, checkpoints, pairing and what is refused."""

import copy
import json
import sys
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import save_file

import train_student
import train_teacher
import transfer_student
from distiller_zoo import Distillation, DistillError, distiller_dict
from helper.checkpoint import load_network
from helper.util import cli_errors
from models import create_model
from models.util import ModelError
from scripts import export_student
from tests.common import call

NETS = """
import torch
from torch import nn
from torchvision.models import VisionTransformer

class Teacher(nn.Module):
    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    def __init__(self, num_classes):
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.layer3 = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU())
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(32, num_classes)
    def forward(self, x):
        return self.out(self.drop(self.layer3(self.layer2(self.layer1(x))).mean((2, 3))))

class Named(Teacher):
    # no automatic choice finds a stage of it
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.a = nn.ModuleDict({"b": nn.ModuleDict({k: self._modules.pop(k) for k in ("layer1", "layer2", "layer3")})})
    def forward(self, x):
        b = self.a["b"]
        return self.out(b["layer3"](b["layer2"](b["layer1"](x))).mean((2, 3)))

class Ours(Teacher):
    # our interface, and a list called stages
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.stages = nn.ModuleList([self.layer2, self.layer3])
    def get_feat_modules(self):
        return nn.ModuleList([self.layer1, *self.stages])
    def forward(self, x, is_feat=False, preact=False):
        feats = [self.layer1(x)]
        for stage in self.stages:
            feats.append(stage(feats[-1]))
        feats.append(feats[-1].mean((2, 3)))
        return (feats, self.out(feats[-1])) if is_feat else self.out(feats[-1])

class Scaled(Teacher):
    def forward(self, x):
        return 9 * super().forward(x)

class Bright(Teacher):
    std = (0.01, 0.01, 0.01)

class Neck(Teacher):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.out = nn.Sequential(nn.BatchNorm1d(32), self.out)

class Half(Teacher):
    std = (1, 1)

def vit(num_classes):
    return VisionTransformer(64, 16, 2, 2, 32, 64, num_classes=num_classes)

class Broken(nn.Module):
    def __init__(self):
        raise KeyError("my mistake")
"""
SAME_CHANNELS = {"fsp", "kdsvd"}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a file of networks and the checkpoint of a torchvision teacher with random weights."""
    path = tmp_path_factory.mktemp("own")
    (path / "my_nets.py").write_text(NETS)
    torch.manual_seed(0)
    torch.save(create_model("torchvision:resnet18", 3).state_dict(), path / "resnet18.pth")
    return path


@pytest.fixture
def run(here, image_folder, monkeypatch, capsys, tmp_path):
    """-> run(script, *flags), which returns exit code, stdout, stderr."""
    monkeypatch.chdir(here)
    flags = ["--dataset", "folder", "--data_folder", image_folder, "--batch_size", "33", "--epochs", "2"]
    flags += ["--device", "cpu", "--output", tmp_path]
    return lambda script, *more: call(script, [*flags, *more], monkeypatch, capsys)


def teacher(here):
    return ["--path_t", here / "resnet18.pth", "--model_t", "torchvision:resnet18"]


def lines(folder):
    """The lines of metrics.jsonl without times, and the last weights, of each run in a folder."""
    found = {}
    for path in sorted(folder.glob("**/metrics.jsonl")):
        kept = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in path.open()]
        (last,) = path.parent.glob("*_last.pth")
        found[path.parent.name] = kept, torch.load(last, weights_only=True)["model"]
    return found


STUDENTS = [
    "timm:test_vit",
    "timm:test_convnext",
    "timm:test_efficientnet",
    "torchvision:mobilenet_v3_small",
    "resnet8",
]


@pytest.mark.parametrize(
    "student", ["timm:test_resnet", *(pytest.param(name, marks=pytest.mark.slow) for name in STUDENTS)]
)
def test_every_method(student, run, here, tmp_path):
    names = [name for name in distiller_dict if name not in {"abound"} | SAME_CHANNELS]
    flags = ["--model_s", student, "--init_epochs", "1", "--epochs", "1", "--nce_k", "6"]
    code, _, err = run(train_student, *teacher(here), "--distill", *names, *flags)
    assert code == 0, err
    found = lines(tmp_path)
    assert len(found) == len(names)
    for name, (metrics, state) in found.items():
        assert metrics[-1]["train_loss"] > 0, name
        assert all(value.isfinite().all() for value in state.values() if value.is_floating_point())
    for name in ("abound", "fsp"):
        code, _, err = run(train_student, *teacher(here), "--distill", name, *flags[:-2])
        assert code == 2 and name in err


def test_groups_and_resume(run, here, tmp_path):
    """A network with dropout: in a group as alone, and resumed as uninterrupted, bit for bit."""
    flags = [*teacher(here), "--model_s", "my_nets.py:Teacher", "--nce_k", "6", "--optimizer", "adamw"]
    for out, names, epochs in (
        ("group", ["kd", "crd"], 2),
        ("alone", ["kd"], 2),
        ("alone", ["crd"], 1),
        ("alone", ["crd"], 2),
    ):
        few = flags if "crd" in names else [flag for flag in flags if flag not in ("--nce_k", "6")]
        code, _, err = run(train_student, *few, "--distill", *names, "--epochs", epochs, "--output", tmp_path / out)
        assert code == 0, err
    group, alone = lines(tmp_path / "group"), lines(tmp_path / "alone")
    assert group.keys() == alone.keys() and len(group) == 2
    for name, (metrics, state) in group.items():
        assert metrics == alone[name][0]
        assert all(torch.equal(value, alone[name][1][key]) for key, value in state.items())


def test_checkpoints(run, here, tmp_path, monkeypatch):
    """Weights for other classes, a teacher from them, a probe; classes are named on the command line only."""
    other = create_model("timm:test_resnet", 5)
    save_file(other.state_dict(), tmp_path / "five.safetensors")
    code, out, err = run(train_teacher, "--model", "timm:test_resnet", "--weights", tmp_path / "five.safetensors")
    assert code == 0 and "classifier" in out, err
    (path,) = tmp_path.glob("models/timm-test_resnet_*/timm-test_resnet_last.pth")
    assert load_network(path)[0] == "timm:test_resnet"
    assert torch.load(path, weights_only=True)["model"].keys() == other.state_dict().keys()
    code, out, err = run(train_student, "--path_t", path, "--model_s", "my_nets.py:Teacher", "--describe")
    assert code == 0 and out.count("compared") == 4, out
    stages = ["--stages_t", "layer2,layer3,layer4"]
    code, out, err = run(train_student, "--path_t", path, "--model_s", "my_nets.py:Teacher", *stages)
    assert code == 0 and "last 2 stages" in out, err
    (student,) = tmp_path.glob("student_model/*/my_nets-Teacher_last.pth")
    code, _, err = run(transfer_student, "--path_s", student)
    assert code == 2 and "my_nets.py:Teacher" in err and "--model_s" in err
    for flags in (["--path_s", student, "--model_s", "my_nets.py:Teacher"], ["--path_s", path]):
        code, _, err = run(transfer_student, *flags)
        assert code == 0, err
    code, _, err = run(train_student, "--path_t", path, "--model_s", "resnet8", "--distill", "simkd", "--epochs", "1")
    assert code == 0, err
    monkeypatch.setitem(sys.modules, "timm", None)
    code, _, err = run(train_student, "--path_t", path, "--model_s", "resnet8")
    assert code == 2 and "requirements-extra.txt" in err


def test_stages_that_only_a_name_finds(run, here, tmp_path):
    """From the first training to the export of a SimKD student, whose file names no class that may be run."""
    stages, net = "a.b.layer1,a.b.layer2,a.b.layer3", "my_nets.py:Named"
    torch.save(create_model(net, 3, stages=stages.split(",")).state_dict(), tmp_path / "named.pth")
    torch.save(create_model("my_nets.py:Ours", 3).state_dict(), tmp_path / "ours.pth")
    named, ours = ["--path_t", tmp_path / "named.pth", "--model_t", net], ["--path_t", tmp_path / "ours.pth"]
    code, _, err = run(train_student, *named, "--stages_t", stages, "--model_s", "my_nets.py:Ours", "--epochs", "1")
    assert code == 0 and not err, err
    flags = ["--model_s", net, "--stages_s", stages, "--distill", "simkd", "--batch_size", "32", "--epochs", "1"]
    code, _, err = run(train_student, *ours, "--model_t", "my_nets.py:Ours", *flags)
    assert code == 0, err
    (path,) = tmp_path.glob("student_model/*simkd*/*_last.pth")
    assert load_network(path, net)[2].net.stages == stages.split(",")
    args = [path, "--model", net, "--format", "state_dict", "onnx", "--output", tmp_path / "export"]
    assert cli_errors(lambda: export_student.main([*map(str, args)])) == 0
    card = (tmp_path / "export" / "README.md").read_text()
    assert "minus mean (0.5, 0.5, 0.5)" in card and f'create_model("{net}-simkd32f2", 3, 32, ' in card
    code, _, err = run(train_student, *named, "--stages_t", "a.b.layer2,a.b.layer1")
    assert code == 2 and "a.b.layer1,a.b.layer2" in err


def test_a_bf16_teacher_sees_normalised_images(run, here, tmp_path):
    losses = []
    torch.save(create_model("my_nets.py:Bright", 3).state_dict(), tmp_path / "bright.pth")
    for precision in ("fp32", "bf16"):
        more = ["--path_t", tmp_path / "bright.pth", "--model_t", "my_nets.py:Bright", "--precision_t", precision]
        code, _, err = run(train_student, *more, "--epochs", "1", "--output", tmp_path / precision)
        assert code == 0, err
        ((metrics, _),) = lines(tmp_path / precision).values()
        losses.append(metrics[-1]["train_div"])
    assert losses[0] == pytest.approx(losses[1], rel=0.03)


@pytest.mark.parametrize(
    ("script", "flags", "named"),
    [
        (train_teacher, ["--model", "timm:resnet5O"], "resnet50"),
        (train_teacher, ["--model", "torchvision:resnet19"], "resnet18"),
        (train_teacher, ["--model", "timm:hf-hub:someone/net"], "hf-hub"),
        (train_teacher, ["--model", "nets.py:Small"], "nets.py"),
        (train_teacher, ["--model", "my_nets.py:Nobody"], "Teacher"),
        (train_teacher, ["--model", "my_nets.py:Broken"], "my mistake"),
        (train_teacher, ["--model", "my_nets.py:Half"], "my_nets.py:Half"),
        (train_teacher, ["--model", "my_nets.py:Neck", "--batch_size", "13"], "--batch_size 13"),
        (train_teacher, ["--model", "resnet8", "--weights", "resnet18.pth"], "resnet18.pth"),
        (train_teacher, ["--model", "resnet8", "--weights", "pretrained"], "resnet8"),
        (train_student, ["--model_s", "my_nets.py:Teacher", "--stages_s", "layer1,layer9"], "layer9"),
        (train_student, ["--model_s", "resnet8", "--stages_s", "layer1"], "resnet8"),
    ],
)
def test_bad_input(script, flags, named, run, here, tmp_path):
    more = teacher(here) if script is train_student else []
    code, _, err = run(script, *more, *flags)
    assert code == 2 and named in err and err.count("\n") == 1, err
    assert not list(tmp_path.iterdir())


def test_a_classifier_that_is_not_all(here, monkeypatch):
    """SimKD and SRRL need logits that are a linear layer's, SimKD its input to be the last map's mean."""
    monkeypatch.chdir(here)
    for name, method, error in (
        ("my_nets.py:Scaled", "srrl", ModelError),
        ("my_nets.py:Scaled", "simkd", ModelError),
        ("timm:test_convnext", "simkd", DistillError),
        ("timm:test_vit", "simkd", DistillError),
        ("timm:test_vit", "srrl", None),
        ("timm:test_resnet", "simkd", None),
    ):
        torch.manual_seed(0)
        student, teacher = create_model("resnet8", 3), create_model(name, 3, 32)
        with pytest.raises(error, match=name) if error else nullcontext():
            Distillation(method, student, teacher, labels=[0, 1, 2])


def test_own_loop_at_the_size_of_a_foreign_network(here, monkeypatch):
    """A ViT of 64 pixels takes no others; copied, saved and loaded, the whole gives the same loss in bfloat16."""
    monkeypatch.chdir(here)
    torch.manual_seed(0)
    student, teacher = create_model("my_nets.py:vit", 3, 64), create_model("timm:test_resnet", 3, 64)
    kd = Distillation("simkd", student, teacher, labels=[0, 1, 2])
    twin = copy.deepcopy(kd)
    for p in twin.parameters():
        p.data.zero_()
    twin.load_state_dict(kd.state_dict())
    images, target = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 0])
    with torch.autocast("cpu", torch.bfloat16):
        losses = [net(images, target) for net in (kd, twin)]
    losses[0].backward()
    assert torch.equal(*losses) and not any(p.grad is not None for p in twin.parameters())
