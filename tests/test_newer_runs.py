"""Newer methods through the scripts: another predictor, settings of a pair, several terms in one student."""

import json

import pytest
import torch

import train_student
import transfer_student
from distiller_zoo import distiller_dict
from helper import checkpoint
from helper.build import build_students
from models import create_model
from models.util import head
from tests.common import CPU, as_teacher, calibrate, call, make_opt, make_source

SAME = ["--batch_size", "16", "--device", "cpu"]


@pytest.fixture(scope="module")
def path_t(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("net") / "resnet14_vanilla" / "x.pth"
    path.parent.mkdir()
    torch.save(create_model("resnet14", 3).state_dict(), path)
    return path


def student(path_t, image_folder, out, *flags):
    data = [*SAME, "--dataset", "folder", "--data_folder", image_folder, "--epochs", "1", "--init_epochs", "1"]
    return [*data, "--path_t", path_t, "--output", out, *flags]


def configs(out):
    found = [(json.loads(path.read_text()), path.parent) for path in out.rglob("config.json")]
    return {config["method"]: (config, folder) for config, folder in found}


def test_a_student_that_predicts_otherwise(path_t, image_folder, tmp_path, monkeypatch, capsys):
    """SimKD's network is trained, counted, saved, and serves as teacher and for a probe by its checkpoint alone."""
    args = student(path_t, image_folder, tmp_path / "a", "--distill", "simkd", "--model_s", "ShuffleV2")
    assert call(train_student, args, monkeypatch, capsys)[0] == 0
    (config, folder) = configs(tmp_path / "a")["simkd"]
    path = next(folder.glob("*_last.pth"))
    arch, n_cls, net, about = checkpoint.load_network(path)
    assert (arch, n_cls) == (config["arch"], 3) and arch.startswith("ShuffleV2-simkd")
    assert config["params"] == sum(p.numel() for p in net.parameters())
    of_teacher = torch.load(path_t, weights_only=True)
    assert torch.equal(head(net).weight, of_teacher["fc.weight"]) and torch.equal(head(net).bias, of_teacher["fc.bias"])

    args = student(path, image_folder, tmp_path / "b", "--distill", "kd", "icd")
    code, out, _ = call(train_student, args, monkeypatch, capsys)
    assert code == 0 and f"teacher {arch}: test {about['accuracy']:.2f}" in out
    args = [*SAME, "--path_s", path, "--dataset", "digits", "--image_size", "8", "--epochs", "1", "--output", tmp_path]
    assert call(transfer_student, args, monkeypatch, capsys)[0] == 0
    (probe,) = (tmp_path / "transfer").rglob("*_last.pth")
    assert checkpoint.load_network(probe)[:2] == (arch, 10)


def test_several_terms_in_one_student(path_t, image_folder, tmp_path, monkeypatch, capsys):
    names = ["wttm+crd", "itrd+wttm:2", "crd"]
    args = student(path_t, image_folder, tmp_path, "--nce_k", "9", "--distill", *names)
    assert call(train_student, args, monkeypatch, capsys)[0] == 0
    found = configs(tmp_path)
    assert set(found) == {"crd+wttm", "itrd+wttm_2", "crd"}
    assert found["crd+wttm"][0]["weights"] == {"gamma": 1.0, "alpha": 0.0, "beta": 1.0}
    (line,) = map(json.loads, (found["crd+wttm"][1] / "metrics.jsonl").read_text().splitlines())
    assert line["train_kd"] > 0 and line["train_div"] == 0


@pytest.mark.parametrize(
    "name", ["crd+crd", "crd+nope", "abound+crd", "kd+crd", "simkd+crd", "crd:0+wttm", "crd:x+wttm", "crd+"]
)
def test_combinations_that_cannot_be(name, path_t, image_folder, tmp_path, monkeypatch, capsys):
    args = student(path_t, image_folder, tmp_path / "out", "--distill", name)
    code, _, err = call(train_student, args, monkeypatch, capsys)
    assert code == 2 and "--distill" in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_settings_published_for_a_pair(tmp_path, capsys):
    """They are defaults, said in the first lines and in config.json; what the user gives counts."""
    source = make_source()
    teacher = as_teacher(calibrate("resnet56", source), "resnet56", source)

    def built(*names, flags=()):
        opt = make_opt(*names, flags=["--model_s", "resnet20", "--output", str(tmp_path), *flags])
        return {s.name: s for s in build_students(opt, source, CPU, teacher)}

    found = built("dkd", "reviewkd", "crd")
    out = capsys.readouterr().out
    assert found["dkd"].run.config["options"] == {"dkd_beta": 2.0} and found["dkd"].distiller.beta == 2
    assert found["reviewkd"].weights["beta"] == 0.6 and "_b_0.6_" in found["reviewkd"].run.folder.name
    assert found["crd"].run.config["published"] == {}
    assert "dkd: published for resnet56 -> resnet20: dkd_beta 2" in out and "reviewkd: published" in out
    given = built("dkd", "reviewkd", flags=["--dkd_beta", "5", "-b", "3"])
    assert given["dkd"].distiller.beta == 5 and given["reviewkd"].weights["beta"] == 3
    assert given["dkd"].run.config["published"] == {}

    standardised = built("kd", "dkd", flags=["--logit_stand"])
    assert standardised["kd"].T == 2 and standardised["kd"].weights["alpha"] == 9
    assert standardised["dkd"].distiller.T == 3 and standardised["dkd"].weights["beta"] == 18
    assert built("kd", flags=["--logit_stand", "--kd_T", "6"])["kd"].T == 6


@pytest.mark.slow
def test_every_student_in_a_group_is_the_student_alone(path_t, image_folder, tmp_path, monkeypatch, capsys):
    names = [*distiller_dict, "crd+wttm"]
    args = student(path_t, image_folder, tmp_path / "group", "--nce_k", "9", "--distill", *names)
    assert call(train_student, args, monkeypatch, capsys)[0] == 0
    together = configs(tmp_path / "group")
    for name in names:
        few = ["--nce_k", "9"] if {"crd", "rrd"} & set(name.split("+")) else []
        args = student(path_t, image_folder, tmp_path / name, "--distill", name, *few)
        assert call(train_student, args, monkeypatch, capsys)[0] == 0
        states = [
            checkpoint.load(next(folder.glob("*_last.pth")))["model"]
            for folder in (together[name][1], configs(tmp_path / name)[name][1])
        ]
        assert all(torch.equal(value, states[1][key]) for key, value in states[0].items()), name
