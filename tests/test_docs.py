"""The commands in README and shell scripts are understood by the real parsers, and the documented example works."""

import re
import shlex
from pathlib import Path

import pytest

import distiller_zoo
import train_student
import train_teacher
import transfer_student
from distiller_zoo import aliases, distiller_dict
from distiller_zoo.distillation import weights_of
from scripts import benchmark, convert_checkpoint, export_student, plot_corr, plot_curves, plot_tsne, report, run_table

ROOT = Path(__file__).resolve().parent.parent
PARSERS = {
    "train_teacher.py": train_teacher.parse,
    "train_student.py": train_student.parse,
    "transfer_student.py": transfer_student.parse,
    "scripts/benchmark.py": benchmark.parse,
    "scripts/convert_checkpoint.py": convert_checkpoint.parse,
    "scripts/plot_corr.py": plot_corr.parse,
    "scripts/plot_curves.py": plot_curves.parse,
    "scripts/plot_tsne.py": plot_tsne.parse,
    "scripts/export_student.py": export_student.parse,
    "scripts/report.py": report.parse,
    "scripts/run_table.py": run_table.parse,
}


def parsed_commands(path):
    """The commands of a file that call one of our Python scripts, as (script, parsed options)."""
    text = (ROOT / path).read_text().replace("\\\n", " ").replace('"$trial"', "1")
    found = re.findall(r"^ *python ([\w/]+\.py)(.*)", text, re.MULTILINE)
    return [(script, PARSERS[script](shlex.split(args))) for script, args in found]


@pytest.mark.parametrize("path", ["README.md", "scripts/run_cifar_vanilla.sh"])
def test_commands_parse(path):
    assert len(parsed_commands(path)) > 10


def test_files_named_in_the_documents_exist():
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")):
        text = document.read_text()
        named = [document.parent / name for name in re.findall(r"\]\((?!http)([^)#]+)", text)]
        named += [ROOT / name for name in re.findall(r"\bsh ([\w./]+)", text)]
        named += [ROOT / name for name in re.findall(r"\bpython ([\w/]+\.py)", text)]
        assert not [name for name in named if not name.exists()], document


def test_readme_has_every_method_with_its_weights():
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|.*\| ([\d./ ]+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    named = {}
    for names, numbers in rows:
        first, *others = re.findall(r"`(\w+)`", names)
        assert all(aliases[other] == first for other in others)
        named[first] = [float(number) for number in numbers.split("/")]
    assert named == {name: list(cls.weights.values()) for name, cls in distiller_dict.items()}


def test_distill_script_has_the_published_weights():
    """The first line of a method has its published weights; some have a second one, with KD."""
    commands = [opt for _, opt in parsed_commands("scripts/run_cifar_distill.sh") if opt.beta is not None]
    first, second = {}, {}
    for opt in commands:
        (name,) = opt.distill
        (second if name in first else first)[name] = weights_of(distiller_dict[name], vars(opt))
    assert first == {name: cls.weights for name, cls in distiller_dict.items() if name not in ("none", "kdsvd")}
    assert second == {name: {**first[name], "alpha": 1.0} for name in ("crd", "rrd", "icd")}


def test_example_method_trains(image_folder, tmp_path, monkeypatch):
    """docs/add_a_method.md: the class and its line in the registry are all that a method needs."""
    text = (ROOT / "docs" / "add_a_method.md").read_text()
    names = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], names)
    monkeypatch.setitem(distiller_zoo.distiller_dict, "cosine", names["CosineLoss"])
    common = ["--dataset", "folder", "--data_folder", str(image_folder), "--batch_size", "33", "--epochs", "1"]
    common += ["--device", "cpu", "--output", str(tmp_path)]
    train_student.main([*common, "--distill", "none"])
    path_t = str(next(tmp_path.rglob("resnet8_last.pth")))
    command = re.search(r"train_student.py (.*)", text)[1].replace("...", path_t)
    train_student.main([*common, "--trial", "2", *shlex.split(command)])
    assert [path.parent.name for path in tmp_path.rglob("resnet8_last.pth") if "cosine" in path.parent.name]
