"""Checkpoints of other programs: read in every known layout, refused where they would run code, converted."""

import argparse
import collections
import io
import os
import pickle
import pickletools
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import train_teacher
from helper import checkpoint
from helper.util import RunError, cli_errors
from models import create_model, model_dict
from scripts import convert_checkpoint

ROOT = Path(__file__).resolve().parent.parent
N_CLS = 3
OLD_FORMAT = {"_use_new_zipfile_serialization": False}


@pytest.fixture(scope="module")
def state():
    """Weights whose running statistics are not the initial ones, with numbers that a conversion could spoil."""
    torch.manual_seed(0)
    model = create_model("resnet8", N_CLS)
    model(torch.randn(4, 3, 32, 32))
    state = model.state_dict()
    state["fc.bias"][:] = torch.tensor([-0.0, 1e-42, 1 / 3])
    return state


@pytest.fixture(scope="module")
def ours(state, image_folder, tmp_path_factory):
    """A checkpoint as train_teacher.py writes it, with those weights, in a folder whose name misleads."""
    folder = tmp_path_factory.mktemp("ours")
    args = ["--dataset", "folder", "--data_folder", image_folder, "--image_size", "8", "--model", "resnet8"]
    args += ["--epochs", "1", "--device", "cpu", "--output", folder]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_teacher.py", *map(str, args)])
        assert cli_errors(train_teacher.main) == 0
    content = torch.load(next(folder.rglob("resnet8_last.pth")))
    path = folder / "vgg13_vanilla" / "resnet8_last.pth"
    path.parent.mkdir()
    checkpoint.save(path, {**content, "model": state, "epoch": 240, "accuracy": 72.5})
    return path


def optimizer(state):
    """The state of torch.optim.SGD, with the learning rate that RepDistiller's schedule makes."""
    momentum = {i: {"momentum_buffer": value * 2} for i, value in enumerate(list(state.values())[:2])}
    return {"state": momentum, "param_groups": [{"lr": np.float64(0.05 * 0.1**3), "nesterov": False, "params": [0, 1]}]}


def options(**names):
    return argparse.Namespace(learning_rate=0.05, lr_decay_epochs=[150, 180, 210], trial="1", tb_freq=500, **names)


def prefixed(state, prefix="module."):
    return collections.OrderedDict((prefix + key, value) for key, value in state.items())


# What the scripts of RepDistiller and mdistiller pass to torch.save.
LAYOUTS = {
    "RepDistiller's epoch": lambda s: {"epoch": 240, "model": s, "accuracy": torch.tensor(72.5), **sgd(s)},
    "RepDistiller's best": lambda s: {"epoch": 3, "model": s, "best_acc": np.float32(72.5), **sgd(s)},
    "RepDistiller's last": lambda s: {"opt": options(model="resnet8"), "model": s, **sgd(s)},
    "mdistiller's": lambda s: {"epoch": 9, "model": prefixed(s), "best_acc": np.float64(72), **sgd(s)},
    "state": dict,
    "state of DataParallel": prefixed,
}


def sgd(state):
    return {"optimizer": optimizer(state)}


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


zip_and_old = pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "old"])


@zip_and_old
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, as_zip, state, tmp_path):
    path = tmp_path / "resnet8_vanilla" / "ckpt_epoch_240.pth"
    path.parent.mkdir()
    torch.save(LAYOUTS[layout](state), path, _use_new_zipfile_serialization=as_zip)
    arch, n_cls, model, about = checkpoint.load_network(path)
    assert (arch, n_cls, model.training) == ("resnet8", N_CLS, False)
    assert same_bits(model.state_dict(), state)
    content = LAYOUTS[layout](state)
    rest = content.keys() - {"model"} - prefixed(state).keys() - state.keys()
    assert about.keys() - {"accuracy"} == rest - {"accuracy"}
    assert about.get("accuracy") == content.get("accuracy", content.get("best_acc"))
    assert all(type(about[key]) in (int, float) for key in ("epoch", "accuracy") if key in about)
    if "optimizer" in about:
        assert about["optimizer"]["param_groups"][0]["lr"] == 0.05 * 0.1**3


@zip_and_old
@pytest.mark.parametrize("core", [b"core", b"_core"], ids=["numpy 1", "numpy 2"])
def test_numbers_of_any_numpy(core, as_zip, tmp_path):
    """They become plain numbers."""
    values = [np.float64(1 / 3), np.float32(0.1), np.float16(0.1), np.int64(-5), np.int32(7), np.bool_(True)]
    values.append(np.array(2.5, ">f8")[()])
    path = tmp_path / "x.pth"
    torch.save({"values": values}, path, _use_new_zipfile_serialization=as_zip)
    rewrite(path, rb"numpy\._?core\.", rb"numpy." + core + b".")
    found = checkpoint.load(path)["values"]
    assert found == [v.item() for v in values] and [type(v) for v in found] == [type(v.item()) for v in values]


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without")
@zip_and_old
def test_tensors_of_a_gpu(as_zip, state, tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"model": state, "arch": "resnet8"}, path, _use_new_zipfile_serialization=as_zip)
    rewrite(path, b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:0")
    with pytest.raises(RuntimeError, match="CUDA"):  # it is what a GPU's file is
        torch.load(path)
    assert same_bits(checkpoint.load_network(path)[2].state_dict(), state)


def test_a_checkpoint_of_ours(ours, state):
    arch, n_cls, model, about = checkpoint.load_network(ours)
    assert (arch, n_cls) == ("resnet8", N_CLS) and same_bits(model.state_dict(), state)
    assert (about["dataset"], about["image_size"], about["epoch"], about["accuracy"]) == ("folder", 8, 240, 72.5)
    assert len(about["mean"]) == len(about["std"]) == 3


def test_what_training_scripts_keep_is_read(state, tmp_path):
    schedule = torch.optim.lr_scheduler.MultiStepLR(torch.optim.SGD([torch.zeros(1)], 0.1), [150, 180, 210])
    opt = argparse.Namespace(device=torch.device("cuda:0"), size=torch.Size([3, 32, 32]), dtype=torch.float16)
    more = {"classes": {1, 2, "x"}, "raw": b"x" * 1000, None: 0, "image_size": [32, 32], "mean": (0.5, 0.5, 0.5)}
    torch.save({"model": state, "lr_scheduler": schedule.state_dict(), "args": opt, **more}, tmp_path / "x.pth")
    about = checkpoint.load_network(tmp_path / "x.pth", "resnet8")[3]
    assert about["lr_scheduler"]["milestones"] == schedule.milestones and vars(about["args"]) == vars(opt)
    assert about["raw"] == more["raw"] and about["classes"] == more["classes"]
    assert not about.keys() & {"image_size", "mean"}  # our checkpoints say these otherwise


@pytest.mark.parametrize("data", [{"class_names": ["a", "b", "c"]}, {"class_names": [1, 2, 3]}, {"dataset": "x" * 300}])
def test_what_is_said_about_the_data(data, state, tmp_path):
    """Kept as our checkpoints say it; in others the key may mean anything, in ours it is damage."""
    path = tmp_path / "x.pth"
    valid = data == {"class_names": ["a", "b", "c"]}
    checkpoint.save(path, {"model": state, **data})
    found = checkpoint.load_network(path)[3]
    assert found == (data if valid else {})
    checkpoint.save(path, {"model": state, "config_sha256": "0", **data})
    if valid:
        assert checkpoint.load_network(path)[3].items() >= data.items()
    else:
        with pytest.raises(RunError, match=f"x.pth.*{next(iter(data))}"):
            checkpoint.load_network(path)


def read(path, capsys, *args, **kwargs):
    """-> (architecture, weights, the rest of the file, what was printed)."""
    arch, _, model, about = checkpoint.load_network(path, *args, **kwargs)
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") <= 1
    return arch, model.state_dict(), about, err


@pytest.mark.parametrize("key", ["state_dict", "net", "model_state_dict", "student", "teacher", "params", "ema", "any"])
def test_weights_under_another_key(key, state, tmp_path, capsys):
    path = tmp_path / "x.pth"
    torch.save({"epoch": 3, key: state, **sgd(state)}, path)
    _, found, about, said = read(path, capsys, "resnet8")
    assert same_bits(found, state) and about.keys() == {"epoch", "optimizer"}
    assert said.startswith(f"note: {path}: ") and f"'{key}'" in said


class Holder(nn.Module):
    """As a LightningModule or mdistiller's Distiller holds networks."""

    def __init__(self, **networks):
        super().__init__()
        for name, network in networks.items():
            setattr(self, name, network)


def network(state, arch="resnet8"):
    model = create_model(arch, N_CLS)
    model.load_state_dict(state)
    return model


def test_a_checkpoint_of_lightning(state, tmp_path, capsys):
    path = tmp_path / "epoch=3-step=100.ckpt"
    lightning = Holder(model=network(state), criterion=nn.CrossEntropyLoss(torch.ones(N_CLS)))
    content = {"epoch": 3, "global_step": 100, "pytorch-lightning_version": "2.4.0", "hyper_parameters": {"lr": 0.1}}
    torch.save({**content, "state_dict": lightning.state_dict(), "callbacks": {}, "loops": {}}, path)
    arch, found, about, said = read(path, capsys)
    assert arch == "resnet8" and same_bits(found, state) and about.items() >= content.items()
    assert "resnet8" in said and "'state_dict.model'" in said


def test_student_and_teacher_of_mdistiller(state, tmp_path, capsys):
    """Both are in one state; the part, or the architecture where it differs, says which is meant."""
    teacher = create_model("resnet14", N_CLS)
    path = tmp_path / "latest"
    both = nn.DataParallel(Holder(student=network(state), teacher=teacher, extra=nn.Linear(3, 3)))
    torch.save({"epoch": 3, "model": both.state_dict(), "best_acc": 70.0}, path)
    with pytest.raises(RunError) as error:
        checkpoint.load_network(path, flag="--model_s")
    for part in (str(path), "resnet8 in 'model.student'", "resnet14 in 'model.teacher'", "--part_s"):
        assert part in str(error.value)
    for part in ("student", "model.student"):
        assert same_bits(read(path, capsys, part=part)[1], state)
    arch, found, about, _ = read(path, capsys, part="teacher")
    assert arch == "resnet14" and same_bits(found, teacher.state_dict()) and about["epoch"] == 3
    assert same_bits(read(path, capsys, "resnet8")[1], state)
    with pytest.raises(RunError, match="'assistant'"):
        checkpoint.load_network(path, part="assistant")


WRAPPERS = {
    "module": nn.DataParallel,
    "_orig_mod": torch.compile,
    "_orig_mod.module": lambda model: torch.compile(nn.DataParallel(model)),
    "module._orig_mod.module": lambda model: nn.DataParallel(torch.compile(nn.DataParallel(model))),
    "n_averaged": lambda model: torch.optim.swa_utils.AveragedModel(nn.DataParallel(model)),
}


@pytest.mark.parametrize("prefix", WRAPPERS)
def test_prefixes_of_wrappers(prefix, state, tmp_path, capsys):
    wrapped = WRAPPERS[prefix](network(state)).state_dict()
    assert next(iter(wrapped)).startswith(prefix)
    torch.save({"model": wrapped}, tmp_path / "x.pth")
    _, found, _, said = read(tmp_path / "x.pth", capsys, "resnet8")
    assert same_bits(found, state) and said == ""


@pytest.mark.parametrize(
    ("folder", "content"),
    [
        ("resnet8_vanilla", {}),
        ("resnet8_cifar100_lr_0.05_decay_0.0005_trial_0", {}),
        ("S:resnet8_T:resnet32x4_cifar100_kd_r:0.1_a:0.9_b:0.0_1", {}),
        ("vgg8_vanilla", {"arch": "resnet8"}),
        ("vgg8_vanilla", {"opt": options(model="resnet8")}),
        ("x", {"opt": options(model_s="resnet8", model_t="wrn_40_2")}),
        ("resnet8", {"opt": {"model": 3}, "arch": "a network of someone else"}),
    ],
)
def test_a_network_that_is_named(folder, content, state, tmp_path, monkeypatch, capsys):
    """The file comes before its folder. Without a name it could be one of two here."""
    monkeypatch.setitem(model_dict, "twin", model_dict["resnet8"])
    path = tmp_path / folder / "x.pth"
    path.parent.mkdir()
    torch.save({"model": state, **content}, path)
    assert read(path, capsys)[0::3] == ("resnet8", "")
    assert read(path, capsys, "twin")[0::3] == ("twin", "")


@pytest.mark.parametrize("folder", ["x", "vgg8_vanilla"])
def test_a_network_that_is_not_named(folder, state, tmp_path, monkeypatch, capsys):
    """Or that is in the wrong folder."""
    path = tmp_path / folder / "x.pth"
    path.parent.mkdir()
    torch.save(state, path)
    arch, found, _, said = read(path, capsys)
    assert arch == "resnet8" and same_bits(found, state) and said == f"note: {path}: read as a resnet8\n"
    monkeypatch.setitem(model_dict, "twin", model_dict["resnet8"])
    with pytest.raises(RunError, match=r"resnet8.*twin.*--model_s"):
        checkpoint.load_network(path, flag="--model_s")


def test_a_network_that_is_unknown(tmp_path):
    torch.save(nn.Sequential(nn.Linear(3, 3)).state_dict(), tmp_path / "x.pth")
    with pytest.raises(RunError, match=r"x\.pth: not a known network"):
        checkpoint.load_network(tmp_path / "x.pth")


class Old:
    """A tensor as torch 0.3 or 0.4 pickled it."""

    def __init__(self, tensor, key, version):
        self.tensor, self.key, self.version = tensor.contiguous(), key, version

    def __reduce__(self):
        args = (Storage(self), 0, tuple(self.tensor.shape), self.tensor.stride())
        if self.version == "0.3":
            return torch._utils._rebuild_tensor, args
        return torch._utils._rebuild_tensor_v2, (*args, False, None)  # None for hooks


class Storage:
    def __init__(self, old):
        self.old = old


class OldPickler(pickle._Pickler):
    def persistent_id(self, value):
        if isinstance(value, Storage):
            kind = torch.cuda.FloatStorage if value.old.version == "0.3" else torch.FloatStorage
            return "storage", kind, value.old.key, "cuda:0", value.old.tensor.numel(), None
        return None


@pytest.mark.parametrize("version", ["0.3", "0.4"])
def test_files_of_old_torch(version, state, tmp_path, capsys):
    """Before 0.4.1 batch norms did not count their batches."""
    floats = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    old = {key: Old(value, str(i), version) for i, (key, value) in enumerate(floats.items())}
    path = tmp_path / "x.pth"
    with open(path, "wb") as file:
        for value in (0x1950A86A20F9469CFC6C, 1001, {}, {"model": old}, sorted(v.key for v in old.values())):
            OldPickler(file, 2).dump(value)
        for value in sorted(old.values(), key=lambda value: value.key):
            file.write(value.tensor.numel().to_bytes(8, "little") + value.tensor.numpy().tobytes())
    found = read(path, capsys, "resnet8")[1]
    assert same_bits({key: found[key] for key in floats}, floats)
    assert all(found[key] == 0 and found[key].dtype == torch.int64 for key in found.keys() - floats.keys())


def test_safetensors(state, tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(state, path)
    assert same_bits(read(path, capsys)[1], state)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RunError, match=r"model\.safetensors: damaged"):
        checkpoint.load(path)


def zipped(path, state):
    torch.save(state, path.with_name("inner"))
    with zipfile.ZipFile(path, "w") as file:
        file.write(path.with_name("inner"), "cifar_teachers/resnet8_vanilla/ckpt_epoch_240.pth")


def tarred(mode):
    def write(path, state):
        torch.save(state, path.with_name("inner"))
        with tarfile.open(path, mode) as file:
            file.add(path.with_name("inner"), "cifar_teachers/resnet8_vanilla/ckpt_epoch_240.pth")

    return write


def folder(path, state):
    (path / "x").mkdir(parents=True)
    torch.save(state, path / "x" / "last.pth")


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:22aa\nsize 30000\n"
OTHER_KINDS = {
    "TorchScript": (lambda p, s: torch.jit.trace(network(s).eval(), torch.zeros(2, 3, 8, 8)).save(p), "torch.jit.load"),
    "whole model": (lambda p, s: torch.save(network(s), p), "save its state_dict"),
    "whole model, old": (lambda p, s: torch.save(network(s), p, **OLD_FORMAT), "state_dict"),
    "git-LFS": (lambda p, s: p.write_text(LFS), "git lfs pull"),
    "web page": (lambda p, s: p.write_text("\n<!DOCTYPE html><html>Sign in</html>"), "web page"),
    "tar": (tarred("w"), "unpack it"),
    "tar.gz": (tarred("w:gz"), "unpack it"),
    "zip": (zipped, "unpack it"),
    "folder": (folder, "x/last.pth"),
    "empty": (lambda p, s: p.touch(), "empty"),
    "protocol 4": (lambda p, s: torch.save(s, p, pickle_protocol=4), "protocol 4"),
    "protocol 4, old": (lambda p, s: torch.save(s, p, pickle_protocol=4, **OLD_FORMAT), "protocol 4"),
    "protocol 4, bare": (lambda p, s: p.write_bytes(pickle.dumps({"a": 1}, 4)), "protocol 4"),
    "stray": (lambda p, s: torch.save({**s, "epoch": 3}, p), "'epoch'"),
    "stray in the weights": (lambda p, s: torch.save({"epoch": 3, "model": {**s, "lr": None}}, p), "'lr'"),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_another_kind_of_file_is_named(kind, state, tmp_path):
    path = tmp_path / "x.pth"
    write, said = OTHER_KINDS[kind]
    write(path, state)
    with pytest.raises(RunError, match=f"x.pth: .*{said}") as error:
        checkpoint.load_network(path, "resnet8")
    assert not re.search("NoneType|object|Error", str(error.value))


def without(state, *keys):
    return {key: value for key, value in state.items() if key not in keys}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: without(s, "fc.weight", "fc.bias"), "not a resnet8: lacks fc.bias (2 tensors missing, 0 unknown)"),
        (lambda s: without(s, "fc.bias"), "not a resnet8: lacks fc.bias (1 tensors missing, 0 unknown)"),
        (lambda s: {**s, "fc.bias": s["fc.bias"][:2]}, "fc.bias is [2], a resnet8 has [3]"),
        (lambda s: {**s, "fc.weight": torch.zeros(1).expand(10**9, 64)}, "fc.bias is [3]"),
        (lambda s: {**s, "fc.weight": s["fc.weight"].to_sparse()}, "'fc.weight'"),
        (lambda s: {**s, "fc.weight": s["fc.weight"].long()}, "fc.weight holds what no trained network does"),
        (lambda s: {**s, "fc.weight": s["fc.weight"] / 0}, "fc.weight holds what no trained network does"),
        (lambda s: {**s, "bn1.running_var": -s["bn1.running_var"]}, "bn1.running_var holds a negative variance"),
        (lambda s: {**s, "convs": s["fc.bias"]}, "not a resnet8: has convs besides (0 tensors missing, 1 unknown)"),
        (lambda s: {**s, "module.fc.bias": s["fc.bias"]}, "holds no network weights"),
        (lambda s: {"epoch": 3, "model": {}}, "holds no network weights"),
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
    "in the weights": (lambda: {"model": Call(os.system, "touch evil")}, r"needs (posix|nt)\.system,"),
    "in the options": (lambda: {"opt": argparse.Namespace(x=Call(exec, "open('evil', 'w')"))}, r"needs exec,"),
    "as the file": (lambda: Call(Path.touch, Path("evil")), r"needs getattr,"),
    "a whole network": (lambda: create_model("resnet8", 2), r"needs models\.resnet\.ResNet,"),
    "an array": (lambda: {"lr": np.zeros(2)}, r"needs numpy\._?core\.multiarray\._reconstruct,"),
}


@zip_and_old
@pytest.mark.parametrize("attack", ATTACKS)
def test_no_code_is_run(attack, as_zip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, said = ATTACKS[attack]
    path = tmp_path / "resnet8_vanilla.pth"
    torch.save(content(), path, _use_new_zipfile_serialization=as_zip)
    with pytest.raises(RunError, match=said):
        checkpoint.load_network(path, "resnet8")
    assert not Path("evil").exists()
    if attack in ("in the weights", "in the options"):  # it would have worked
        torch.load(path, weights_only=False)
        assert Path("evil").exists()


def test_a_bare_pickle(tmp_path):
    """One sentence is all that is printed, though torch warns of such files."""
    (tmp_path / "x.pth").write_bytes(pickle.dumps({"model": Call(os.system, "touch evil")}, 2))
    command = [sys.executable, ROOT / "scripts" / "convert_checkpoint.py", "x.pth", "y.pth"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"convert_checkpoint\.py: x\.pth: [^\n]+\n", done.stderr), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]


def test_flags_of_a_dtype_are_not_taken_from_a_file(tmp_path):
    """numpy's own scalar would take these for pointers to objects."""
    dtype = Call(np.dtype, "f8", False, True, state=(4, "<", None, None, None, -1, -1, 63))
    torch.save({"lr": Call(np.float64(0).__reduce__()[0], dtype, b"\1" * 8)}, tmp_path / "x.pth")
    assert pickle.loads(pickle.dumps(dtype)).flags == 63
    assert checkpoint.load(tmp_path / "x.pth")["lr"] == np.frombuffer(b"\1" * 8).item()


def test_a_flipped_bit_is_refused(state, tmp_path):
    path = tmp_path / "x.pth"
    torch.save(state, path)
    weight = state["fc.weight"].numpy().tobytes()
    path.write_bytes(path.read_bytes().replace(weight, bytes([weight[0] ^ 1]) + weight[1:]))
    assert not same_bits(torch.load(path), state)  # torch says nothing
    with pytest.raises(RunError, match=r"x\.pth: damaged"):
        checkpoint.load(path)


def test_tensors_that_were_not_read_are_refused(state, tmp_path):
    """An old file whose list of storages is empty: torch returns what the memory held before."""
    path = tmp_path / "x.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    file = io.BytesIO(data)
    for _ in range(4):
        list(pickletools.genops(file))
    before = file.tell()
    list(pickletools.genops(file))
    path.write_bytes(data[:before] + pickle.dumps([], 2) + data[file.tell() :])
    assert torch.load(path).keys() == state.keys()
    with pytest.raises(RunError, match=r"x\.pth: damaged"):
        checkpoint.load(path)


# ---- scripts/convert_checkpoint.py


def convert(args, capsys):
    """-> exit code, stdout, stderr."""
    try:
        code = cli_errors(lambda: convert_checkpoint.main([str(arg) for arg in args]))
    except SystemExit as stop:  # argparse
        code = stop.code
    out = capsys.readouterr()
    return code, out.out, out.err


def test_there_and_back(ours, state, tmp_path, capsys):
    """RepDistiller's scripts take what is converted from ours, and it converts back."""
    assert convert([ours, tmp_path / "teachers"], capsys)[0] == 0
    there = tmp_path / "teachers" / "resnet8_vanilla" / "ckpt_epoch_240.pth"
    theirs = torch.load(there)
    assert theirs.keys() == {"epoch", "model", "accuracy"} and (theirs["epoch"], theirs["accuracy"]) == (240, 72.5)
    segments = str(there).split("/")[-2].split("_")  # as RepDistiller finds the network
    create_model(segments[0], N_CLS).load_state_dict(theirs["model"])
    assert same_bits(theirs["model"], state)

    back = tmp_path / "back.pth"
    assert convert([there, back, "--dataset", "digits"], capsys)[0] == 0
    content = torch.load(back)
    assert same_bits(content.pop("model"), state)
    assert content == {"arch": "resnet8", "n_cls": N_CLS, "dataset": "digits", "epoch": 240, "accuracy": 72.5}
    assert checkpoint.load_network(back)[:2] == ("resnet8", N_CLS)  # whatever its folder is called


@pytest.mark.parametrize("layout", LAYOUTS)
def test_foreign_layouts_become_ours(layout, state, tmp_path, capsys):
    source, target = tmp_path / "x.pth", tmp_path / "y.pth"
    content = LAYOUTS[layout](state)
    torch.save(content, source)
    assert convert([source, target, "--model", "resnet8"], capsys)[0] == 0
    found = torch.load(target)
    assert same_bits(found["model"], state) and (found["arch"], found["n_cls"]) == ("resnet8", N_CLS)
    assert found.get("epoch") == content.get("epoch")
    assert found.get("accuracy") == content.get("accuracy", content.get("best_acc"))
    assert found.keys() <= {"model", "arch", "n_cls", "epoch", "accuracy"}


def test_precision_is_kept(state, tmp_path, capsys):
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    torch.save(half, tmp_path / "x.pth")
    assert convert([tmp_path / "x.pth", tmp_path, "--model", "resnet8", "--to", "repdistiller"], capsys)[0] == 0
    found = torch.load(tmp_path / "resnet8_vanilla" / "resnet8_last.pth")
    assert found.keys() == {"model"} and same_bits(found["model"], half)


def test_nothing_is_overwritten_unasked(ours, state, tmp_path, capsys):
    target = tmp_path / "y.pth"
    target.write_text("precious")
    code, _, err = convert([ours, target], capsys)
    assert code == 2 and str(target) in err and "--force" in err
    assert target.read_text() == "precious"
    code, out, _ = convert([ours, target, "--force"], capsys)
    assert code == 0 and same_bits(torch.load(target)["model"], state)
    assert "note: RepDistiller takes the network's name from the folder" in out


@pytest.mark.parametrize("name", ["y.bin", "y.ckpt", "y.pth.tar", "out/y.x"])
def test_a_name_with_a_suffix_is_a_file(name, state, tmp_path, capsys):
    torch.save({"a": state, "b": state}, tmp_path / "x.pth")
    args = ["--part", "b", "--to", "repdistiller"]
    assert convert([tmp_path / "x.pth", tmp_path / name, *args], capsys)[0] == 0
    assert same_bits(torch.load(tmp_path / name)["model"], state)
    (tmp_path / "v1.0").mkdir()  # is there already
    assert convert([tmp_path / "x.pth", tmp_path / "v1.0", *args], capsys)[0] == 0
    assert (tmp_path / "v1.0" / "resnet8_vanilla" / "resnet8_last.pth").is_file()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["ours", "y.pth", "--to", "distillers"], "resnet8_last.pth: is a checkpoint of ours already"),
        (["ours", "y.pth", "--dataset", "digits"], "--dataset"),
        (["ours", "y.pth", "--model", "vgg8"], "not a vgg8: lacks block0.0.bias"),
        (["ours", "y.pth", "--model", "vgg7"], "unknown network 'vgg7'; known: vgg"),
        (["ours", "y.pth", "--to", "timm"], "'timm'"),
        (["ours"], "OUT"),
        (["both.pth", "y.pth"], "--part"),
        (["nowhere.pth", "y.pth"], "nowhere.pth: no such checkpoint file"),
    ],
)
def test_bad_input(args, said, ours, state, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": state, "b": state}, "both.pth")
    code, _, err = convert([ours if arg == "ours" else arg for arg in args], capsys)
    assert code == 2 and said in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["both.pth"]
