"""A run that is cut off goes on as if it had not been."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from helper import checkpoint

ROOT = Path(__file__).resolve().parent.parent
METHODS = ["none", "hint", "abound", "crd", "icd"]


@pytest.fixture(scope="module")
def command(image_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher")
    same = ["--dataset", "folder", "--data_folder", str(image_folder), "--batch_size", "16", "--device", "cpu"]
    teacher = [*same, "--model", "resnet8", "--epochs", "1", "--output", str(out)]
    subprocess.run([sys.executable, ROOT / "train_teacher.py", *teacher], check=True)
    path_t = next(out.rglob("resnet8_last.pth"))
    student = ["--distill", *METHODS, "--path_t", str(path_t), "--nce_k", "9", "--epochs", "4", "--init_epochs", "1"]
    return [sys.executable, str(ROOT / "train_student.py"), *same, *student, "--lr_decay_epochs", "2", "--output"]


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    subprocess.run([*command, out], check=True)
    return out


def results(out):
    found = {}
    for path in out.rglob("config.json"):
        lines = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            line.pop("seconds", None)
        found[json.loads(path.read_text())["method"]] = lines, checkpoint.load(path.parent / "resume.pth")
    return found


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key != "seconds")
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("lines", [0, 1, 3])
def test_killed_runs_end_as_whole_ones(command, whole, lines, tmp_path):
    """SIGKILL once a student's metrics have `lines` epochs: weights, banks, momentum and metrics come out the same."""
    process = subprocess.Popen([*command, tmp_path], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        written = [path.read_text().count("\n") for path in tmp_path.rglob("*_crd_*/metrics.jsonl")]
        if written >= [lines] if lines else any(tmp_path.rglob("config.json")):
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it had not finished

    subprocess.run([*command, tmp_path], check=True, stdout=subprocess.DEVNULL)
    expected, got = results(whole), results(tmp_path)
    assert set(got) == set(METHODS)
    for name in METHODS:
        assert got[name][0] == expected[name][0], name
        assert same(got[name][1], expected[name][1]), name
        last = [checkpoint.load(next(out.rglob(f"*_{name}_*/resnet8_last.pth")))["model"] for out in (whole, tmp_path)]
        assert same(*last), name


def test_a_damaged_state_is_refused(command, whole, tmp_path):
    subprocess.run([*command, tmp_path], check=True, stdout=subprocess.DEVNULL)
    path = next(tmp_path.rglob("*_icd_*/resume.pth"))
    path.write_bytes(path.read_bytes()[:5000])
    done = subprocess.run([*command, tmp_path], capture_output=True, text=True)
    assert done.returncode == 2 and str(path) in done.stderr and done.stderr.count("\n") == 1
