"""t-SNE of what a network makes of test images: a point an image, a colour and marker a class.

    python scripts/plot_tsne.py --path save/models/resnet32x4_*/resnet32x4_last.pth --output tsne.pdf
    python scripts/plot_tsne.py --path resnet8_last.pth --of logits --classes 20

Pooled features may be those of another data set than the network was trained on (--dataset).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dataset import DataSource
from helper.options import Parser, named, number
from helper.util import RunError, choose_device, cli_errors
from models import model_dict
from scripts.plotting import (
    COLOURS,
    MARKERS,
    add_data_options,
    check_classes,
    load_data,
    load_network,
    new_figure,
    outputs,
    picture_file,
    plain,
    shown,
    write_picture,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PERPLEXITY = 40
FEWEST = 4  # images: with these, perplexity 1 is possible
LEGEND = 20  # classes, at most


def chosen(source: DataSource, samples: int, classes: int, seed: int) -> DataSource:
    """Of the test images at most `samples`, drawn from the first `classes` classes, in file order."""
    index = np.flatnonzero(source.test_labels < classes)
    index = np.sort(np.random.default_rng(seed).permutation(index)[:samples])
    if len(index) < FEWEST:
        raise RunError(f"--classes {classes}: these have {len(index)} test images, t-SNE needs {FEWEST}")
    return source._replace(test_images=source.test_images[index], test_labels=source.test_labels[index])


def tsne(values: np.ndarray, seed: int) -> np.ndarray:
    """(N, C) -> (N, 2), from where the first two principal components lie."""
    from sklearn.manifold import TSNE

    perplexity = min(PERPLEXITY, (len(values) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(values)


def scatter(points: np.ndarray, labels: np.ndarray, names: tuple[str, ...], title: str) -> Figure:
    """A point an image; the legend names the classes where they are few."""
    figure = new_figure(7, 5.4)
    axes = figure.subplots()
    present = np.unique(labels).tolist()
    for c in present:
        colour, hollow = COLOURS[c % len(COLOURS)], c // len(COLOURS) % 2
        axes.scatter(
            *points[labels == c].T,
            s=min(30, max(8, 12_000 / len(points))),
            facecolors="none" if hollow else colour,
            edgecolors=colour,
            marker=MARKERS[c % len(MARKERS)],
            linewidths=0.7,
            alpha=0.8,
            label=plain(names[c], 24),
        )
    axes.set_title(plain(title, 56), fontsize=10, loc="left")
    axes.set(xticks=[], yticks=[])
    axes.set_aspect("equal", adjustable="datalim")
    if len(present) <= LEGEND:
        figure.legend(loc="outside right upper", fontsize=9)
    return figure


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, model = parser.add_argument, named("network", model_dict)
    add("--path", type=Path, required=True, metavar="FILE", help="a checkpoint, ours or a published one")
    add("--model", **model, help="its network (read from the checkpoint, or from its folder's name)")
    add("--of", choices=("features", "logits"), default="features", help="what is drawn (features)")
    add("--classes", type=number(int, 1), default=10, help="how many, the first ones (10)")
    add("--samples", type=number(int, FEWEST), default=2000, help="test images, at most (2000)")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of the images drawn and of t-SNE (0)")
    add_data_options(parser)
    add("--output", type=picture_file, default=Path("save/tsne.png"), help=".png or .pdf (save/tsne.png)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    opt = parse(argv)
    device = choose_device(opt.device)
    network = load_network(opt.path, opt.model, "--model")
    source = load_data(opt, network)
    if opt.of == "logits":
        check_classes(network, source.n_cls, "the data set")
    source = chosen(source, opt.samples, opt.classes, opt.seed)
    values = dict(zip(("features", "logits"), outputs(network, source, device), strict=True))[opt.of]
    if not np.ptp(values, axis=0).any():
        raise RunError(f"{network.path}: gives the same {opt.of} for every image")
    n = len(source.test_labels)
    title = f"{network.name}: {opt.of} of {n:,} test images of {opt.dataset}"
    names = [shown(name) for name in source.class_names]
    write_picture(scatter(tsne(values, opt.seed), source.test_labels, names, title), opt.output)


if __name__ == "__main__":
    sys.exit(cli_errors(main))
