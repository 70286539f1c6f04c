"""Checkpoints of others: read in every layout that is around, refused where they would run code; converted."""

import argparse
import collections
import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from helper import checkpoint
from helper.run import Run
from helper.util import RunError
from models import create_model
from scripts import convert_checkpoint

ROOT = Path(__file__).resolve().parent.parent
N_CLS = 7


@pytest.fixture(scope="module")
def state():
    """Of a network whose batch norms have seen something, with numbers that a conversion could spoil."""
    torch.manual_seed(0)
    model = create_model("resnet8", N_CLS)
    model(torch.randn(4, 3, 32, 32))
    state = model.state_dict()
    state["fc.bias"][:3] = torch.tensor([-0.0, 1e-42, 1 / 3])
    return state


def optimizer(state):
    """As torch.optim.SGD's, with the learning rate that RepDistiller's schedule makes."""
    momentum = {i: {"momentum_buffer": value * 2} for i, value in enumerate(list(state.values())[:2])}
    return {"state": momentum, "param_groups": [{"lr": np.float64(0.05 * 0.1**3), "nesterov": False, "params": [0, 1]}]}


def options(**names):
    return argparse.Namespace(learning_rate=0.05, lr_decay_epochs=[150, 180, 210], trial="1", tb_freq=500, **names)


def prefixed(state):
    return collections.OrderedDict((f"module.{key}", value) for key, value in state.items())


# What the scripts of RepDistiller and mdistiller pass to torch.save.
LAYOUTS = {
    "RepDistiller's epoch": lambda s: {
        "epoch": 240,
        "model": s,
        "accuracy": torch.tensor(72.5),
        "optimizer": optimizer(s),
    },
    "RepDistiller's best": lambda s: {"epoch": 3, "model": s, "best_acc": np.float32(72.5), "optimizer": optimizer(s)},
    "RepDistiller's last": lambda s: {"opt": options(model="resnet8"), "model": s, "optimizer": optimizer(s)},
    "mdistiller's": lambda s: {"epoch": 9, "model": prefixed(s), "optimizer": optimizer(s), "best_acc": np.float64(72)},
    "state": dict,
    "state of DataParallel": prefixed,
}


def rewrite(path, pattern, new):
    """Replace bytes of a file's pickles."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            members = {name: file.read(name) for name in file.namelist()}
        with zipfile.ZipFile(path, "w") as file:
            for name, content in members.items():
                file.writestr(name, re.sub(pattern, new, content) if name.endswith("data.pkl") else content)
    else:
        path.write_bytes(re.sub(pattern, new, path.read_bytes()))


def same_bits(a, b):
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and a[key].numpy().tobytes() == b[key].numpy().tobytes() for key in a
    )


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, as_zip, state, tmp_path):
    path = tmp_path / "resnet8_vanilla" / "ckpt_epoch_240.pth"
    path.parent.mkdir()
    torch.save(LAYOUTS[layout](state), path, _use_new_zipfile_serialization=as_zip)
    arch, n_cls, model, about = checkpoint.load_network(path)
    assert (arch, n_cls, model.training) == ("resnet8", N_CLS, False)
    assert same_bits(model.state_dict(), state)
    assert about.keys() == LAYOUTS[layout](state).keys() - {"model"} - prefixed(state).keys() - state.keys()
    if "optimizer" in about:
        lr = about["optimizer"]["param_groups"][0]["lr"]
        assert type(lr) is float and lr == 0.05 * 0.1**3
    if "best_acc" in about:
        assert type(about["best_acc"]) is float and about["best_acc"] in (72, 72.5)


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("core", [b"core", b"_core"], ids=["numpy 1", "numpy 2"])
def test_numbers_of_any_numpy(core, as_zip, tmp_path):
    values = [np.float64(1 / 3), np.float32(0.1), np.float16(0.1), np.int64(-5), np.int32(7), np.bool_(True)]
    values.append(np.array(2.5, ">f8")[()])
    path = tmp_path / "x.pth"
    torch.save({"values": values}, path, _use_new_zipfile_serialization=as_zip)
    rewrite(path, rb"numpy\._?core\.", rb"numpy." + core + b".")
    found = checkpoint.load(path)["values"]
    assert found == [v.item() for v in values] and [type(v) for v in found] == [type(v.item()) for v in values]


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without")
@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "old"])
def test_tensors_of_a_gpu(as_zip, state, tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"model": state, "arch": "resnet8"}, path, _use_new_zipfile_serialization=as_zip)
    rewrite(path, b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:0")
    with pytest.raises(RuntimeError, match="CUDA"):  # it is what a GPU's file is
        torch.load(path)
    assert same_bits(checkpoint.load_network(path)[2].state_dict(), state)


def test_a_student_of_ours_serves_as_teacher(state, tmp_path):
    """In a folder whose name would mislead; its data set's statistics come along."""
    model = create_model("resnet8", N_CLS)
    model.load_state_dict(state)
    config = {"dataset": "folder", "n_cls": N_CLS, "mean": [0.5] * 3, "std": [0.2] * 3, "image_size": 32}
    folder = tmp_path / "vgg13_vanilla"
    folder.mkdir()
    run = Run(folder, "resnet8", {**config, "opt": {"model_s": "resnet8", "model_t": "vgg13", "distill": ["kd"]}})
    run.save("resnet8_last", model.to(memory_format=torch.channels_last), 240, 72.5)
    arch, n_cls, model, about = checkpoint.load_network(folder / "resnet8_last.pth")
    assert (arch, n_cls) == ("resnet8", N_CLS) and same_bits(model.state_dict(), state)
    assert about.items() >= {**config, "epoch": 240, "accuracy": 72.5}.items()


@pytest.mark.parametrize(
    ("folder", "content", "name"),
    [
        ("wrn_40_2_vanilla", {}, "wrn_40_2"),
        ("resnet8x4_cifar100_lr_0.05_decay_0.0005_trial_0", {}, "resnet8x4"),
        ("ResNet50", {}, "ResNet50"),
        ("S:resnet8x4_T:resnet32x4_cifar100_kd_r:0.1_a:0.9_b:0.0_1", {}, "resnet8x4"),
        ("S:resnet8x4_T:resnet32x4_cifar100_kd_r:0.1_a:0.9_b:0.0_1", {"arch": "vgg8"}, "vgg8"),
        ("x", {"opt": options(model="resnet110")}, "resnet110"),
        ("x", {"opt": options(model_s="wrn_16_2", model_t="wrn_40_2")}, "wrn_16_2"),
        ("resnet56_vanilla", {"opt": options()}, "resnet56"),
        ("resnet56_vanilla", {"opt": {"model": 3}}, "resnet56"),
    ],
)
def test_whose_network_it_is(folder, content, name):
    path = Path(folder, "ckpt_epoch_240.pth")
    assert checkpoint.arch_of(path, content, None) == name
    assert checkpoint.arch_of(path, content, "vgg19") == "vgg19"


@pytest.mark.parametrize(("flags", "said"), [({}, "--model_t"), ({"flag": "--model_s"}, "--model_s")])
def test_the_flag_that_names_it(flags, said, state, tmp_path):
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(RunError, match=rf"by its folder '{tmp_path.name}'; pass {said}$"):
        checkpoint.load_network(tmp_path / "x.pth", **flags)
    assert checkpoint.load_network(tmp_path / "x.pth", "resnet8", **flags)[1] == N_CLS


def without(state, *keys):
    return {key: value for key, value in state.items() if key not in keys}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: without(s, "fc.weight", "fc.bias"), "not a resnet8: lacks fc.bias (2 tensors missing, 0 unknown)"),
        (lambda s: without(s, "fc.bias"), "not a resnet8: lacks fc.bias (1 tensors missing, 0 unknown)"),
        (lambda s: {**s, "fc.bias": s["fc.bias"][:5]}, "fc.weight is [7, 64], a resnet8 has [5, 64]"),
        (lambda s: {**s, "fc.bias": s["fc.weight"]}, "fc.weight is [7, 64], a resnet8 has [2, 64]"),
        (lambda s: {**s, "fc.bias": torch.zeros(1).expand(10**9)}, "a tensor is larger than its storage"),
        (lambda s: {**s, "fc.weight": s["fc.weight"].to_sparse()}, "(it asks for torch._utils._rebuild_sparse_tensor)"),
        (lambda s: {**s, "fc.weight": s["fc.weight"].long()}, "fc.weight holds what no trained network does"),
        (lambda s: {**s, "fc.weight": s["fc.weight"] / 0}, "fc.weight holds what no trained network does"),
        (lambda s: {**s, "convs": s["fc.bias"]}, "not a resnet8: has convs besides (0 tensors missing, 1 unknown)"),
        (lambda s: {"state_dict": s}, "holds no network weights"),
    ],
)
def test_weights_that_do_not_fit(change, said, state, tmp_path):
    path = tmp_path / "x.pth"
    torch.save(change(state), path)
    with pytest.raises(RunError, match=re.escape(said)) as error:
        checkpoint.load_network(path, "resnet8")
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


class Call:
    """Pickled as a call of anything."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args, state) if state else (function, args)

    def __reduce__(self):
        return self.reduced


ATTACKS = {
    "in the weights": (lambda: {"model": Call(os.system, "touch evil")}, r"\(it asks for (posix|nt)\.system\)"),
    "in the options": (lambda: {"opt": argparse.Namespace(x=Call(exec, "open('evil', 'w')"))}, r"\(it asks for exec\)"),
    "as the file": (lambda: Call(Path.touch, Path("evil")), r"\(it asks for getattr\)"),
    "a whole network": (lambda: create_model("resnet8", 2), r"\(it asks for models\.resnet\.ResNet\)"),
    "an array": (lambda: {"lr": np.zeros(2)}, r"\(it asks for numpy\._?core\.multiarray\._reconstruct\)"),
}


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_no_code_is_run(attack, as_zip, state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, said = ATTACKS[attack]
    path = tmp_path / "resnet8_vanilla.pth"
    torch.save(content(), path, _use_new_zipfile_serialization=as_zip)
    with pytest.raises(RunError, match=f"refused, not a plain checkpoint of tensors {said}"):
        checkpoint.load_network(path, "resnet8")
    assert not Path("evil").exists()
    if attack in ("in the weights", "in the options"):  # it would have worked
        torch.load(path, weights_only=False)
        assert Path("evil").exists()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_bare_pickle(protocol, tmp_path):
    """Nothing but one sentence is said, though torch warns of such files."""
    (tmp_path / "x.pth").write_bytes(pickle.dumps({"model": Call(os.system, "touch evil")}, protocol))
    command = [sys.executable, ROOT / "scripts" / "convert_checkpoint.py", "x.pth", "y.pth"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"convert_checkpoint\.py: x\.pth: [^\n]+\n", done.stderr), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]


def test_flags_of_a_type_are_not_taken_from_a_file(tmp_path):
    """numpy's own dtype would believe this one to hold pointers to objects."""
    dtype = Call(np.dtype, "f8", False, True, state=(4, "<", None, None, None, -1, -1, 63))
    torch.save({"lr": Call(np.float64(0).__reduce__()[0], dtype, b"\1" * 8)}, tmp_path / "x.pth")
    assert pickle.loads(pickle.dumps(dtype)).flags == 63
    assert checkpoint.load(tmp_path / "x.pth")["lr"] == np.frombuffer(b"\1" * 8).item()


@pytest.mark.parametrize("args", [("f8", b"\0" * 7), ("O", b"\0" * 8), ("f8", 3), (3, b"\0" * 8)])
def test_numbers_that_are_none(args, tmp_path):
    dtype = Call(np.dtype, args[0], state=(3, "<", None, None, None, -1, -1, 0))
    torch.save({"lr": Call(np.float64(0).__reduce__()[0], dtype, args[1])}, tmp_path / "x.pth")
    with pytest.raises(RunError, match="damaged or not a checkpoint"):
        checkpoint.load(tmp_path / "x.pth")


# ---- scripts/convert_checkpoint.py


def convert(args, monkeypatch, capsys):
    """-> exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, args)])
    try:
        code = convert_checkpoint.main()
    except SystemExit as stop:  # argparse
        code = stop.code
    out = capsys.readouterr()
    return code, out.out, out.err


def ours(state, folder):
    model = create_model("resnet8", N_CLS)
    model.load_state_dict(state)
    config = {"dataset": "digits", "n_cls": N_CLS, "mean": [0.5] * 3, "std": [0.2] * 3, "image_size": 32, "opt": {}}
    Run(folder, "resnet8", config).save("resnet8_last", model, 240, 72.5)
    return folder / "resnet8_last.pth"


def test_there_and_back(state, tmp_path, monkeypatch, capsys):
    """RepDistiller's scripts take what comes of ours; of that comes ours again."""
    code, out, _ = convert([ours(state, tmp_path), tmp_path / "teachers"], monkeypatch, capsys)
    there = tmp_path / "teachers" / "resnet8_vanilla" / "ckpt_epoch_240.pth"
    assert code == 0 and out == f"{there}: resnet8, 7 classes, in the layout of repdistiller\n"
    theirs = torch.load(there)
    assert theirs.keys() == {"epoch", "model", "accuracy"} and (theirs["epoch"], theirs["accuracy"]) == (240, 72.5)
    segments = str(there).split("/")[-2].split("_")  # as RepDistiller finds the network
    create_model(segments[0], N_CLS).load_state_dict(theirs["model"])
    assert same_bits(theirs["model"], state)

    back = tmp_path / "back.pth"
    assert convert([there, back, "--dataset", "digits"], monkeypatch, capsys)[0] == 0
    content = torch.load(back)
    assert same_bits(content.pop("model"), state)
    assert content == {"arch": "resnet8", "n_cls": 7, "dataset": "digits", "epoch": 240, "accuracy": 72.5}
    assert checkpoint.load_network(back)[:2] == ("resnet8", N_CLS)  # whatever its folder is called


@pytest.mark.parametrize("layout", LAYOUTS)
def test_foreign_layouts_become_ours(layout, state, tmp_path, monkeypatch, capsys):
    source, target = tmp_path / "x.pth", tmp_path / "y.pth"
    content = LAYOUTS[layout](state)
    torch.save(content, source)
    assert convert([source, target, "--model", "resnet8"], monkeypatch, capsys)[0] == 0
    found = torch.load(target)
    assert same_bits(found["model"], state) and (found["arch"], found["n_cls"]) == ("resnet8", 7)
    assert found.get("epoch") == content.get("epoch")
    assert found.get("accuracy") == content.get("accuracy", content.get("best_acc"))
    assert found.keys() <= {"model", "arch", "n_cls", "epoch", "accuracy"}


def test_precision_is_kept(state, tmp_path, monkeypatch, capsys):
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    torch.save(half, tmp_path / "x.pth")
    args = [tmp_path / "x.pth", tmp_path, "--model", "resnet8", "--to", "repdistiller"]
    assert convert(args, monkeypatch, capsys)[0] == 0
    found = torch.load(tmp_path / "resnet8_vanilla" / "resnet8_last.pth")
    assert found.keys() == {"model"} and same_bits(found["model"], half)


def test_a_folder_that_repdistiller_would_not_understand(state, tmp_path, monkeypatch, capsys):
    code, out, _ = convert([ours(state, tmp_path), tmp_path / "y.pth"], monkeypatch, capsys)
    assert code == 0 and "note: RepDistiller takes the network's name from the folder" in out
    assert (tmp_path / "y.pth").exists()


def test_nothing_is_overwritten_unasked(state, tmp_path, monkeypatch, capsys):
    source, target = ours(state, tmp_path), tmp_path / "y.pth"
    target.write_text("precious")
    code, _, err = convert([source, target], monkeypatch, capsys)
    assert (code, err) == (2, f"convert_checkpoint.py: {target}: exists; pass --force to overwrite it\n")
    assert target.read_text() == "precious"
    assert convert([source, target, "--force"], monkeypatch, capsys)[0] == 0
    assert same_bits(torch.load(target)["model"], state)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["ours", "y.pth", "--to", "distillers"], "resnet8_last.pth: is a checkpoint of ours already"),
        (["ours", "y.pth", "--dataset", "digits"], "--dataset: RepDistiller's layout has no place for it"),
        (["ours", "y.pth", "--model", "vgg8"], "not a vgg8: lacks block0.0.bias"),
        (["ours", "y.pth", "--model", "vgg7"], "unknown network 'vgg7'; known: vgg"),
        (["ours", "y.pth", "--to", "timm"], "invalid choice: 'timm'"),
        (["ours"], "the following arguments are required: OUT"),
        (["bare", "y.pth"], "pass --model"),
        (["nowhere.pth", "y.pth"], "nowhere.pth: no such checkpoint file"),
    ],
)
def test_bad_input(args, said, state, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = {"ours": ours(state, tmp_path), "bare": tmp_path / "bare.pth"}
    torch.save(state, files["bare"])
    code, _, err = convert([files.get(arg, arg) for arg in args], monkeypatch, capsys)
    assert code == 2 and said in err and err.count("\n") == 1
    assert set(tmp_path.iterdir()) == set(files.values())
