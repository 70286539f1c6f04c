"""The numbers of the report: runs as trials of a method on a pair of networks, compared with others and published."""

import hashlib
import json
import re
import shlex
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import numpy as np

from distiller_zoo import BASELINE, DistillError, distiller_class, distiller_dict, method_options
from distiller_zoo.distillation import KD_T
from helper.options import LR, Parser, add_engine_options, add_weights, parser_for
from helper.util import RunError
from models import create_model, default_lr, is_known
from models.util import ModelError
from scripts import stats
from scripts.costs import costs
from scripts.plotting import DAMAGED, shown

PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text())
# Runs that differ in one of these settings are not trials of the same thing. The published protocol is the scripts'
# defaults, on CIFAR-100; how networks are computed (ENGINE) makes no difference to it.
_protocol, _engine = parser_for(""), Parser()
add_weights(_protocol)
add_engine_options(_engine)
PROTOCOL = {key: value for key, value in vars(_protocol.parse_args([])).items() if key not in _protocol.free}
PROTOCOL |= {"epochs": 240, "image_size": 32, "learning_rate": LR}
del PROTOCOL["seed"], PROTOCOL["deterministic"], PROTOCOL["stream"]
ENGINE = vars(_engine.parse_args([])).keys() - _engine.free
ANYTHING = (*DAMAGED, ArithmeticError)


def label_of(config: dict) -> str:
    """A method, and in what it departs from its published settings."""
    name, published, weights = str(config["method"]), config.get("published") or {}, config["weights"]
    try:
        usual, options = distiller_class(name).weights, method_options(name)
    except DistillError:  # of another version, or the user's own
        return shown(name)
    label, given = name, {}
    for key, default in usual.items():
        if key == "alpha" and default == 0 and weights[key] == 1:
            label += " + kd"
        elif weights[key] != published.get(key, default):
            given[key] = f" {weights[key]:g}"
    if weights.get("alpha") and config["kd_T"] != published.get("kd_T", KD_T):
        given["kd_T"] = f" {config['kd_T']:g}"
    for key, value in config["options"].items():
        if key not in published and value != options[key].default:
            given[key] = "" if value is True else f" {value}"
    return shown(", ".join([label, *(f"{key}{value}" for key, value in given.items())]))


def facts(run: dict, root: Path) -> dict:
    """What the page says of a run, from its config.json and metrics.jsonl."""
    config, epochs, final = run["config"], run["epochs"], run["final"]
    try:
        opt, part = config["opt"], config["parts"][-1]
        best = max(epochs, key=lambda line: line["test_acc"], default={})  # the first of equals
        settings = {key: opt[key] for key in sorted(PROTOCOL.keys() | ENGINE) if key in opt}
        settings["image_size"] = config["image_size"]
        usual = PROTOCOL | {"learning_rate": default_lr.get(opt.get("model_s"), LR)}
        extra = {key: float(final[key]) for key in ("test_macro_f1", "peak_mib") if key in final}
        if not all(abs(value) < 1e30 for value in extra.values()):
            raise ValueError("a number that cannot be plotted")
        recall = zip(final.get("test_recall", ()), config["class_names"], strict=False)
        return {
            "folder": run["folder"].relative_to(root).as_posix(),
            "role": shown(config["role"]),
            "dataset": run["dataset"],
            "teacher": shown(config["teacher"]),
            "student": shown(opt.get("model_s", config["arch"])),
            "method": label_of(config) if config["role"] == "student" else shown(config["role"]),
            "trial": shown(opt["trial"]),
            "seed": int(opt["seed"]),
            "state": "finished" if len(epochs) >= opt["epochs"] else "failed" if "failed" in part else "unfinished",
            "reason": clean(part.get("failed", "")),
            "epochs": len(epochs),
            "of": int(opt["epochs"]),
            "last": epochs[-1]["test_acc"] if epochs else None,
            "best": best.get("test_acc"),
            "best_epoch": best.get("epoch"),
            "macro_f1": extra.get("test_macro_f1"),
            "worst": sorted([float(value), shown(name)] for value, name in recall if 0 <= value <= 100)[:5],
            "seconds": epochs[-1]["seconds"] if epochs else 0.0,
            "peak_mib": extra.get("peak_mib"),
            "together": len(opt.get("distill", [0])),
            "call": clean([part.get(key) for key in ("host", "pid", "argv")]),
            "arch": shown(config["arch"]),
            "params": run["params"],
            "n_cls": int(config["n_cls"]),
            "image_size": int(config["image_size"]),
            "device": shown(part.get("device")),
            "commit": shown(part.get("code")),
            "command": clean(shlex.join(map(str, part["argv"]))),
            "settings": {key: shown(value) for key, value in settings.items()},
            "off": [
                shown(f"{key} {settings[key]}") for key in settings if settings[key] != usual.get(key, settings[key])
            ],
            "curve": [[float(f"{line[key]:.4g}") for line in epochs] for key in ("test_acc", "train_loss")],
        }
    except ANYTHING as error:
        raise RunError(f"{run['folder'] / 'config.json'}: damaged ({error!r})") from error


def clean(text: object) -> str:
    return "".join(c if c.isprintable() else " " for c in str(text)[:4000])


def digest(folder: Path) -> str | None:
    """SHA-256 of the last checkpoint, if there is one."""
    path = next(iter(sorted(folder.glob("*_last.pth"))), None)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path else None


def name_apart(students: list[dict]) -> None:
    """Names of methods and networks that stand for one setting each: what differs becomes a part of them."""
    if len({run["dataset"] for run in students}) > 1:
        for run in students:
            run["student"] += f" on {run['dataset']}"
    alike, differing = defaultdict(list), defaultdict(set)
    for run in students:
        alike[run["method"], run["teacher"] * (run["method"] != BASELINE), run["student"]].append(run["settings"])
    for (method, *_), settings in alike.items():
        differing[method] |= {key for key in settings[0] if len({found.get(key) for found in settings}) > 1}
    for run in students:
        named = (f"{key} {run['settings'].get(key)}" for key in sorted(differing[run["method"]]))
        run["method"] = ", ".join([run["method"], *named])


def group(runs: list[dict]) -> dict[str, dict[str, list[int]]]:
    """method -> pair -> indices of its runs. A baseline has no teacher: it belongs to each pair with its student."""
    students = [run for run in runs if run["role"] == "student"]
    name_apart(students)
    teachers, cells = defaultdict(set), defaultdict(lambda: defaultdict(list))
    for run in students:
        teachers[run["student"]] |= {run["teacher"]} - {"none"}
    for i, run in enumerate(runs):
        if run["role"] == "student":
            everywhere = run["method"].split(",")[0] == BASELINE and teachers[run["student"]]
            for teacher in everywhere or [run["teacher"]]:
                cells[run["method"]][f"{teacher}->{run['student']}"].append(i)
    place = {name: i for i, name in enumerate(distiller_dict)}
    order = sorted(cells, key=lambda name: (place.get(re.split("[ ,+]", name)[0], len(place)), name))
    return {name: cells[name] for name in order}


def summarise(method: str, pair: str, members: list[int], runs: list[dict]) -> dict:
    """A cell of the table: its trials are the finished runs, one of each seed."""
    done = sorted((i for i in members if runs[i]["state"] == "finished"), key=lambda i: runs[i]["folder"])
    trials = list({runs[i]["seed"]: i for i in reversed(done)}.values())[::-1]
    cell = {"runs": members, "trials": trials, "repeated": len(done) - len(trials)}
    cell |= {state: sum(runs[i]["state"] == state for i in members) for state in ("failed", "unfinished")}
    if trials:
        for key in ("last", "best", "macro_f1"):
            if all(runs[i][key] is not None for i in trials):
                cell[key] = stats.mean_sd([runs[i][key] for i in trials])
        cell["seconds"] = stats.mean_sd([runs[i]["seconds"] / runs[i]["epochs"] for i in trials])[0]
        cell["together"] = max(runs[i]["together"] for i in trials)
    rows = [row for row in PUBLISHED["rows"] if row["method"] == method and pair in row["pairs"]] if trials else []
    cell["off"] = sorted({key for i in trials for key in runs[i]["off"]}) if rows else []
    cell["published"] = [against(row, pair, cell) for row in rows if not cell["off"]]
    return cell


def against(row: dict, pair: str, cell: dict) -> dict:
    """A published number; ours of the same epoch (the last where the source does not say) minus it, on the mean."""
    mean, sd = cell["best" if row["epoch"] == "best" else "last"]
    value, n, theirs = row["pairs"][pair], len(cell["trials"]), row.get("sd", {}).get(pair)
    half, verdict = None, "published uncertainty unknown"
    if theirs and row["n"] and sd is not None:
        half = stats.welch((mean, sd, n), (value, theirs, row["n"]))[1]
        verdict = noise(mean - value, half)
    elif sd is None:
        verdict = "one trial"
    about = {"source": PUBLISHED["sources"][row["source"]], "epoch": row["epoch"], "n": row["n"], "sd": theirs}
    return {"value": value, "mean": mean - value, "half": half, "verdict": verdict, **about}


def versus(cell: dict, control: dict, runs: list[dict]) -> dict | None:
    """Differences to the control over the trials that both have; by their means where they share none."""
    if not (cell["trials"] and control["trials"]):
        return None
    theirs = {runs[i]["seed"]: runs[i]["last"] for i in control["trials"]}
    shared = [runs[i]["last"] - theirs[runs[i]["seed"]] for i in cell["trials"] if runs[i]["seed"] in theirs]
    mean, half = stats.paired(shared) if shared else [cell["last"][0] - control["last"][0], None]
    return {"mean": mean, "half": half, "verdict": noise(mean, half), "trials": shared}


def noise(difference: float, half: float | None) -> str | None:
    return None if half is None else "within noise" if abs(difference) <= half else "beyond noise"


def across(cells: dict) -> dict:
    """Each method against the control, over the pairs that both have."""
    found = {}
    for method, row in cells.items():
        versus = [cell["vs"] for cell in row.values() if cell.get("vs")]
        if len(versus) > 1:
            d = [vs["mean"] for vs in versus]
            found[method] = {"pairs": len(d), "mean": float(np.mean(d)), "p": stats.signed_rank(d)}
            found[method] |= {"higher": sum(x > 1e-9 for x in d), "lower": sum(x < -1e-9 for x in d)}
            if trials := [vs["trials"] for vs in versus if vs["trials"]]:
                found[method]["beats"] = stats.beats(trials)
    for method, p in zip(found, stats.holm([row["p"] for row in found.values()]), strict=True):
        found[method]["holm"] = p
    return found


def rank(cells: dict, pairs: list[str]) -> dict:
    """Mean ranks of the methods that have a trial of every pair, and Nemenyi's critical difference."""
    complete = [method for method, row in cells.items() if all(row.get(pair, {}).get("trials") for pair in pairs)]
    if len(complete) < 3 or len(pairs) < 2:
        return {}
    values = np.array([[cells[method][pair]["last"][0] for method in complete] for pair in pairs])
    ranks = dict(zip(complete, stats.mean_ranks(values).tolist(), strict=True))
    return {"ranks": ranks, "cd": stats.critical_difference(len(complete), len(pairs))}


def networks(runs: list[dict], latency: dict[str, float]) -> dict:
    """Parameters, MACs, latency on this CPU unless it is given, and accuracies of those trained as teachers."""
    found = {}
    for run in runs:
        name = f"{run['arch']}, {run['dataset']}, {run['image_size']} pixels"
        if name not in found and run["role"] in ("student", "teacher"):
            found[name] = {"params": run["params"], "taught": []}
            if is_known(run["arch"]) and 0 < run["n_cls"] < 1e5 and 8 <= run["image_size"] <= 512:
                with suppress(ModelError, RunError):  # a network that cannot be built here
                    cost = costs(create_model(run["arch"], run["n_cls"], run["image_size"]), run["image_size"])
                    found[name]["macs"] = cost["macs"]
                    found[name]["latency_ms"] = latency.get(name, round(cost["latency_ms"], 2))
        if run["role"] == "teacher" and run["state"] == "finished":
            found[name]["taught"].append(run["last"])
    return {name: {**net, "taught": net["taught"] and stats.mean_sd(net["taught"])} for name, net in found.items()}


def analyse(runs: list[dict], control: str | None, latency: dict[str, float]) -> dict:
    """All numbers of the page, from runs as facts() has them. Raises RunError if no run is of the control."""
    groups = group(runs)
    pairs = dict.fromkeys((*PUBLISHED["rows"][0]["pairs"], *sorted({pair for row in groups.values() for pair in row})))
    pairs = [pair for pair in pairs if any(pair in row for row in groups.values())]
    if control not in (None, *groups):
        raise RunError(f"--control {control}: there are runs of {', '.join(groups) or 'teachers only'}")
    control = control or next((method for method in ("kd", BASELINE) if method in groups), None)
    cells = {
        method: {pair: summarise(method, pair, row[pair], runs) for pair in pairs if pair in row}
        for method, row in groups.items()
    }
    for method, row in cells.items():
        for pair, cell in row.items():
            if control != method and pair in cells.get(control, ()):
                cell["vs"] = versus(cell, cells[control][pair], runs)
    calls = defaultdict(float)  # students of one call share the clock
    for run in runs:
        call, _ = run.pop("call"), run.pop("settings")
        calls[call] = max(calls[call], run["seconds"])
    counts = sorted({len(cell["trials"]) for row in cells.values() for cell in row.values()} - {0, 1})
    numbers = {"control": control, "pairs": pairs, "hours": sum(calls.values()) / 3600, "cells": cells}
    numbers |= {"across": across(cells), "rank": rank(cells, pairs), "networks": networks(runs, latency)}
    return rounded({**numbers, "detectable": {n: stats.detectable(n) for n in counts}, "runs": runs})


def rounded(value: object) -> object:
    """Six digits of every number, which other versions of numpy and scipy give as well; keys as JSON has them."""
    if isinstance(value, dict):
        return {str(key): rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
