"""Time and memory of training, beside a plain loop that trains as the reference does.

    python scripts/benchmark.py                               steps of kd, nst and crd
    python scripts/benchmark.py --methods fsp icd --pairs vgg13:vgg8 --variants fp32 bf16
    python scripts/benchmark.py --together                    2, 5 and 15 students of one teacher at once
    python scripts/benchmark.py --teacher                     the teacher alone, by the number of batches at once
    python scripts/benchmark.py --epoch                       an epoch of kd with evaluation
    python scripts/benchmark.py --losses nst crd              losses alone, and CRD's draw
    python scripts/benchmark.py --all                         all of these, in about nine minutes of an H200 (estimate)
    python scripts/benchmark.py --all --images 128 --batch_size 8 --rounds 1 --pairs resnet20:resnet8     a trial of it

All sides run in this process, by turns; bench/steps.py and bench/losses.py say what they are. Images are random, in the
shape of CIFAR-100; so are the teachers' weights. The losses are those that are computed in another form than the
reference's, forward and backward, at the shapes of the pairs' features, each side with the features in the layout of
its own training; a loss or gradients that differ end the run. Prints tables, and writes them into the output folder.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from helper import checkpoint
from helper.build import device_name
from helper.options import Parser, method, number
from helper.util import RunError, choose_device, cli_errors, code_version, keep_buffers, versions
from models import model_dict
from models.util import known_first
from scripts.bench import losses as bench_losses
from scripts.bench import steps as bench_steps
from scripts.bench.losses import FORMS, N_DATA, Side
from scripts.bench.measure import by_turns, extra_memory, in_turn, kernels, timed
from scripts.bench.steps import FIRST, MACRO, METHODS, VARIANTS, Case, Loop

PAIRS = ["wrn_40_2:wrn_16_2", "resnet32x4:resnet8x4"]
ROUNDS = {"steps": 3, "together": 2, "teacher": 5, "epoch": 1, "losses": 7}
PROFILED = 3  # steps of which the kernels are counted


def losses(part: str, opt: argparse.Namespace, rounds: int, device: torch.device) -> Iterator[dict]:
    """Rows of the table, with every number behind them."""
    for what, on, *sides in bench_losses.cases(opt, device):
        print(f"{what} {on} ...", file=sys.stderr)
        yield loss_row(what, on, sides, rounds, device)


def loss_row(what: str, on: str, sides: tuple[Side, Side], rounds: int, device: torch.device) -> dict:
    """A row, if both sides agree."""
    apart = bench_losses.compare(f"{what} {on}", *(side() for side in sides))
    memory = [extra_memory(side, device) for side in sides]
    ms = in_turn(sides, rounds, device)
    ratios = [other / ours for ours, other in zip(*ms, strict=True)]
    ratio = statistics.median(ms[1]) / statistics.median(ms[0])
    values = {"ms": ms, "bytes": memory, "ratio": ratio, "ratios": ratios, "differences": apart}
    return {"what": what, "on": on, **values}


def steps(part: str, opt: argparse.Namespace, rounds: int, device: torch.device) -> Iterator[dict]:
    """Rows of the table, one for each side of a case."""
    of_loop, seen_of = partial(step_ms, opt=opt, device=device), partial(step_kernels, device=device)
    if part == "epoch":
        of_loop, seen_of = partial(epoch_ms, device=device), lambda loop: None
    for case in bench_steps.cases(part, opt, device):
        print(f"{part}: {case.what} {case.on} ...", file=sys.stderr)
        yield from step_rows(case, opt.batch_size, of_loop, seen_of, rounds, device)


def step_rows(
    case: Case,
    batch_size: int,
    of_loop: Callable[[Loop], float],
    seen_of: Callable[[Loop], tuple[float, float] | None],
    rounds: int,
    device: torch.device,
) -> Iterator[dict]:
    """A row for each side, after all have been made and have done their first steps."""
    gc.collect()  # the last case's networks and recorded steps
    loops, sizes = [], []
    for makers in case.sides.values():
        side: list[Loop] = []
        sizes.append([extra_memory(lambda make=make, side=side: side.append(make()), device) for make in makers])
        loops.append(side)
    ms = by_turns([lambda side=side: sum(map(of_loop, side)) for side in loops], rounds)
    seen = [list(map(seen_of, side)) for side in loops]
    first = [torch.tensor([loss for loop in side for loss in loop.losses], dtype=torch.float64) for side in loops]
    for name, values, size, work, found in zip(case.sides, ms, sizes, seen, first, strict=True):
        middle, apart = statistics.median(values), (found / first[0] - 1).abs()
        n_kernels, at_work = (None, None) if None in work else map(sum, zip(*work, strict=True))
        yield {
            "what": case.what,
            "on": case.on,
            "side": name,
            "flags": VARIANTS.get(name),
            "ms": values,
            "images_per_s": batch_size * 1000 / middle,
            "minutes": middle * case.epochs * -(-N_DATA // batch_size) / 60_000,
            "ratio": statistics.median(ms[0]) / middle,
            "ratios": [plain / value for plain, value in zip(ms[0], values, strict=True)],
            "bytes": None if None in size else max(size),
            "kernels": n_kernels,
            "busy": at_work and at_work / middle,
            "losses": found.tolist(),
            "differences": (apart[::FIRST].max().item(), apart.max().item()),  # nan if a loss is
        }


def step_ms(loop: Loop, opt: argparse.Namespace, device: torch.device) -> float:
    """Milliseconds of one step, the mean of some; as many as loader workers may have prepared are done before."""
    with loop.going(2 * opt.num_workers + 2) as run:
        return timed(run, opt.steps, device)


def step_kernels(loop: Loop, device: torch.device) -> tuple[float, float] | None:
    """Kernels of one step, and the milliseconds in which at least one is at work."""
    with loop.going(0) as run:
        return kernels(run, PROFILED, device)


def epoch_ms(loop: Loop, device: torch.device) -> float:
    """Milliseconds of an epoch with its evaluation, by training steps."""
    return timed(loop.epoch, 1, device) / loop.n_steps


def teachers(part: str, opt: argparse.Namespace, rounds: int, device: torch.device) -> Iterator[dict]:
    """Rows of the table, by the time of one batch."""
    for what, precision, sides in bench_steps.teachers(opt, device):
        print(f"{part}: {what} {precision} ...", file=sys.stderr)
        ms = in_turn(sides, rounds, device)
        ms = [[value / n for value in values] for n, values in zip(MACRO, ms, strict=True)]
        yield {"what": what, "precision": precision, "at_once": MACRO, "ms": ms}


def loss_cells(row: dict) -> list[str]:
    """A row's numbers as text."""
    ms = [spread(statistics.median(times), times) for times in row["ms"]]
    times, memory = spread(row["ratio"], row["ratios"]), map(megabytes, row["bytes"])
    return [row["what"], row["on"], *ms, times, *memory, differences(row)]


def step_cells(row: dict) -> list[str]:
    """A row's numbers as text."""
    cells = [row["what"], row["on"], row["side"], spread(statistics.median(row["ms"]), row["ms"])]
    cells += [short(row["images_per_s"]), short(row["minutes"])]
    plain = row["side"] == "plain"
    cells += ["-" if plain else spread(row["ratio"], row["ratios"]), megabytes(row["bytes"])]
    work = ["-", "-"] if row["kernels"] is None else [f"{row['kernels']:.0f}", f"{row['busy']:.0%}"]
    return [*cells, "-" if plain else differences(row), *work]


def teacher_cells(row: dict) -> list[str]:
    """A row's numbers as text."""
    return [row["what"], row["precision"], *(spread(statistics.median(ms), ms) for ms in row["ms"])]


def differences(row: dict) -> str:
    return ", ".join(f"{value:.0e}" for value in row["differences"] or ()) or "-"


def megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.0f}"


def spread(middle: float, values: list[float]) -> str:
    few = [short(value) for value in (middle, min(values), max(values))]
    return f"{few[0]} ({few[1]}..{few[2]})"


def short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


TIMES = "ratio of the medians (least..most of a round's); MB: memory beyond what was held before, at its highest"
ON_LOSSES = (
    f"Median (least..most) of {{rounds}} rounds; times: {TIMES}; differences of loss and gradients, relative to the "
    "largest entry."
)
ON_STEPS = (
    "Batches of {batch_size}; {workers} loader workers beside the plain loop. Median (least..most) of {rounds} rounds "
    "of {steps} steps; training: 240 epochs of CIFAR-100, of a first stage 30; times: how much faster than the plain "
    f"loop (several methods: one after another), {TIMES}, from making it to its {FIRST}th step, without workers; "
    f"differences from the plain loop's losses on the same batches, the first's and the largest of {FIRST}, "
    "relative; kernels: of a step on a GPU, copies among them; busy: the share of its time in which one is at work."
)
ON_EPOCHS = ON_STEPS.replace("{steps} steps", "an epoch of {images} images with evaluation, by its training steps")
ON_TEACHERS = (
    "Milliseconds of the forward pass for {batch_size} images, if one, two, four or eight times as many are given at "
    "once; on a GPU from a recording. Median (least..most) of {rounds} rounds."
)
LOSSES = ("loss", "on", "ours, ms", "other form, ms", "times", "ours, MB", "other form, MB", "differences")
STEPS = ("what", "on", "side", "ms a step", "images/s", "training, min", "times", "MB", "differences")
STEPS += ("kernels", "busy")
TEACHERS = ("teacher", "precision", "one batch, ms", "two, ms", "four, ms", "eight, ms")
PARTS = {  # what measures the rows; their cells; columns, how many of these are names; a note
    "steps": (steps, step_cells, STEPS, 3, ON_STEPS),
    "together": (steps, step_cells, STEPS, 3, ON_STEPS),
    "teacher": (teachers, teacher_cells, TEACHERS, 2, ON_TEACHERS),
    "epoch": (steps, step_cells, STEPS, 3, ON_EPOCHS),
    "losses": (losses, loss_cells, LOSSES, 2, ON_LOSSES),
}


def table(part: str, about: dict, rows: list[dict]) -> str:
    """Markdown, below what the numbers depend on."""
    _, cells, columns, names, note = PARTS[part]
    lines = [columns, ["---"] * names + ["---:"] * (len(columns) - names), *map(cells, rows)]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (
        f"`{about['command']}`, {about['date']}, commit {about['code']}, {about['device']}, {about['buffers']}, "
        f"{versions}.\n{note.format(**about)}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)
    )


def network_pair(text: str) -> tuple[str, str]:
    """'wrn_40_2:wrn_16_2' -> teacher, student"""
    pair = tuple(text.split(":"))
    if len(pair) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a teacher and a student like wrn_40_2:wrn_16_2")
    for name in pair:
        if name not in model_dict:
            known = ", ".join(known_first(name, model_dict))
            raise argparse.ArgumentTypeError(f"unknown network {name!r}; known: {known}")
    return pair


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, positive = parser.add_argument, number(int, 1)
    pairs, workers = [network_pair(pair) for pair in PAIRS], min(8, os.cpu_count() or 1)
    add("--losses", nargs="*", choices=FORMS, metavar="METHOD", help=f"losses alone, some of {', '.join(FORMS)} (all)")
    add("--together", nargs="*", type=positive, metavar="N", help="the first N methods at once (2 5 15)")
    add("--teacher", action="store_true", help="the teacher's forward pass, of 1, 2, 4 and 8 batches at once")
    add("--epoch", action="store_true", help="whole epochs with evaluation")
    add("--all", action="store_true", help="all parts, and all variants that may pay on the device")
    add("--methods", nargs="+", type=method, metavar="NAME", help="(kd nst crd; --epoch kd; --together all but kdsvd)")
    add("--pairs", nargs="+", type=network_pair, metavar="T:S", default=pairs, help=f"networks ({' '.join(PAIRS)})")
    add("--variants", nargs="+", choices=VARIANTS, metavar="NAME", help=f"of our side: {', '.join(VARIANTS)} (fp32)")
    add("--images", type=number(int, 2), default=N_DATA, help=f"to train on, and a fifth of it to test ({N_DATA})")
    add("--batch_size", type=positive, default=64, help="(64)")
    add("--rounds", type=positive, help=f"({', '.join(f'{part} {n}' for part, n in ROUNDS.items())})")
    add("--steps", type=positive, default=10, help="of a round (10)")
    add("--num_workers", type=number(int, 0), default=workers, help="of the plain loop (8, or the cores if fewer)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    add(
        "--keep_buffers",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on a CPU with glibc, freed buffers stay with the process, of all sides, as in the training scripts (on)",
    )
    add("--output", type=Path, default=Path("save/benchmark"), help="folder of the results (save/benchmark)")
    return completed(parser, parser.parse_args(argv))


def completed(parser: Parser, opt: argparse.Namespace) -> argparse.Namespace:
    """The parts that are asked for, and what depends on them; refuse what train_student.py would."""
    asked = {part: getattr(opt, part) not in (None, False) for part in ("losses", "together", "teacher", "epoch")}
    asked["steps"] = not any(asked.values())
    opt.parts = [part for part in PARTS if opt.all or asked[part]]
    for key in ("losses", "methods", "variants"):
        setattr(opt, key, list(dict.fromkeys(getattr(opt, key) or ())))
    opt.losses = opt.losses or list(FORMS)
    n = len(opt.methods or METHODS["together"])
    opt.together = opt.together or [*(few for few in (2, 5) if few < n), n]
    if max(opt.together) > n:
        parser.error(f"--together {max(opt.together)}: there are {n} methods")
    for part in set(opt.parts) & set(METHODS):
        for flags in [VARIANTS[name] for name in opt.variants] or [()]:
            for pair in opt.pairs:
                bench_steps.student_options(pair, opt.batch_size, opt.methods or METHODS[part], flags)
    return opt


def main(argv: list[str] | None = None) -> None:
    opt = parse(argv)
    device = choose_device(opt.device)
    torch.backends.cudnn.benchmark = True  # as in training
    name, threads = device_name(device), torch.get_num_threads()
    tf32 = "TF32" if torch.backends.cudnn.allow_tf32 else "float32"
    kept = opt.keep_buffers and device.type == "cpu" and keep_buffers()
    about = {
        "command": shlex.join(["python", "scripts/benchmark.py", *sys.argv[1:]]),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "code": code_version(),
        "device": name if device.type == "cpu" else f"{name}, {tf32} convolutions, {threads} CPU threads",
        "threads": threads,
        "workers": opt.num_workers,
        "buffers": "freed buffers kept" if kept else "the C library's default allocation",
        "versions": versions(),
        "batch_size": opt.batch_size,
        "images": opt.images,
        "steps": opt.steps,
    }
    try:
        opt.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--output {opt.output}: cannot be made ({error.strerror})") from error
    for part in opt.parts:
        rounds = opt.rounds or ROUNDS[part]
        text = measured(part, opt, {**about, "rounds": rounds}, device)
        print(text, end="" if part == opt.parts[-1] else "\n")


def measured(part: str, opt: argparse.Namespace, about: dict, device: torch.device) -> str:
    """The table of a part. Its files are written with every row: a run that is cut off leaves what it has done."""
    rows, text = [], ""
    with contextlib.redirect_stdout(sys.stderr):  # stdout is the tables'
        for row in PARTS[part][0](part, opt, about["rounds"], device):
            rows.append(row)
            text = table(part, about, rows)
            checkpoint.write(opt.output / f"{part}.md", text.encode())
            content = json.dumps({**about, "rows": rows}, indent=1) + "\n"
            checkpoint.write(opt.output / f"{part}.json", content.encode())
    return text


if __name__ == "__main__":
    sys.exit(cli_errors(main))
