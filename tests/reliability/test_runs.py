"""How a run ends when something goes wrong, and what it does not do: lose, overwrite, choose by test images."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import train_student
import train_teacher
from distiller_zoo import distiller_dict
from distiller_zoo.base import Baseline
from helper import checkpoint
from helper.build import hold_out
from helper.interrupt import EXIT, IN_USE
from helper.loops import drop_nonfinite
from helper.util import RunError
from models import create_model
from scripts import plotting, report
from tests.common import call, make_opt, make_source, make_student

ROOT = Path(__file__).resolve().parents[2]
SAME = ["--batch_size", "16", "--device", "cpu"]


@pytest.fixture(scope="module")
def data(image_folder):
    return [*SAME, "--dataset", "folder", "--data_folder", str(image_folder)]


@pytest.fixture(scope="module")
def path_t(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("net") / "resnet8_vanilla" / "x.pth"
    path.parent.mkdir()
    torch.save(create_model("resnet8", 3).state_dict(), path)
    return ["--path_t", str(path)]


def folder_of(out, method="none"):
    (found,) = (p.parent for p in Path(out).rglob("config.json") if json.loads(p.read_text())["method"] == method)
    return found


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- two runs, one folder ---


def test_the_second_run_says_who_has_the_folder(data, tmp_path):
    command = [sys.executable, str(ROOT / "train_teacher.py"), *data, "--model", "resnet8", "--output", str(tmp_path)]
    first = subprocess.Popen(
        [*command, "--epochs", "500"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        while not any(tmp_path.rglob("metrics.jsonl")):
            assert first.poll() is None
            time.sleep(0.02)
        second = subprocess.run([*command, "--epochs", "500"], capture_output=True, text=True)
        assert second.returncode == IN_USE and second.stderr.count("\n") == 1
        assert f"is in use by process {first.pid} on " in second.stderr
        assert first.poll() is None
    finally:
        first.send_signal(signal.SIGTERM)
        _, said = first.communicate()
    assert first.returncode == EXIT and said.startswith("train_teacher.py: SIGTERM: ")
    third = subprocess.Popen([*command, "--epochs", "500"], stdout=subprocess.PIPE, text=True)  # nobody has it now
    assert "epochs are done already" in third.stdout.readline()
    third.send_signal(signal.SIGINT)
    third.communicate()
    assert third.returncode == EXIT


# --- not finite ---


class Burst(Baseline):
    """A loss or a gradient that is not finite at the third step."""

    weights = {"gamma": 1.0, "beta": 1.0}
    feats, has_teacher, what, seen = -1, True, "loss", 0

    def forward(self, f_s, f_t):
        type(self).seen += 1
        x = f_s.mean() * 0
        if self.seen != 3:
            return x
        return x + torch.inf if self.what == "loss" else x.square().sqrt()  # of which the derivative at 0 is NaN


@pytest.fixture(params=["loss", "gradient"])
def burst(request, monkeypatch):
    monkeypatch.setitem(distiller_dict, "burst", type("Burst", (Burst,), {"what": request.param}))
    return request.param


def test_a_track_that_is_not_finite_ends_and_the_others_go_on(burst, data, path_t, tmp_path, monkeypatch, capsys):
    args = [*data, *path_t, "--distill", "burst", "none", "--epochs", "2", "--output", tmp_path, "--print_freq", "1"]
    code, out, err = call(train_student, args, monkeypatch, capsys)
    assert code == 1
    assert f"burst: stopped, epoch 1, step 3: the {burst} is not finite (" in err and "Traceback" not in err
    assert all(f"{term} " in err for term in ("loss", "cls", "div", "kd"))
    assert "burst: failed, epoch 1, step 3" in out and "none: last " in out
    assert [line["epoch"] for line in lines_of(folder_of(tmp_path))] == [1, 2]
    broken = folder_of(tmp_path, "burst")
    assert not (broken / "resume.pth").exists() and not list(broken.glob("*.pth"))


def test_the_last_good_state_is_kept(data, path_t, tmp_path, monkeypatch, capsys):
    """Not finite in the second epoch: what the first has left stands."""
    monkeypatch.setitem(distiller_dict, "burst", type("Burst", (Burst,), {"what": "gradient", "seen": -5}))
    args = [*data, *path_t, "--distill", "burst", "--epochs", "3", "--output", tmp_path, "--save_minutes", "0.01"]
    code, _, err = call(train_student, args, monkeypatch, capsys)
    assert code == 1 and "epoch 2, step 3: the gradient is not finite (norm nan" in err
    folder = folder_of(tmp_path, "burst")
    assert [line["epoch"] for line in lines_of(folder)] == [1]
    assert checkpoint.load(folder / "resume.pth")["epoch"] == 1
    for path in folder.glob("*.pth"):
        content = checkpoint.load(path)
        assert all(value.isfinite().all() for value in content["model"].values())


def test_statistics_that_overflow_end_a_student(tmp_path, capsys):
    """With finite losses: batch norm does not use them in training, and divides by them in validation."""
    opt, source = make_opt("none"), make_source(n=12)
    students = [make_student("none", opt, source, None, tmp_path / str(i)) for i in range(2)]
    students[0].model.bn1.running_var[1] = torch.inf
    assert drop_nonfinite(students, 4) == students[1:]
    assert students[0].run.failed == "epoch 4, step 0: bn1.running_var is not finite"
    assert capsys.readouterr().err == f"none: stopped, {students[0].run.failed}\n"


def test_detect_anomaly_names_the_operation(data, path_t, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(distiller_dict, "burst", type("Burst", (Burst,), {"what": "gradient"}))
    args = [*data, *path_t, "--distill", "burst", "--epochs", "1", "--output", tmp_path, "--detect_anomaly"]
    try:
        with pytest.warns(UserWarning, match=r"Error detected in \w+Backward0"):
            code, _, err = call(train_student, args, monkeypatch, capsys)
    finally:
        torch.autograd.set_detect_anomaly(False)
    assert code == 2 and "--detect_anomaly: burst, step 3: Function '" in err and "returned nan values" in err
    assert "Traceback" not in err


def test_a_run_of_an_older_version_goes_on_as_it_began(data, tmp_path, monkeypatch, capsys):
    """Its config.json does not name the newer options; they had the values that are the defaults now."""
    args = [*data, "--model", "resnet8", "--output", tmp_path, "--epochs"]
    assert call(train_teacher, [*args, "1"], monkeypatch, capsys)[0] == 0
    path = folder_of(tmp_path) / "config.json"
    config = json.loads(path.read_text())
    del config["batch_norm_shares"]
    for key in ("augment", "optimizer", "schedule", "warmup_epochs", "weights", "tf32", "stream", "sync_bn"):
        del config["opt"][key]
    path.write_text(json.dumps(config))
    code, _, err = call(train_teacher, [*args, "2", "--augment", "none"], monkeypatch, capsys)
    assert code == 2 and "--augment: crop there, none here" in err
    assert call(train_teacher, [*args, "2"], monkeypatch, capsys)[0] == 0


# --- honest accuracy ---


def test_held_out_images_are_a_share_of_every_class():
    whole = make_source(n=60, n_cls=3)
    whole.train_images[:] = np.arange(60)[:, None, None, None]
    held = hold_out(whole, 0.1, seed=0)
    images, labels = held.val_images[:, 0, 0, 0], held.val_labels
    assert np.bincount(labels).tolist() == [2, 2, 2] and np.bincount(held.train_labels).tolist() == [18] * 3
    assert sorted([*images, *held.train_images[:, 0, 0, 0]]) == list(range(60))  # each image on one side
    assert (images % 3 == labels).all() and (held.train_images[:, 0, 0, 0] % 3 == held.train_labels).all()
    assert (hold_out(whole, 0.1, seed=0).val_images == held.val_images).all()
    assert (hold_out(whole, 0.1, seed=1).val_images != held.val_images).any()
    with pytest.raises(RunError, match=r"--val_split 0\.01"):
        hold_out(whole, 0.01, seed=0)


def test_an_epoch_is_chosen_by_images_held_out(data, tmp_path, monkeypatch, capsys):
    args = [*data, "--model", "resnet8", "--epochs", "4", "--output", tmp_path, "--val_split", "0.3"]
    code, out, _ = call(train_teacher, args, monkeypatch, capsys)
    folder = folder_of(tmp_path)
    lines = lines_of(folder)
    best = max(lines, key=lambda line: line["val_acc"])  # the first of equals
    assert code == 0 and f"chosen by held-out images {best['test_acc']:.2f} (epoch {best['epoch']})" in out
    assert lines[-1]["chosen_acc"] == pytest.approx(best["test_acc"], abs=1e-4)
    assert checkpoint.load(folder / "resnet8_chosen.pth")["epoch"] == best["epoch"]
    table = report.table(plotting.read_runs([tmp_path]))
    assert "| chosen |" in table and f" {best['test_acc']:.2f} |" in table.splitlines()[-1]
    config = json.loads((folder / "config.json").read_text())
    assert (config["n_train"], config["n_test"]) == (45, 12)


# --- files ---


def test_a_folder_that_may_not_be_written_is_named(data, tmp_path, monkeypatch, capsys):
    blocked = tmp_path / "save"
    blocked.write_text("a file where the folder would be")
    code, _, err = call(train_teacher, [*data, "--model", "resnet8", "--output", blocked], monkeypatch, capsys)
    assert code == 2 and str(blocked) in err and err.count("\n") == 1


def test_a_disk_that_fills_up_leaves_the_last_state(data, tmp_path):
    """Files may not grow beyond the limit: the first epoch's fit, the next run's do not. Nothing that was is lost."""
    args = [*data, "--model", "resnet8", "--epochs", "3", "--output", str(tmp_path / "cut")]
    code = (
        "import resource, runpy, sys; from helper.run import Run; save = Run.save_state\n"
        "def then_full(self, state):\n"
        "    save(self, state)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "Run.save_state = then_full\n"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    full = subprocess.run(
        [sys.executable, "-c", code, "train_teacher.py", *args], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert full.returncode == 2 and "cannot be written" in full.stderr and "Traceback" not in full.stderr
    folder = folder_of(tmp_path / "cut")
    assert checkpoint.load(folder / "resume.pth")["epoch"] == 1 and not list(folder.glob("*.tmp"))
    whole = tmp_path / "whole"
    command = [sys.executable, ROOT / "train_teacher.py", *args]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    subprocess.run([*command[:-1], whole], check=True, stdout=subprocess.DEVNULL)
    ends = [checkpoint.load(f / "resnet8_last.pth")["model"] for f in (folder, folder_of(whole))]
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())
    assert [line["epoch"] for line in lines_of(folder)] == [1, 2, 3]
