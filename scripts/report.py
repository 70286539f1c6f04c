"""Tables, page and curves of all runs in a folder.

    python scripts/report.py save
    python scripts/report.py save --control none
    python scripts/report.py --check save

Prints a table of the runs and writes to the folder: a page with the methods compared over pairs of networks and trials
(report.html), its tables as Markdown (report.md) and for LaTeX (table.tex); every run with its numbers, command and
checkpoint (report.csv); the curves (report.png). --check recomputes all but the curves from the logs: exit code 1 if a
file differs.
"""

import argparse
import re
import sys
from pathlib import Path

import matplotlib

from helper import checkpoint
from helper.options import Parser
from helper.util import RunError, cli_errors
from scripts import page
from scripts.compare import analyse, digest, facts
from scripts.plot_curves import curves
from scripts.plotting import DAMAGED, begun, find_runs, shown, write_picture

NAMES = ("report.html", "report.md", "report.csv", "table.tex")
DRAWN_BY = f"Matplotlib v{matplotlib.__version__}"


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
    return page.markdown_table(rows)


def make(
    found: list[dict], root: Path, title: str, control: str | None, sums: dict[str, str], latency: dict[str, float]
) -> dict[str, str]:
    """The text of every file of the page.

    sums: SHA-256 of checkpoints, for those that are no longer there; latency: of networks, if it was measured before
    """
    runs = sorted((facts(run, root) for run in found), key=lambda run: run["folder"])
    for run in runs:
        run["sha256"] = digest(root / run["folder"]) or sums.get(run["folder"])
    numbers = {"title": title, **analyse(runs, control, latency)}
    texts = page.html(numbers), page.markdown(numbers), page.csv_text(numbers), page.latex(numbers)
    return dict(zip(NAMES, texts, strict=True))


def check(found: list[dict], root: Path) -> None:
    """Compare the files of the page with the logs. Exit code 1 if they differ."""
    try:
        there = {name: (root / name).read_bytes().decode(errors="replace") for name in NAMES}
    except OSError as error:
        raise RunError(f"{error.filename}: cannot be read ({error.strerror}); --check needs a report") from error
    try:
        numbers = page.embedded(there["report.html"])
        sums = {run["folder"]: run["sha256"] for run in numbers["runs"]}
        latency = {name: net["latency_ms"] for name, net in numbers["networks"].items() if "latency_ms" in net}
        made = make(found, root, str(numbers["title"]), numbers["control"], sums, latency)
    except DAMAGED as error:
        print(f"{root / 'report.html'}: was changed ({error!r})")
        raise SystemExit(1) from error
    if DRAWN_BY not in there["report.html"]:
        print(f"note: the figures were not drawn by this {DRAWN_BY} and are not compared")
        for texts in (there, made):
            texts["report.html"] = re.sub("<svg.*?</svg>", "", texts["report.html"], flags=re.DOTALL)
    wrong = [name for name in NAMES if there[name] != made[name]]
    for name in wrong:
        both = enumerate(zip(there[name], made[name], strict=False))
        at = next((i for i, (a, b) in both if a != b), min(len(there[name]), len(made[name])))
        old, new = (text[max(at - 60, 0) : at + 30] for text in (there[name], made[name]))
        print(f"{root / name}: has {old!r}, and the logs give {new!r}")
    if wrong:
        raise SystemExit(1)
    print(f"{root}: the report says what the logs of its {len(found)} runs say")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder with runs at any depth")
    parser.add_argument("--control", metavar="METHOD", help="the method that others are compared with (kd)")
    parser.add_argument("--check", action="store_true", help="compare the files of an earlier report with the logs")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    opt = parse(argv)
    root, found = opt.folder, find_runs([opt.folder])
    if opt.check:
        return check(found, root)
    texts = make(found, root, shown(root.resolve().name), opt.control, {}, {})
    runs = begun(found)
    print(table(runs))
    print("Students of one call share the teacher and the clock: the seconds are those of the whole call.")
    for name, content in texts.items():
        checkpoint.write(root / name, content.encode())
    write_picture(curves(runs, ["test_acc", "test_loss"]), root / "report.png")
    print(f"page: {root / 'report.html'}")


if __name__ == "__main__":
    sys.exit(cli_errors(main))
