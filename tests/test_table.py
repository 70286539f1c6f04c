"""The table: what it plans and refuses, and that it ends alike however it is killed."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

import train_student
from helper import checkpoint
from helper.interrupt import EXIT
from scripts import run_table
from scripts.table_engine import last_epoch
from tests.common import call

ROOT = Path(__file__).resolve().parent.parent
TABLE = shlex.split(
    "--pairs resnet8:resnet8 --distill kd crd --dataset digits --epochs 3 --lr_decay_epochs 2 --batch_size 200 "
    "--image_size 8 --nce_k 9 --device cpu --save_minutes 0.01 --print_freq 1"
)


@pytest.fixture(scope="module")
def script():
    """Starts the script as a process of its own."""
    started = []

    def start(*args):
        command = [sys.executable, ROOT / "scripts" / "run_table.py", *map(str, args)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env))
        return started[-1]

    yield start
    for process in started:
        process.kill()  # if the test has failed


def finish(process):
    out, _ = process.communicate(timeout=300)
    return process.returncode, out


def results(out):
    """All that a table's runs leave, but for times and what depends on how often they were started."""
    found = {}
    for folder in {path.parent for path in out.rglob("config.json")}:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            line.pop("seconds", None)
        (last,) = folder.glob("*_last.pth")
        model = {key: value.tolist() for key, value in checkpoint.load(last)["model"].items()}
        found[folder.relative_to(out)] = lines, model
    return found


def events(out):
    path = out / "table" / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def children(out):
    """Processes of a table's runs: their command lines have its folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            args = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(out).encode() in args and any(arg.endswith((b"train_student.py", b"train_teacher.py")) for arg in args):
            found.append(int(entry.name))
    return found


def wait_for(condition):
    for _ in range(2400):
        if found := condition():
            return found
        time.sleep(0.05)
    raise TimeoutError


@pytest.fixture(scope="module")
def alone(script, tmp_path_factory):
    """A table that was left alone."""
    out = tmp_path_factory.mktemp("alone")
    code, said = finish(script(*TABLE, "--trials", "2", "--output", out))
    assert code == 0, said
    return out


@pytest.mark.slow
def test_killed_at_three_moments_it_ends_as_one_left_alone(script, alone, tmp_path):
    command = [*TABLE, "--trials", "2", "--jobs", "2", "--output", tmp_path]
    first = script(*command)
    wait_for(lambda: any(last_epoch(path) for path in tmp_path.rglob("metrics.jsonl")))
    os.kill(wait_for(lambda: children(tmp_path))[0], signal.SIGKILL)  # is started again
    wait_for(lambda: any(event["event"] == "again" for event in events(tmp_path)))
    wait_for(lambda: any((tmp_path / "student_model").rglob("metrics.jsonl")))
    first.send_signal(signal.SIGTERM)
    code, said = finish(first)
    assert code == EXIT and "SIGTERM" in said and not children(tmp_path)
    second = script(*command)
    wait_for(lambda: children(tmp_path))
    second.kill()
    wait_for(lambda: not children(tmp_path))  # they save and end with it
    second.communicate()
    code, said = finish(script(*command))
    assert code == 0, said
    assert results(tmp_path) == results(alone)


@pytest.mark.slow
def test_ray_starts_a_lost_worker_again(script, alone, tmp_path):
    process = script(*TABLE, "--trials", "2", "--address", "local", "--jobs", "2", "--output", tmp_path)
    wait_for(lambda: any((tmp_path / "student_model").rglob("metrics.jsonl")))
    child = wait_for(lambda: children(tmp_path))[0]
    worker = int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(worker, signal.SIGKILL)  # the run saves and ends
    code, said = finish(process)
    assert code == 0 and "ray" not in said.replace(str(tmp_path), "").lower(), said
    assert any("WorkerCrashed" in event.get("error", "") for event in events(tmp_path))
    assert results(tmp_path) == results(alone)


@pytest.mark.slow
def test_runs_of_ray_are_saved_when_the_driver_is_killed(script, tmp_path):
    process = script(*TABLE, "--epochs", "500", "--address", "local", "--output", tmp_path)
    wait_for(lambda: any(tmp_path.rglob("metrics.jsonl")))
    process.kill()
    wait_for(lambda: not children(tmp_path))
    assert "SIGTERM: stopped" in (tmp_path / "table" / "teacher_resnet8.log").read_text()


def test_finished_runs_are_skipped(alone, monkeypatch, capsys):
    before = events(alone)
    code, out, _ = call(run_table, [*TABLE, "--trials", "2", "--output", alone], monkeypatch, capsys)
    assert code == 0 and events(alone) == before
    code, out, _ = call(run_table, ["status", alone], monkeypatch, capsys)
    assert code == 0 and "5 of 5" in out


def test_what_is_added_or_lost_is_trained(alone, tmp_path, monkeypatch, capsys):
    shutil.copytree(alone, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.glob("student_model/*_kd_*_1/*_last.pth"):
        path.unlink()
    wanted = [*TABLE, "--trials", "3", "--output", tmp_path, "--dry_run"]
    code, out, _ = call(run_table, wanted, monkeypatch, capsys)
    lines = [shlex.split(line) for line in out.splitlines()]
    assert code == 0 and [line[line.index("--distill") + 1 :] for line in lines] == [["kd"], ["kd", "crd"]]
    assert ["--nce_k" in line for line in lines] == [False, True]  # kd does not take it
    assert all(train_student.parse(line[2:]).epochs == 3 for line in lines)


@pytest.mark.slow
def test_a_run_that_fails_is_listed_and_the_rest_goes_on(script, tmp_path):
    code, said = finish(script(*TABLE, "--beta", "1e38", "--output", tmp_path))
    (line,) = [line for line in said.splitlines() if line.startswith("failed: ") and "log" in line]
    assert code == 1 and "(crd)" in line and "not finite" in said
    assert Counter(event["event"] for event in events(tmp_path))["again"] == 2
    assert len(list(tmp_path.glob("student_model/*_kd_*/*_last.pth"))) == 1


def test_the_published_table(tmp_path, monkeypatch, capsys):
    flags = ["--distill", "kd", "fsp", "--output", tmp_path, "--dry_run"]
    code, out, err = call(run_table, ["tables/published.toml", *flags], monkeypatch, capsys)
    fetch, *tasks = out.splitlines()
    assert code == 0 and len(tasks) == 65 and fetch.split()[1] == "scripts/fetch_teachers.py"
    assert err.count("without fsp") == 7  # unequal channels
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text, flags, named",
    [
        ("epoch = 3", [], "'epoch'"),
        ("[teacher]\nepoch = 3", [], "'epoch'"),
        ("epochs = 'many'", [], "--epochs"),
        ("epochs = ", [], "table.toml"),
        ("trials = 0", [], "--trials"),
        ("", ["--pairs", "resnet8:resnet9"], "resnet9"),
        ("", ["--pairs", "resnet9:resnet8"], "resnet9"),
        ("", ["--pairs", "resnet8"], "'resnet8'"),
        ("", ["--distill", "kd", "nothing"], "'nothing'"),
        ("", ["--hint_layer", "1"], "--hint_layer"),
        ("", ["--published_teachers"], "resnet8"),
        ("teacher.checkpoint.resnet8 = 'none.pth'", [], "none.pth"),
        ("", ["--jobs", "2", "--gpus_per_job", "0.5"], "--gpus_per_job"),
        ("", ["--output", "table.toml"], "table.toml"),
        ("", ["--address", "127.0.0.1:1"], "127.0.0.1:1"),
    ],
)
def test_wrong_input_is_refused_in_one_sentence(text, flags, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("table.toml").write_text(text)
    given = ["--device", "cpu", *TABLE[:6], "--dataset", "digits", *flags]
    code, _, err = call(run_table, ["table.toml", *given], monkeypatch, capsys)
    assert code == 2 and named in err and err.count("\n") == 1
    assert not any(tmp_path.rglob("events.jsonl"))  # nothing was started


def test_another_table_in_its_folder_is_refused(alone, monkeypatch, capsys):
    code, _, err = call(run_table, [*TABLE, "--alpha", "0.5", "--output", alone], monkeypatch, capsys)
    assert code == 2 and str(alone / "table" / "table.json") in err
    code, _, err = call(run_table, [*TABLE, "--momentum", "0.5", "--output", alone], monkeypatch, capsys)
    assert code == 2 and str(alone) in err and "momentum" in err


@pytest.mark.slow
def test_slurm_sends_sigterm_and_the_element_is_requeued(tmp_path, monkeypatch, capsys):
    many = [*TABLE, "--epochs", "500", "--output", tmp_path / "save"]
    code, text, _ = call(run_table, ["slurm", *many], monkeypatch, capsys)
    assert code == 0 and "#SBATCH --array=0-1" in text
    (tmp_path / "array.sh").write_text(text)
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/requeued\n')
    (tmp_path / "scontrol").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    env |= {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_JOB_ID": "7"}
    element = subprocess.Popen(["bash", tmp_path / "array.sh"], env=env, stdout=subprocess.DEVNULL)
    wait_for(lambda: any(tmp_path.rglob("metrics.jsonl")))
    element.send_signal(signal.SIGTERM)
    assert element.wait() == EXIT and (tmp_path / "requeued").read_text() == "requeue 7_0\n"
