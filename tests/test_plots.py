"""Plots and the table: what they show, that it can be read, and what the scripts say about bad input."""

import json
import shutil
from itertools import combinations

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

import train_student
import train_teacher
from dataset import load_dataset
from helper import checkpoint
from helper.util import cli_errors
from models import create_model
from scripts import plot_corr, plot_curves, plot_tsne, plotting, report


def call(script, *args):
    """-> exit code"""
    try:
        return cli_errors(lambda: script.main([*map(str, args)]))
    except SystemExit as stop:  # argparse
        return stop.code


@pytest.fixture(scope="module")
def save(image_folder, tmp_path_factory):
    """A teacher, a baseline and a student with a first stage, trained by the real scripts on 3 x 4 test images."""
    out = tmp_path_factory.mktemp("save")
    usual = ["--dataset", "folder", "--data_folder", image_folder, "--epochs", 2, "--batch_size", 22, "--output", out]
    assert call(train_teacher, *usual, "--model", "resnet8", "--device", "cpu") == 0
    students = ["--path_t", next(out.rglob("*_last.pth")), "--distill", "none", "factor", "--init_epochs", 3]
    assert call(train_student, *usual, *students, "--device", "cpu") == 0
    return out


@pytest.fixture
def path_t(save):
    return next(save.glob("models/*/*_last.pth"))


def plain_outputs(path, images, mean, std):
    """Features and logits of uint8 images, without the project's loader."""
    content = torch.load(path, weights_only=True)
    model = create_model(content["arch"], 3)
    model.load_state_dict(content["model"])
    x = torch.tensor((images / 255.0 - np.array(mean)) / np.array(std), dtype=torch.float32).permute(0, 3, 1, 2)
    feats, logits = model.eval()(x, is_feat=True)
    return feats[-1].detach(), logits.detach()


def assert_readable(figure):
    """No text leaves the figure or overlaps another."""
    FigureCanvasAgg(figure).draw()
    texts = [text for legend in figure.legends for text in legend.get_texts()]
    texts += [title for axes in figure.axes for title in (axes.title, axes._left_title)]
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        texts += [axis.label, *(tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high)]
    boxes, frame = [text.get_window_extent() for text in texts if text.get_text() and text.get_visible()], figure.bbox
    assert all(frame.x0 <= box.x0 < box.x1 <= frame.x1 and frame.y0 <= box.y0 < box.y1 <= frame.y1 for box in boxes)
    assert not any(box.padded(-1).overlaps(other.padded(-1)) for box, other in combinations(boxes, 2))


@pytest.mark.parametrize("value", [0.0, 0.1, -1e30])
def test_constant_logits_correlate_with_nothing(value):
    """The mean of 77 times 0.1 is rounded in float64: what is left would correlate with itself."""
    logits = np.random.default_rng(0).normal(size=(77, 4))
    logits[:, 2] = value
    found, others = plot_corr.correlation(logits), np.ix_([0, 1, 3], [0, 1, 3])
    assert (found[2] == 0).all() and (found[:, 2] == 0).all()
    np.testing.assert_allclose(found[others], np.corrcoef(logits[:, [0, 1, 3]].T), atol=1e-12)


@pytest.mark.parametrize("n", [1, 5])
def test_maps_have_one_scale(n):
    rng = np.random.default_rng(0)
    maps = {f"resnet8x4, similarity + kd, trial {i}": rng.uniform(-1, 1, (10, 10)) * (i + 1) for i in range(n)}
    figure = plot_corr.heat_maps(maps)
    images = [axes.images[0] for axes in figure.axes if axes.images]
    limit = max(np.abs(difference).max() for difference in maps.values())
    for image, (name, difference) in zip(images, maps.items(), strict=True):
        np.testing.assert_array_equal(image.get_array(), difference)
        assert image.get_clim() == (-limit, limit) and image.axes.get_title().replace("\n", " ").startswith(name)
    assert_readable(figure)


def test_plot_corr(save, path_t, image_folder, tmp_path, capsys):
    """The numbers printed are those of plain logits of every test image."""
    source = load_dataset("folder", image_folder)
    output, paths = tmp_path / "new" / "corr.png", [*save.glob("student_model/*/*_last.pth"), path_t]
    args = ["--path_t", path_t, "--path_s", *paths, "--data_folder", image_folder, "--output", output]
    assert call(plot_corr, *args) == 0
    assert output.read_bytes().startswith(b"\x89PNG") and list(output.parent.iterdir()) == [output]
    printed = dict(line.split(": mean absolute difference ") for line in capsys.readouterr().out.splitlines()[:3])
    assert set(printed) == {"resnet8, factor", "resnet8, baseline", "resnet8, teacher"}
    logits = [plain_outputs(path, source.test_images, source.mean, source.std)[1] for path in (path_t, *paths)]
    of_teacher, *of_students = [np.corrcoef(x.T) for x in logits]
    expected = sorted(np.abs(of_teacher - other).mean() for other in of_students)
    assert sorted(map(float, printed.values())) == pytest.approx(expected, abs=2e-4) and expected[1] > 1e-3


def test_networks_see_images_as_in_their_training(path_t, image_folder, tmp_path):
    """Mean and deviation of the checkpoint count; for a published one, which has none, those of the data set."""
    source, content, folder = (
        load_dataset("folder", image_folder),
        checkpoint.load(path_t),
        tmp_path / "resnet8_vanilla",
    )
    own, data = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}, {"mean": source.mean, "std": source.std}
    folder.mkdir()
    checkpoint.save(folder / "own.pth", {**content, **own})
    checkpoint.save(folder / "none.pth", {key: content[key] for key in ("model", "arch", "n_cls")})
    for name, moments in {"own": own, "none": data}.items():
        network = plotting.load_network(folder / f"{name}.pth", None, "--model")
        assert network.name == "resnet8, resnet8_vanilla"
        found = plotting.outputs(network, source, torch.device("cpu"))
        for a, b in zip(found, plain_outputs(network.path, source.test_images, **moments), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(b).max())


def test_images_of_a_tsne(image_folder):
    source = load_dataset("folder", image_folder)
    few, other, everything = (plot_tsne.select(source, *args) for args in ((5, 2, 0), (5, 2, 1), (1000, 10, 0)))
    index = [np.flatnonzero((source.test_images == image).all((1, 2, 3))).item() for image in few.test_images]
    assert len(index) == 5 and index == sorted(index) and set(few.test_labels) == {0, 1}
    assert (source.test_labels[index] == few.test_labels).all() and (other.test_images != few.test_images).any()
    assert (everything.test_images == source.test_images).all()


@pytest.mark.parametrize("n", [2, 20, 100])
def test_classes_of_a_tsne(n):
    """Each has its points and its look, and its name in the legend if they are few."""
    names = ["$x^$", "a name of so many words that it takes lines", *(f"class {c}" for c in range(2, n))]
    labels, points = np.arange(10 * n) % n, np.random.default_rng(0).normal(size=(10 * n, 2))
    figure = plot_tsne.scatter(points, labels, names, "wrn_40_2, wrn_40_2_vanilla: features of 2,000 test images")
    clouds = figure.axes[0].lines
    for c, cloud in enumerate(clouds):
        np.testing.assert_array_equal(cloud.get_xydata(), points[labels == c])
    assert len({(cloud.get_color(), cloud.get_marker()) for cloud in clouds}) == len(clouds) == n
    texts = [text.get_text().replace("\n", " ") for legend in figure.legends for text in legend.get_texts()]
    assert texts == (names if n <= 20 else [])
    assert_readable(figure)


def test_plot_tsne(path_t, image_folder, tmp_path, capsys):
    """Features may be of another data set than the network was trained on, logits may not."""
    args = ["--path", path_t, "--output", tmp_path / "tsne.pdf", "--data_folder", image_folder]
    assert call(plot_tsne, *args, "--of", "logits") == 0
    assert (tmp_path / "tsne.pdf").read_bytes().startswith(b"%PDF")
    digits = ["--dataset", "digits", "--samples", 40]
    assert call(plot_tsne, *args, *digits) == 0
    assert call(plot_tsne, *args, *digits, "--of", "logits") == 2 and str(path_t) in capsys.readouterr().err


def test_curves_are_the_runs(save):
    runs, keys = plotting.read_runs([save, save / "models"]), [*plot_curves.PANELS, "init_train_loss"]
    assert [run["name"] for run in runs] == ["resnet8, teacher", "resnet8, baseline", "resnet8, factor"]
    figure = plot_curves.curves(runs, keys[:-1])
    for axes, key in zip(figure.axes, keys, strict=True):
        for drawn, run in zip(axes.lines, runs, strict=True):
            lines = map(json.loads, (run["folder"] / "metrics.jsonl").read_text().splitlines())
            expected = [[line.get("epoch", line.get("init_epoch")), line[key]] for line in lines if key in line]
            assert drawn.get_xydata().tolist() == expected
    assert [len(drawn.get_xdata()) for drawn in figure.axes[-1].lines] == [0, 0, 3]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [run["name"] for run in runs]
    assert_readable(figure)


@pytest.mark.parametrize("n", [1, 6, 32])
def test_many_curves_are_told_apart(n):
    epochs = [{"epoch": e, "test_acc": e / 4, "train_loss": -e} for e in range(1, 241)]
    runs = [{"name": f"resnet8x4, similarity + kd, trial {i}", "epochs": epochs, "first": []} for i in range(n)]
    figure = plot_curves.curves(runs, ["test_acc", "train_loss"])
    assert len({(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}) == n
    assert figure.axes[1].get_yscale() == "linear"  # negative: a logarithm would hide it
    assert_readable(figure)


def test_runs_of_equal_names(save, tmp_path):
    """They are told apart by trial, data set and folder."""
    for name, trial, dataset in (("a", 1, "folder"), ("b", 2, "folder"), ("c", 2, "digits"), ("d", 2, "digits")):
        shutil.copytree(next(save.glob("student_model/*_factor_*")), tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        config["opt"]["trial"], config["dataset"] = trial, dataset
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    trials = ["trial 1", "trial 2, folder", *(f"trial 2, digits, {tmp_path / name}" for name in "cd")]
    found = [run["name"] for run in plotting.read_runs([tmp_path / name for name in "abcd"])]
    assert found == [f"resnet8, factor, {trial}" for trial in trials]


def test_names_of_runs():
    student = {"role": "student", "arch": "vgg8", "method": "crd"}
    assert plotting.name_of({**student, "weights": {"alpha": 0.0, "beta": 0.8}}) == "vgg8, crd"
    assert plotting.name_of({**student, "weights": {"alpha": 1.0, "beta": 0.8}}) == "vgg8, crd + kd"
    assert plotting.name_of({"role": "transfer", "arch": "vgg8", "student": "S"}) == "vgg8, transfer of S"


def test_report(save, tmp_path, capsys):
    """Its table has the last and best accuracy of metrics.jsonl, and that of the epoch which held-out images chose."""
    shutil.copytree(save, tmp_path / "save")
    metrics = next(tmp_path.glob("save/models/*/metrics.jsonl"))
    lines = list(map(json.loads, metrics.open()))
    assert "chosen" not in report.table(plotting.read_runs([save]))
    lines = [lines[0] | {"test_acc": 50.0, "val_acc": 60.0}, lines[1] | {"test_acc": 40.0, "val_acc": 70.0}]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert call(report, tmp_path / "save") == 0
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["network and method", "last", "best", "at epoch", "chosen", "parameters", "seconds"]
    assert rows[2][:6] == ["resnet8, teacher", "40.00", "50.00", "1 of 2", "40.00", "77,587"]
    assert [row[0] for row in rows[3:5]] == ["resnet8, baseline", "resnet8, factor"]
    assert (tmp_path / "save" / "report.png").exists()


@pytest.mark.parametrize("script", [plot_curves, report])
@pytest.mark.parametrize(("old", "new"), [("}", ""), ("arch", "other"), ("test_loss", "other"), (": 2,", ": null,")])
def test_damaged_runs(script, old, new, save, tmp_path, capsys):
    shutil.copytree(next(save.glob("models/*")), tmp_path / "run")
    path = tmp_path / "run" / ("config.json" if old == "arch" else "metrics.jsonl")
    path.write_text(path.read_text().replace(old, new))
    assert call(script, path.parent, *["--output", tmp_path / "a.png"] * (script is plot_curves)) == 2
    err = capsys.readouterr().err
    assert str(path) in err and err.count("\n") == 1
    assert not list(tmp_path.rglob("*.png")) and not list(tmp_path.rglob("*.md"))


@pytest.mark.parametrize(
    ("script", "args", "said"),
    [
        (plot_curves, ["{save}", "--output", "a.jpg"], "a.jpg"),
        (plot_curves, ["{save}", "--output", "dead.pth/a.png"], "dead.pth"),
        (plot_curves, ["{save}", "nowhere"], "nowhere"),
        (plot_tsne, ["--path", "dead.pth"], "dead.pth"),
        (plot_tsne, ["--path", "infinite.pth"], "infinite.pth"),
        (plot_tsne, ["--path", "{path_t}", "--device", "tpu"], "--device"),
        (plot_corr, ["--path_t", "{path_t}", "--path_s", "nowhere.pth"], "nowhere.pth"),
        (plot_corr, ["--path_t", "{path_t}", "--path_s", "seven.pth"], "seven.pth"),
    ],
)
def test_bad_input(script, args, said, save, path_t, image_folder, tmp_path, monkeypatch, capsys):
    """Among it a network that has collapsed, and one whose outputs are not finite."""
    monkeypatch.chdir(tmp_path)
    content = checkpoint.load(path_t)
    dead = {key: torch.zeros_like(value) for key, value in content["model"].items()}
    checkpoint.save(tmp_path / "dead.pth", {**content, "model": dead})
    checkpoint.save(tmp_path / "infinite.pth", {**content, "std": [0.0, 0.0, 0.0]})
    checkpoint.save(tmp_path / "seven.pth", {"model": create_model("resnet8", 7).state_dict(), "arch": "resnet8"})
    data = [] if script is plot_curves else ["--data_folder", image_folder]
    assert call(script, *(arg.format(save=save, path_t=path_t) for arg in args), *data) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and not list(tmp_path.rglob("*.png"))
