"""Table and curves of all runs below a folder.

    python scripts/report.py save

prints a table (method, last and best test accuracy, parameters, seconds), and writes it with the curves of
accuracy and loss into the folder (report.md, report.png).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Okabe and Ito's colours, told apart with any colour vision; the line styles repeat the distinction
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#999999")
STYLES = ("-", "--", "-.", ":")


def read_runs(root: Path) -> list[dict]:
    """Configuration and epochs of every run below `root`, teachers first, then in order of training."""
    runs = []
    for path in root.rglob("config.json"):
        try:
            config = json.loads(path.read_text())
            lines = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
            epochs = [line for line in lines if "epoch" in line]
            if epochs:
                order = (config["role"] == "student", path.stat().st_mtime_ns)
                runs.append({**config, "epochs": epochs, "name": name_of(config), "order": order})
        except FileNotFoundError:
            continue  # no epoch has ended yet
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(fail(f"{path.parent}: not a run's files ({error})")) from error
    runs.sort(key=lambda run: run["order"])
    names = Counter(run["name"] for run in runs)
    for run in runs:
        if names[run["name"]] > 1:
            run["name"] += f", trial {run['opt']['trial']}"
    return runs


def name_of(config: dict) -> str:
    if config["role"] == "teacher":
        return f"{config['arch']}, teacher"
    weights = config["weights"]
    with_kd = " + kd" if weights.get("alpha") and weights.get("beta") else ""
    return f"{config['arch']}, {config['method'] if config['distilled'] else 'alone'}{with_kd}"


def fail(message: str) -> int:
    print(f"report.py: {message}", file=sys.stderr)
    return 2


def table(runs: list[dict]) -> str:
    """One row a run."""
    rows = [("network and method", "last", "best", "at epoch", "parameters", "seconds")]
    for run in runs:
        last = run["epochs"][-1]
        best_epoch = next(line["epoch"] for line in run["epochs"] if line["test_acc"] == last["best_acc"])
        row = (
            run["name"],
            f"{last['test_acc']:.2f}",
            f"{last['best_acc']:.2f}",
            f"{best_epoch} of {last['epoch']}",
            f"{run['params']:,}",
            f"{last['seconds']:.0f}",
        )
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, tuple("-" * width for width in widths))
    return "\n".join("| " + " | ".join(align(row, widths)) + " |" for row in rows)


def align(row: tuple[str, ...], widths: list[int]) -> list[str]:
    """Names to the left, numbers to the right."""
    name, *numbers = zip(row, widths, strict=True)
    return [name[0].ljust(name[1]), *(cell.rjust(width) for cell, width in numbers)]


def curves(runs: list[dict], path: Path) -> None:
    """Test accuracy and test loss by epoch."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for i, run in enumerate(runs):
        style = {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i % len(STYLES)], "label": run["name"]}
        epochs = [e["epoch"] for e in run["epochs"]]
        left.plot(epochs, [e["test_acc"] for e in run["epochs"]], **style)
        right.plot(epochs, [e["test_loss"] for e in run["epochs"]], **style)
    left.set(xlabel="epoch", ylabel="test accuracy (%)")
    right.set(xlabel="epoch", ylabel="test cross-entropy", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where runs are, at any depth")
    root = parser.parse_args().folder
    runs = read_runs(root)
    if not runs:
        return fail(f"{root} holds no run with a finished epoch")
    text = table(runs)
    print(text)
    print("Students of one call share the teacher and the clock: the seconds of each are those of the call.")
    try:
        (root / "report.md").write_text(text + "\n")
        curves(runs, root / "report.png")
    except OSError as error:
        return fail(str(error))
    print(f"table: {root / 'report.md'}\npicture: {root / 'report.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
