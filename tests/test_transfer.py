"""Linear probes of frozen students."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_student
import transfer_student
from dataset import load_dataset
from dataset.loader import DeviceLoader
from helper import checkpoint
from helper.build import make_loaders
from helper.probe import FeatureLoader, Probe, number_views, plan_views
from helper.run import Run
from models import create_model, model_dict
from models.util import head
from tests.common import call
from transfer_student import parse


@pytest.mark.parametrize("arch", model_dict)
def test_only_the_head_of_any_network_trains(arch):
    torch.manual_seed(0)
    net = create_model(arch, 7)
    keys, before = list(net.state_dict()), {key: value.clone() for key, value in net.state_dict().items()}
    probe = Probe(net, 4).train()
    images, target = torch.randn(5, 3, 32, 32), torch.tensor([0, 1, 2, 3, 0])
    (f,), logit = probe(images, is_feat=True)
    assert f.shape == (5, head(net).in_features) and logit.shape == (5, 4)
    net.eval()
    torch.testing.assert_close(logit, net(images))  # the network as a whole, and so its checkpoint, says the same
    torch.testing.assert_close(probe(f), logit)

    trained = [p for p in probe.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in head(net).parameters()}
    F.cross_entropy(logit, target).backward()
    torch.optim.SGD(trained, lr=1.0).step()
    state = probe.state_dict()
    assert list(state) == keys
    moved = {key for key in keys if state[key].shape != before[key].shape or not torch.equal(state[key], before[key])}
    assert len(moved) == 2 and all(state[key].shape[0] == 4 for key in moved)


def test_views_are_numbered_one_to_one():
    every = torch.cartesian_prod(torch.arange(3), torch.arange(9), torch.arange(9), torch.arange(2)).T
    views = number_views(every)
    assert torch.equal(views, torch.arange(3 * 162))
    assert torch.equal(plan_views(views, 4), every)
    assert torch.equal(plan_views(number_views(every[:1]), 1), every[:1])


@pytest.mark.parametrize("flip", [True, False])
def test_features_are_those_of_the_images(flip):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (20, 8, 8, 3), np.uint8), np.arange(20) % 3
    same = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    torch.manual_seed(0)
    probe = Probe(create_model("resnet8", 5), 3).eval()
    for augment, epochs in (("crop", [2, 3]), (None, [1])):
        loader = DeviceLoader(images, labels, 6, augment=augment, flip=flip, seed=4, **same)
        kept = FeatureLoader(loader, probe, epochs).fill()
        assert len(kept) == 4 and kept.nbytes() == kept.bank.numel() * 4
        for epoch in epochs:
            loader.set_epoch(epoch)
            want = list(loader)
            kept.set_epoch(epoch)
            got = list(kept)
            kept.set_epoch(epoch, 2)
            assert all(torch.equal(a, b) for a, b in zip(next(iter(kept)), got[2], strict=True))
            for (x, target, index), (f, target_f, index_f) in zip(want, got, strict=True):
                assert torch.equal(target, target_f) and torch.equal(index, index_f)
                torch.testing.assert_close(f, probe.features(x))


# --- the script ---


@pytest.fixture(scope="module")
def path_s(tmp_path_factory):
    """A student of four classes, not trained, but with the batch statistics of real images."""
    source = load_dataset("digits", Path(), 32)
    images = DeviceLoader(source.test_images, source.test_labels, 200, mean=source.mean, std=source.std)
    torch.manual_seed(3)
    net = create_model("resnet8", 4).train()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        net(next(iter(images))[0])
    path = tmp_path_factory.mktemp("models") / "S_resnet8_T_vgg13" / "resnet8_last.pth"
    path.parent.mkdir()
    checkpoint.save(path, {"model": net.state_dict(), "arch": "resnet8", "n_cls": 4})
    return path


def probed(out):
    (folder,) = {path.parent for path in out.rglob("config.json")}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return folder, [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


DIGITS = ["--dataset", "digits", "--device", "cpu", "--batch_size", "100"]


def test_a_frozen_student_learns_another_data_set(path_s, tmp_path, monkeypatch, capsys):
    args = [*DIGITS, "--epochs", "8", "--learning_rate", "0.3", "--output", tmp_path / "a", "--path_s", path_s]
    code, out, _ = call(transfer_student, args, monkeypatch, capsys)
    assert code == 0 and "results in" in out and "are computed once and kept" in out
    folder, lines = probed(tmp_path / "a")
    assert folder.name == "S_resnet8_T_vgg13_to_digits_lr_0.3_decay_0_trial_0"
    assert folder.parent == tmp_path / "a" / "transfer"
    assert [line["epoch"] for line in lines] == list(range(1, 9)) and lines[-1]["test_acc"] > 35
    assert json.loads((folder / "config.json").read_text())["role"] == "transfer"

    arch, n_cls, net, about = checkpoint.load_network(folder / "resnet8_last.pth")
    assert (arch, n_cls, about["dataset"]) == ("resnet8", 10, "digits")
    before = checkpoint.load(path_s)["model"]
    for key, value in net.state_dict().items():
        assert key.startswith("fc.") or torch.equal(value, before[key]), key
    source = load_dataset("digits", tmp_path, 32)
    with torch.no_grad():  # the checkpoint alone gives the accuracy that was told
        _, test, _ = make_loaders(source, parse([*map(str, args)]), torch.device("cpu"))
        hits = sum(int((net(images).argmax(1) == target).sum()) for images, target, _ in test)
    assert lines[-1]["test_acc"] == pytest.approx(100 * hits / 797, abs=1e-4)


def test_kept_features_change_nothing(path_s, tmp_path, monkeypatch, capsys):
    """But rounding: convolutions of other batches may add in another order."""
    states, curves = [], []
    for name, flag in (("kept", "--cache_features"), ("not", "--no-cache_features")):
        args = [*DIGITS, "--epochs", "2", "--output", tmp_path / name, "--path_s", path_s, flag, "--image_size", "16"]
        code, out, _ = call(transfer_student, args, monkeypatch, capsys)
        assert code == 0 and ("computed once" in out) == (name == "kept")
        folder, lines = probed(tmp_path / name)
        states.append(checkpoint.load(folder / "resnet8_last.pth")["model"])
        curves.append(lines)
    for key, value in states[0].items():
        torch.testing.assert_close(value, states[1][key], atol=1e-5, rtol=1e-4)
    for a, b in zip(*curves, strict=True):
        assert a.pop("test_recall") == pytest.approx(b.pop("test_recall"), abs=0.01)
        assert a == pytest.approx(b, rel=1e-4)


def test_it_goes_on_after_a_cut(path_s, tmp_path, monkeypatch, capsys):
    args = [*DIGITS, "--path_s", path_s, "--epochs", "3", "--output"]
    assert call(transfer_student, [*args, tmp_path / "whole"], monkeypatch, capsys)[0] == 0

    class Cut(Exception):
        pass

    def cut(self, values):
        if values["epoch"] == 2:
            raise Cut
        whole(self, values)

    whole = Run.write_line
    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_line", cut)
        with pytest.raises(Cut):
            call(transfer_student, [*args, tmp_path / "cut"], patch, capsys)
    code, out, _ = call(transfer_student, [*args, tmp_path / "cut"], monkeypatch, capsys)
    assert code == 0 and "1 of 3 epochs are done already" in out
    (a, lines_a), (b, lines_b) = probed(tmp_path / "whole"), probed(tmp_path / "cut")
    assert [line["epoch"] for line in lines_b] == [1, 2, 3]
    for key, value in checkpoint.load(a / "resnet8_last.pth")["model"].items():
        torch.testing.assert_close(checkpoint.load(b / "resnet8_last.pth")["model"][key], value, atol=1e-5, rtol=1e-4)
    assert lines_a[0] == lines_b[0]


def test_another_student_is_another_run(path_s, tmp_path, monkeypatch, capsys):
    args = [*DIGITS, "--epochs", "1", "--output", tmp_path, "--path_s"]
    assert call(transfer_student, [*args, path_s], monkeypatch, capsys)[0] == 0
    other = tmp_path / path_s.parent.name / path_s.name
    other.parent.mkdir()
    checkpoint.save(other, {"model": create_model("resnet8", 4).state_dict(), "arch": "resnet8"})
    code, _, err = call(transfer_student, [*args, other], monkeypatch, capsys)
    assert code == 2 and "student_crc32" in err and err.count("\n") == 1


def test_a_distilled_student_is_probed(image_folder, tmp_path, monkeypatch, capsys):
    """As the two scripts leave and take it."""
    data = ["--dataset", "folder", "--data_folder", image_folder, "--batch_size", "16", "--device", "cpu"]
    student = [*data, "--model_s", "MobileNetV2", "--distill", "none", "--epochs", "1", "--output", tmp_path]
    assert call(train_student, student, monkeypatch, capsys)[0] == 0
    path = next(tmp_path.rglob("MobileNetV2_last.pth"))
    args = [*DIGITS, "--epochs", "1", "--output", tmp_path / "probe", "--path_s", path]
    assert call(transfer_student, args, monkeypatch, capsys)[0] == 0
    assert probed(tmp_path / "probe")[0].name.startswith(f"{path.parent.name}_to_digits_")


def test_the_protocol():
    opt = parse(["--path_s", "x"])
    assert (opt.epochs, opt.learning_rate, opt.lr_decay_epochs) == (100, 0.05, [30, 60, 90])
    assert (opt.weight_decay, opt.momentum, opt.batch_size, opt.save_freq) == (0, 0.9, 64, 50)
    assert (opt.dataset, opt.image_size, opt.trial, opt.seed, opt.model_s) == ("stl10", 32, "0", 0, None)
    assert parse(["--path_s", "x", "--model_s", "ShuffleV1"]).learning_rate == 0.05


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "arguments are required: --path_s"),
        (["--path_s", "nowhere.pth"], "nowhere.pth: no such checkpoint file"),
        (["--path_s", "PATH", "--model_s", "vgg8"], "not a vgg8"),
        (["--path_s", "PATH", "--dataset", "tinyimagenet", "--data_folder", "nowhere"], "get_tinyimagenet.sh"),
        (["--path_s", "PATH", "--distill", "kd"], "unrecognized arguments: --distill kd"),
    ],
)
def test_bad_input(args, said, path_s, tmp_path, monkeypatch, capsys):
    known = {"PATH": path_s}
    code, _, err = call(
        transfer_student, [*(known.get(a, a) for a in args), "--output", tmp_path / "out"], monkeypatch, capsys
    )
    assert code == 2 and said in err and err.startswith("transfer_student") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
