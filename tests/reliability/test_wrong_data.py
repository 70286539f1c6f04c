"""What would train silently on wrong labels, or otherwise than meant, is refused or said."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train_student
import train_teacher
from helper import checkpoint
from helper.interrupt import EXIT
from models import create_model
from tests.common import call

ROOT = Path(__file__).resolve().parents[2]
SAME = ["--dataset", "folder", "--batch_size", "16", "--device", "cpu"]


@pytest.fixture
def folder(image_folder, tmp_path):
    return shutil.copytree(image_folder, tmp_path / "images")


@pytest.fixture(scope="module")
def path_t(image_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher")
    args = [*SAME, "--data_folder", image_folder, "--model", "resnet8", "--epochs", "3", "--output", out]
    subprocess.run([sys.executable, ROOT / "train_teacher.py", *args], check=True)
    return next(out.rglob("resnet8_last.pth"))


def rename(folder, names):
    for split in ("train", "test"):
        for old in names:
            (folder / split / old).rename(folder / split / f"{old}~")
        for old, new in names.items():
            (folder / split / f"{old}~").rename(folder / split / new)


@pytest.mark.parametrize(
    ("names", "said"), [({"red": "blue", "blue": "red"}, None), ({"red": "a"}, "other classes"), ({}, None)]
)
def test_a_teacher_of_other_classes_is_refused(names, said, folder, path_t, tmp_path, monkeypatch, capsys):
    """The same names on other images cannot be seen in the names; in another order, they can."""
    rename(folder, names)
    args = [*SAME, "--data_folder", folder, "--path_t", path_t, "--epochs", "1", "--output", tmp_path / "out"]
    code, out, err = call(train_student, args, monkeypatch, capsys)
    assert code == (2 if said else 0)
    assert not said or (said in err and str(path_t) in err and not (tmp_path / "out").exists())
    assert ("warning: the teacher's file claims" in out) == bool(names and not said)


def test_a_teacher_of_the_classes_in_another_order_is_refused(folder, path_t, tmp_path, monkeypatch, capsys):
    content = checkpoint.load(path_t)
    path = tmp_path / "t.pth"
    checkpoint.save(path, {**content, "class_names": content["class_names"][::-1]})
    args = [*SAME, "--data_folder", folder, "--path_t", path, "--epochs", "1", "--output", tmp_path / "out"]
    code, _, err = call(train_student, args, monkeypatch, capsys)
    assert code == 2 and "the same classes in another order" in err and str(path) in err


def test_data_that_changed_between_two_parts_is_refused(folder, tmp_path, monkeypatch, capsys):
    args = [*SAME, "--data_folder", folder, "--model", "resnet8", "--epochs", "1", "--output", tmp_path / "out"]
    assert call(train_teacher, args, monkeypatch, capsys)[0] == 0
    rename(folder, {"red": "blue", "blue": "red"})
    code, _, err = call(train_teacher, args, monkeypatch, capsys)
    assert code == 2 and "data_crc32" in err


def test_more_epochs_continue_a_finished_run(folder, tmp_path, monkeypatch, capsys):
    args = [*SAME, "--data_folder", folder, "--model", "resnet8", "--lr_decay_epochs", "2"]
    for out, epochs in (("whole", "3"), ("more", "2"), ("more", "3")):
        assert call(train_teacher, [*args, "--epochs", epochs, "--output", tmp_path / out], monkeypatch, capsys)[0] == 0
    ends = [checkpoint.load(next((tmp_path / out).rglob("resnet8_last.pth"))) for out in ("whole", "more")]
    assert all(torch.equal(value, ends[1]["model"][key]) for key, value in ends[0]["model"].items())
    lines = next((tmp_path / "more").rglob("metrics.jsonl")).read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3] and ends[1]["epoch"] == 3
    code, _, err = call(train_teacher, [*args, "--epochs", "2", "--output", tmp_path / "more"], monkeypatch, capsys)
    assert code == 2 and "--epochs may be raised, not lowered" in err


@pytest.mark.parametrize("epochs", ["-1", "0", "1,1", "5,2,5"])
def test_schedules_that_mean_nothing_are_refused(epochs, tmp_path, monkeypatch, capsys):
    args = ["--dataset", "digits", f"--lr_decay_epochs={epochs}", "--output", tmp_path / "out"]
    code, _, err = call(train_teacher, args, monkeypatch, capsys)
    assert code == 2 and "--lr_decay_epochs" in err and not (tmp_path / "out").exists()


def test_a_schedule_that_never_decays_is_said(folder, tmp_path, monkeypatch, capsys):
    args = [*SAME, "--data_folder", folder, "--model", "resnet8", "--epochs", "1", "--output"]
    assert "does not decay" in call(train_teacher, [*args, tmp_path / "a"], monkeypatch, capsys)[1]
    args = ["--lr_decay_epochs", "", *args]
    assert "does not decay" not in call(train_teacher, [*args, tmp_path / "b"], monkeypatch, capsys)[1]


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2", "SIGHUP"])
def test_warning_signals_save_and_ask_for_more(name, folder, tmp_path):
    args = [*SAME, "--data_folder", folder, "--model", "resnet8", "--epochs", "500", "--output", tmp_path]
    process = subprocess.Popen([sys.executable, ROOT / "train_teacher.py", *args], stdout=subprocess.DEVNULL)
    while not any(tmp_path.rglob("resume.pth")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(getattr(signal, name))
    assert process.wait() == EXIT


def test_nohup_is_respected(folder, tmp_path):
    args = [*SAME, "--data_folder", folder, "--model", "resnet8", "--epochs", "3", "--output", tmp_path]
    command = [sys.executable, ROOT / "train_teacher.py", *args]
    ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, preexec_fn=ignore)
    while not any(tmp_path.rglob("resume.pth")):
        time.sleep(0.02)
    process.send_signal(signal.SIGHUP)
    assert process.wait() == 0


def test_without_docstrings_and_asserts(folder, tmp_path):
    args = [*SAME, "--data_folder", folder, "--distill", "none", "--epochs", "1", "--output", tmp_path]
    for flags in (["--help"], args):
        subprocess.run(
            [sys.executable, "-OO", ROOT / "train_student.py", *flags], check=True, stdout=subprocess.DEVNULL
        )
    assert any(tmp_path.rglob("resnet8_last.pth"))


def test_a_closed_pipe_ends_quietly(folder, tmp_path):
    args = [*SAME, "--data_folder", folder, "--model", "resnet8", "--epochs", "500", "--output", tmp_path]
    read, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, ROOT / "train_teacher.py", *args], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    os.read(read, 10)
    os.close(read)
    assert process.communicate()[1] == "" and process.returncode == 128 + signal.SIGPIPE


def test_a_digits_teacher_on_ten_other_classes(tmp_path, monkeypatch, capsys):
    path = tmp_path / "resnet8.pth"
    about = {"arch": "resnet8", "n_cls": 10, "dataset": "cifar10", "class_names": [f"photo {i}" for i in range(10)]}
    checkpoint.save(path, {"model": create_model("resnet8", 10).state_dict(), **about})
    args = ["--dataset", "digits", "--path_t", path, "--output", tmp_path / "out"]
    code, _, err = call(train_student, args, monkeypatch, capsys)
    assert code == 2 and "other classes" in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("odd", [torch.zeros(2), torch.tensor(1 + 2j), torch.zeros((), device="meta"), "72"])
def test_an_odd_accuracy_in_a_file_is_no_claim(odd, folder, path_t, tmp_path, monkeypatch, capsys):
    path = tmp_path / "x.pth"
    torch.save({"model": checkpoint.load(path_t)["model"], "best_acc": odd}, path)
    args = [*SAME, "--data_folder", folder, "--path_t", path, "--epochs", "1", "--output", tmp_path / "out"]
    code, out, err = call(train_student, args, monkeypatch, capsys)
    assert code == 0 and "claims" not in out and "Traceback" not in err


@pytest.mark.parametrize(("key", "odd"), [("epoch", torch.inf), ("best", torch.nan), ("step", 2.7), ("seconds", None)])
def test_impossible_progress_is_refused(key, odd, folder, tmp_path, monkeypatch, capsys):
    args = [*SAME, "--data_folder", folder, "--model", "resnet8", "--epochs", "1", "--output", tmp_path / "out"]
    assert call(train_teacher, args, monkeypatch, capsys)[0] == 0
    (path,) = (tmp_path / "out").rglob("resume.pth")
    checkpoint.save(path, {**checkpoint.load(path), key: odd})
    code, _, err = call(train_teacher, args, monkeypatch, capsys)
    assert code == 2 and str(path) in err and err.count("\n") == 1
