"""Runs that are killed at random moments, again and again, end as one that was left alone: every bit of every file.

Each run is a process of its own (forked from this one, which has imported all that takes long), ended by a real SIGKILL
or SIGTERM. `DISTILLERS_SOAK=10` multiplies the number of kills.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.utils.tensorboard  # here, not in every process

import train_student
import train_teacher
import transfer_student
from distiller_zoo import distiller_dict
from helper import checkpoint
from helper.interrupt import EXIT
from helper.util import cli_errors
from models import create_model

SOAK = int(os.environ.get("DISTILLERS_SOAK", "1"))
SAME = ["--batch_size", "16", "--device", "cpu", "--save_minutes", "0.01", "--print_freq", "1"]
STAGES = ["abound", "factor", "fsp"]
OTHERS = [name for name in distiller_dict if name not in STAGES]
GROUPS = {"stages": STAGES, **{"-".join(OTHERS[i::4]): OTHERS[i::4] for i in range(4)}}
KILLS = {"teacher": 15, "transfer": 12, **dict.fromkeys(GROUPS, 15)}  # 102
QUICK = {"teacher": 2, "stages": 3}


@pytest.fixture(scope="module")
def commands(image_folder, tmp_path_factory):
    """name -> (script, arguments without --output)"""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("net") / "resnet8_vanilla" / "x.pth"
    path.parent.mkdir()
    torch.save(create_model("resnet8", 3).state_dict(), path)
    data = [*SAME, "--dataset", "folder", "--data_folder", image_folder]
    student = [*data, "--path_t", path, "--epochs", "2", "--init_epochs", "2", "--lr_decay_epochs", "1"]
    few = {name: ["--nce_k", "9"] if {"crd", "rrd"} & set(group) else [] for name, group in GROUPS.items()}
    return {
        "teacher": (train_teacher, [*data, "--model", "resnet8", "--epochs", "4", "--lr_decay_epochs", "2"]),
        "transfer": (transfer_student, [*data, "--path_s", path, "--epochs", "9"]),
        **{name: (train_student, [*student, *few[name], "--distill", *group]) for name, group in GROUPS.items()},
    }


def begin(script, args, out):
    """-> the process that runs it."""
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(os.open(out.parent / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        sys.argv = [f"{script.__name__}.py", *map(str, args), "--output", str(out)]
        code = cli_errors(script.main)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(process):
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def results(out):
    """All that a run leaves, by folder, but for clocks."""
    found = {}
    for path in sorted(out.rglob("config.json")):
        folder = path.parent
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        files = {file.name: checkpoint.load(file) for file in folder.glob("*.pth")}
        assert "resume.pth" in files and any(name.endswith("_last.pth") for name in files)
        assert not list(folder.glob("*.tmp"))
        found[folder.name] = without_clocks([lines, files])
    return found


def without_clocks(tree):
    if isinstance(tree, dict):
        return {key: without_clocks(value) for key, value in tree.items() if key not in ("seconds", "output")}
    return [without_clocks(value) for value in tree] if isinstance(tree, list | tuple) else tree


def differences(a, b, where=""):
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [where]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{where}: {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [found for key in a for found in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list):
        if len(a) != len(b):
            return [f"{where}: {len(a)} and {len(b)}"]
        return [found for i, pair in enumerate(zip(a, b, strict=True)) for found in differences(*pair, f"{where}/{i}")]
    return [] if a == b else [f"{where}: {a} and {b}"]


def kill_again_and_again(script, args, folder, kills, whole, seconds, rng):
    """Runs that are killed after random times, until there were so many kills; each that ends is compared."""
    ends, n = Counter(), 0
    while sum(ends.values()) < kills or n == 0:
        n += 1
        out = folder / str(n) / "save"
        out.parent.mkdir()
        while True:
            process = begin(script, args, out)
            kind = rng.choice([signal.SIGKILL, signal.SIGTERM])
            deadline = (
                time.monotonic() + rng.uniform(0.2, 0.8) * seconds if sum(ends.values()) < kills else float("inf")
            )
            code = None
            while code is None and time.monotonic() < deadline:
                ended, status = os.waitpid(process, os.WNOHANG)
                code = os.waitstatus_to_exitcode(status) if ended else None
                time.sleep(0.002)
            if code is None:
                os.kill(process, kind)
                code = wait(process)
                ends[code] += 1
            said = (out.parent / "stderr").read_text()
            assert code in (0, -signal.SIGKILL, EXIT, -signal.SIGTERM), f"{code}: {said}"
            assert "Traceback" not in said, said
            if code == 0:
                break
        assert not differences(whole, results(out)), (n, ends, differences(whole, results(out))[:5])
    return ends


def check(name, commands, kills, folder):
    script, args = commands[name]
    out = folder / "whole" / "save"
    out.parent.mkdir()
    start = time.monotonic()
    assert wait(begin(script, args, out)) == 0, (out.parent / "stderr").read_text()
    seconds, whole = time.monotonic() - start, results(out)
    ends = kill_again_and_again(script, args, folder, kills, whole, seconds, random.Random(name))
    assert ends[-signal.SIGKILL] + ends[EXIT] + ends[-signal.SIGTERM] + ends[0] >= kills
    print(f"{name}: {sum(ends.values())} kills ({dict(ends)}), no difference")


@pytest.mark.parametrize("name", QUICK)
def test_killed_runs_end_as_whole_ones(name, commands, tmp_path):
    check(name, commands, QUICK[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLS)
def test_a_hundred_kills(name, commands, tmp_path):
    check(name, commands, KILLS[name] * SOAK, tmp_path)


def test_every_method_is_killed():
    assert {method for group in GROUPS.values() for method in group} == set(distiller_dict)
    assert sum(KILLS.values()) >= 100
    assert Path(train_student.__file__).parent == Path(__file__).parents[2]
