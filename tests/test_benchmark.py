"""The benchmark: its two forms and two loops agree, the plain loop is plain, and the tables show what was run."""

import json
import multiprocessing
import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dataset.loader import normalize
from distiller_zoo import Distiller, distiller_dict
from helper.build import checksum, make_loaders
from helper.util import cli_errors
from scripts import benchmark
from scripts.bench import losses as bench_losses
from scripts.bench import measure as bench_measure
from scripts.bench import steps as bench_steps
from scripts.bench.steps import FIRST, OurLoop, PlainLoop, student_options

ROOT = Path(__file__).resolve().parent.parent
CPU, PAIR = torch.device("cpu"), ("resnet20", "resnet8")
SMALL = ["--pairs", ":".join(PAIR), "--batch_size", "4", "--images", "18", "--device", "cpu"]
SMALL += ["--steps", "2", "--num_workers", "1"]
FIRST_STAGE = [name for name, cls in distiller_dict.items() if cls.init_modules is not Distiller.init_modules]


def call(args, capsys):
    """-> exit code, stdout, stderr"""
    try:
        code = cli_errors(lambda: benchmark.main([*SMALL, *map(str, args)]))
    except SystemExit as stop:  # argparse
        code = stop.code
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """stdout and folder of --all as a user starts it, from elsewhere."""
    out = tmp_path_factory.mktemp("benchmark")
    command = [sys.executable, ROOT / "scripts" / "benchmark.py", "--all", "--losses", "nst", "crd", *SMALL]
    command += ["--methods", "fsp", "kd", "--variants", "fp32", "--rounds", "2", "--output", out / "to"]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in out.iterdir()] == ["to"]  # students leave nothing
    return done.stdout, out / "to"


ROWS = {
    "steps": ["fsp, first stage", "fsp", "kd"],
    "together": ["2 methods together"],
    "cost": ["fsp", "kd"],
    "kernels": ["fsp", "kd"],
    "teacher": ["resnet20"],
    "epoch": ["fsp", "kd"],
    "losses": ["nst", "crd"],
}


def test_what_it_prints(run):
    text, folder = run
    assert text == "\n".join((folder / f"{part}.md").read_text() for part in ROWS)
    assert {path.name for path in folder.iterdir()} == {f"{part}.{kind}" for part in ROWS for kind in ("md", "json")}


@pytest.mark.parametrize("part", ROWS)
def test_the_table_shows_what_the_json_holds(part, run):
    table, about = ((run[1] / f"{part}.{kind}").read_text() for kind in ("md", "json"))
    about = json.loads(about)
    assert all(about[key] in table for key in ("command", "date", "code", "device")) and "{" not in table
    assert (about["rounds"], about["batch_size"], about["images"], about["workers"]) == (2, 4, 18, 1)
    columns, _, *lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    cells = [dict(zip(columns, line, strict=True)) for line in lines]
    assert list(dict.fromkeys(cell[columns[0]] for cell in cells)) == ROWS[part]
    for i, (row, cell) in enumerate(zip(about["rows"], cells, strict=True)):
        number = {key: float(value.split()[0].rstrip(",")) for key, value in cell.items() if value[0].isdigit()}
        if part == "teacher":
            assert [number[key] for key in columns[2:]] == pytest.approx(list(map(median, row["ms"])), rel=0.006)
        elif part == "cost":
            assert number["relative to KD"] == pytest.approx(median(row["ms"][0]) / median(row["ms"][1]), rel=0.006)
        elif part == "kernels":
            assert cell["operators"] == " / ".join(map(str, row["operators"])) and cell["kernels"] == "- / -"
            assert row["operators"][1] > 100 and (row["operators"][0] == row["operators"][1]) == (
                cell["method"] == "kd"
            )
            # resnet20 and resnet8: forward through both, backward to all weights and all images but the first
            assert row["convolutions"] == [21 + 9 + 17] * 2 if cell["method"] == "kd" else True
        elif part == "losses":
            assert number["speed-up"] == pytest.approx(median(row["ms"][1]) / median(row["ms"][0]), rel=0.006)
            assert row["differences"][0] < 1e-4 and 0 < row["differences"][1] < 1e-4
        else:
            ms, epochs = median(row["ms"]), 30 if "first stage" in cell["method"] else 240
            assert cell["side"] == ["plain", "fp32"][i % 2] and len(row["ms"]) == 2
            expected = {"ms per step": ms, "images/s": 4000 / ms, "training, min": ms * 12_500 * epochs / 60_000}
            assert {key: number[key] for key in expected} == pytest.approx(expected, rel=0.006)
            assert len(row["losses"]) == FIRST * (2 if part == "together" else 1)
            assert (0 < row["differences"][1] < 1e-3) == (cell["side"] == "fp32")


@pytest.mark.parametrize("name", bench_losses.REFERENCES)
@pytest.mark.parametrize(
    "wrong",
    [
        lambda loss: loss * 1.001,
        lambda loss: loss + 1e-3 * (loss - loss.detach()),  # in the gradient alone
        lambda loss: loss * float("nan"),
    ],
)
def test_forms_that_differ_are_refused(name, wrong, tmp_path, monkeypatch, capsys):
    form = bench_losses.REFERENCES[name]
    monkeypatch.setitem(bench_losses.REFERENCES, name, lambda *args, **needs: wrong(form(*args, **needs)))
    code, out, err = call(["--losses", name, "--output", tmp_path], capsys)
    assert code == 2 and f"{name} resnet20:resnet8" in err and not out and not list(tmp_path.iterdir())


def test_times_of_a_teacher_are_of_one_batch(monkeypatch):
    monkeypatch.setattr(benchmark, "milliseconds", lambda sides, rounds: [[5.0 * n] for n in (1, 2, 4, 8)])
    rows = list(benchmark.teachers("teacher", benchmark.parse(SMALL), 1, CPU))
    assert rows and all(numbers["ms"] == [[5.0]] * 4 for _, numbers in rows)


def test_sides_are_interleaved():
    calls = []
    sides = [lambda name=name: calls.append(name) or len(calls) for name in "abc"]
    assert bench_measure.interleaved(sides, 3) == [[1, 6, 7], [2, 5, 8], [3, 4, 9]]
    assert "".join(calls) == "abc" + "cba" + "abc"


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
del held
assert extra_memory(lambda: torch.ones(2**20), CPU) / 2**20 < 12
"""


@pytest.mark.skipif(bench_measure.extra_memory(list, CPU) is None, reason="this system does not tell")
@pytest.mark.parametrize("touched", ["1", "20"])
def test_extra_memory(touched):
    """What a run needs at most, though it is free again at its end, and was used before; in a process of its own."""
    done = subprocess.run([sys.executable, "-c", MEMORY, touched], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_of_a_gpu():
    """Four, which are no longer at work than the whole takes."""
    x = torch.randn(4, 256, 256, device="cuda")
    n, ms = bench_measure.kernels(lambda: [y.cos() for y in x], 5, x.device)
    assert n == 4 and 0 < ms < bench_measure.timed(lambda: [y.cos() for y in x], 5) * 2


@pytest.fixture(scope="module")
def setting():
    """Three batches of 8 and a short one: the ten steps go through four epochs."""
    source = bench_steps.synthetic(28)
    stream = bench_steps.endless(make_loaders(source, student_options(PAIR, 8, ["none"]), CPU)[0])
    batches = [next(stream) for _ in range(FIRST)]
    return bench_steps.Setting(source, bench_steps.random_teacher(PAIR[0], source, CPU), batches, CPU, 0)


WEIGHTS = {"hint": 10, "attention": 100, "similarity": 100, "rkd": 0.1, "pkt": 3000, "factor": 10, "dist": 0.1}  # steep
OWN = {name: ["-b", str(beta)] for name, beta in WEIGHTS.items()} | {n: ["--nce_k", "64"] for n in ("crd", "rrd")}


def options(name, *flags):
    """With small steps: networks in training are chaotic, and differences in the last bit grow with their length."""
    return student_options(PAIR, 8, [name], [*OWN.get(name, ()), "--learning_rate", "0.001", *flags])


def largest(ours, plain):
    return max(abs(a - b) / abs(b) for a, b in zip(ours.losses, plain.losses, strict=True))


@pytest.mark.parametrize(("name", "first"), [*((n, False) for n in distiller_dict), *((n, True) for n in FIRST_STAGE)])
def test_the_plain_loop_trains_as_ours(name, first, setting):
    before = checksum(setting.teacher.model)
    plain, ours = PlainLoop(setting, options(name, "--no-channels_last"), first), OurLoop(setting, options(name), first)
    assert len(ours.losses) == FIRST and len(set(plain.losses)) == FIRST and np.isfinite(plain.losses).all()
    assert largest(ours, plain) < 1e-4
    assert checksum(setting.teacher.model) == before


@pytest.mark.parametrize("flags", [["--momentum", "0.8"], ["--kd_T", "4.1"], ["--trial", "2"]])
def test_loops_that_differ_are_seen(flags, setting):
    plain, ours = PlainLoop(setting, options("kd"), False), OurLoop(setting, options("kd", *flags), False)
    assert largest(ours, plain) > 1e-4


class Operators(TorchDispatchMode):
    """Counts operators."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "first", "reads"), [("kd", False, 3), ("fsp", True, 1), ("crd", False, 3 + 4)])
def test_how_a_plain_step_is_computed(name, first, reads, setting):
    """Contiguous, in float32, without fused kernels; loss, accuracies and CRD's constants are read from the device."""
    loop, _ = PlainLoop(setting, options(name, "--no-channels_last"), first), OurLoop(setting, options(name), first)
    nets = [*loop.student.model.parameters(), *loop.teacher.model.parameters()]
    assert all(p.is_contiguous() and p.dtype == torch.float32 for p in nets)
    batch = next(iter(loop.loader))
    with Operators() as mode:
        loop.step(*batch)
    assert mode.seen["_local_scalar_dense"] == reads and mode.seen["convolution_backward"]
    assert not any("fused" in operator for operator in mode.seen)


def test_plain_images(setting):
    """A test image is that of our loader to the last bit; a training image is a window of it, half of them mirrored."""
    source, moments = setting.source, (setting.source.mean, setting.source.std)
    plain = torch.stack([image for image, _, _ in bench_steps.Images(source.test_images, source.test_labels, moments)])
    assert torch.equal(plain, normalize(torch.from_numpy(source.test_images), *moments))
    torch.manual_seed(0)
    augmented = bench_steps.Images(source.train_images[:1], source.train_labels[:1], moments, augment=True)
    padded = np.pad(source.train_images[0], ((4, 4), (4, 4), (0, 0)))
    windows = np.stack([padded[y : y + 32, x : x + 32] for y in range(9) for x in range(9)])
    straight, mirrored = (normalize(torch.from_numpy(w.copy()), *moments) for w in (windows, windows[:, :, ::-1]))
    images = [augmented[0][0] for _ in range(40)]
    found = [[bool((w == image).flatten(1).all(1).any()) for w in (straight, mirrored)] for image in images]
    assert all(map(any, found)) and 8 < sum(a for a, _ in found) < 32


@pytest.mark.parametrize(("K", "distinct"), [(20, True), (80, False)])
def test_plain_negatives(K, distinct):
    labels, source = np.arange(30) % 3, bench_steps.synthetic(30)
    _, _, drawn = bench_steps.Images(source.train_images, labels, (source.mean, source.std), K=K)[4]
    assert drawn[0] == 4 and len(drawn) == 1 + K
    assert (labels[drawn[1:]] != labels[4]).all() and (len(set(drawn[1:])) == K) is distinct


def test_readings():
    logit = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0], [0, 9, 0, 0, 0, 0, 0], [9, 8, 7, 6, 5, 4, 3]])
    got = bench_steps.readings(torch.tensor(2.5), logit.float(), torch.tensor([6, 3, 1, 6]))
    assert got == (2.5, 50, 75)


def test_workers_live_as_long_as_their_round(setting):
    loop = PlainLoop(setting._replace(num_workers=2), options("kd"), False)
    before, steps = set(multiprocessing.active_children()), []
    loop.step = lambda *batch: steps.append(batch)
    with loop.going(3) as step:
        assert len(steps) == 3 and len(set(multiprocessing.active_children()) - before) == 2
        step()
        step()  # of the next epoch
    assert len(steps) == 5 and set(multiprocessing.active_children()) <= before


@pytest.mark.parametrize("kind", [PlainLoop, OurLoop])
def test_an_epoch_is_all_images_once_and_an_evaluation(kind, setting):
    loop, seen = kind(setting, options("kd"), False), Counter()
    (model,) = [student.model for student in loop.students]
    model.register_forward_pre_hook(lambda m, args: seen.update({m.training: len(args[0])}))
    loop.epoch()
    loop.epoch()
    assert seen == {True: 2 * 28, False: 2 * 5} and len(loop.loader) == 4


def test_an_epoch_that_fails_is_refused(setting):
    loop = OurLoop(setting, options("kd"), False)
    with torch.no_grad():
        next(loop.students[0].model.parameters()).fill_(torch.nan)
    with pytest.raises(bench_steps.RunError):
        loop.epoch()


@pytest.mark.parametrize(
    ("args", "parts", "together"),
    [
        ([], ["steps"], [2, 5, len(bench_steps.METHODS["together"])]),
        (["--losses", "--methods", "kd", "sp", "at"], ["losses"], [2, 3]),
        (["--epoch", "--together", "3", "4"], ["together", "epoch"], [3, 4]),
        (["--together", "--methods", "kd", "sp", "at", "kd"], ["together"], [2, 3]),
        (["--all", "--methods", "kd", "--losses", "crd"], list(ROWS), [1]),
    ],
)
def test_parts(args, parts, together):
    opt = benchmark.parse(args)
    assert opt.parts == parts and opt.together == together


def test_all_takes_the_variants_that_make_sense(monkeypatch):
    for native in (True, False):
        monkeypatch.setattr(bench_steps, "has_native_bf16", lambda device, native=native: native)
        for part, more in (("steps", {"nchw", "no_graph"}), ("together", set()), ("epoch", {"compiled_bf16"})):
            on_cpu, on_gpu = (bench_steps.sensible(part, torch.device(kind)) for kind in ("cpu", "cuda"))
            assert on_cpu == ["fp32", "bf16"][: 1 + native]
            assert set(on_gpu) == {*on_cpu, *(more if native else more - {"compiled_bf16"})}


@pytest.mark.parametrize("variant", bench_steps.VARIANTS)
def test_variants_are_options_of_the_script(variant):
    assert student_options(PAIR, 4, ["kd", "crd"], bench_steps.VARIANTS[variant]).distill == ["kd", "crd"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--losses", "kd"], "kd"),
        (["--pairs", "resnet20:resnet9"], "resnet20:resnet9"),
        (["--device", "abacus"], "--device"),
        (["--losses", "nst", "--output", __file__], __file__),
        (["--all", "--batch_size", "2", "--output", "here"], "--batch_size 2"),  # before the first part is measured
        (["--together", "3", "--methods", "kd", "at"], "--together 3"),
        (["--images", "3"], "3 images"),
        (["--methods", "fsp", "--pairs", "wrn_40_2:wrn_40_1"], "fsp"),
    ],
)
def test_wrong_flags(args, said, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(args, capsys)
    assert code == 2 and said in err.splitlines()[-1] and not out
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
