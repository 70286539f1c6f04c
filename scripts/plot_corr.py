"""How far a teacher's and its students' logits correlate otherwise between classes.

    python scripts/plot_corr.py --path_t save/models/resnet32x4_*/resnet32x4_last.pth \\
        --path_s save/student_model/*/resnet8x4_last.pth --output corr.pdf

Over all test images, the correlation matrix of the teacher's logits minus that of each student's; all students with one
scale. The mean absolute difference stands above each picture, and is printed.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from helper.options import Parser, named
from helper.util import choose_device, cli_errors
from models import model_dict
from scripts.plotting import (
    add_data_options,
    check_classes,
    distinct,
    load_data,
    load_network,
    new_figure,
    outputs,
    picture_file,
    plain,
    write_picture,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def correlation(logits: np.ndarray) -> np.ndarray:
    """(N, n_cls) -> (n_cls, n_cls) in float64; a class whose logit is constant has zeros, also on the diagonal."""
    logits = logits.astype(np.float64)
    varies = np.ptp(logits, axis=0) > 0  # not by the deviation: a constant's mean may be rounded
    z = np.where(varies, logits - logits.mean(0), 0)
    z /= np.where(varies, z.std(0), 1)
    return z.T @ z / len(z)


def heat_maps(differences: dict[str, np.ndarray]) -> Figure:
    """A map for each student, all of one scale."""
    n = len(differences)
    columns = n if n < 4 else math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    figure = new_figure(2.6 * columns + 1.4, 2.9 * rows + 0.4)
    limit = max(float(np.abs(d).max()) for d in differences.values()) or 1.0
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (name, difference) in zip(grid.flat, differences.items(), strict=False):
        shown = axes.imshow(difference, cmap="PuOr", vmin=-limit, vmax=limit, interpolation="nearest")
        axes.set_title(f"{plain(name, 26)}\nmean |difference| {np.abs(difference).mean():.3f}", fontsize=9)
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_major_locator().set_params(integer=True)
    for axes in grid.flat[n:]:
        axes.remove()
    figure.supxlabel("class", fontsize=10)
    figure.supylabel("class", fontsize=10)
    figure.colorbar(shown, ax=figure.axes, aspect=15 * rows, label="teacher's correlation - student's")
    return figure


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, model = parser.add_argument, named("network", model_dict)
    add("--path_t", type=Path, required=True, metavar="FILE", help="the teacher's checkpoint")
    add("--path_s", type=Path, required=True, nargs="+", metavar="FILE", help="students' checkpoints")
    add("--model_t", **model, help="the teacher's network (read from the checkpoint, or from its folder's name)")
    add("--model_s", **model, help="the students' network (as the teacher's)")
    add_data_options(parser)
    add("--output", type=picture_file, default=Path("save/corr.png"), help=".png or .pdf (save/corr.png)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    opt = parse(argv)
    device = choose_device(opt.device)
    teacher = load_network(opt.path_t, opt.model_t, "--model_t")
    students = [load_network(path, opt.model_s, "--model_s") for path in dict.fromkeys(opt.path_s)]
    for student in students:
        check_classes(student, teacher.n_cls, "the teacher")
    source = load_data(opt, teacher)
    check_classes(teacher, source.n_cls, "the data set")
    of_teacher = correlation(outputs(teacher, source, device)[1])
    apart = [s.trial for s in students], [s.path.stem for s in students], [s.path for s in students]
    names = distinct([s.name for s in students], *apart)
    differences = {}
    for student, name in zip(students, names, strict=True):
        differences[name] = of_teacher - correlation(outputs(student, source, device)[1])
        print(f"{name}: mean absolute difference {np.abs(differences[name]).mean():.4f}")
    write_picture(heat_maps(differences), opt.output)


if __name__ == "__main__":
    sys.exit(cli_errors(main))
