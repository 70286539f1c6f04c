"""The benchmark of whole steps: the plain loop trains as ours, is plain indeed, and the tables say what was run."""

import json
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from dataset.loader import normalize
from distiller_zoo import Distiller, distiller_dict
from helper.build import fingerprint, loaders
from scripts import benchmark
from scripts.bench import measure as bench_measure
from scripts.bench import steps as bench_steps
from scripts.bench.steps import FIRST, OurLoop, PlainLoop, student_options
from tests.test_benchmark import call

ROOT = Path(__file__).resolve().parent.parent
PAIR = ("resnet20", "resnet8")
SMALL = ["--pairs", ":".join(PAIR), "--batch_size", "4", "--images", "18", "--rounds", "1", "--device", "cpu"]
SMALL += ["--steps", "2", "--num_workers", "1"]
FIRST_STAGE = [name for name, cls in distiller_dict.items() if cls.init_modules is not Distiller.init_modules]
CASES = [*((name, False) for name in distiller_dict), *((name, True) for name in FIRST_STAGE)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """stdout and folder of --all as a user starts it, from elsewhere."""
    out = tmp_path_factory.mktemp("benchmark")
    command = [sys.executable, ROOT / "scripts" / "benchmark.py", "--all", "--losses", "nst", *SMALL]
    command += ["--methods", "fsp", "kd", "--variants", "bf16_teacher", "fp32", "--rounds", "2"]
    ran = subprocess.run([*command, "--output", out / "to"], cwd=out, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert [path.name for path in out.iterdir()] == ["to"]  # students leave nothing
    return ran.stdout, out / "to"


def read(folder, part):
    return json.loads((folder / f"{part}.json").read_text())


def test_what_it_leaves(run):
    text, folder = run
    parts = ["steps", "together", "teacher", "epoch", "losses"]
    assert {path.name for path in folder.iterdir()} == {f"{part}.{kind}" for part in parts for kind in ("md", "json")}
    assert text == "\n".join((folder / f"{part}.md").read_text() for part in parts)
    for part in parts:
        about, shown = read(folder, part), (folder / f"{part}.md").read_text()
        for key in ("command", "date", "code", "device", "buffers"):
            assert about[key] and about[key] in shown
        assert about["versions"]["torch"] in shown and about["versions"]["torchvision"] in shown
        assert (about["rounds"], about["batch_size"], about["images"], about["workers"]) == (2, 4, 18, 1)
        assert "{" not in shown
    sides = ["plain", "bf16_teacher", "fp32"]
    for part, what in (
        ("steps", ["fsp, first stage", "fsp", "kd"]),
        ("together", ["2 methods together"]),
        ("epoch", ["fsp", "kd"]),
    ):
        rows = read(folder, part)["rows"]
        assert [(row["what"], row["side"]) for row in rows] == [(name, side) for name in what for side in sides]
        assert all(row["kernels"] is row["busy"] is None for row in rows)  # of a GPU


@pytest.mark.parametrize("part", ["steps", "together", "epoch"])
def test_the_table_says_what_the_json_does(run, part):
    _, folder = run
    lines = [
        line.strip("|\n ").split(" | ") for line in (folder / f"{part}.md").read_text().splitlines() if line[:1] == "|"
    ]
    columns, _, *cells = lines
    rows = read(folder, part)["rows"]
    assert len(cells) == len(rows) and {len(line) for line in lines} == {len(columns)}
    for row, line in zip(rows, cells, strict=True):
        plain = next(r for r in rows if (r["what"], r["side"]) == (row["what"], "plain"))
        ms, of_plain = (statistics.median(r["ms"]) for r in (row, plain))
        assert line[:3] == [row["what"], "resnet20:resnet8", row["side"]] and len(row["ms"]) == 2
        epochs = 30 if "first stage" in row["what"] else 240
        for shown, value in zip(line[3:6], (ms, 4 / ms * 1000, ms / 1000 / 60 * 12_500 * epochs), strict=True):
            assert float(shown.split()[0]) == pytest.approx(value, rel=0.006)
        assert len(row["losses"]) == len(plain["losses"]) == FIRST * (2 if part == "together" else 1)
        if row is plain:
            assert line[6] == line[8] == line[9] == line[10] == "-" and row["flags"] is None
            continue
        assert float(line[6].split()[0]) == pytest.approx(of_plain / ms, rel=0.006)
        ratios = [a / b for a, b in zip(plain["ms"], row["ms"], strict=True)]
        assert row["ratios"] == pytest.approx(ratios)
        first, largest = row["differences"]
        apart = [abs(a / b - 1) for a, b in zip(row["losses"], plain["losses"], strict=True)]
        assert largest == pytest.approx(max(apart)) and first == pytest.approx(max(apart[::FIRST]))
        assert first < (1e-5 if row["side"] == "fp32" else 0.1)
        assert line[8:] == [f"{first:.0e}, {largest:.0e}", "-", "-"]
    if bench_measure.extra_memory(list, torch.device("cpu")) is not None:
        assert all(float(line[7]) > 1 for line in cells)


def test_the_table_of_teachers(run):
    _, folder = run
    rows = read(folder, "teacher")["rows"]
    lines = [line.split(" | ") for line in (folder / "teacher.md").read_text().splitlines() if line[:1] == "|"][2:]
    assert [row["what"] for row in rows] == ["resnet20"] * len(rows) and rows[0]["precision"] == "fp32"
    for row, (arch, precision, *ms) in zip(rows, lines, strict=True):
        assert arch == "| resnet20" and precision == row["precision"] and row["at_once"] == [1, 2, 4, 8]
        for shown, values in zip(ms, row["ms"], strict=True):
            assert float(shown.split()[0]) == pytest.approx(statistics.median(values), rel=0.006) and len(values) == 2


def test_a_teacher_is_given_several_batches_and_times_are_of_one(monkeypatch):
    """A network that takes 4 ms for 3 images, and so 32 for 24."""
    seen = []

    def slow(images, preact):
        seen.append((tuple(images.shape), torch.is_grad_enabled()))
        time.sleep(len(images) * 4e-3 / 3)

    monkeypatch.setattr(bench_steps.Engine, "network", lambda *_: slow)
    monkeypatch.setattr(bench_steps, "native_bf16", lambda device: False)
    opt = benchmark.parse(["--teacher", "--batch_size", "3", "--pairs", ":".join(PAIR), "vgg8:resnet8"])
    rows = list(benchmark.teachers("teacher", opt, 2, torch.device("cpu")))
    assert [(row["what"], row["precision"]) for row in rows] == [("resnet20", "fp32"), ("vgg8", "fp32")]
    assert {shape for shape, _ in seen} == {(n, 3, 32, 32) for n in (3, 6, 12, 24)} and not any(g for _, g in seen)
    assert all(ms == pytest.approx(4, rel=0.5) for row in rows for values in row["ms"] for ms in values)


def test_kernels_and_their_share_of_a_step(monkeypatch, capsys, tmp_path):
    """Where a profiler sees any: here those of the CPU stand for a GPU's. Plain students come one after another."""
    of_cpu = partial(bench_measure.kernels, of=ProfilerActivity.CPU)
    monkeypatch.setattr(benchmark, "kernels", of_cpu)
    args = ["--together", "--methods", "none", "kd", "--num_workers", "0", "--output", tmp_path]
    assert call([*SMALL, *args, "--steps", "5"], monkeypatch, capsys)[0] == 0
    plain, ours = read(tmp_path, "together")["rows"]
    lines = (tmp_path / "together.md").read_text().splitlines()[-2:]
    for row, line in zip((plain, ours), lines, strict=True):
        assert row["kernels"] > 1000 and 0.3 < row["busy"] < 1.5
        assert line.strip("| ").split(" | ")[-2:] == [f"{row['kernels']:.0f}", f"{row['busy']:.0%}"]
    assert plain["kernels"] > ours["kernels"]  # the teacher twice


def test_intervals_are_counted_and_united():
    """Beside a time line of nanoseconds. Operations lie within each other; what a user names is none."""
    x = torch.randn(300, 300)
    with profile(activities=[ProfilerActivity.CPU]) as seen, record_function("all of it"):
        for _ in range(3):
            torch.nn.functional.linear(x, x).softmax(1)
            time.sleep(0.01)
    of_cpu = [e for e in seen.events() if e.name != "all of it"]
    line = np.zeros(int(1000 * max(e.time_range.end for e in of_cpu)) + 1, dtype=bool)
    for e in of_cpu:
        line[round(1000 * e.time_range.start) : round(1000 * e.time_range.end)] = True
    n, ms = bench_measure.at_work(seen.events(), DeviceType.CPU)
    assert n == len(of_cpu) and ms == pytest.approx(line.sum() / 1e6, rel=1e-3)
    assert ms < sum(e.time_range.elapsed_us() for e in of_cpu) / 1000
    assert bench_measure.at_work(seen.events(), DeviceType.CUDA) == (0, 0)


def test_no_kernels_are_seen_without_a_gpu():
    assert bench_measure.kernels(list, 2, torch.device("cpu")) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_of_a_gpu():
    """Four, and no longer at work than the whole takes."""
    device = torch.device("cuda")
    x = torch.randn(4, 256, 256, device=device)
    n, ms = bench_measure.kernels(lambda: [y.cos() for y in x], 5, device)
    assert n == 4 and 0 < ms < bench_measure.timed(lambda: [y.cos() for y in x], 5, device) * 2


# --- both sides train alike ---


@pytest.fixture(scope="module")
def setting():
    """Three batches of 8 and a short one: the ten steps go through four epochs."""
    source, device = bench_steps.synthetic(28), torch.device("cpu")
    loader, _ = loaders(source, student_options(PAIR, 8, ["none"]), device)
    stream = bench_steps.endless(loader)
    batches = [next(stream) for _ in range(FIRST)]
    return bench_steps.Setting(source, bench_steps.random_teacher(PAIR[0], source, device), batches, device, 0)


WEIGHTS = {"hint": 10, "attention": 100, "similarity": 100, "rkd": 0.1, "pkt": 3000, "factor": 10}  # of steep losses
OWN = {name: ["-b", str(beta)] for name, beta in WEIGHTS.items()} | {n: ["--nce_k", "64"] for n in ("crd", "rrd")}


def options(name, *flags):
    """With small steps: networks in training are chaotic, and differences in the last bit grow with their length."""
    return student_options(PAIR, 8, [name], [*OWN.get(name, ()), "--learning_rate", "0.001", *flags])


def largest(ours, plain):
    return max(abs(a - b) / abs(b) for a, b in zip(ours.losses, plain.losses, strict=True))


@pytest.mark.parametrize(("name", "first_stage"), CASES)
def test_the_plain_loop_trains_as_ours(name, first_stage, setting):
    before = fingerprint(setting.teacher.model)
    plain, ours = (kind(setting, options(name), first_stage) for kind in (PlainLoop, OurLoop))
    assert len(ours.losses) == FIRST and len(set(plain.losses)) == FIRST and np.isfinite(plain.losses).all()
    assert largest(ours, plain) < 1e-4
    assert fingerprint(setting.teacher.model) == before


@pytest.mark.parametrize(
    "flags", [["--momentum", "0.8"], ["--learning_rate", "0.0011"], ["--kd_T", "4.1"], ["--trial", "2"]]
)
def test_loops_that_differ_are_seen(flags, setting):
    plain, ours = PlainLoop(setting, options("kd"), False), OurLoop(setting, options("kd", *flags), False)
    assert largest(ours, plain) > 1e-4


def test_together_each_trains_as_alone(setting):
    names = ["hint", "kd", "icd"]
    together = OurLoop(setting, student_options(PAIR, 8, names), False)
    alone = [OurLoop(setting, student_options(PAIR, 8, [name]), False).losses for name in names]
    assert together.losses == [loss for losses in alone for loss in losses]


# --- the plain loop is plain ---


class Reads(TorchDispatchMode):
    """Counts the numbers that are read from the device."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "first_stage", "reads"), [("kd", False, 3), ("fsp", True, 1), ("crd", False, 3 + 4)])
def test_how_a_plain_step_is_computed(name, first_stage, reads, setting):
    loop = PlainLoop(setting, options(name), first_stage)
    nets = [*loop.track.model.parameters(), *loop.teacher.parameters()]
    assert all(p.is_contiguous() and p.dtype == torch.float32 for p in nets)
    batch = next(iter(loop.loader))
    with Reads() as mode:
        loop.step(*batch)
    assert mode.seen["_local_scalar_dense"] == reads
    assert not any("fused" in op for op in mode.seen) and mode.seen["convolution_backward"]


def test_plain_images_are_those_of_torchvision(setting):
    """A test image is the loader's to the last bit; a training image is a window of it, half of them mirrored."""
    source = setting.source
    moments = source.mean, source.std
    plain = torch.stack([image for image, _, _ in bench_steps.Images(source.test_images, source.test_labels, moments)])
    ours = normalize(torch.from_numpy(source.test_images), *moments)
    assert torch.equal(plain, ours)
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
    labels = np.arange(30) % 3
    source = bench_steps.synthetic(30)
    index, drawn = bench_steps.Images(source.train_images, labels, (source.mean, source.std), K=K)[4][2:]
    assert index == 4 == drawn[0] and len(drawn) == 1 + K
    assert (labels[drawn[1:]] != labels[4]).all() and (len(set(drawn[1:])) == K) is distinct


def test_readings():
    logit = torch.tensor(
        [[0.0, 1, 2, 3, 4, 5, 6], [6.0, 5, 4, 3, 2, 1, 0], [0.0, 9, 0, 0, 0, 0, 0], [9.0, 8, 7, 6, 5, 4, 3]]
    )
    got = bench_steps.readings(torch.tensor(2.5), logit, torch.tensor([6, 3, 1, 6]))
    assert got == (2.5, 50, 75)


def test_workers_live_as_long_as_their_round(setting):
    loop = PlainLoop(setting._replace(num_workers=2), options("kd"), False)
    before, steps = set(multiprocessing.active_children()), []
    loop.step = lambda *batch: steps.append(batch)
    with loop.going(3) as step:
        assert len(steps) == 3
        assert len(set(multiprocessing.active_children()) - before) == 2
        step()
        step()  # of the next epoch
    assert len(steps) == 5 and set(multiprocessing.active_children()) <= before


@pytest.mark.parametrize("kind", [PlainLoop, OurLoop])
def test_an_epoch_is_all_images_once_and_an_evaluation(kind, setting, monkeypatch):
    loop, seen = kind(setting, options("kd"), False), []
    model = loop.track.model if kind is PlainLoop else loop.tracks[0].model
    model.register_forward_pre_hook(lambda m, args: seen.append((m.training, args[0])))
    loop.epoch()
    loop.epoch()  # goes on in training mode
    per_epoch = Counter()
    for training, images in seen:
        per_epoch[training] += len(images)
    assert per_epoch == {True: 2 * 28, False: 2 * 5} and loop.n_steps == 4
    evaluated = torch.cat([images for training, images in seen if not training])[:5]
    assert torch.equal(evaluated, normalize(torch.from_numpy(setting.source.test_images), *setting.source[5:7]))
    steps = [int(value) for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")]
    assert set(steps) == {FIRST + 2 * 4}


def test_an_epoch_that_fails_is_said(setting):
    loop = OurLoop(setting, options("kd"), False)
    with torch.no_grad():
        next(loop.tracks[0].model.parameters()).fill_(torch.nan)
    with pytest.raises(bench_steps.RunError, match=r"kd.*not finite"):
        loop.epoch()


# --- what can be asked for ---


def test_sides_take_turns_in_any_number():
    calls = []
    sides = [lambda name=name: calls.append(name) or len(calls) for name in "abc"]
    assert bench_measure.by_turns(sides, 3) == [[1, 6, 7], [2, 5, 8], [3, 4, 9]]
    assert "".join(calls) == "abc" + "cba" + "abc"


@pytest.mark.parametrize(
    ("args", "parts", "together"),
    [
        ([], ["steps"], [2, 5, 15]),
        (["--losses"], ["losses"], [2, 5, 15]),
        (["--epoch", "--together", "3", "4"], ["together", "epoch"], [3, 4]),
        (["--teacher"], ["teacher"], [2, 5, 15]),
        (["--together", "--methods", "kd", "sp", "at", "kd"], ["together"], [2, 3]),
        (["--all", "--methods", "kd", "--losses", "crd"], ["steps", "together", "teacher", "epoch", "losses"], [1]),
    ],
)
def test_parts(args, parts, together):
    opt = benchmark.parse(args)
    assert opt.parts == parts and opt.together == together


def test_all_takes_the_variants_that_make_sense(monkeypatch):
    for native in (True, False):
        monkeypatch.setattr(bench_steps, "native_bf16", lambda device, native=native: native)
        for part, more in (("steps", {"nchw", "no_graph"}), ("together", {"streams"}), ("epoch", {"compiled_bf16"})):
            on_cpu, on_gpu = (bench_steps.sensible(part, torch.device(kind)) for kind in ("cpu", "cuda"))
            assert on_cpu == ([*["fp32", "bf16_teacher"][: 1 + (part == "steps")], "bf16"] if native else ["fp32"])
            assert set(on_gpu) == {*on_cpu, *(more if native else more - {"compiled_bf16"})}


def test_a_variant_of_the_layout_is_one(setting):
    """Of both networks and the images; the teacher that is shared stays as it is."""
    loop = OurLoop(setting, student_options(PAIR, 8, ["kd"], bench_steps.VARIANTS["nchw"]), False)
    nets = loop.tracks[0].model, loop.step.teacher, setting.teacher.model
    last = [any(p.dim() == 4 and not p.is_contiguous() for p in net.parameters()) for net in nets]
    assert last == [False, False, True]
    assert next(iter(loop.loader))[0].is_contiguous() and next(iter(loop.test_loader))[0].is_contiguous()


@pytest.mark.parametrize("variant", bench_steps.VARIANTS)
def test_variants_are_options_of_the_script(variant):
    opt = student_options(PAIR, 4, ["kd", "crd"], bench_steps.VARIANTS[variant])
    assert opt.distill == ["kd", "crd"] and opt.batch_size == 4 and opt.model_s == "resnet8"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--variants", "bf17"], "bf17"),
        (["--variants", "odd"], "--no_such_flag"),
        (["--methods", "kdd"], "unknown method 'kdd'"),
        (["--methods", "rkd", "--batch_size", "2"], "--batch_size 2: rkd"),
        (["--together", "3", "--methods", "kd", "at"], "--together 3: there are 2 methods"),
        (["--together", "0"], "--together"),
        (["--images", "1"], "--images"),
        (["--images", "3"], "--batch_size 4 is larger than the training set (3 images)"),
        (["--steps", "0"], "--steps"),
        (["--num_workers", "-1"], "--num_workers"),
        (["--methods", "fsp", "--pairs", "wrn_40_2:wrn_40_1"], "equal channels"),
    ],
)
def test_wrong_flags(args, says, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(bench_steps.VARIANTS, "odd", ["--no_such_flag"])
    code, out, err = call([*SMALL, *args], monkeypatch, capsys)
    last = err.strip().splitlines()[-1]
    assert code == 2 and says in last and "Traceback" not in err and last.startswith("benchmark.py: ") and not out
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
