"""Table and curves of all runs in a folder.

    python scripts/report.py save

prints a table (method, last and best test accuracy, parameters, seconds) and writes it with the curves of accuracy and
loss to the folder (report.md, report.png).
"""

import argparse
import sys
from pathlib import Path

from helper import checkpoint
from helper.options import Parser
from helper.util import cli_errors
from scripts.plot_curves import curves
from scripts.plotting import read_runs, write_picture


def table(runs: list[dict]) -> str:
    """One row per run; with a column for runs that chose an epoch by held-out images, if there are any."""
    rows = [["network and method", "last", "best", "at epoch", "chosen", "parameters", "seconds"]]
    for run in runs:
        last, best = run["epochs"][-1], max(run["epochs"], key=lambda line: line["test_acc"])  # the first of equals
        row = [run["name"], f"{last['test_acc']:.2f}", f"{best['test_acc']:.2f}"]
        held_out = [line for line in run["epochs"] if line["val_acc"] >= 0]
        chosen = f"{max(held_out, key=lambda line: line['val_acc'])['test_acc']:.2f}" if held_out else "-"
        row += [f"{best['epoch']:.0f} of {last['epoch']:.0f}", chosen, f"{run['params']:,}", f"{last['seconds']:.0f}"]
        rows.append(row)
    if all(row[4] == "-" for row in rows[1:]):
        rows = [row[:4] + row[5:] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    aligned = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in aligned)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder with runs at any depth")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    root = parse(argv).folder
    runs = read_runs([root])
    text = table(runs)
    print(f"{text}\nStudents of one call share the teacher and the clock: the seconds are those of the whole call.")
    checkpoint.write(root / "report.md", (text + "\n").encode())
    print(f"table: {root / 'report.md'}")
    write_picture(curves(runs, ["test_acc", "test_loss"]), root / "report.png")


if __name__ == "__main__":
    sys.exit(cli_errors(main))
