"""Train all pairs of networks x methods x trials of a table; can be stopped at any moment and started again.

    python scripts/run_table.py tables/quick.toml                        on this machine, one task after another
    python scripts/run_table.py tables/quick.toml --jobs 2 --trials 5    flags override the file
    python scripts/run_table.py --pairs resnet20:resnet8 --distill kd crd --trials 3 --dataset digits --nce_k 512
    python scripts/run_table.py tables/published.toml --jobs 8 --gpus_per_job 0.25
    python scripts/run_table.py tables/published.toml --address auto     on a running Ray cluster
    python scripts/run_table.py tables/published.toml --dry_run          print the command lines, one a line
    python scripts/run_table.py status save/quick                        how far a table is (its folder or its TOML)
    python scripts/run_table.py slurm tables/published.toml              print the script of a SLURM array

A task is a pair in one trial, with all its unfinished methods in one call of train_student.py. The file and the flags
take any option of train_student.py. Teachers are trained with the same data set and schedule; the file's [teacher]
section has options of train_teacher.py for them, or names files (checkpoint = {wrn_40_2 = "FILE"}), or has
published = true. Finished runs are skipped. Exit code: 0, 1 if runs failed, 2 for wrong input, 75 if interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from copy import deepcopy
from difflib import get_close_matches
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch
from torch import nn

import train_student
import train_teacher
from dataset import DataError, DataSource, ImageFiles
from distiller_zoo import DistillError, distiller_class, distiller_dict, kd_loss, method_options
from helper import checkpoint
from helper.build import (
    distillation,
    load_source,
    load_teacher,
    memory_format,
    new_model,
    student_folder,
    teacher_folder,
)
from helper.interrupt import EXIT, IN_USE
from helper.options import WEIGHTS, Parser, method, number, plain
from helper.run import Run, lock
from helper.student import Teacher
from helper.util import InUse, RunError, choose_device, cli_errors
from models import create_model, file_name
from scripts import fetch_teachers
from scripts.table_engine import ROOT, Cell, Ray, Task, Threads, quiet, work

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PUBLISHED = ROOT / "tables" / "published.toml"
NETWORK = r"((?:(?:timm|torchvision|[^:]+\.py):)?[^:]+)"
SHORT = {"r": "gamma", "a": "alpha", "b": "beta"}
# options that the table gives to every run itself
SET = {"model_s", "path_t", "model_t", "part_t", "distill", "trial", "seed", "resume", "options", "free", "argv"}

Options = dict[str, Any]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The table as a namespace: command, pairs, distill, trials, options, teacher, and where to run it."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv.pop(0) if argv[:1] in (["status"], ["slurm"]) else "run"
    file = Path(argv.pop(0)) if argv and not argv[0].startswith("-") else None
    parser = Parser(description=__doc__, allow_abbrev=False, usage="run_table.py [status | slurm] [TABLE.toml] [flags]")
    add = parser.add
    add("--pairs", nargs="+", metavar="TEACHER:STUDENT", help="pairs of networks, or published: those 13")
    add("--distill", nargs="+", type=lambda name: name if name == "all" else method(name), help="methods, or all")
    add("--trials", type=number(int, 1), default=1, help="trials of each pair, numbered from 1; the number is the seed")
    add("--published_teachers", action="store_true", help="download the teachers of the published table")
    add("--jobs", type=number(int, 1), help="tasks at once (one; as many as the GPUs take)")
    add("--gpus_per_job", type=number(float, 0), help="GPUs of a task; below 1, several share one (1 if there are any)")
    add("--address", help="run on a Ray cluster: HOST:PORT, auto, or local to start one on this machine")
    add("--dry_run", action="store_true", help="print the command lines instead of running them")
    if command == "status" and file and file.is_dir():
        return argparse.Namespace(command=command, folder=file / "table")
    table = read(file) if file else {}
    teacher = table.pop("teacher", {})
    known = vars(train_student.parse(["--path_t", "x", "--distill", *distiller_dict]))
    keys = known.keys() - SET | {key for name in distiller_dict for key in method_options(name)}
    teacher_keys = vars(train_teacher.parse([])).keys() - {"model", "resume", "output", "free", "argv"}
    check_keys(f"{file}", table, keys | {"pairs", "distill", "trials", "teacher"})
    check_keys(f"{file}, [teacher]", teacher, teacher_keys | {"published", "checkpoint"})
    opt, rest = parser.parse_known_args([*flags(table), *argv])
    opt.command, options = command, read_flags(parser, rest)
    check_keys(parser.prog, options, keys)
    # a switch that is off anyway; there is no flag for that
    opt.options = {key: value for key, value in options.items() if value is not False or known.get(key) is not False}
    shared = {key: value for key, value in opt.options.items() if key in teacher_keys - {"weights"}}
    opt.teacher = {**shared, **teacher, **({"published": True} if opt.published_teachers else {})}
    opt.folder = Path(options.get("output", known["output"])) / "table"
    if command == "status":
        return opt
    if not opt.pairs or not opt.distill:
        parser.error("a table needs pairs and methods: a TOML file, or --pairs and --distill")
    texts = [name for text in opt.pairs for name in (read(PUBLISHED)["pairs"] if text == "published" else [text])]
    found = {text: re.fullmatch(f"{NETWORK}:{NETWORK}", text) for text in texts}
    if wrong := [text for text, match in found.items() if not match]:
        parser.error(f"--pairs: {wrong[0]!r} is not TEACHER:STUDENT")
    opt.pairs = {text: match.groups() for text, match in found.items()}
    opt.distill = list(dict.fromkeys(distiller_dict if "all" in opt.distill else opt.distill))
    return opt


def read(file: Path) -> Options:
    try:
        return tomllib.loads(file.read_text())
    except ValueError as error:
        raise RunError(f"{file}: is not TOML ({error})") from error


def check_keys(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    for key in given:
        if key not in known:
            near = ", ".join(get_close_matches(key, known, 5, 0))
            raise RunError(f"{where}: unknown option {key!r}; similar ones: {near}")


def flags(options: Options) -> list[str]:
    """{"epochs": 3, "graph": False, "lr_decay_epochs": [1, 2]} -> --epochs 3 --no-graph --lr_decay_epochs 1,2"""
    found = []
    for key, value in options.items():
        if isinstance(value, bool):
            found.append(f"--{key}" if value else f"--no-{key}")
        elif isinstance(value, list) and all(isinstance(part, str) for part in value):
            found += [f"--{key}", *value]
        else:
            found += [f"--{key}", ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return found


def read_flags(parser: Parser, args: list[str]) -> Options:
    """The inverse of flags(), with values as they are written."""
    options: Options = {}
    for arg in args:
        if arg.startswith("-"):
            key, given, value = arg.lstrip("-").partition("=")
            key, on = SHORT.get(key, key).removeprefix("no-"), not key.startswith("no-")
            options[key] = value if given else on
        elif not options or options[key] is False:
            parser.error(f"unexpected {arg!r}; the table's file comes first")
        else:
            options[key] = arg if options[key] is True else [*np.atleast_1d(options[key]).tolist(), arg]
    return options


def options_of(methods: Iterable[str], options: Options) -> Options:
    """Without those that only other methods take: train_student.py refuses them."""
    mine = {key for name in methods for key in (*method_options(name), *distiller_class(name).weights)}
    others = {key for name in distiller_dict for key in method_options(name)} | set(WEIGHTS)
    return {key: value for key, value in options.items() if key in mine or key not in others}


class Plan(NamedTuple):
    """What a table asks for."""

    tasks: list[Task]
    undefined: dict[str, dict[str, str]]  # pair -> method -> why it is left out
    nets: dict[str, tuple[nn.Module, nn.Module, argparse.Namespace]]  # pair -> teacher, student, options of trial 1
    source: DataSource
    free: set[str]  # options that may change when the table is resumed


def make_plan(opt: argparse.Namespace) -> Plan:
    """Tasks for all runs, finished or not. Raises RunError if a folder holds a run with other options."""
    # wrong options and names end here, before any data is fetched
    first = train_student.parse(["--path_t", "x", *flags(opt.options), "--distill", *opt.distill])
    parsed = {pair: train_student.parse(student_argv(opt, pair, 1, Path("x"), opt.distill)) for pair in opt.pairs}
    try:
        source = load_source(argparse.Namespace(**{**vars(first), "download": first.download and not opt.dry_run}))
    except DataError:
        if not opt.dry_run:
            raise
        source = stand_in(first)
    teachers = plan_teachers(opt, first, source)
    tasks = list(dict.fromkeys(task for _, _, task in teachers.values() if task))
    plan, settings = Plan(tasks, {}, {}, source, first.free - {*WEIGHTS, "kd_T", "epochs"}), {}
    for pair, (arch, arch_s) in opt.pairs.items():
        teacher, model = teachers[arch][0], new_model(arch_s, source, parsed[pair], parsed[pair].stages_s)
        plan.nets[pair] = teacher.model, model, parsed[pair]
        plan.undefined[pair], settings[pair] = {}, {}
        for name in opt.distill:
            try:
                kd = distillation(name, deepcopy(model), parsed[pair], source, teacher)
                weights = {key: kd.weights[key] for key in kd.distiller.weights}
                settings[pair][name] = {"weights": weights, "kd_T": kd.T, "options": kd.options}
            except DistillError as error:
                plan.undefined[pair][name] = str(error).removeprefix(f"method {name}: ")
    for trial, pair in product(range(1, opt.trials + 1), [pair for pair in opt.pairs if settings[pair]]):
        teacher, path, after = teachers[opt.pairs[pair][0]]
        command, cells = partial(student_argv, opt, pair, trial, path), []
        opt_s = train_student.parse(command(settings[pair]))
        for name, setting in settings[pair].items():
            folder = student_folder(name, setting["weights"], teacher.arch, opt_s)
            check(
                folder,
                opt_s,
                {"method": name, **setting} | ({"teacher_crc32": teacher.crc32} if teacher.path else {}),
                source,
            )
            cells.append(Cell(pair, name, str(trial), folder, opt_s.epochs))
        tasks.append(Task(f"{pair} trial {trial}", cells, "train_student.py", command, after))
    return plan


def stand_in(opt: argparse.Namespace) -> DataSource:
    """Something in the shape of CIFAR-100, for a dry run without the data."""
    size, n_cls = opt.image_size or 32, fetch_teachers.N_CLS
    images, labels = np.zeros((1, size, size, 3), np.uint8), np.arange(50_000) % n_cls
    return DataSource(images, labels, images, labels[:1], n_cls, (0.5,) * 3, (0.5,) * 3, ())


def student_argv(opt: argparse.Namespace, pair: str, trial: int, path: Path, methods: Iterable[str]) -> list[str]:
    arch, arch_s = opt.pairs[pair]
    name = ["--model_t", arch] if arch in opt.teacher.get("checkpoint", {}) else []
    options = flags(options_of(methods, opt.options))
    return ["--path_t", str(path), *name, "--model_s", arch_s, "--trial", str(trial), *options, "--distill", *methods]


def plan_teachers(
    opt: argparse.Namespace, first: argparse.Namespace, source: DataSource
) -> dict[str, tuple[Teacher, Path, Task | None]]:
    """Each teacher, untrained where there is none yet, its checkpoint, and the task that makes it."""
    given, published = opt.teacher.get("checkpoint", {}), opt.teacher.get("published")
    options = {key: value for key, value in opt.teacher.items() if key not in ("checkpoint", "published")}
    options |= {key: value for key, value in opt.options.items() if key == "output"}
    fetch, teachers = (
        Task("fetch", [], "scripts/fetch_teachers.py", lambda names: [*names, "--output", first.output]),
        {},
    )
    for arch in dict.fromkeys(arch for arch, _ in opt.pairs.values()):
        argv, task = ["--model", arch, *flags(options)], None
        opt_t = train_teacher.parse(argv)
        if arch in given:
            path = Path(given[arch])
        elif published:
            if arch not in fetch_teachers.PUBLISHED or source.n_cls != fetch_teachers.N_CLS:
                known = f"{fetch_teachers.N_CLS} classes: {', '.join(fetch_teachers.PUBLISHED)}"
                raise RunError(f"there is no published teacher {arch} for {source.n_cls} classes, only for {known}")
            path, task = first.output / "models" / fetch_teachers.FILE.format(arch), fetch
            fetch.cells.append(Cell(arch, arch, "published", path.parent, 0, path.name))
        else:
            folder = teacher_folder(opt_t)
            check(folder, opt_t, {"role": "teacher"}, source)
            path, cell = (
                folder / f"{file_name(arch)}_last.pth",
                Cell(arch, "teacher", opt_t.trial, folder, opt_t.epochs),
            )
            task = Task(f"teacher {arch}", [cell], "train_teacher.py", lambda _, argv=argv: argv)
        if task and not path.is_file():
            teacher = Teacher(arch, create_model(arch, source.n_cls, source.train_images.shape[1], first.stages_t))
        else:
            teacher = load_teacher(argparse.Namespace(**{**vars(first), "path_t": path, "model_t": arch}))
            if source.class_names:  # which the stand-in lacks
                teacher.check(source)
        teachers[arch] = teacher, path, task
    return teachers


def check(folder: Path, opt: argparse.Namespace, about: Options, source: DataSource) -> None:
    """Raise RunError if the folder holds another run."""
    if (folder / "config.json").exists():
        options = {key: value for key, value in plain(opt).items() if value != "auto"}  # which the device decides
        options |= {"stream": isinstance(source.train_images, ImageFiles)}
        data = {"data_crc32": source.crc32} if source.class_names else {}
        Run(folder, "", {**about, **data, "opt": options}, opt.free).check()


def show(plan: Plan, out: TextIO) -> None:
    cells = [cell for task in plan.tasks for cell in task.cells]
    left = {cell for task in plan.tasks for cell in task.left()}
    for name in dict.fromkeys(cell.pair for cell in cells):
        n, n_left = (sum(cell.pair == name for cell in some) for some in (cells, left))
        kind = "" if name in plan.undefined else "   the teacher"
        print(f"{name:<30} {n:4} runs, {n - n_left:4} done, {n_left:4} to do{kind}", file=out)
        for method_name, why in plan.undefined.get(name, {}).items():
            print(f"    without {method_name}: {why}", file=out)
    print(f"{'all':<30} {len(cells):4} runs, {len(cells) - len(left):4} done, {len(left):4} to do", file=out)


def estimate(plan: Plan) -> str:
    """Hours of what is left, by timing steps of the networks of each pair."""
    left = {task: len(task.left()) for task in plan.tasks}
    pairs = {task.cells[0].pair for task, n in left.items() if n}
    nets, size = {pair: nets for pair, nets in plan.nets.items() if pair in pairs}, plan.source.train_images.shape[1]
    opt = next(iter(plan.nets.values()))[2]
    device = choose_device(opt.device)
    if device.type == "cuda":  # in a process of its own: this one would hold memory of the GPU to the end
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            seconds = pool.submit(time_steps, nets, size).result()
    else:
        seconds = time_steps(nets, size)
    total = 0.0
    for task, n in left.items():
        forward, step = seconds.get(task.cells[0].pair, (0, 0))  # training a teacher takes little beside its students
        total += n and (forward + n * step) * task.cells[0].epochs
    hours = total * math.ceil(len(plan.source.train_labels) / opt.batch_size) / 3600
    said = f"{hours:.1f} hours" if hours >= 2 else f"{60 * hours:.1f} minutes"
    return f"about {said} of one task at a time on this {device.type}, by timing a step of KD for each pair"


def time_steps(nets: dict[str, tuple], size: int) -> dict[str, list[float]]:
    """Seconds of a teacher's forward pass and of a student's step of KD, for each pair."""
    seconds = {}
    for pair, (teacher, student, opt) in nets.items():
        device, times = choose_device(opt.device), []
        images = torch.rand(opt.batch_size, 3, size, size, device=device).to(memory_format=memory_format(opt))
        for net, train in ((teacher, False), (student, True)):
            net.to(device, memory_format=memory_format(opt)).train(train)
            for _ in range(5):
                start = time.perf_counter()
                half = torch.autocast(device.type, torch.bfloat16, opt.precision != "fp32")
                with torch.set_grad_enabled(train), half:
                    logit = net(images)
                if train:
                    kd_loss(logit.float(), logit.detach().float().roll(1, 0), 4.0).backward()
                logit.sum().item()  # waits for the device
                times.append(time.perf_counter() - start)
        seconds[pair] = [min(times[:5]), min(times[5:])]
    return seconds


def keep(opt: argparse.Namespace, plan: Plan) -> None:
    """Write table.json. Raises RunError if there is one with other options; runs may be added to it."""
    path, root = opt.folder / "table.json", opt.folder.parent
    table: Options = {}
    for name in ("options", "teacher"):
        options = {key: shlex.join(flags({key: value})) for key, value in getattr(opt, name).items()}
        table[name] = {key: value for key, value in sorted(options.items()) if key not in plan.free}
    cells = [
        {**cell._asdict(), "folder": str(cell.folder.relative_to(root))} for task in plan.tasks for cell in task.cells
    ]
    if path.exists():
        before = read_table(path)
        if differ := [f"{before[key]} there, {table[key]} here" for key in table if before[key] != table[key]]:
            raise RunError(f"{path} is a table with other options ({'; '.join(differ)}): choose another --output")
        table["undefined"] = before["undefined"]
        cells = list({cell["folder"]: cell for cell in [*before["cells"], *cells]}.values())
    table["undefined"] = {**table.get("undefined", {}), **plan.undefined}
    checkpoint.write(path, (json.dumps({**table, "cells": cells}, indent=1) + "\n").encode())


def read_table(path: Path) -> Options:
    """table.json; its cells are the table's runs, with folders relative to --output."""
    try:
        table = json.loads(checkpoint.read_text(path))
        for cell in table["cells"]:
            Cell(**{**cell, "folder": Path(cell["folder"])})
        return {key: table[key] for key in ("options", "teacher", "undefined", "cells")}
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise RunError(f"{path}: damaged ({error}); it may be deleted, the runs are kept") from error


def status(folder: Path) -> None:
    """Print how far a table has got."""
    path = folder / "table.json"
    if not path.exists():
        raise RunError(f"{path}: there is no such file, no table was started there")
    cells = [Cell(**{**cell, "folder": folder.parent / cell["folder"]}) for cell in read_table(path)["cells"]]
    try:
        lock(folder).release()
        state = "stopped"
    except InUse:
        state = "running"
    events = folder / "events.jsonl"
    lines = events.read_text().splitlines() if events.exists() else []
    last = {line["task"]: line for line in (json.loads(line) for line in lines if line.endswith("}"))}
    n = sum(cell.is_done() for cell in cells)
    print(f"{folder.parent}: {state}, {n} of {len(cells)} runs are done")
    for name, line in last.items():
        if line["event"] == "failed" or (line["event"] == "start" and state == "running"):
            what = {"failed": "failed", "start": "runs"}[line["event"]]
            print(f"{what:<8} since {line['time']}  {name}  {line.get('error', '')}")


SLURM = """\
#!/bin/bash
#SBATCH --job-name=table
#SBATCH --array={first}-{last}
#SBATCH --output={folder}/slurm-%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --gpus={gpus}
{note}tasks=(
{tasks}
)
cd {cwd} || exit 2
export PYTHONPATH={root}
eval "exec {python} {root}/${{tasks[SLURM_ARRAY_TASK_ID]}}" &
child=$!
trap 'kill -TERM $child' TERM # the run saves, and ends with code {again}
wait $child
code=$?
if [ $code = 143 ]; then wait $child; code=$?; fi # 143: wait was interrupted by the trap
case $code in {again} | {in_use}) scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID" ;; esac
exit $code
"""


def slurm_script(tasks: list[Task], opt: argparse.Namespace) -> str:
    """An array with an element for each task; those that make teachers come first."""
    n, note = sum(task.after is None for task in tasks), ""
    if 0 < n < len(tasks):
        note = (
            f"# Elements 0-{n - 1} make the teachers that the others need:\n"
            f"#     job=$(sbatch --parsable --array=0-{n - 1} THIS_FILE)\n"
            f"#     sbatch --dependency=afterok:$job --array={n}-{len(tasks) - 1} THIS_FILE\n"
        )
    return SLURM.format(
        first=0,
        last=len(tasks) - 1,
        folder=opt.folder.absolute(),
        gpus=math.ceil(opt.gpus_per_job if opt.gpus_per_job is not None else opt.options.get("device") != "cpu"),
        note=note,
        tasks="\n".join(shlex.quote(shlex.join(task.command())) for task in tasks),
        cwd=shlex.quote(str(Path.cwd())),
        root=shlex.quote(str(ROOT)),
        python=shlex.quote(sys.executable),
        again=EXIT,
        in_use=IN_USE,
    )


def main(argv: list[str] | None = None) -> list[Task] | None:
    opt = parse(argv)
    if opt.command == "status":
        return status(opt.folder)
    only_print = opt.dry_run or opt.command == "slurm"
    plan = make_plan(opt)
    show(plan, sys.stderr if only_print else sys.stdout)
    tasks = [task for task in plan.tasks if task.left()]
    if not tasks:
        return tasks
    if opt.dry_run:
        return print(*(shlex.join(["python", *task.command()]) for task in tasks), sep="\n")
    opt.folder.mkdir(parents=True, exist_ok=True)
    hushed = quiet(opt.folder / "ray.log") if opt.address and opt.command == "run" else nullcontext(sys.stdout)
    with lock(opt.folder), hushed as out:
        keep(opt, plan)
        if opt.command == "slurm":
            return print(slurm_script(tasks, opt), end="")
        use_gpus = opt.options.get("device", "auto") != "cpu"
        if opt.address:
            engine = Ray(opt.address, opt.jobs, opt.gpus_per_job, use_gpus, opt.folder)
        else:
            engine = Threads(opt.jobs, opt.gpus_per_job, use_gpus)
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(engine.threads)  # as a task has
        print(f"{estimate(plan)}; up to {engine.capacity()} at once, logs in {opt.folder}", file=out, flush=True)
        plan.nets.clear()
        work(plan.tasks, engine, opt.folder, out)
    if failed := [task.name for task in tasks if task.failed]:
        print(f"{len(failed)} tasks failed: {', '.join(failed)}; the same command tries them again")
    return tasks


if __name__ == "__main__":
    sys.exit(cli_errors(main))
