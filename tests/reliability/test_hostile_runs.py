"""Damaged files of a run: the run goes on to the right end, or says in one sentence why not; so do the scripts."""

import contextlib
import json
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.utils.tensorboard  # here, not in a case: it takes a second
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook

import train_student
import train_teacher
import transfer_student
from helper.interrupt import EXIT
from helper.util import cli_errors
from scripts import plot_corr, plot_curves, plot_tsne, report
from tests.reliability.hostile import (
    VALUES,
    cases,
    changed,
    damaged,
    outcome_of,
    packed,
    same_bits,
    spoilt_network,
)


@contextlib.contextmanager
def counted(stop=0):
    """Counts the optimizers' steps; in that of number `stop`, SIGTERM arrives."""
    steps = []

    def count(*_):
        steps.append(None)
        if len(steps) == stop:
            signal.raise_signal(signal.SIGTERM)

    handle = register_optimizer_step_post_hook(count)
    yield steps
    handle.remove()


def start(script, args, out):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["script.py", *map(str, args), "--output", str(out)])
        return cli_errors(script.main)


@pytest.fixture(scope="session")
def runs(nets, tmp_path_factory):
    """Runs of two epochs, whole and stopped in the second; the command of each."""
    root = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    for split, n in (("train", 10), ("test", 3)):
        for c in ("a", "b"):
            (root / "data" / split / c).mkdir(parents=True)
            for i in range(n):
                image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
                image.save(root / "data" / split / c / f"{i}.png")
    path = root / "resnet8_vanilla" / "x.pth"
    path.parent.mkdir()
    torch.save(nets.state, path)
    data = ["--dataset", "folder", "--data_folder", root / "data", "--image_size", "8", "--device", "cpu"]
    data += ["--epochs", "2", "--batch_size", "8", "--lr_decay_epochs", "1"]
    student = [*data, "--path_t", path, "--init_epochs", "1", "--distill"]
    group = ["none", "similarity", "vid", "abound"]
    commands = {
        "teacher": (train_teacher, [*data, "--model", "resnet8"], 1),
        "transfer": (transfer_student, [*data, "--path_s", path], 1),
        "crd": (train_student, [*student, "crd", "--nce_k", "3"], 1),
        "factor": (train_student, [*student, "factor"], 1),
        "group": (train_student, [*student, *group], len(group)),
    }
    ends = {}
    for name, (script, args, n) in commands.items():
        with counted() as steps:
            assert start(script, args, root / "whole" / name) == 0
        with counted(stop=len(steps) - n):  # an epoch has three batches
            assert start(script, args, root / "stopped" / name) == EXIT
        ends[name] = weights(root / "whole" / name)
    return SimpleNamespace(root=root, path=path, commands=commands, ends=ends)


def weights(out):
    return {path.parent.name: torch.load(path)["model"] for path in out.rglob("*_last.pth")}


def go_on(runs, rng, folder, file, spoil):
    """Damage a file of a stopped run and start the run again: it ends as the whole one, or leaves all weights alone."""
    name = rng.choice(list(runs.commands))
    script, args, _ = runs.commands[name]
    out = folder / "out"
    shutil.copytree(runs.root / "stopped" / name, out)
    path = rng.choice(sorted(out.rglob(file)))
    spoil(path)
    before = {path: path.read_bytes() for path in out.rglob("*.pth") if path.is_file()}
    ended = outcome_of(script.main, *args, "--output", out)
    if ended.code == 0:
        found = weights(out)
        assert found.keys() == runs.ends[name].keys()
        assert all(same_bits(found[key], runs.ends[name][key]) for key in found)
        for path in out.rglob("metrics.jsonl"):
            assert [json.loads(line) for line in path.read_text().splitlines()][-1]["epoch"] == 2
    else:
        assert str(path.parent) in ended.said
        assert before == {path: path.read_bytes() for path in out.rglob("*.pth") if path.is_file()}
    return ended


@cases(120)
def test_bytes(rng, folder, runs):
    file = rng.choice(["config.json", "metrics.jsonl", "resume.pth"])
    return go_on(runs, rng, folder, file, lambda path: path.write_bytes(damaged(path.read_bytes(), rng)))


TEXTS = [
    *("[" * 200_000, '{"opt":' * 100_000, "1" * 5000, f'{{"epoch": {"9" * 5000}}}\n', "NaN", "\ufeff{}", "\0" * 1000),
    *("{}\n" * 1000, "null\n", '{"epoch": NaN}\n', '{"init_epoch": null}\n', '"x"', "{}}\n", '{"epoch": [1]}\n'),
]


def spoil_text(path, rng):
    """Other values in config.json or metrics.jsonl, or other text."""
    content = [json.loads(line) for line in path.read_text().splitlines()] if path.suffix == ".jsonl" else None
    content = changed(content or json.loads(path.read_text()), rng, VALUES)
    lines = content if isinstance(content, list) else [content]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_text(rng.choice(TEXTS) if rng.random() < 0.2 else text)


@cases(120)
def test_texts(rng, folder, runs):
    return go_on(runs, rng, folder, rng.choice(["config.json", "metrics.jsonl"]), lambda path: spoil_text(path, rng))


@cases(80)
def test_states_of_something_else(rng, folder, nets, runs):
    """In the place of resume.pth: another checkpoint, or a state in which an entry is missing or of another type."""

    def spoil(path):
        content = torch.load(path)
        key = rng.choice(list(content))
        others = [{k: v for k, v in content.items() if k != key}]
        others += [{**content, key: value} for value in (None, "x", [], {})]
        others += [nets.ours, nets.state, {}, [], {"model": content["model"]}, {**content, "model": nets.ours}]
        path.write_bytes(packed(rng.choice(others)))

    ended = go_on(runs, rng, folder, "resume.pth", spoil)
    assert "resume.pth" in ended.said or ended.code == 0  # an empty dict is a method's state that has none
    return ended


@cases(60)
def test_report_and_curves(rng, folder, runs):
    shutil.copytree(runs.root / "whole" / rng.choice(["teacher", "crd", "factor"]), folder / "runs")
    spoil_text(rng.choice([*(folder / "runs").rglob("config.json"), *(folder / "runs").rglob("metrics.jsonl")]), rng)
    if rng.random() < 0.5:
        ended, written = outcome_of(report.main, folder / "runs"), folder / "runs" / "report.md"
    else:
        written = folder / "out" / "curves.png"
        ended = outcome_of(plot_curves.main, folder / "runs", "--output", written)
    assert written.exists() == (ended.code == 0)
    return ended


@cases(40)
def test_pictures(rng, folder, nets, runs):
    path, picture = folder / "x.pth", folder / "out" / "x.png"
    spoilt_network(nets, rng, path)
    data = ["--data_folder", runs.root / "data", "--dataset", "folder", "--device", "cpu", "--output", picture]
    if rng.random() < 0.5:
        ended = outcome_of(plot_tsne.main, "--path", path, "--model", "resnet8", *data)
    else:
        models = ["--model_t", "resnet8", "--model_s", "resnet8"]
        files = rng.sample([path, runs.path], 2)
        ended = outcome_of(plot_corr.main, "--path_t", files[0], "--path_s", files[1], *models, *data)
    assert picture.exists() == (ended.code == 0)
    return ended
