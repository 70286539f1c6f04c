"""Plot a t-SNE of a network's features or logits: a point for each test image, a colour and marker for each class.

    python scripts/plot_tsne.py --path save/models/resnet32x4_*/resnet32x4_last.pth --output tsne.pdf
    python scripts/plot_tsne.py --path resnet8_last.pth --of logits --classes 20

Pooled features may be of another data set than the network was trained on (--dataset).
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from cycler import cycler
from matplotlib.figure import Figure
from sklearn.manifold import TSNE

from dataset import DataSource
from helper.options import Parser, number
from helper.util import RunError, cli_errors
from scripts import plotting

FEWEST, LEGEND = 4, 20  # images that a perplexity of 1 needs; classes at most
MARKERS = cycler(marker=[*"osD^v<>pPX*hd"]) * plotting.COLOURS  # 104


def select(source: DataSource, samples: int, classes: int, seed: int) -> DataSource:
    """At most `samples` test images, drawn from the first `classes` classes, in file order."""
    index = np.random.default_rng(seed).permutation(np.flatnonzero(source.test_labels < classes))
    index = np.sort(index[:samples])
    if len(index) < FEWEST:
        raise RunError(f"--classes {classes}: these have {len(index)} test images, t-SNE needs {FEWEST}")
    return source._replace(test_images=source.test_images[index], test_labels=source.test_labels[index])


def scatter(points: np.ndarray, labels: np.ndarray, names: tuple[str, ...], title: str) -> Figure:
    """A point for each image; the legend names the classes if they are few."""
    figure = Figure(figsize=(7, 5.4))
    axes = figure.subplots()
    axes.set_prop_cycle(MARKERS)
    for c in (present := np.unique(labels).tolist()):
        axes.plot(*points[labels == c].T, linestyle="", markersize=4, alpha=0.8)
    axes.set_title(plotting.shown(title, 56), fontsize=10, loc="left")
    axes.set(xticks=[], yticks=[])
    axes.set_aspect("equal", adjustable="datalim")
    if len(present) <= LEGEND:
        figure.legend(axes.lines, [plotting.shown(names[c], 24) for c in present], loc="outside right upper")
    return figure


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--path", type=Path, required=True, metavar="FILE", help="a checkpoint, ours or a published one")
    add("--model", metavar="NAME", help="its network (read from the checkpoint, or from its folder's name)")
    add("--part", metavar="KEY", help="which network of a checkpoint that holds several")
    add("--of", choices=("features", "logits"), default="features", help="what is plotted (features)")
    add("--classes", type=number(int, 1), default=10, help="the first so many classes (10)")
    add("--samples", type=number(int, FEWEST), default=2000, help="test images at most (2000)")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of the images drawn and of t-SNE (0)")
    plotting.add_data_options(parser)
    add("--output", type=plotting.picture_file, default=Path("save/tsne.png"), help=".png or .pdf (save/tsne.png)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    opt = parse(argv)
    network = plotting.load_network(opt.path, opt.model, "--model", opt.part)
    source = plotting.load_data(opt, network, other_classes=opt.of == "features")
    source = select(source, opt.samples, opt.classes, opt.seed)
    values = plotting.outputs(network, source, opt.device)[opt.of == "logits"]
    if not np.ptp(values, axis=0).any():
        raise RunError(f"{network.path}: its {opt.of} are the same for every image")
    title = f"{network.name}: {opt.of} of {len(values):,} test images of {opt.dataset}"
    points = TSNE(perplexity=min(40, (len(values) - 1) / 3), init="pca", random_state=opt.seed).fit_transform(values)
    plotting.write_picture(scatter(points, source.test_labels, source.class_names, title), opt.output)


if __name__ == "__main__":
    sys.exit(cli_errors(main))
