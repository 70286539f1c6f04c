"""Foreign networks in the scripts: every method, groups, resume, checkpoints, pairing and what is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

import train_student
import train_teacher
import transfer_student
from distiller_zoo import distiller_dict
from helper import build
from helper.checkpoint import load_network
from models import create_model
from tests.common import call

NETS = """
import torch
from torch import nn

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


def test_checkpoints(run, here, tmp_path, image_folder):
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


@pytest.mark.parametrize(
    ("script", "flags", "named"),
    [
        (train_teacher, ["--model", "timm:resnet5O"], "resnet50"),
        (train_teacher, ["--model", "torchvision:resnet19"], "resnet18"),
        (train_teacher, ["--model", "timm:hf-hub:someone/net"], "hf-hub"),
        (train_teacher, ["--model", "nets.py:Small"], "nets.py"),
        (train_teacher, ["--model", "my_nets.py:Smal"], "Teacher"),
        (train_teacher, ["--model", "my_nets.py:Broken"], "my mistake"),
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


def test_teacher_in_bfloat16_has_its_own_normalisation(here, image_folder, monkeypatch):
    """The copy of the teacher that computes in bfloat16 is made after the network knows the data's mean and std."""
    seen = {}
    monkeypatch.setattr(train_student, "opened", lambda runs: seen.update(runs=runs) or pytest.fail("stop"))
    monkeypatch.setattr(
        train_student, "move_teacher", lambda t, *args: (build.move_teacher(t, *args), seen.update(t=t))
    )
    flags = ["--path_t", here / "resnet18.pth", "--model_t", "torchvision:resnet18", "--dataset", "folder"]
    flags += ["--data_folder", image_folder, "--device", "cpu", "--precision_t", "bf16", "--output", here / "out"]
    with pytest.raises(pytest.fail.Exception, match="stop"):
        train_student.main([*map(str, flags)])
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        _, logit = seen["t"].forward(images, False)
        expected = seen["t"].model(images)
        seen["t"].model.renormalise(seen["t"].model.mean, seen["t"].model.std)
        assert not torch.allclose(seen["t"].model(images), expected, rtol=0.2)
    torch.testing.assert_close(logit, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))
