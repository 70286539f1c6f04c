"""Spoilt folders of runs: a run goes on to the right end, or says in one sentence why not; so do the scripts."""

import collections
import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.utils.tensorboard  # here, not in a case: it takes a second
from PIL import Image

import train_student
import train_teacher
import transfer_student
from helper import checkpoint, loops
from scripts import fetch_teachers, plot_corr, plot_curves, plot_tsne, report
from tests.reliability.hostile import (
    NOWHERE,
    VALUES,
    cases,
    changed,
    confined,
    damaged,
    misplaced,
    outcome_of,
    packed,
    refilled,
    same_bits,
    scene,
    spoilt_network,
)


@pytest.fixture(scope="session")
def runs(nets, tmp_path_factory):
    """Runs of two epochs, broken off in the second, and as they end; the command of each."""
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
    student = [*data, "--path_t", path, "--init_epochs", "1"]
    group = ["none", "similarity", "vid", "abound", "fsp", "icd"]
    commands = {
        "teacher": (train_teacher, [*data, "--model", "resnet8"]),
        "transfer": (transfer_student, [*data, "--path_s", path]),
        "crd": (train_student, [*student, "--distill", "crd", "--nce_k", "3"]),
        "rrd": (train_student, [*student, "--distill", "rrd", "kd", "--nce_k", "3"]),
        "factor": (train_student, [*student, "--distill", "factor"]),
        "group": (train_student, [*student, "--distill", *group]),
    }
    found = SimpleNamespace(root=root, path=path, commands=commands, ends={})
    real = loops.run_epoch

    def cut(epoch, *args):
        if epoch == 2:
            raise KeyboardInterrupt
        real(epoch, *args)

    for name, (script, args) in commands.items():
        broken, whole = root / "broken" / name, root / "ended" / name
        with contextlib.redirect_stderr(io.StringIO()), mock.patch.object(loops, "run_epoch", cut):
            assert outcome_code(script.main, [*args, "--output", broken]) == 130
        shutil.copytree(broken, whole)
        assert outcome_of(script.main, *args, "--output", whole).code == 0
        found.ends[name] = {path.parent.name: checkpoint.load(path)["model"] for path in whole.rglob("*_last.pth")}
    return found


def outcome_code(main, args):
    with mock.patch.object(sys, "argv", ["script.py", *map(str, args)]), contextlib.redirect_stdout(io.StringIO()):
        return main()


def go_on(runs, rng, folder, file, spoil, exact=True):
    """Spoil a file of a broken run, and start the run again. exact: it ends as the whole one, if it does not refuse"""
    name = rng.choice(list(runs.commands))
    script, args = runs.commands[name]
    shutil.copytree(runs.root / "broken" / name, folder / "out")
    spoil(rng.choice(sorted((folder / "out").rglob(file))))
    ended = outcome_of(script.main, *args, "--output", folder / "out")
    if ended.code == 0:
        check_ended(runs, name, folder / "out", exact)
    return ended


def check_ended(runs, name, out, exact):
    assert {path.parent.name for path in out.rglob("*_last.pth")} == runs.ends[name].keys()
    for path in out.rglob("*_last.pth"):
        state = checkpoint.load(path)["model"]
        assert all(value.isfinite().all() for value in state.values())
        assert not exact or same_bits(state, runs.ends[name][path.parent.name])
    for path in out.rglob("config.json"):
        assert len(json.loads(path.read_text())["parts"]) >= 1
    for path in out.rglob("metrics.jsonl"):
        assert [json.loads(line) for line in path.read_text().splitlines()][-1]["epoch"] == 2


@cases(50)
def test_config(rng, folder, runs):
    return go_on(runs, rng, folder, "config.json", lambda path: path.write_bytes(damaged(path.read_bytes(), rng)))


@cases(60)
def test_content_of_config(rng, folder, runs):
    def spoil(path):
        path.write_text(json.dumps(changed(json.loads(path.read_text()), rng, VALUES)))

    return go_on(runs, rng, folder, "config.json", spoil)


@cases(50)
def test_metrics(rng, folder, runs):
    def spoil(path):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines = changed(lines, rng, VALUES)
        content = "".join(json.dumps(line) + "\n" for line in (lines if isinstance(lines, list) else [lines])).encode()
        path.write_bytes(damaged(content, rng) if rng.random() < 0.4 else content)

    return go_on(runs, rng, folder, "metrics.jsonl", spoil)


DEEP = "[" * 100_000 + "]" * 100_000
TEXTS = [
    *("[" * 200_000, '{"opt":' * 100_000, f'{{"opt": {{}}, "parts": {DEEP}}}', f'{{"epoch": {DEEP}}}\n', "1" * 5000),
    *(f'{{"epoch": {"9" * 5000}}}\n', "NaN", "\ufeff{}", "\0" * 1000, '{"epoch": 1}\r\n', "{}\n" * 1000, "null\n"),
    *('{"epoch": NaN}\n', '{"epoch": 1e400}\n', '{"init_epoch": null}\n', '"x"', "{}}\n", '{"epoch": [1]}\n', "\ud83d"),
]


@cases(2 * len(TEXTS))
def test_texts(rng, folder, runs):
    def spoil(path):
        path.write_bytes(rng.choice(TEXTS).encode(errors="surrogatepass"))

    return go_on(runs, rng, folder, rng.choice(["config.json", "metrics.jsonl"]), spoil)


@cases(60)
def test_state(rng, folder, runs):
    return go_on(runs, rng, folder, "resume.pth", lambda path: path.write_bytes(damaged(path.read_bytes(), rng)))


@cases(120)
def test_content_of_state(rng, folder, nets, runs):
    def spoil(path):
        content = torch.load(path)
        part = {key: content[key] for key in ([rng.choice(list(content))] if rng.random() < 0.6 else content)}
        found = changed(part, rng, VALUES + nets.odd)
        rest = {key: value for key, value in content.items() if key not in part}
        path.write_bytes(packed({**rest, **found} if isinstance(found, dict) else found))

    return go_on(runs, rng, folder, "resume.pth", spoil, exact=False)


@cases(60)
def test_numbers_of_state(rng, folder, runs):
    """Of the right type and shape; a training that diverges from them ends as any that diverges."""

    def spoil(path):
        content = torch.load(path)
        refilled({key: content[key] for key in rng.choice([["model"], ["optimizer"], ["distiller", "meters"]])}, rng)
        path.write_bytes(packed(content))

    return go_on(runs, rng, folder, "resume.pth", spoil, exact=False)


def tangled(state):
    value = 0
    for _ in range(40):
        value = [value, value]
    state["optimizer"]["state"][0]["more"] = value


def overlapping(state):
    momentum = state["optimizer"]["state"][0]
    old = momentum["momentum_buffer"]
    storage = torch.zeros(old.numel())
    momentum["momentum_buffer"] = storage.as_strided(old.shape, [0] * old.dim(), old.numel() - 1)


def assigned(state):
    """As torch's own flag in a state dict asks for: the weights would be the file's tensors, of their type."""
    model = collections.OrderedDict(
        (key, value.double() if value.is_floating_point() else value) for key, value in state["model"].items()
    )
    names = {key.rpartition(".")[0] for key in model}
    model._metadata = {name: {"assign_to_params_buffers": True, "version": 2} for name in names}
    state["model"] = model


CRAFTED = {
    "tangled": (tangled, "goes on"),
    "overlapping": (overlapping, "goes on with other numbers"),
    "another layout": (lambda state: contiguous(state["optimizer"]["state"]), "goes on"),
    "other types": (assigned, "goes on"),
    "no momentum": (lambda state: state["optimizer"]["state"].clear(), "is refused"),
    "no optimizer": (lambda state: state["optimizer"].clear(), "is refused"),
    "nothing": (lambda state: state.clear(), "is refused"),
    "no number for a meter": (lambda state: state["meters"]["sums"].fill_(torch.nan), "is refused"),
    "a momentum of NaN": (lambda state: first(state)["momentum_buffer"].fill_(torch.nan), "is refused"),
    "a momentum of bytes": (lambda state: to_bytes(first(state)), "is refused"),
    "an epoch before the first": (lambda state: state.update(epoch=-1), "is refused"),
    "a step after the last": (lambda state: state.update(step=1000), "is refused"),
    "more than all": (lambda state: state.update(best=1e9), "is refused"),
    "one number for all meters": (lambda state: state["meters"].update(sums=torch.tensor(0.0).double()), "is refused"),
}


def to_bytes(momentum):
    momentum["momentum_buffer"] = momentum["momentum_buffer"].to(torch.int8)


def first(state):
    return state["optimizer"]["state"][0]


def contiguous(state):
    for momentum in state.values():
        momentum["momentum_buffer"] = momentum["momentum_buffer"].contiguous()


@pytest.mark.parametrize("what", CRAFTED)
def test_crafted_state(what, runs, tmp_path):
    """Made by reviewers: most hung, ended the process or went on to a wrong end."""
    spoil, then = CRAFTED[what]
    script, args = runs.commands["teacher"]
    with confined(), scene(tmp_path / "case") as folder:
        shutil.copytree(runs.root / "broken" / "teacher", folder / "out")
        (path,) = (folder / "out").rglob("resume.pth")
        content = torch.load(path)
        spoil(content)
        path.write_bytes(packed(content))
        ended = outcome_of(script.main, *args, "--output", folder / "out")
        assert ended.code == (2 if then == "is refused" else 0), ended.said
        if not ended.code:
            check_ended(runs, "teacher", folder / "out", exact=then == "goes on")


@pytest.mark.parametrize("name", [".lock", ".config.json.tmp", ".resume.pth.tmp", "metrics.jsonl", "config.json"])
@pytest.mark.parametrize("kind", ["link", "link to nothing", "hard link", "pipe"])
def test_nothing_is_written_through_a_name(name, kind, runs, tmp_path):
    script, args = runs.commands["teacher"]
    with scene(tmp_path / "case") as folder:
        shutil.copytree(runs.root / "broken" / "teacher", folder / "out")
        path = next((folder / "out").rglob("config.json")).with_name(name)
        path.unlink(missing_ok=True)
        (folder / "elsewhere").mkdir()
        target = folder / "elsewhere" / "file"
        if kind in ("link", "hard link"):
            target.write_text("precious")
        if kind == "pipe":
            os.mkfifo(path)
        else:
            path.hardlink_to(target) if kind == "hard link" else path.symlink_to(target)
        outcome_of(script.main, *args, "--output", folder / "out")
        assert [f.read_text() for f in target.parent.iterdir()] == ["precious"] * (kind in ("link", "hard link"))


def test_a_configuration_that_grows(runs, tmp_path):
    """A megabyte, indented by a space for each of its brackets, is half a gigabyte."""
    script, args = runs.commands["teacher"]
    with confined(), scene(tmp_path / "case") as folder:
        shutil.copytree(runs.root / "broken" / "teacher", folder / "out")
        (path,) = (folder / "out").rglob("config.json")
        content = json.loads(path.read_text())
        for _ in range(500):
            content["parts"] = [content["parts"]]
        path.write_text(json.dumps(content))
        assert outcome_of(script.main, *args, "--output", folder / "out").code == 2


def test_a_line_of_two_stages(runs, tmp_path):
    with scene(tmp_path / "case") as folder:
        shutil.copytree(runs.root / "ended" / "teacher", folder / "runs")
        (path,) = (folder / "runs").rglob("metrics.jsonl")
        path.write_text(path.read_text() + '{"init_epoch": 1, "init_train_loss": 1, "epoch": 1}\n')
        assert outcome_of(report.main, folder / "runs").code == 0


@cases(40)
def test_files_of_a_run(rng, folder, runs):
    return go_on(runs, rng, folder, "*[!k]", lambda path: path.is_file() and misplaced(path, rng), exact=False)


def ended_run(runs, rng, folder):
    """A run in folder/runs, whose configuration or metrics are spoilt."""
    shutil.copytree(runs.root / "ended" / rng.choice(["teacher", "crd", "factor"]), folder / "runs")
    (path,) = (folder / "runs").rglob(rng.choice(["config.json", "metrics.jsonl"]))
    kind = rng.randrange(4)
    if kind == 0:
        path.write_bytes(damaged(path.read_bytes(), rng))
    elif kind == 1:
        path.write_bytes(rng.choice(TEXTS).encode(errors="surrogatepass"))
    else:
        read = (
            json.loads if path.name == "config.json" else lambda text: [json.loads(line) for line in text.splitlines()]
        )
        found = changed(read(path.read_text()), rng, VALUES)
        lines = found if isinstance(found, list) else [found]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "runs"


@cases(60)
def test_report(rng, folder, runs):
    found = ended_run(runs, rng, folder)
    ended = outcome_of(report.main, found)
    assert (found / "report.png").exists() == (found / "report.md").exists() == (ended.code == 0)
    return ended


@cases(30)
def test_curves(rng, folder, runs):
    picture = folder / "out" / "curves.png"
    ended = outcome_of(plot_curves.main, ended_run(runs, rng, folder), "--output", picture)
    assert picture.exists() == (ended.code == 0)
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


def fetch(folder, archive=NOWHERE):
    """As the user calls it, with another archive and without a mirror."""
    where = ["--output", folder / "out", "--archive", archive, "--mirror", NOWHERE]
    with mock.patch.multiple(fetch_teachers, PUBLISHED={"resnet8": 1.0}, N_CLS=2):
        return outcome_of(fetch_teachers.main, "resnet8", *where)


@cases(60)
def test_recorded_teachers(rng, folder, nets):
    models = folder / "out" / "models"
    path = models / "resnet8_vanilla" / "ckpt_epoch_240.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(nets.old)
    lock = f"{hashlib.sha256(nets.old).hexdigest()}  resnet8_vanilla/ckpt_epoch_240.pth\n".encode() * 2
    (models / "teachers.lock").write_bytes(damaged(lock, rng) if rng.random() < 0.8 else lock)
    if rng.random() < 0.4:
        path.write_bytes(damaged(nets.old, rng))
    if rng.random() < 0.2:
        misplaced(rng.choice([path, models / "teachers.lock"]), rng, sparse=False)
    return fetch(folder)


@cases(60)
def test_archive_of_teachers(rng, folder, nets):
    """Members that lead elsewhere, links, sizes and headers that are lies."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=rng.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])) as tar:
        for name in ("../evil", "cifar_teachers/resnet8_vanilla/ckpt_epoch_240.pth"):
            member = tarfile.TarInfo(rng.choice([name, "x" * 150, name]))
            member.size = len(nets.old)
            member.type = rng.choice([tarfile.REGTYPE, tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.GNUTYPE_LONGNAME])
            member.linkname = rng.choice(["", "/etc/passwd"])
            tar.addfile(member, io.BytesIO(nets.old))
    content = bytearray(buffer.getvalue())
    if rng.random() < 0.4:  # a size of a terabyte, in a header with the right checksum
        content[:512] = huge_header(content[:512])
    path = folder / "teachers.tar"
    path.write_bytes(damaged(bytes(content), rng) if rng.random() < 0.6 else content)
    return fetch(folder, path.as_uri())


def huge_header(header):
    info = tarfile.TarInfo.frombuf(bytes(header), "utf-8", "strict")
    info.size = 2**40
    return info.tobuf(tarfile.GNU_FORMAT)[:512]
