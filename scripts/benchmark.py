"""Time and memory of training, against a plain loop that trains as the reference does.

    python scripts/benchmark.py                               steps of kd, nst and crd
    python scripts/benchmark.py --methods fsp icd --pairs vgg13:vgg8 --variants fp32 bf16
    python scripts/benchmark.py --together                    2, 5 and all methods as students of one teacher at once
    python scripts/benchmark.py --cost                        a step of each method relative to KD's
    python scripts/benchmark.py --kernels                     operators of a step of each method; its kernels on a GPU
    python scripts/benchmark.py --teacher                     the teacher alone, by the number of batches at once
    python scripts/benchmark.py --epoch                       an epoch of kd with evaluation
    python scripts/benchmark.py --losses nst crd              losses alone
    python scripts/benchmark.py --all                         all of these, in about nine minutes on an H200 (estimate)
    python scripts/benchmark.py --all --images 128 --batch_size 8 --rounds 1 --pairs resnet20:resnet8     a trial of it

All sides run in this process, interleaved; scripts/bench/ says what they are. Images are random, in the shape of
CIFAR-100, and so are the teachers' weights. The losses are those that are computed in another form than the
reference's, forward and backward, on features of the pairs' shapes, each side in the memory format of its own training;
a difference between the two ends the run. Prints tables, and writes them and all numbers behind them to --output.
"""

import argparse
import contextlib
import gc
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from statistics import median

import torch

from helper import checkpoint
from helper.build import device_name
from helper.options import Parser, method, number
from helper.util import choose_device, cli_errors, code_version, versions
from models import model_dict
from scripts.bench import losses as bench_losses
from scripts.bench import steps as bench_steps
from scripts.bench.losses import N_DATA, REFERENCES
from scripts.bench.measure import Operators, extra_memory, interleaved, kernels, milliseconds, timed
from scripts.bench.steps import FIRST, MACRO, METHODS, VARIANTS, Case, Loop

PAIRS = ["wrn_40_2:wrn_16_2", "resnet32x4:resnet8x4"]
ROUNDS = {"steps": 3, "together": 2, "cost": 3, "kernels": 1, "teacher": 5, "epoch": 1, "losses": 7}
PROFILED = 3  # steps of which the kernels are counted

Row = tuple[dict[str, str], dict]  # its cells by column, and the numbers behind them


def losses(part: str, opt: argparse.Namespace, rounds: int, device: torch.device) -> Iterator[Row]:
    for name, on, ours, reference in bench_losses.cases(opt, device):
        print(f"{name} {on} ...", file=sys.stderr)
        apart = bench_losses.compare(f"{name} {on}", ours(), reference())
        memory = [extra_memory(side, device) for side in (ours, reference)]
        ms = milliseconds((ours, reference), rounds)
        cells = {"loss": name, "on": on, "optimised, ms": spread(ms[0]), "reference, ms": spread(ms[1])}
        cells |= {"speed-up": speed_up(ms[1], ms[0])}
        cells |= {"optimised, MB": megabytes(memory[0]), "reference, MB": megabytes(memory[1])}
        yield cells | {"differences": few(apart)}, {"ms": ms, "bytes": memory, "differences": apart}


def steps(part: str, opt: argparse.Namespace, rounds: int, device: torch.device) -> Iterator[Row]:
    time_of = epoch_ms if part == "epoch" else partial(step_ms, opt=opt)
    kernels_of = (lambda loop: None) if part == "epoch" else partial(step_kernels, device=device)
    for case in bench_steps.cases(part, opt, device):
        print(f"{part}: {case.what} {case.on} ...", file=sys.stderr)
        yield from step_rows(case, opt.batch_size, time_of, kernels_of, rounds, device)


def step_rows(
    case: Case,
    batch_size: int,
    time_of: Callable[[Loop], float],
    kernels_of: Callable[[Loop], tuple[float, float] | None],
    rounds: int,
    device: torch.device,
) -> Iterator[Row]:
    """A row for each side, after all have been made and have done their first steps."""
    gc.collect()  # the last case's networks and captured steps
    loops, memory = [], []
    for makers in case.sides.values():
        side: list[Loop] = []
        memory.append([extra_memory(lambda make=make, side=side: side.append(make()), device) for make in makers])
        loops.append(side)
    ms = interleaved([lambda side=side: sum(map(time_of, side)) for side in loops], rounds)
    firsts = [torch.tensor([loss for loop in side for loss in loop.losses], dtype=torch.float64) for side in loops]
    for name, side, times, sizes, first in zip(case.sides, loops, ms, memory, firsts, strict=True):
        minutes = median(times) / 60_000 * case.epochs * -(-N_DATA // batch_size)
        apart = (first / firsts[0] - 1).abs()
        apart = apart[::FIRST].max().item(), apart.max().item()  # nan if a loss is
        size = None if None in sizes else max(sizes)
        work = list(map(kernels_of, side))
        n, busy = (None, None) if None in work else map(sum, zip(*work, strict=True))
        plain = name == "plain"
        cells = {"method": case.what, "on": case.on, "side": name, "ms per step": spread(times)}
        cells |= {"images/s": short(batch_size * 1000 / median(times)), "training, min": short(minutes)}
        cells |= {"speed-up": "-" if plain else speed_up(ms[0], times), "MB": megabytes(size)}
        cells |= {"differences": "-" if plain else few(apart)}
        cells |= {
            "kernels": "-" if n is None else f"{n:.0f}",
            "busy": "-" if n is None else f"{busy / median(times):.0%}",
        }
        numbers = {"flags": VARIANTS.get(name), "ms": times, "bytes": size, "kernels": n, "busy_ms": busy}
        yield cells, {**numbers, "losses": first.tolist(), "differences": apart}


def step_ms(loop: Loop, opt: argparse.Namespace) -> float:
    """Milliseconds of one step, the mean of some; as many as loader workers may have prepared are done before."""
    with loop.going(2 * opt.num_workers + 2) as run:
        return timed(run, opt.steps)


def step_kernels(loop: Loop, device: torch.device) -> tuple[float, float] | None:
    with loop.going(0) as run:
        return kernels(run, PROFILED, device)


def epoch_ms(loop: Loop) -> float:
    """Milliseconds of an epoch with its evaluation, by training steps."""
    return timed(loop.epoch, 1) / len(loop.loader)


def costs(part: str, opt: argparse.Namespace, rounds: int, device: torch.device) -> Iterator[Row]:
    for name, on, variant, loop, kd in bench_steps.costs(opt, device):
        print(f"{part}: {name} {on} {variant} ...", file=sys.stderr)
        ms = interleaved([partial(step_ms, side, opt) for side in (loop, kd)], rounds)
        cells = {"method": name, "on": on, "side": variant, "ms per step": spread(ms[0]), "KD's": spread(ms[1])}
        yield cells | {"relative to KD": speed_up(ms[0], ms[1])}, {"ms": ms}


def operators(part: str, opt: argparse.Namespace, rounds: int, device: torch.device) -> Iterator[Row]:
    for name, on, variant, *loops in bench_steps.costs(opt, device):
        print(f"{part}: {name} {on} {variant} ...", file=sys.stderr)
        seen = []
        for loop in loops:
            with Operators() as mode:
                loop.step(next(loop.loader.plans()))
            seen.append(mode)
        ours, kd = seen
        launched = [step_kernels(loop, device) for loop in loops]
        numbers = {"operators": [ours.others, kd.others], "convolutions": [ours.convolutions, kd.convolutions]}
        numbers["kernels"] = [work and work[0] for work in launched]
        cells = {key: " / ".join("-" if n is None else f"{n:.0f}" for n in pair) for key, pair in numbers.items()}
        yield {"method": name, "on": on, "side": variant, **cells}, numbers


def teachers(part: str, opt: argparse.Namespace, rounds: int, device: torch.device) -> Iterator[Row]:
    for arch, precision, sides in bench_steps.teachers(opt, device):
        print(f"{part}: {arch} {precision} ...", file=sys.stderr)
        ms = [[value / n for value in times] for n, times in zip(MACRO, milliseconds(sides, rounds), strict=True)]
        counts = [f"{n} batch{'es' * (n > 1)}, ms" for n in MACRO]
        cells = {"teacher": arch, "precision": precision, **dict(zip(counts, map(spread, ms), strict=True))}
        yield cells, {"at_once": MACRO, "ms": ms}


def spread(values: list[float]) -> str:
    return f"{short(median(values))} ({short(min(values))}-{short(max(values))})"


def speed_up(plain: list[float], ours: list[float]) -> str:
    """Ratio of the medians (min-max of the rounds' ratios)."""
    ratios = [a / b for a, b in zip(plain, ours, strict=True)]
    return f"{short(median(plain) / median(ours))} ({short(min(ratios))}-{short(max(ratios))})"


def short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def few(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.0e}" for value in values)


def megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.0f}"


MEMORY = "MB: peak memory beyond what was held before"
ON_LOSSES = f"Median (min-max) of {{rounds}} rounds; {MEMORY}; relative differences of the loss and of the gradients."
ON_STEPS = (
    "Batch size {batch_size}; {workers} loader workers for the plain loop. Median (min-max) of {rounds} rounds of "
    "{steps} steps; training: 240 epochs of CIFAR-100, 30 of a first stage; speed-up over the plain loop (several "
    f"methods: one after another); {MEMORY}, up to the {FIRST}th step, without workers; relative differences from the "
    f"plain loop's losses on the same batches, the first and the largest of {FIRST}; kernels: per step, copies "
    "included; busy: their share of its time."
)
ON_EPOCHS = ON_STEPS.replace("{steps} steps", "an epoch of {images} images with evaluation, by its training steps")
ON_COST = (
    "A step of train_student.py, teacher included, batch size {batch_size}, interleaved with one of KD. Median "
    "(min-max) of {rounds} rounds of {steps} steps; methods that are undefined on a pair are left out."
)
ON_OPERATORS = (
    "Operators of a step that compute something, of the method / of KD: each launches one kernel or a few on a GPU. "
    "Convolutions, backward ones included, are counted apart; kernels and copies as the GPU's profiler sees them."
)
ON_TEACHERS = (
    "Milliseconds of the forward pass per {batch_size} images, given one, two, four or eight batches at once; on a GPU "
    "as a captured graph. Median (min-max) of {rounds} rounds."
)
PARTS = {
    "steps": (steps, ON_STEPS),
    "together": (steps, ON_STEPS),
    "cost": (costs, ON_COST),
    "kernels": (operators, ON_OPERATORS),
    "teacher": (teachers, ON_TEACHERS),
    "epoch": (steps, ON_EPOCHS),
    "losses": (losses, ON_LOSSES),
}


def measure(part: str, opt: argparse.Namespace, about: dict, device: torch.device) -> str:
    """The table of a part in Markdown. Its files are written with every row: a run cut off leaves what it has done."""
    (rows_of, note), rows, names = PARTS[part], [], ("loss", "method", "teacher", "on", "side", "precision")
    used = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    text = f"`{about['command']}`, {about['date']}, commit {about['code']}, {about['device']}, {used}.\n"
    text += f"{note.format(**about)}\n\n"
    with contextlib.redirect_stdout(sys.stderr):  # stdout is the tables'
        for cells, numbers in rows_of(part, opt, about["rounds"], device):
            rows.append({**cells, **numbers})
            lines = [cells.values()]
            if len(rows) == 1:
                lines = [cells, ["---" if name in names else "---:" for name in cells], *lines]
            text += "".join(f"| {' | '.join(line)} |\n" for line in lines)
            checkpoint.write(opt.output / f"{part}.md", text.encode())
            content = json.dumps({**about, "rows": rows}, indent=1) + "\n"
            checkpoint.write(opt.output / f"{part}.json", content.encode())
    return text


def network_pair(text: str) -> tuple[str, str]:
    """'wrn_40_2:wrn_16_2' -> teacher, student"""
    teacher, _, student = text.partition(":")
    if not {teacher, student} <= model_dict.keys():
        raise argparse.ArgumentTypeError(f"{text!r} is not a teacher and a student like wrn_40_2:wrn_16_2")
    return teacher, student


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser, positive = Parser(description=__doc__), number(int, 1)
    pairs, workers = [network_pair(pair) for pair in PAIRS], min(8, os.cpu_count() or 1)
    names, most = ", ".join(REFERENCES), len(METHODS["together"])
    add = parser.add_argument
    add("--losses", nargs="*", choices=REFERENCES, metavar="METHOD", help=f"losses alone, some of {names} (all)")
    add("--together", nargs="*", type=positive, metavar="N", help=f"the first N methods at once (2 5 {most})")
    add("--cost", action="store_true", help="a step of each method relative to KD's")
    add("--kernels", action="store_true", help="operators and kernels of a step of each method")
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
    add("--device", type=choose_device, default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    add("--output", type=Path, default=Path("save/benchmark"), help="folder of the results (save/benchmark)")
    opt = parser.parse_args(argv)
    asked = {part: getattr(opt, part) not in (None, False) for part in PARTS if part != "steps"}
    opt.parts = [part for part in PARTS if opt.all or asked.get(part, not any(asked.values()))]
    for key in ("losses", "methods", "variants"):
        setattr(opt, key, list(dict.fromkeys(getattr(opt, key) or ())))
    opt.losses = opt.losses or list(REFERENCES)
    n = len(opt.methods or METHODS["together"])
    opt.together = opt.together or [*(k for k in (2, 5) if k < n), n]
    if max(opt.together) > n:
        parser.error(f"--together {max(opt.together)}: there are {n} methods")
    for part in set(opt.parts) & set(METHODS):  # refuse what train_student.py would
        for flags in [VARIANTS[name] for name in opt.variants] or [()]:
            for pair in opt.pairs:
                bench_steps.student_options(pair, opt.batch_size, opt.methods or METHODS[part], flags)
    return opt


def main(argv: list[str] | None = None) -> None:
    opt = parse(argv)
    device = opt.device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True  # as in training
    name, threads = device_name(device), torch.get_num_threads()
    tf32 = "TF32" if torch.backends.cudnn.allow_tf32 else "float32"
    about = {
        "command": shlex.join(["python", "scripts/benchmark.py", *(sys.argv[1:] if argv is None else argv)]),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "code": code_version(),
        "device": name if device.type == "cpu" else f"{name}, {tf32} convolutions, {threads} CPU threads",
        "versions": versions(),
        "batch_size": opt.batch_size,
        "images": opt.images,
        "steps": opt.steps,
        "workers": opt.num_workers,
    }
    opt.output.mkdir(parents=True, exist_ok=True)
    for part in opt.parts:
        text = measure(part, opt, {**about, "rounds": opt.rounds or ROUNDS[part]}, device)
        print(text, end="" if part == opt.parts[-1] else "\n")


if __name__ == "__main__":
    sys.exit(cli_errors(main))
