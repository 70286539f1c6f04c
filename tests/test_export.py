"""Exported networks: run outside of the project, with the accuracy of their training; and what networks cost."""

import hashlib
import json
import os
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, recall_score
from torch import nn

import train_student
import train_teacher
from dataset import load_dataset
from helper import checkpoint
from helper.util import RunError, cli_errors
from models import create_model
from scripts import costs, export_student

ROOT = Path(__file__).resolve().parent.parent
FORMATS = ["state_dict", "safetensors", "onnx"]
# Runs the code of a card: without this project for ONNX, and with it on the path for a network of this project.
RUN = """
import sys, numpy, pathlib
space = {"images": numpy.load("images.npy")}
exec(pathlib.Path("code.py").read_text(), space)
if "model" in space:
    space["logits"] = space["model"](sys.modules["torch"].from_numpy(space["images"])).detach().numpy()
else:
    assert not {"models", "helper", "torch"} & sys.modules.keys()
numpy.save("logits.npy", space["logits"])
"""


def call(script, *args):
    """-> exit code"""
    try:
        return cli_errors(lambda: script.main([*map(str, args)]))
    except SystemExit as stop:  # argparse
        return stop.code


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of a teacher of digits and of two students, by method."""
    out = tmp_path_factory.mktemp("save")
    usual = ["--dataset", "digits", "--image_size", 8, "--epochs", 4, "--batch_size", 20, "--device", "cpu"]
    usual += ["--learning_rate", 0.1, "--output", out]
    assert call(train_teacher, *usual, "--model", "resnet14") == 0
    students = ["--path_t", next(out.rglob("*_last.pth")), "--model_s", "resnet8", "--distill", "kd", "simkd"]
    assert call(train_student, *usual, *students) == 0
    return {json.loads(path.read_text())["method"]: path.parent for path in out.rglob("config.json")}


@pytest.fixture
def path(runs):
    return runs["kd"] / "resnet8_last.pth"


def facts_of(card):
    return dict(re.findall(r"^- (.+?): (.+)$", card, re.M))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kd", "simkd"])
def test_what_is_exported_runs_elsewhere_as_well_as_in_training(method, runs, tmp_path):
    path, folder = next(runs[method].glob("*_last.pth")), tmp_path / "new" / "export"
    assert call(export_student, path, "--format", *FORMATS, "--output", folder) == 0
    card, saved = (folder / "README.md").read_text(), torch.load(path, weights_only=True)
    names = [f"{saved['arch']}.{suffix}" for suffix in ("pth", "safetensors", "onnx")]
    assert {file.name for file in folder.iterdir()} == {*names, "README.md", "labels.json"}
    assert all(hashlib.sha256((folder / name).read_bytes()).hexdigest() in card for name in names)
    state = torch.load(folder / names[0], weights_only=True)
    assert list(state) == list(saved["model"]) and all(torch.equal(state[key], saved["model"][key]) for key in state)
    assert not any(str(root).encode() in (folder / names[2]).read_bytes() for root in (ROOT, tmp_path))

    source, line = (
        load_dataset("digits", "nowhere", 8),
        json.loads((path.parent / "metrics.jsonl").open().readlines()[-1]),
    )
    assert json.loads((folder / "labels.json").read_text()) == list(source.class_names)
    images = (source.test_images / 255 - np.array(source.mean)) / np.array(source.std)
    np.save(folder / "images.npy", np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32))
    for code, known in zip(re.findall("```python\n(.*?)```", card, re.S), (ROOT, ROOT, ""), strict=True):
        (folder / "code.py").write_text(code)
        subprocess.run([sys.executable, "-c", RUN], cwd=folder, env=os.environ | {"PYTHONPATH": str(known)}, check=True)
        found, target = np.load(folder / "logits.npy").argmax(1), source.test_labels
        one = 100 / len(target) + 1e-4  # image: logits may be equal to rounding
        assert 100 * accuracy_score(target, found) == pytest.approx(line["test_acc"], abs=one)
        assert 100 * f1_score(target, found, average="macro") == pytest.approx(line["test_macro_f1"], abs=2 * one)
        assert 100 * recall_score(target, found, average=None) == pytest.approx(line["test_recall"], abs=12 * one)
        assert len(set(found)) > 3  # a network that has learnt nothing would predict one class


def test_the_card(path, capsys):
    assert call(export_student, path) == 0
    folder = path.with_name("resnet8_last_export")
    card, config = (folder / "README.md").read_text(), json.loads((path.parent / "config.json").read_text())
    assert card.partition("\n\n")[2].strip() in capsys.readouterr().out
    lines = [json.loads(line) for line in (path.parent / "metrics.jsonl").open()]
    best = max(lines, key=lambda line: line["test_acc"])
    facts = facts_of(card)
    assert facts["Network"].startswith(f"resnet8, {config['params']:,} parameters") and facts["Teacher"] == "resnet14"
    assert facts["Method"] == "kd: 0.1 * cross-entropy + 0.9 * KL at T = 4.0" and facts["Data set"] == "digits"
    assert "(N, 3, 8, 8)" in facts["Input"] and f"({config['mean'][0]:.6g}, " in facts["Input"]
    assert facts["Epoch"] == "4" and facts["Test accuracy (%)"] == f"{lines[3]['test_acc']:.2f}"
    assert facts["Test macro-F1 (%)"] == f"{lines[3]['test_macro_f1']:.2f}"
    ends = f"last {lines[3]['test_acc']:.2f} (epoch 4), best {best['test_acc']:.2f} (epoch {best['epoch']})"
    assert facts["Test accuracy in training (%)"] == ends
    assert config["parts"][0]["code"] in facts["Trained with"] and f"torch {torch.__version__}" in facts["Versions"]
    assert facts["SHA-256 of the configuration"] == checkpoint.load(path)["config_sha256"]

    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert call(export_student, path) == 0  # over its own files
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_card_says_only_what_is_known(runs, path, tmp_path):
    """Of a published file, with the files of another network's run beside it."""
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes((runs["none"] / name).read_bytes())
    torch.save(checkpoint.load(path)["model"], tmp_path / "x.pth")
    assert call(export_student, tmp_path / "x.pth", "--output", tmp_path / "out") == 0
    facts = facts_of((tmp_path / "out" / "README.md").read_text())
    assert set(facts) == {"Network", "Input", "Output"} and "mean" not in facts["Input"]
    assert not (tmp_path / "out" / "labels.json").exists()


@pytest.mark.parametrize("layout", FORMATS)
def test_another_network_is_noticed(layout):
    torch.manual_seed(0)
    net, images = create_model("resnet8", 5).eval(), torch.randn(3, 3, 8, 8)
    other = deepcopy(net)
    other.fc.bias.data[3] += 0.01
    content = export_student.encode(net, layout, images)
    assert export_student.check(content, layout, net, images)
    with pytest.raises(RunError, match=layout):
        export_student.check(content, layout, other, images)


def test_without_the_extras(path, tmp_path, monkeypatch, capsys):
    args = [path, "--format", "onnx", "--output", tmp_path / "out"]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        assert call(export_student, *args) == 0
    assert "onnxruntime is not installed" in (tmp_path / "out" / "README.md").read_text()
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    capsys.readouterr()
    assert call(export_student, *args) == 2
    err = capsys.readouterr().err
    assert "pip install" in err and "onnxscript" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["nowhere.pth"], "nowhere.pth"),
        (["README.md"], "README.md"),
        (["{path}", "--format", "torchscript"], "--format"),
        (["{path}", "--model", "resnet14"], "resnet14"),
        (["{path}", "--output", "."], "README.md"),
        (["{path}", "--output", "README.md"], "README.md"),
        (["resnet8.pth", "--output", "{tmp}"], "resnet8.pth"),
        (["no_config/x.pth"], "no_config"),
        (["no_metrics/x.pth"], "no_metrics"),
    ],
)
def test_bad_input(args, said, path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text("precious")
    content = path.read_bytes()
    if args[0] == "resnet8.pth":
        Path("README.md").unlink()
        Path("resnet8.pth").write_bytes(content)
    if args[0].startswith("no"):
        for folder, damaged in (("no_config", "config.json"), ("no_metrics", "metrics.jsonl")):
            Path(folder).mkdir()
            Path(folder, "x.pth").write_bytes(content)
            for name in ("config.json", "metrics.jsonl"):
                text = path.with_name(name).read_text()
                Path(folder, name).write_text(text[:-3] if name == damaged else text)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert call(export_student, *(arg.format(path=path, tmp=tmp_path) for arg in args)) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


class Tokens(nn.Module):
    """Four patches of 16 pixels through a transformer layer, which torch computes by fused kernels."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, stride=8)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, x):
        return self.layer(self.patches(x).flatten(2).transpose(1, 2)).mean(1)


def test_costs_of_attention():
    model, threads = Tokens().train().requires_grad_(False), torch.get_num_threads()
    found = costs.costs(model, 16)
    n, c = 4, 16  # tokens, channels
    projections, attention, mlp = 4 * n * c * c, 2 * n * n * c, 2 * n * c * 32
    assert found["macs"] == n * c * 3 * 8 * 8 + projections + attention + mlp
    assert found["params"] == sum(p.numel() for p in model.parameters()) and found["latency_ms"] > 0
    assert model.training and not any(p.requires_grad for p in model.parameters())
    assert torch.get_num_threads() == threads
    with pytest.raises(RunError, match="--image_size 4"):
        costs.costs(model, 4)


def test_table_of_costs(path, capsys):
    assert call(costs, "vgg8", path) == 0
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in capsys.readouterr().out.splitlines()]
    assert [row[:3] for row in rows[2:]] == [["vgg8", "100", "32"], ["resnet8", "10", "8"]]
    convs = (3 * 64 * 32**2, 64 * 128 * 16**2, 128 * 256 * 8**2, 256 * 512 * 4**2, 512 * 512 * 4**2)
    assert rows[2][4] == f"{(9 * sum(convs) + 512 * 100) / 1e6:,.1f}"
    for name in ("resnet8x5", "README.md"):
        assert call(costs, name, path) == 2
        out, err = capsys.readouterr()
        assert name in err and err.count("\n") == 1 and not out
