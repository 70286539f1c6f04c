"""What README, docs and shell scripts tell a user to type is understood by the real parsers, and works."""

import re
import shlex
import sys
from pathlib import Path

import pytest

import distiller_zoo
import train_student
from distiller_zoo import aliases, distiller_dict
from helper.options import parse_student, parse_teacher, parse_transfer, weights_of
from models import model_dict
from scripts import benchmark, convert_checkpoint, plot_corr, plot_curves, plot_tsne, report

ROOT = Path(__file__).resolve().parent.parent
PARSERS = {
    "train_teacher.py": parse_teacher,
    "train_student.py": parse_student,
    "transfer_student.py": parse_transfer,
    "scripts/convert_checkpoint.py": convert_checkpoint.parse,
    "scripts/plot_corr.py": plot_corr.parse,
    "scripts/plot_curves.py": plot_curves.parse,
    "scripts/plot_tsne.py": plot_tsne.parse,
    "scripts/report.py": report.parse,
    "scripts/benchmark.py": benchmark.parse,
}


def commands(path):
    """The lines of a file that call a script of ours, continuations joined."""
    text = (
        (ROOT / path).read_text().replace("\\\n", " ").replace('"$trial"', "1").replace("...", "x").replace("$same", "")
    )
    found = re.findall(r"(?:python|\"\$python\") ([\w/]+\.py)(.*)", text)
    return [(script, shlex.split(args.split("`")[0], comments=True)) for script, args in found]


@pytest.mark.parametrize(
    "path",
    ["README.md", "docs/benchmarks.md", "scripts/run_cifar_distill.sh", "scripts/run_cifar_vanilla.sh"],
)
def test_commands_parse(path):
    found = commands(path)
    assert found
    for script, args in found:
        PARSERS[script](args)


def test_readme_has_what_users_look_for():
    text, found = (ROOT / "README.md").read_text(), commands("README.md")
    opts = [parse_student(args) for script, args in found if script == "train_student.py"]
    said = [(opt.distill, opt.alpha) for opt in opts]
    assert (["kd"], None) in said and (["icd"], None) in said and (["icd"], 1.0) in said
    assert {parse_transfer(args).dataset for script, args in found if script == "transfer_student.py"} == {
        "stl10",
        "tinyimagenet",
    }
    assert {script for script, _ in found} >= PARSERS.keys() - {"scripts/benchmark.py"}
    for shell in re.findall(r"\bsh ([\w/]+\.sh)", text):
        assert (ROOT / shell).is_file(), shell
    assert {"scripts/fetch_pretrained_teachers.sh", "data/get_tinyimagenet.sh", "scripts/quickstart.sh"} <= {
        *re.findall(r"\bsh ([\w/]+\.sh)", text)
    }
    for paper in ("2407.11802", "2407.12073", "Contrastive Representation Distillation"):
        assert paper in text.partition("## Papers")[2]


def test_the_distill_script_has_every_method_with_its_published_weights():
    lines = [parse_student(args) for _, args in commands("scripts/run_cifar_distill.sh")]
    assert {opt.distill[0] for opt in lines} == set(distiller_dict) - {"none", "kdsvd"}
    for opt in lines[:15]:
        published = {"gamma": 0.0, "alpha": 0.0, "beta": 0.0, **distiller_dict[opt.distill[0]].weights}
        assert weights_of(opt.distill[0], opt) == published
    with_kd = {opt.distill[0]: weights_of(opt.distill[0], opt) for opt in lines[15:]}
    assert set(with_kd) == {"crd", "rrd", "icd"} and all(w["alpha"] == 1 for w in with_kd.values())


def test_readme_names_every_method_and_weight():
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|.*\| ([\d./ ]+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    named = {}
    for names, numbers in rows:
        first, *others = re.findall(r"`(\w+)`", names)
        assert all(aliases[other] == first for other in others)
        named[first] = [float(number) for number in numbers.split("/")]
    assert named == {name: list(cls.weights.values()) for name, cls in distiller_dict.items()}


def test_the_scripts_name_known_networks():
    for script, args in commands("scripts/run_cifar_vanilla.sh"):
        opt = PARSERS[script](args)
        assert (opt.model if script == "train_teacher.py" else opt.model_s) in model_dict


def test_the_example_method_trains(image_folder, tmp_path, monkeypatch, capsys):
    """docs/add_a_method.md: its class and one entry of the registry are all that is needed."""
    text = (ROOT / "docs" / "add_a_method.md").read_text()
    names = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], names)
    monkeypatch.setitem(distiller_zoo.distiller_dict, "cosine", names["CosineLoss"])
    data = ["--dataset", "folder", "--data_folder", str(image_folder), "--batch_size", "33", "--epochs", "1"]
    data += ["--device", "cpu", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train_student.py", *data, "--distill", "none"])
    assert train_student.main() == 0
    path_t = str(next(tmp_path.rglob("resnet8_last.pth")))
    command = re.search(r"train_student.py (.*)", text)[1].replace("...", path_t)
    monkeypatch.setattr(sys, "argv", ["train_student.py", *data, "--trial", "2", *shlex.split(command)])
    assert train_student.main() == 0
    out = capsys.readouterr().out
    assert "cosine: last " in out and "none: last " in out
