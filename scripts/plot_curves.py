"""Plot the curves of runs side by side.

    python scripts/plot_curves.py save
    python scripts/plot_curves.py save/models/resnet32x4_* save/student_model/*_crd_* --of test_acc --output crd.pdf

Test accuracy and training loss by epoch, or what --of names; the loss of a first stage has its own panel.
"""

import argparse
import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from helper.options import Parser
from helper.util import cli_errors
from scripts.plotting import picture_file, read_runs, shown, write_picture

PANELS = {"test_acc": "test accuracy (%)", "test_loss": "test cross-entropy"}
PANELS |= {"train_acc": "training accuracy (%)", "train_loss": "training loss"}


def curves(runs: list[dict], keys: list[str]) -> Figure:
    """A panel for each key of metrics.jsonl, and one for first stages; a line for each run."""
    panels = [("epochs", key, PANELS[key]) for key in keys]
    panels += [("first", "train_loss", "loss of the first stage")] * any(run["first"] for run in runs)
    named = len(runs) <= 32  # as many lines can be told apart
    columns = -(-len(runs) // 22) * named  # of the legend
    figure = Figure(figsize=(4.2 * len(panels) + 2.4 * columns, 4.2))
    for axes, (stage, key, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for run in runs:  # also without a first stage: a run has the same colour in all panels
            axes.plot([line["epoch"] for line in run[stage]], [line[key] for line in run[stage]], linewidth=1.2)
        axes.set(xlabel="epoch", ylabel=label)
        if key.endswith("_loss") and axes.dataLim.ymin > 0:  # a likelihood may be negative
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(LogFormatter())
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    if named:
        names = [shown(run["name"], 40) for run in runs]
        figure.legend(figure.axes[0].lines, names, loc="outside right upper", ncols=columns, fontsize=8, handlelength=4)
    return figure


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="FOLDER", help="a run's folder, or one with runs at any depth")
    add("--of", nargs="+", choices=PANELS, default=["test_acc", "train_loss"], help="panels (test_acc train_loss)")
    add("--output", type=picture_file, default=Path("save/curves.png"), help=".png or .pdf (save/curves.png)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    opt = parse(argv)
    write_picture(curves(read_runs(opt.folders), list(dict.fromkeys(opt.of))), opt.output)


if __name__ == "__main__":
    sys.exit(cli_errors(main))
