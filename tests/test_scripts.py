"""The entry scripts as a user calls them: what they leave, and what they say to wrong input."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_student
import train_teacher
from helper import checkpoint
from models import create_model
from scripts import plotting
from tests.common import call

ROOT = Path(__file__).resolve().parent.parent
TEACHER = ["--model", "resnet8", "--epochs", "2", "--batch_size", "16", "--save_freq", "1", "--device", "cpu"]
STUDENT = ["--model_s", "resnet8", "--epochs", "2", "--batch_size", "16", "--init_epochs", "1", "--device", "cpu"]
ALL = ["none", "kd", "hint", "attention", "abound", "crd", "icd"]


@pytest.fixture(scope="module")
def data(image_folder):
    return ["--dataset", "folder", "--data_folder", str(image_folder)]


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    """A teacher's folder, made by the real script."""
    out = tmp_path_factory.mktemp("teacher")
    subprocess.run([sys.executable, ROOT / "train_teacher.py", *data, *TEACHER, "--output", out], check=True)
    return out / "models" / "resnet8_folder_lr_0.05_decay_0.0005_trial_0"


@pytest.fixture
def path_t(teacher):
    return ["--path_t", str(teacher / "resnet8_last.pth")]


def weights(folder):
    return checkpoint.load(next(Path(folder).glob("*_last.pth")))["model"]


def runs(out):
    return {json.loads(p.read_text())["method"]: p.parent for p in Path(out).rglob("config.json")}


def test_what_a_teacher_leaves(teacher):
    left = {path.name for path in teacher.iterdir()}
    assert {"config.json", "metrics.jsonl", "resnet8_best.pth", "resnet8_last.pth", "ckpt_epoch_1.pth"} <= left
    assert any(name.startswith("events.out.tfevents") for name in left)
    assert {name for name in left if name.startswith(".")} == {".lock"}  # no temporary files
    saved = torch.load(teacher / "resnet8_last.pth", weights_only=True)
    assert len(saved["config_sha256"]) == 64
    assert saved["arch"] == "resnet8" and saved["n_cls"] == 3 and saved["epoch"] == 2 and saved["dataset"] == "folder"
    assert len(saved["mean"]) == 3 and saved["opt"]["learning_rate"] == 0.05
    (part,) = json.loads((teacher / "config.json").read_text())["parts"]
    assert part["versions"]["torch"] == torch.__version__ and "--save_freq" in part["argv"] and part["code"]
    lines = [json.loads(line) for line in (teacher / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert lines[-1]["test_acc"] == pytest.approx(saved["accuracy"], abs=1e-5)


def test_tensorboard_tags(teacher):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(teacher)).Reload()
    tags = {"train_acc", "train_loss", "test_acc", "test_acc_top5", "test_macro_f1", "test_loss"}
    assert set(events.Tags()["scalars"]) == tags
    assert [e.step for e in events.Scalars("test_acc")] == [1, 2]


def test_recall_of_each_class(image_folder, tmp_path, monkeypatch, capsys):
    """null where a class has no test images; files of earlier versions, which lack it, can still be read."""
    shutil.copytree(image_folder, tmp_path / "images")
    shutil.rmtree(tmp_path / "images" / "test" / "green")
    args = ["--dataset", "folder", "--data_folder", tmp_path / "images", *TEACHER, "--val_split", "0.3"]
    assert call(train_teacher, [*args, "--output", tmp_path / "out"], monkeypatch, capsys)[0] == 0
    (path,) = tmp_path.rglob("metrics.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        blue, green, red = line["test_recall"]
        assert green is None and (blue + red) / 2 == pytest.approx(line["test_acc"], abs=0.01)  # of four images each
        assert sum(line["val_recall"]) / 3 == pytest.approx(line["val_acc"], abs=0.01) and line["val_macro_f1"] >= 0
    assert len(plotting.read_runs([tmp_path])) == 1
    old = [{key: value for key, value in line.items() if "recall" not in key and "f1" not in key} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in old))
    assert len(plotting.read_runs([tmp_path])[0]["epochs"]) == 2


def test_a_student_in_a_group_is_the_student_alone(data, path_t, tmp_path, monkeypatch, capsys):
    group = [*data, *STUDENT, *path_t, "--nce_k", "20", "--output", tmp_path / "group", "--distill", *ALL]
    code, out, _ = call(train_student, group, monkeypatch, capsys)
    assert code == 0
    together = runs(tmp_path / "group")
    assert set(together) == set(ALL)
    for name in ALL:
        assert f"{name}: last " in out and str(together[name]) in out
        options = ["--nce_k", "20"] if name == "crd" else []
        alone = [*data, *STUDENT, *path_t, *options, "--output", tmp_path / name, "--distill", name]
        assert call(train_student, alone, monkeypatch, capsys)[0] == 0
        a, b = weights(together[name]), weights(runs(tmp_path / name)[name])
        assert all(torch.equal(a[key], b[key]) for key in a), name
    first = weights(together["none"])
    assert any(not torch.equal(first[key], v) for key, v in weights(together["kd"]).items())


def test_main_returns_what_the_runs_have_come_to(data, path_t, tmp_path):
    """For programs that call it, without a command line."""
    args = [*data, *STUDENT, *path_t, "--distill", "none", "kd", "--output", str(tmp_path)]
    first = train_student.main(list(map(str, args)))
    assert [r.name for r in first] == ["none", "kd"] and not any(r.failed for r in first)
    for result in [*first, *train_student.main(list(map(str, args)))]:  # the second finds all done
        saved = checkpoint.load(next(result.folder.glob("*_last.pth")))
        assert result.last == saved["accuracy"] and result.best >= result.last and result.epoch in (1, 2)
    assert json.loads((first[0].folder / "config.json").read_text())["parts"][0]["argv"][1:] == args


def test_seeds(data, tmp_path, monkeypatch, capsys):
    """Same seed, same bits; the trial's number is the seed unless one is given."""
    found = {}
    for name, flags in {
        "a": ["--seed", "3"],
        "b": ["--seed", "3", "-t", "9"],
        "c": ["-t", "3"],
        "d": ["-t", "4"],
    }.items():
        assert call(train_teacher, [*data, *TEACHER, *flags, "--output", tmp_path / name], monkeypatch, capsys)[0] == 0
        found[name] = weights(runs(tmp_path / name)["none"])["conv1.weight"]
    assert torch.equal(found["a"], found["b"]) and torch.equal(found["a"], found["c"])
    assert not torch.equal(found["a"], found["d"])


def test_the_published_names_and_files_work_as_teacher(data, teacher, tmp_path, monkeypatch, capsys):
    """A foreign file, known by its folder's name; a DataParallel prefix and numpy scalars as published files have."""
    import numpy as np

    state = {f"module.{key}": value for key, value in weights(teacher).items()}
    foreign = tmp_path / "resnet8_vanilla" / "ckpt_epoch_240.pth"
    foreign.parent.mkdir()
    optimizer = {"param_groups": [{"lr": np.float64(5e-5)}]}
    torch.save({"epoch": 240, "model": state, "accuracy": torch.tensor(75.6), "optimizer": optimizer}, foreign)
    args = [*data, *STUDENT, "--path_t", foreign, "--distill", "fitnet", "at", "--output", tmp_path / "out"]
    code, out, _ = call(train_student, args, monkeypatch, capsys)
    assert code == 0 and "teacher resnet8" in out
    assert set(runs(tmp_path / "out")) == {"hint", "attention"}


def test_no_teacher_is_needed_without_a_method(data, tmp_path, monkeypatch, capsys):
    args = [*data, *STUDENT, "--distill", "none", "--output", tmp_path]
    code, out, _ = call(train_student, args, monkeypatch, capsys)
    assert code == 0 and out.splitlines()[-1].startswith("none: last ")
    assert json.loads((runs(tmp_path)["none"] / "config.json").read_text())["teacher"] == "none"


def test_a_student_serves_as_teacher(data, path_t, tmp_path, monkeypatch, capsys):
    args = [*data, *STUDENT, *path_t, "--distill", "kd", "--output", tmp_path / "1"]
    assert call(train_student, args, monkeypatch, capsys)[0] == 0
    second = runs(tmp_path / "1")["kd"] / "resnet8_best.pth"
    args = [
        *data,
        *STUDENT,
        "--path_t",
        second,
        "--model_s",
        "ShuffleV2",
        "--distill",
        "at",
        "--output",
        tmp_path / "2",
    ]
    assert call(train_student, args, monkeypatch, capsys)[0] == 0
    config = json.loads((runs(tmp_path / "2")["attention"] / "config.json").read_text())
    assert config["teacher"] == "resnet8" and config["opt"]["learning_rate"] == 0.01


@pytest.mark.filterwarnings("ignore:.*")
def test_a_track_that_diverges_ends_alone(data, path_t, tmp_path, monkeypatch, capsys):
    """hint with an absurd weight overflows; kd beside it goes on and equals kd alone."""
    flags = [*data, *STUDENT, *path_t, "--distill"]
    code, out, err = call(
        train_student, [*flags, "hint", "none", "-b", "1e38", "--output", tmp_path], monkeypatch, capsys
    )
    assert code == 1
    assert "hint: stopped, epoch " in err and "the loss is not finite" in err and "hint: failed" in out
    found = runs(tmp_path)
    assert not list(found["hint"].glob("*_last.pth")) and list(found["none"].glob("*_last.pth"))


def bad(args, said, script=train_student):
    return pytest.param(script, args, said, id=" ".join(args)[:60])


@pytest.mark.parametrize(
    ("script", "args", "said"),
    [
        bad(["--distill", "hnt"], "unknown method 'hnt'; known: hint, "),
        bad(["--model_s", "resnet9"], "unknown network 'resnet9'; known: resnet8, "),
        bad(["--dataset", "cifar"], "unknown data set 'cifar'; known: cifar10, cifar100"),
        bad(["--distill", "kd", "--nce_k", "4"], "--nce_k: not an option of kd, but of crd, rrd"),
        bad(["--distill", "none", "-a", "1"], "--alpha: not an option of none"),
        bad(["--distill", "kd", "-r", "0", "-a", "0"], "nothing is left of the loss of kd"),
        bad(["--distill", "kd", "-r", "0", "-a", "0", "-b", "1"], "nothing is left of the loss of kd"),
        bad(["--distill", "abound", "-r", "0"], "nothing is left of the loss of abound"),
        bad(["--distill", "hint", "--hint_layer", "4"], "method hint: a map is needed, not a vector"),
        bad(["--distill", "hint", "--hint_layer", "7"], "invalid choice: 7"),
        bad(["--distill", "kd", "-b", "nan"], "nan is out of range"),
        bad(["--epochs", "0"], "0 is out of range"),
        bad(["--epochs", "9" * 400], "is not an integer"),
        bad(["--distill", "crd", "--nce_k", "0"], "0 is out of range"),
        bad(["--distill", "crd", "--nce_t", "0"], "0 is out of range"),
        bad(["--distill", "crd", "--nce_m", "7"], "7 is out of range"),
        bad(["--trial", ".."], "is not a name for a folder"),
        bad(["--learning_rate", "inf"], "inf is out of range"),
        bad(["--lr_decay_epochs", "a,b"], "is not a list of epochs"),
        bad(["--batch_size", "67"], "--batch_size 67 is larger than the training set (66 images)"),
        bad(["--batch_size", "1", "--distill", "kd", "pkt"], "--batch_size 1: pkt compares the samples of a batch"),
        bad(
            ["--batch_size", "65", "--distill", "none", "--model_s", "vgg8", "--image_size", "8"],
            "--batch_size 65: leaves one of the 66 training images for the last batch",
        ),
        bad(["--distill", "fsp", "--model_s", "resnet8x4"], "method fsp: needs equal channels, the student's are [32,"),
        bad(["--distill", "kdsvd", "--model_s", "resnet8x4"], "method kdsvd: needs equal channels, the student's are"),
        bad(["--device", "cuda:77"], "--device cuda:77"),
        bad(["--device", "tpu"], "--device tpu"),
        bad(["--trial", "a/b"], "is not a name for a folder"),
        bad(["--data_folder", "nowhere"], "nowhere needs folders"),
        bad(["--path_t", "nowhere.pth"], "nowhere.pth: no such checkpoint file"),
        bad(["--model_t", "vgg8"], "not a vgg8: lacks block0.0.bias"),
        bad(["--model", "resnet9"], "unknown network 'resnet9'", train_teacher),
        bad(["--batch_size", "1000"], "--batch_size 1000 is larger than the training set", train_teacher),
    ],
)
def test_bad_input(script, args, said, data, path_t, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    usual = [*data, *(path_t if script is train_student else []), "--output", out]
    code, _, err = call(script, [*usual, *args], monkeypatch, capsys)
    assert code == 2
    assert said in err and err.startswith(script.__name__) and err.count("\n") == 1
    assert not out.exists()


def test_a_teacher_is_asked_for(data, tmp_path, monkeypatch, capsys):
    code, _, err = call(train_student, [*data, "--distill", "kd", "--output", tmp_path], monkeypatch, capsys)
    assert code == 2 and "--path_t" in err


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("evil-was-here"),)


def damaged(kind, teacher, folder):
    path = folder / "x.pth"
    good = (teacher / "resnet8_last.pth").read_bytes()
    if kind == "truncated":
        path.write_bytes(good[: len(good) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "flipped bit":
        place = good.index(weights(teacher)["fc.weight"].numpy().tobytes())
        path.write_bytes(good[:place] + bytes([good[place] ^ 64]) + good[place + 1 :])
    elif kind == "nan":
        torch.save({"model": {k: v * float("nan") for k, v in weights(teacher).items()}, "arch": "resnet8"}, path)
    elif kind == "keys":
        torch.save({"model": dict(enumerate(weights(teacher).values())), "arch": "resnet8"}, path)
    elif kind == "text":
        path.write_text("<html>404 not found</html>")
    elif kind == "code":
        torch.save({"model": Evil()}, path)
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "no weights":
        torch.save({"model": {"a": 1}, "arch": "resnet8"}, path)
    elif kind == "classes":
        torch.save({"model": create_model("resnet8", 7).state_dict(), "arch": "resnet8"}, path)
    elif kind == "said classes":
        torch.save({"model": create_model("resnet8", 7).state_dict(), "arch": "resnet8", "n_cls": 7}, path)
    return path


KINDS = ["truncated", "empty", "flipped bit", "nan", "keys", "text", "code", "list", "no weights"]


@pytest.mark.parametrize("kind", [*KINDS, "classes", "said classes"])
def test_bad_checkpoints(kind, data, teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path, out = damaged(kind, teacher, tmp_path), tmp_path / "out"
    code, _, err = call(train_student, [*data, "--path_t", path, "--output", out], monkeypatch, capsys)
    assert code == 2 and str(path) in err and err.count("\n") == 1
    assert not out.exists() and not (tmp_path / "evil-was-here").exists()


def test_stages_must_match(data, tmp_path, monkeypatch, capsys):
    """vgg has four middle maps, resnet three."""
    path = tmp_path / "vgg8_vanilla" / "x.pth"
    path.parent.mkdir()
    torch.save(create_model("vgg8", 3).state_dict(), path)
    args = [*data, "--path_t", path, "--distill", "at", "--output", tmp_path / "out"]
    code, _, err = call(train_student, args, monkeypatch, capsys)
    assert code == 2 and "method attention compares 3 student maps (16x32x32, " in err and "4 teacher maps" in err
    assert not (tmp_path / "out").exists()


def test_a_run_is_never_overwritten(data, teacher, monkeypatch, capsys):
    again = [*data, *TEACHER, "--output", teacher.parent.parent]
    before = {path: path.read_bytes() for path in teacher.iterdir() if path.name != ".lock"}
    code, out, _ = call(train_teacher, [*again, "--resume", "never"], monkeypatch, capsys)
    second = teacher.with_name(f"{teacher.name}_2")
    assert code == 0 and str(second) in out
    ends = [checkpoint.load(folder / "resnet8_last.pth") for folder in (teacher, second)]
    assert all(torch.equal(value, ends[1]["model"][key]) for key, value in ends[0]["model"].items())
    assert ends[0]["config_sha256"] == ends[1]["config_sha256"]
    code, _, err = call(train_teacher, [*again, "--epochs", "3", "--momentum", "0.5"], monkeypatch, capsys)
    assert code == 2 and "momentum: 0.9 there, 0.5 here" in err
    code, out, _ = call(train_teacher, again, monkeypatch, capsys)  # a finished run is left as it is
    assert code == 0 and "2 of 2 epochs are done already" in out
    changed = [path.name for path, content in before.items() if path.read_bytes() != content]
    assert changed == [] and set(teacher.iterdir()) - {teacher / ".lock"} == set(before)


def test_a_full_disk_ends_with_a_sentence(data, tmp_path):
    """Files may not grow beyond 100 kB: the first checkpoint does not fit."""
    limited = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
    limited += "sys.argv = sys.argv[1:]; sys.path.insert(0, '.'); runpy.run_path(sys.argv[0], run_name='__main__')"
    args = [sys.executable, "-c", limited, "train_teacher.py", *data, *TEACHER, "--output", str(tmp_path)]
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("train_teacher.py: ") and "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.pth")) and not list(tmp_path.rglob(".*.tmp"))


def test_help_names_everything(monkeypatch, capsys):
    code, out, _ = call(train_student, ["--help"], monkeypatch, capsys)
    assert code == 0
    for word in (
        "cifar100",
        "50,000",
        "digits",
        "1,000 + 797",
        "MobileNetV2",
        "--nce_k",
        "negatives per sample",
        "fitnet",
    ):
        assert word in out


def test_the_main_job_in_miniature(tmp_path):
    """A teacher, its students and their report, as processes."""
    run = [sys.executable]
    small = ["--dataset", "digits", "--epochs", "1", "--batch_size", "500", "--output", str(tmp_path)]

    def sh(*args):
        done = subprocess.run([*run, *map(str, args)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    sh("train_teacher.py", *small, "--model", "resnet8")
    path = next(tmp_path.glob("models/*/resnet8_last.pth"))
    out = sh("train_student.py", *small, "--path_t", path, "--distill", "none", "kd", "icd", "crd", "--nce_k", "64")
    assert out.count(": last ") == 4
    out = sh("scripts/report.py", tmp_path)
    for row in ("resnet8, teacher", "resnet8, baseline", "resnet8, kd", "resnet8, icd", "resnet8, crd"):
        assert row in out
    picture = tmp_path / "report.png"
    assert f"picture: {picture}" in out and picture.read_bytes().startswith(b"\x89PNG")
