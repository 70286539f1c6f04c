"""Curves of runs, side by side.

    python scripts/plot_curves.py save
    python scripts/plot_curves.py save/models/resnet32x4_* save/student_model/*_crd_* --of test_acc --output crd.pdf

Test accuracy and training loss by epoch, or what --of names; the loss of first stages has a panel of its own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from helper.options import Parser
from helper.util import cli_errors
from scripts.plotting import look, new_figure, picture_file, plain, read_runs, write_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

PANELS = {
    "test_acc": "test accuracy (%)",
    "test_loss": "test cross-entropy",
    "train_acc": "training accuracy (%)",
    "train_loss": "training loss",
}
FIRST_STAGE = "init_train_loss"
ENTRIES = 22  # of a legend's column


def curves(runs: list[dict], keys: list[str]) -> Figure:
    """A panel for each key of metrics.jsonl, a line for each run."""
    columns = -(-len(runs) // ENTRIES)
    figure = new_figure(4.2 * len(keys) + 2.4 * columns, 4.2)
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        panel(axes, runs, key)
    names = [plain(run["name"]) for run in runs]
    figure.legend(figure.axes[0].lines, names, loc="outside right upper", ncols=columns, fontsize=8, handlelength=4)
    return figure


def panel(axes: Axes, runs: list[dict], key: str) -> None:
    stage, epoch = ("first", "init_epoch") if key == FIRST_STAGE else ("epochs", "epoch")
    lowest = 1.0
    for i, run in enumerate(runs):
        if not run[stage]:
            continue
        values = [line[key] for line in run[stage]]
        step = -(-len(values) // 8)  # some eight markers a line, not all at the same epochs
        axes.plot(
            [line[epoch] for line in run[stage]],
            values,
            **look(i),
            markevery=(i % step, step),
            markersize=4,
            linewidth=1.2,
        )
        lowest = min(lowest, *values)
    axes.set(xlabel="epoch", ylabel=PANELS.get(key, "loss of the first stage"))
    if key.endswith("_loss") and lowest > 0:  # a likelihood's may be negative
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(minor_labels())
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)


def minor_labels() -> LogFormatter:
    """Plain numbers, where an axis of less than a decade needs more than its powers of ten."""
    from matplotlib.ticker import LogFormatter

    return LogFormatter()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, names = parser.add_argument, list(PANELS)
    add("folders", nargs="+", type=Path, metavar="FOLDER", help="a run's folder, or one with runs at any depth")
    add("--of", nargs="+", choices=names, default=["test_acc", "train_loss"], help="panels (test_acc train_loss)")
    add("--output", type=picture_file, default=Path("save/curves.png"), help=".png or .pdf (save/curves.png)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    opt = parse(argv)
    runs = read_runs(opt.folders)
    first_stage = [FIRST_STAGE] if any(run["first"] for run in runs) else []
    write_picture(curves(runs, [*dict.fromkeys(opt.of), *first_stage]), opt.output)


if __name__ == "__main__":
    sys.exit(cli_errors(main))
