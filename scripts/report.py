"""Table and curves of all runs below a folder.

    python scripts/report.py save

prints a table (method, last and best test accuracy, parameters, seconds), and writes it with the curves of
accuracy and loss into the folder (report.md, report.png).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from helper import checkpoint
from helper.options import Parser
from helper.util import cli_errors
from scripts.plot_curves import curves
from scripts.plotting import read_runs, write_picture


def table(runs: list[dict]) -> str:
    """One row a run; with a column for runs that held out images to choose an epoch by, if there are any."""
    head = ("network and method", "last", "best", "at epoch", "chosen", "parameters", "seconds")
    rows = [head, *map(cells, runs)]
    if all(row[4] == "-" for row in rows[1:]):
        rows = [row[:4] + row[5:] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, tuple("-" * width for width in widths))
    return "\n".join("| " + " | ".join(align(row, widths)) + " |" for row in rows)


def cells(run: dict) -> tuple[str, ...]:
    last = run["epochs"][-1]
    best = max(run["epochs"], key=lambda line: line["test_acc"])  # the first of equals
    held_out = [line for line in run["epochs"] if isinstance(line.get("val_acc"), float)]
    chosen = max(held_out, key=lambda line: line["val_acc"]) if held_out else None
    return (
        run["name"],
        f"{last['test_acc']:.2f}",
        f"{best['test_acc']:.2f}",
        f"{best['epoch']} of {last['epoch']}",
        f"{chosen['test_acc']:.2f}" if chosen else "-",
        f"{run['params']:,}",
        f"{last['seconds']:.0f}",
    )


def align(row: tuple[str, ...], widths: list[int]) -> list[str]:
    """Names to the left, numbers to the right."""
    name, *numbers = zip(row, widths, strict=True)
    return [name[0].ljust(name[1]), *(cell.rjust(width) for cell, width in numbers)]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where runs are, at any depth")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    root = parse(argv).folder
    runs = read_runs([root])
    text = table(runs)
    print(text)
    print("Students of one call share the teacher and the clock: the seconds of each are those of the call.")
    checkpoint.write(root / "report.md", (text + "\n").encode())
    print(f"table: {root / 'report.md'}")
    write_picture(curves(runs, ["test_acc", "test_loss"]), root / "report.png")


if __name__ == "__main__":
    sys.exit(cli_errors(main))
