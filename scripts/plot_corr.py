"""Plot how differently the logits of a teacher and its students correlate between classes.

    python scripts/plot_corr.py --path_t save/models/resnet32x4_*/resnet32x4_last.pth \\
        --path_s save/student_model/*/resnet8x4_last.pth --output corr.pdf

For each student, the correlation matrix of the teacher's logits minus the student's, over all test images and with one
colour scale. The mean absolute difference is printed, and stands above each map.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from helper.options import Parser
from helper.util import cli_errors
from scripts import plotting


def correlation(logits: np.ndarray) -> np.ndarray:
    """(N, n_cls) -> (n_cls, n_cls) in float64; zeros for a class whose logit is constant."""
    with np.errstate(invalid="ignore"):
        matrix = np.corrcoef(logits, rowvar=False, dtype=np.float64)
    constant = np.ptp(logits, axis=0) == 0  # not by the deviation: a constant's mean may be rounded
    matrix[constant] = matrix[:, constant] = 0
    return matrix


def heat_maps(differences: dict[str, np.ndarray]) -> Figure:
    """A map for each student, all with one scale."""
    columns = min(len(differences), 4)
    rows = -(-len(differences) // columns)
    figure = Figure(figsize=(2.6 * columns + 1.4, 2.9 * rows + 0.4))
    limit = max(float(np.abs(d).max()) for d in differences.values()) or 1.0
    for i, (name, difference) in enumerate(differences.items(), 1):
        axes = figure.add_subplot(rows, columns, i)
        image = axes.imshow(difference, cmap="PuOr", vmin=-limit, vmax=limit, interpolation="nearest")
        axes.set_title(f"{plotting.shown(name, 26)}\nmean |difference| {np.abs(difference).mean():.3f}", fontsize=9)
    figure.supxlabel("class", fontsize=10)
    figure.supylabel("class", fontsize=10)
    figure.colorbar(image, ax=figure.axes, aspect=15 * rows, label="teacher's correlation - student's")
    return figure


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--path_t", type=Path, required=True, metavar="FILE", help="the teacher's checkpoint")
    add("--path_s", type=Path, required=True, nargs="+", metavar="FILE", help="students' checkpoints")
    add("--model_t", metavar="NAME", help="the teacher's network (read from the checkpoint, or from its folder's name)")
    add("--model_s", metavar="NAME", help="the students' network (likewise)")
    add("--part_t", metavar="KEY", help="which network of a teacher's checkpoint that holds several")
    add("--part_s", metavar="KEY", help="likewise of the students' checkpoints")
    plotting.add_data_options(parser)
    add("--output", type=plotting.picture_file, default=Path("save/corr.png"), help=".png or .pdf (save/corr.png)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    opt = parse(argv)
    teacher = plotting.load_network(opt.path_t, opt.model_t, "--model_t", opt.part_t)
    students = [plotting.load_network(path, opt.model_s, "--model_s", opt.part_s) for path in dict.fromkeys(opt.path_s)]
    source = plotting.load_data(opt, teacher, *students)
    target, differences = correlation(plotting.outputs(teacher, source, opt.device)[1]), {}
    names = plotting.distinct(*([getattr(s, key) for s in students] for key in ("name", "trial", "path")))
    for student, name in zip(students, names, strict=True):
        differences[name] = target - correlation(plotting.outputs(student, source, opt.device)[1])
        print(f"{name}: mean absolute difference {np.abs(differences[name]).mean():.4f}")
    plotting.write_picture(heat_maps(differences), opt.output)


if __name__ == "__main__":
    sys.exit(cli_errors(main))
