"""The benchmark of the losses: what it writes, that it refuses forms that disagree, and what its numbers are of."""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from crd.memory import ContrastMemory
from scripts import benchmark
from scripts.bench import losses as bench_losses
from scripts.bench import measure as bench_measure

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--pairs", "resnet20:resnet8", "--batch_size", "2", "--rounds", "1", "--device", "cpu"]
LOSSES = ["nst", "fsp", "crd", "kdsvd"]
CPU = torch.device("cpu")
linux = pytest.mark.skipif(bench_measure.extra_memory(list, CPU) is None, reason="this system does not tell")


def call(args, monkeypatch, capsys):
    """-> exit code, stdout, stderr of its main, in this process."""
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, args)])
    try:
        code = benchmark.main()
    except SystemExit as stop:  # argparse
        code = stop.code
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """stdout and folder of a run as a user starts it, from elsewhere, with two rounds."""
    out = tmp_path_factory.mktemp("benchmark")
    command = [sys.executable, ROOT / "scripts" / "benchmark.py", "--losses", *SMALL, "--rounds", "2"]
    ran = subprocess.run([*command, "--output", out / "to"], cwd=out, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout, out / "to"


def test_what_it_leaves(run):
    text, folder = run
    assert {path.name for path in folder.iterdir()} == {"losses.md", "losses.json"}  # and no temporary file
    assert (folder / "losses.md").read_text() == text
    found = json.loads((folder / "losses.json").read_text())
    assert [row["what"] for row in found["rows"]] == [*LOSSES, "crd's draw", "crd's draw"]
    assert found["batch_size"] == 2 and found["rounds"] == 2
    assert found["versions"]["torch"] == torch.__version__ and found["versions"]["python"] in text
    for key in ("command", "date", "code", "device", "buffers"):
        assert found[key] and found[key] in text
    assert found["threads"] >= 1 and found["command"].startswith("python scripts/benchmark.py --losses --pairs")


def test_the_table_says_what_the_json_does(run):
    text, folder = run
    lines = [line.strip("|\n ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    columns, _, *cells = lines
    rows = json.loads((folder / "losses.json").read_text())["rows"]
    assert len(cells) == len(rows) and {len(line) for line in lines} == {len(columns)}
    for row, line in zip(rows, cells, strict=True):
        medians = [statistics.median(ms) for ms in row["ms"]]
        assert line[:2] == [row["what"], row["on"]]
        for shown, median in zip(line[2:4], medians, strict=True):
            assert float(shown.split()[0]) == pytest.approx(median, rel=0.006)
        assert float(line[4].split()[0]) == pytest.approx(medians[1] / medians[0], rel=0.006)
        assert [round(b / a, 9) for a, b in zip(*row["ms"], strict=True)] == [round(r, 9) for r in row["ratios"]]
        if row["what"] == "crd's draw":
            assert row["differences"] is None and line[-1] == "-"
        else:
            assert 0 <= max(row["differences"]) <= 1e-4 and len(row["differences"]) == 2
            assert row["differences"][1] > 0  # two ways to compute a gradient do not agree to the last bit


def wrong_value(form):
    return lambda *given: form(*given) * 1.001


def wrong_gradient(form):
    def with_it(*given):
        loss = form(*given)
        return loss + 1e-3 * (loss - loss.detach())

    return with_it


def no_number(form):
    return lambda *given: form(*given) * float("nan")


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("wrong", [wrong_value, wrong_gradient, no_number])
def test_forms_that_disagree_are_refused(name, wrong, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bench_losses.FORMS, name, wrong(bench_losses.FORMS[name]))
    code, out, err = call(["--losses", name, *SMALL, "--output", tmp_path], monkeypatch, capsys)
    assert code and "disagree" in err and f"{name} resnet20:resnet8" in err and "Traceback" not in err
    assert not out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", LOSSES)
def test_both_sides_have_equal_features_in_their_own_layout(name):
    """A gradient has the layout of its leaf; all but CRD's are of maps."""
    ours, other = bench_losses.loss_sides(name, ("resnet20", "resnet8"), 2, CPU)
    a, b = ours(), other()
    assert [x.shape for x in a] == [x.shape for x in b] and all(x.any() for x in a)
    shapes = {"nst": 3, "kdsvd": 3, "fsp": 4, "crd": 5}  # crd: the pooled feature, and two weights and biases
    assert len(a) == 1 + shapes[name]


@pytest.mark.parametrize("draw", [bench_losses.draw_on_host, bench_losses.draw_by_topk])
def test_the_other_draws_are_draws(draw):
    """Of other classes, none twice, all alike: those of 600 draws lie within five deviations."""
    labels = torch.arange(30) % 5
    bank = ContrastMemory(labels, 4, 8, 0.07, 0.5, "exact")
    index = torch.tensor([3, 11, 29]).repeat(200)
    (idx,) = draw(bank, index)()
    assert idx.shape == (600, 9) and torch.equal(idx[:, 0], index)
    assert (idx[:, 1:].sort(1).values.diff() > 0).all()
    assert (labels[idx[:, 1:]] != labels[index, None]).all()
    for i in (3, 11, 29):
        count = idx[index == i, 1:].flatten().bincount(minlength=30)[labels != labels[i]]
        deviation = (200 * 8 / 24 * (1 - 8 / 24)) ** 0.5
        assert (count - 200 * 8 / 24).abs().max() <= 5 * deviation


def test_sides_take_turns(monkeypatch):
    """Rounds begin with either side, after a first run of each."""
    calls = []
    sides = [lambda: calls.append("a"), lambda: calls.append("b")]
    monkeypatch.setattr(bench_measure, "LEAST_MS", 0)
    ms = bench_measure.in_turn(sides, 3, CPU)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert [len(times) for times in ms] == [3, 3] and min(map(min, ms)) > 0


def test_quick_runs_are_repeated():
    """Then a round's time is one run's."""
    calls = []

    def quick():
        calls.append(time.perf_counter())

    def slow():
        time.sleep(0.06)

    ms = bench_measure.in_turn([quick, slow], 1, CPU)
    assert len(calls) > 100 and ms[0][0] * (len(calls) - 1) <= 1000 * (time.perf_counter() - calls[0])
    assert ms[1][0] >= 60


MEMORY = """
import sys, torch
from scripts.bench.measure import extra_memory
CPU, touched = torch.device("cpu"), int(sys.argv[1])

def side():
    for _ in range(touched):
        torch.ones(12, 2**20)

side()
for _ in range(2):
    assert 47 < extra_memory(side, CPU) / 2**20 < 60
held = torch.ones(12, 2**20)
assert extra_memory(lambda: held.sum(), CPU) / 2**20 < 12
small = [torch.ones(1000) for _ in range(12_000)]  # buffers that the process keeps when they are freed
del small
assert extra_memory(lambda: [torch.ones(1000) for _ in range(12_000)], CPU) / 2**20 > 40
"""


@linux
@pytest.mark.parametrize("touched", ["1", "20"])
def test_extra_memory(touched):
    """What a run needs at most, though it is free again at its end, and was used before.

    In a process of its own: where another test has limited the memory, the C library cannot give all of it back.
    """
    ran = subprocess.run([sys.executable, "-c", MEMORY, touched], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def keeping(code):
    """Run Python code in a process of its own, after keep_buffers(); skip where the C library cannot."""
    kept = "if not benchmark.keep_buffers(): sys.exit('not glibc')"
    code = f"import resource, sys, torch\nfrom scripts import benchmark\n{kept}\n{code}"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if "not glibc" in ran.stderr:
        pytest.skip("not glibc")
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@linux
def test_kept_buffers_are_used_again():
    """The system hands out 48 MB once, not with every buffer."""
    code = """
def faults():
    for _ in range(5):
        torch.ones(12, 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = faults()
print((faults() - before) * resource.getpagesize())"""
    assert int(keeping(code)) < 48 * 2**20


@linux
def test_kept_buffers_are_said_and_counted(tmp_path):
    """The broadcast's product alone has 16 MB."""
    args = [
        "benchmark.py",
        "--losses",
        "nst",
        *SMALL,
        "--batch_size",
        "16",
        "--keep_buffers",
        "--output",
        str(tmp_path),
    ]
    assert "freed buffers kept" in keeping(f"sys.argv = {args}\nassert benchmark.main() == 0")
    (row,) = json.loads((tmp_path / "losses.json").read_text())["rows"]
    ours, other = row["bytes"]
    product = 16 * 16 * 16 * 32 * 32 * 4
    assert product <= other < 10 * product and ours < other


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--losses", "kd"], "kd"),
        (["--losses", "--pairs", "resnet20"], "resnet20"),
        (["--losses", "--pairs", "resnet20:resnet9"], "unknown network 'resnet9'"),
        (["--losses", "--pairs", "resnet20:resnet8:resnet8"], "teacher and a student"),
        (["--losses", "--rounds", "0"], "--rounds"),
        (["--losses", "--batch_size", "many"], "--batch_size"),
        (["--losses", "--device", "abacus"], "--device abacus"),
        (["--losses", "fsp", "--pairs", "wrn_40_2:wrn_40_1"], "equal channels"),
        (["--losses", "nst", "--output", __file__], "--output"),
    ],
)
def test_wrong_flags(args, says, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(args, monkeypatch, capsys)
    assert code == 2 and says in err and len(err.strip().splitlines()) <= 2 and "Traceback" not in err
    assert not out
