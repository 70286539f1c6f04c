"""The pictures: what they show, that all of it can be read, and what their scripts say to wrong input."""

import json
import os
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

import train_student
import train_teacher
from dataset import load_dataset
from helper import checkpoint
from helper.util import RunError
from models import create_model
from scripts import plot_corr, plot_curves, plot_tsne, plotting, report

ROOT = Path(__file__).resolve().parent.parent
SHORT = ["--epochs", "2", "--batch_size", "22", "--device", "cpu"]
MAGIC = {".png": b"\x89PNG", ".pdf": b"%PDF"}


def run_main(script, args, patch):
    """Exit code of a script's main, in this process."""
    patch.setattr(sys, "argv", [f"{script.__name__.rpartition('.')[2]}.py", *map(str, args)])
    try:
        return script.main()
    except SystemExit as stop:  # argparse
        return stop.code


def call(script, args, monkeypatch, capsys):
    """-> exit code, stdout, stderr."""
    code = run_main(script, args, monkeypatch)
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.fixture(scope="module")
def save(image_folder, tmp_path_factory):
    """A teacher, a student alone and one with a first stage, trained by the real scripts on 3 x 4 test images."""
    out = tmp_path_factory.mktemp("save")
    usual = ["--dataset", "folder", "--data_folder", image_folder, *SHORT, "--output", out]
    with pytest.MonkeyPatch.context() as patch:
        assert run_main(train_teacher, [*usual, "--model", "resnet8"], patch) == 0
        path_t = next(out.rglob("*_last.pth"))
        students = ["--path_t", path_t, "--distill", "none", "factor", "--init_epochs", "3"]
        assert run_main(train_student, [*usual, *students], patch) == 0
    return out


@pytest.fixture
def path_t(save):
    return next(save.glob("models/*/*_last.pth"))


@pytest.fixture
def path_s(save):
    return sorted(save.glob("student_model/*/*_last.pth"))


@pytest.fixture
def source(image_folder):
    return load_dataset("folder", image_folder)


def plain_outputs(path, images, mean, std):
    """Features and logits of uint8 images, image by image, without the project's loader."""
    content = torch.load(path, weights_only=True)
    model = create_model(content["arch"], content["n_cls"])
    model.load_state_dict(content["model"])
    x = (images / 255.0 - np.array(mean)) / np.array(std)
    found = [model.eval()(torch.tensor(i, dtype=torch.float32).permute(2, 0, 1)[None], is_feat=True) for i in x]
    return np.concatenate([g[-1].detach() for g, _ in found]), np.concatenate([z.detach() for _, z in found])


def texts_drawn(figure):
    """Texts that are seen, with their boxes in pixels."""
    FigureCanvasAgg(figure).draw()
    texts = [text for legend in figure.legends for text in legend.get_texts()]
    texts += [title for axes in figure.axes for title in (axes.title, axes._left_title)]
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        texts += [axis.label, *(tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high)]
    texts += filter(None, (figure._supxlabel, figure._supylabel))
    return [(text, text.get_window_extent()) for text in texts if text.get_text() and text.get_visible()]


def assert_readable(figure):
    """No text leaves the figure or lies upon another."""
    boxes, frame = texts_drawn(figure), figure.bbox
    assert boxes
    for text, box in boxes:
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1, text
    for (a, box), (b, other) in combinations(boxes, 2):
        assert not box.padded(-1).overlaps(other.padded(-1)), (a, b)


# plot_corr


def logits_of(n=200, n_cls=7, seed=0):
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(n, n_cls)) @ rng.normal(size=(n_cls, n_cls))
    return (mixed + 100 * rng.normal(size=n_cls)).astype(np.float32)


def test_correlation_is_numpys():
    logits = logits_of()
    expected = np.corrcoef(logits.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(plot_corr.correlation(logits), expected, rtol=0, atol=1e-12)


def test_correlation_is_of_standardised_logits():
    """Neither the scale nor the offset of a class, nor the order of the images, matters; signs and classes do."""
    logits = logits_of().astype(np.float64)
    found = plot_corr.correlation(logits)
    other = logits[::-1] * np.arange(1, 8) + 5.0
    np.testing.assert_allclose(plot_corr.correlation(other), found, rtol=0, atol=1e-12)
    signs = np.array([1, -1, 1, 1, 1, 1, 1])
    np.testing.assert_allclose(plot_corr.correlation(logits * signs), found * np.outer(signs, signs), atol=1e-12)
    np.testing.assert_allclose(plot_corr.correlation(logits[:, ::-1]), found[::-1, ::-1], rtol=0, atol=1e-12)
    assert np.abs(found[0, 1:]).min() > 1e-3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, -1e30])
def test_constant_logits(value, dtype):
    """The mean of 77 times 0.1 is rounded in float64: what is left would correlate fully with itself."""
    logits = logits_of(n=77).astype(dtype)
    logits[:, [2, 5]] = value
    found = plot_corr.correlation(logits)
    assert (found[[2, 5]] == 0).all() and (found[:, [2, 5]] == 0).all()
    others = [0, 1, 3, 4, 6]
    expected = np.corrcoef(logits[:, others].astype(np.float64), rowvar=False)
    np.testing.assert_allclose(found[np.ix_(others, others)], expected, rtol=0, atol=1e-12)
    assert (plot_corr.correlation(np.full((77, 3), value, dtype)) == 0).all()


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6, 15])
def test_maps_have_one_scale_and_are_readable(n):
    rng = np.random.default_rng(0)
    maps = {f"resnet8x4, similarity + kd, trial {i}": rng.uniform(-1, 1, (10, 10)) * (i + 1) / n for i in range(n)}
    figure = plot_corr.heat_maps(maps)
    shown = [axes.images[0] for axes in figure.axes if axes.images]
    limit = max(np.abs(d).max() for d in maps.values())
    assert len(shown) == n
    for image, (name, difference) in zip(shown, maps.items(), strict=True):
        assert image.get_clim() == (-limit, limit) and image.cmap.name == "PuOr"
        np.testing.assert_array_equal(image.get_array(), difference)
        title = image.axes.get_title().replace("\n", " ")
        assert title == f"{name} mean |difference| {np.abs(difference).mean():.3f}"
    assert_readable(figure)


def test_maps_of_no_difference():
    figure = plot_corr.heat_maps({"a": np.zeros((3, 3))})
    (image,) = figure.axes[0].images
    assert np.isfinite(image.get_clim()).all() and image.norm(0.0) == 0.5  # the middle of the colours


@pytest.mark.parametrize("suffix", [".png", ".pdf"])
def test_plot_corr(suffix, path_t, path_s, image_folder, source, tmp_path, monkeypatch, capsys):
    """The numbers printed are those of plain logits of every test image; data set and size are the checkpoint's."""
    output = tmp_path / "new" / f"corr{suffix}"
    args = ["--path_t", path_t, "--path_s", *path_s, path_t, "--data_folder", image_folder, "--output", output]
    code, out, err = call(plot_corr, args, monkeypatch, capsys)
    assert code == 0 and err == ""
    assert output.read_bytes().startswith(MAGIC[suffix]) and list(output.parent.iterdir()) == [output]
    about = torch.load(path_t, weights_only=True)
    of = [
        np.corrcoef(plain_outputs(p, source.test_images, about["mean"], about["std"])[1].astype(float), rowvar=False)
        for p in (path_t, *path_s)
    ]
    apart = [np.abs(of[0] - other).mean() for other in of[1:]]
    lines = out.splitlines()
    assert {line.partition(":")[0] for line in lines[:2]} == {"resnet8, factor", "resnet8, alone"}
    printed = [float(line.rpartition(" ")[2]) for line in lines[:2]]
    assert printed == pytest.approx(apart, abs=2e-4) and min(apart) > 1e-3
    assert lines[2:] == ["resnet8, teacher: mean absolute difference 0.0000", f"picture: {output}"]


def test_networks_see_images_as_in_their_training(path_t, source, tmp_path):
    """Mean and deviation of the checkpoint count; where it has none, as a published one, those of the data set."""
    content = checkpoint.load(path_t)
    own = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    folder = tmp_path / "resnet8_vanilla"
    folder.mkdir()
    checkpoint.save(folder / "own.pth", {**content, **own})
    checkpoint.save(folder / "none.pth", {key: content[key] for key in ("model", "arch", "n_cls")})
    data = {"mean": source.mean, "std": source.std}
    for name, moments in {"own": own, "none": data}.items():
        network = plotting.load_network(folder / f"{name}.pth", None, "--model")
        assert network.name == "resnet8, resnet8_vanilla" and network.n_cls == 3
        found = plotting.outputs(network, source, torch.device("cpu"))
        expected = plain_outputs(folder / f"{name}.pth", source.test_images, **moments)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(b).max())
        assert found[0].shape == (12, 64) and found[1].shape == (12, 3)


# plot_tsne


def test_chosen(source):
    few = plot_tsne.chosen(source, 5, 2, seed=0)
    assert len(few.test_images) == len(few.test_labels) == 5 and set(few.test_labels) == {0, 1}
    of = [np.flatnonzero((source.test_images == image).all((1, 2, 3))).item() for image in few.test_images]
    assert of == sorted(of) and (source.test_labels[of] == few.test_labels).all()
    again, other = (plot_tsne.chosen(source, 5, 2, seed).test_images for seed in (0, 1))
    assert (again == few.test_images).all() and (other != few.test_images).any()
    everything = plot_tsne.chosen(source, 1000, 10, seed=0)
    assert (everything.test_images == source.test_images).all()


def test_tsne_keeps_neighbours():
    """Three clouds far apart in 20 dimensions: in the plane every point's nearest neighbour is of its cloud."""
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3
    values = (rng.normal(size=(3, 20)) * 10)[labels] + rng.normal(size=(90, 20))
    points = plot_tsne.tsne(values.astype(np.float32), seed=0)
    apart = np.square(points[:, None] - points[None]).sum(2) + np.diag(np.full(90, np.inf))
    assert points.shape == (90, 2) and (labels[apart.argmin(1)] == labels).all()
    np.testing.assert_array_equal(plot_tsne.tsne(values.astype(np.float32), seed=0), points)
    assert np.isfinite(plot_tsne.tsne(values[: plot_tsne.FEWEST].astype(np.float32), seed=0)).all()


def test_scatter():
    """Points and names of each class; a legend where there are few. Folders' names are shown as they are."""
    rng = np.random.default_rng(0)
    names = ("_hidden", "$x^$", "a name of so many words that it takes several lines in the legend")
    names += tuple(f"class {c}" for c in range(100 - len(names)))
    for n in (2, 10, 20, 100):
        labels = np.arange(10 * n) % n
        points = rng.normal(size=(10 * n, 2))
        figure = plot_tsne.scatter(points, labels, names, "wrn_40_2, wrn_40_2_vanilla: features of 2,000 test images")
        clouds = figure.axes[0].collections
        for c, cloud in enumerate(clouds):
            np.testing.assert_array_equal(cloud.get_offsets(), points[labels == c])
        assert len({look(cloud) for cloud in clouds}) == len(clouds) == n
        said = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
        shown = [text.replace("\n", " ").replace(r"\$", "$").strip() for text in said]
        assert shown == (list(names[:n]) if n <= 20 else [])
        assert_readable(figure)


def look(cloud):
    """Colour, whether filled, and form."""
    return tuple(cloud.get_edgecolors()[0]), len(cloud.get_facecolors()), cloud.get_paths()[0].vertices.tobytes()


@pytest.mark.parametrize(("suffix", "of"), [(".png", "features"), (".pdf", "logits")])
def test_plot_tsne(suffix, of, path_t, image_folder, tmp_path, monkeypatch, capsys):
    output = tmp_path / f"tsne{suffix}"
    args = ["--path", path_t, "--data_folder", image_folder, "--output", output, "--of", of]
    assert call(plot_tsne, args, monkeypatch, capsys) == (0, f"picture: {output}\n", "")
    assert output.read_bytes().startswith(MAGIC[suffix]) and list(tmp_path.iterdir()) == [output]


def test_tsne_of_another_data_set(path_t, tmp_path, monkeypatch, capsys):
    """Features need not be of the classes that the network knows; logits are."""
    args = ["--path", path_t, "--dataset", "digits", "--samples", "40", "--output", tmp_path / "a.png"]
    assert call(plot_tsne, args, monkeypatch, capsys)[0] == 0
    with Image.open(tmp_path / "a.png") as image:
        assert min(image.size) > 500
    code, _, err = call(plot_tsne, [*args, "--of", "logits"], monkeypatch, capsys)
    assert code == 2 and err == f"plot_tsne.py: {path_t}: was trained for 3 classes, the data set has 10\n"


def test_a_network_that_has_collapsed(path_t, image_folder, tmp_path, monkeypatch, capsys):
    """Nothing to see in a t-SNE; the correlations are finite."""
    content = checkpoint.load(path_t)
    content["model"] = {key: torch.zeros_like(value) for key, value in content["model"].items()}
    dead = tmp_path / "dead.pth"
    checkpoint.save(dead, content)
    args = ["--data_folder", image_folder, "--output", tmp_path / "x.png"]
    code, _, err = call(plot_tsne, ["--path", dead, *args], monkeypatch, capsys)
    assert code == 2 and err == f"plot_tsne.py: {dead}: gives the same features for every image\n"
    code, out, err = call(plot_corr, ["--path_t", path_t, "--path_s", dead, *args], monkeypatch, capsys)
    assert code == 0 and err == "" and 0 < float(out.splitlines()[0].split()[-1]) < 1


# plot_curves and report


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_curves_are_the_runs(save):
    runs = plotting.read_runs([save])
    assert [run["name"] for run in runs] == ["resnet8, teacher", "resnet8, alone", "resnet8, factor"]
    keys = ["test_acc", "test_loss", "train_acc", "train_loss", "init_train_loss"]
    figure = plot_curves.curves(runs, keys)
    for key, axes in zip(keys, figure.axes, strict=True):
        expected = []
        for run in runs:
            lines = [line for line in lines_of(run["folder"]) if key in line]
            if lines:
                expected.append([[line.get("epoch", line.get("init_epoch")), line[key]] for line in lines])
        assert [line.get_xydata().tolist() for line in axes.lines] == expected
    assert len(figure.axes[-1].lines) == 1 and len(figure.axes[-1].lines[0].get_xdata()) == 3  # factor's first stage
    assert figure.axes[-1].lines[0].get_color() == figure.axes[0].lines[2].get_color()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [run["name"] for run in runs]
    assert_readable(figure)


@pytest.mark.parametrize("n", [1, 6, 15, 50])
def test_many_curves_are_told_apart(n):
    epochs = [{"epoch": e, "test_acc": e / 4, "train_loss": -e} for e in range(1, 241)]
    runs = [{"name": f"resnet8x4, similarity + kd, trial {i}", "epochs": epochs, "first": []} for i in range(n)]
    figure = plot_curves.curves(runs, ["test_acc", "train_loss"])
    assert len({(line.get_color(), line.get_linestyle(), line.get_marker()) for line in figure.axes[0].lines}) == n
    assert figure.axes[1].get_yscale() == "linear"  # negative: a logarithm would hide it
    assert_readable(figure)


@pytest.mark.parametrize("suffix", [".png", ".pdf"])
def test_plot_curves(suffix, save, tmp_path, monkeypatch, capsys):
    output = tmp_path / f"curves{suffix}"
    folders = [path.parent for path in save.rglob("config.json")]
    assert call(plot_curves, [*folders, "--output", output], monkeypatch, capsys) == (0, f"picture: {output}\n", "")
    assert output.read_bytes().startswith(MAGIC[suffix]) and list(tmp_path.iterdir()) == [output]


def test_runs_of_equal_names(save, path_s, tmp_path):
    """A run named twice is shown once; others of its name are told apart by trial, data set and folder."""
    folders = []
    for name, trial, dataset in (
        ("a", "1", "folder"),
        ("b", "2", "folder"),
        ("c", "2", "digits"),
        ("d", "2", "digits"),
    ):
        folders.append(tmp_path / name)
        shutil.copytree(path_s[0].parent, folders[-1])
        config = json.loads((folders[-1] / "config.json").read_text())
        config["opt"]["trial"], config["dataset"] = trial, dataset
        (folders[-1] / "config.json").write_text(json.dumps(config))
    names = [run["name"] for run in plotting.read_runs([*folders[::-1], tmp_path])]
    digits = "resnet8, factor, trial 2, digits"
    assert names == [
        f"{digits}, {folders[3]}",
        f"{digits}, {folders[2]}",
        "resnet8, factor, trial 2, folder",
        "resnet8, factor, trial 1",
    ]
    with pytest.raises(RunError, match="nowhere holds no run with a finished epoch"):
        plotting.read_runs([save, tmp_path / "nowhere"])


def test_names_of_runs():
    """By role, as scripts/report.py's table shows them."""
    student = {"role": "student", "arch": "vgg8", "method": "crd", "distilled": True, "weights": {"beta": 0.8}}
    for config, name in (
        ({**student, "weights": {"alpha": 1.0, "beta": 0.8}}, "vgg8, crd + kd"),
        (student, "vgg8, crd"),
        ({**student, "method": "none", "distilled": False}, "vgg8, alone"),
        ({"role": "teacher", "arch": "vgg13"}, "vgg13, teacher"),
        ({"role": "transfer", "arch": "vgg8", "student": "S_vgg8"}, "vgg8, transfer of S_vgg8"),
    ):
        assert plotting.name_of(config) == name


def test_report(save, tmp_path, monkeypatch, capsys):
    """Its table has the last and best of metrics.jsonl; its picture is in the same folder."""
    shutil.copytree(save, tmp_path / "save")
    teacher = next(tmp_path.glob("save/models/*"))
    lines = [{**line, "test_acc": acc} for line, acc in zip(lines_of(teacher), (50.0, 40.0), strict=True)]
    (teacher / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, out, err = call(report, [tmp_path / "save"], monkeypatch, capsys)
    assert code == 0 and err == ""
    table = (tmp_path / "save" / "report.md").read_text()
    assert out.startswith(table) and out.splitlines()[-1] == f"picture: {tmp_path / 'save' / 'report.png'}"
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]
    assert rows[0] == ["network and method", "last", "best", "at epoch", "parameters", "seconds"]
    assert rows[2][:5] == ["resnet8, teacher", "40.00", "50.00", "1 of 2", "77,587"]
    assert [row[0] for row in rows[3:]] == ["resnet8, alone", "resnet8, factor"]
    assert (tmp_path / "save" / "report.png").read_bytes().startswith(MAGIC[".png"])


# what all of them say to wrong input


def test_help_shows_an_example_and_loads_no_library_for_pictures():
    code = "import sys; from scripts import plot_corr, plot_curves, plot_tsne\n"
    code += "for script in (plot_corr, plot_curves, plot_tsne):\n"
    code += "    try: script.parse(['--help'])\n    except SystemExit as stop: assert stop.code == 0\n"
    code += "assert not {'matplotlib', 'sklearn'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("plot_corr", "plot_curves", "plot_tsne"):
        assert f"python scripts/{name}.py " in done.stdout


def test_no_display_is_needed(save, tmp_path):
    """As a user calls it, from elsewhere, where the default backend would open a window."""
    command = [sys.executable, ROOT / "scripts" / "plot_curves.py", save, "--output", "new/a.PDF"]
    env = {key: value for key, value in os.environ.items() if key != "DISPLAY"} | {"MPLBACKEND": "TkAgg"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"picture: {Path('new/a.PDF')}\n"), done.stderr
    assert (tmp_path / "new" / "a.PDF").read_bytes().startswith(MAGIC[".pdf"])


def damaged(kind, save, folder):
    """A copy of the teacher's run in which something is wrong."""
    shutil.copytree(next(save.glob("models/*")), folder)
    path = folder / ("config.json" if kind == "config" else "metrics.jsonl")
    text = path.read_text()
    if kind == "none":
        path.unlink()
    elif kind == "no epoch":
        path.write_text("")
    elif kind == "cut off":
        path.write_text(text[:-30])
    elif kind == "bytes":
        path.write_bytes(b"\xff\xfe" + text.encode())
    elif kind == "key":
        path.write_text(text.replace("test_acc", "other"))
    elif kind == "value":
        path.write_text(text.replace('"test_loss": ', '"test_loss": null, "x": '))
    elif kind == "list":
        path.write_text(f"{text}[1, 2]\n")
    elif kind == "config":
        path.write_text(text[: len(text) // 2])
    return folder


@pytest.mark.parametrize("script", [plot_curves, report])
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("none", "holds no run with a finished epoch"),
        ("no epoch", "holds no run with a finished epoch"),
        ("cut off", "metrics.jsonl: line 2 is damaged"),
        ("bytes", "metrics.jsonl: line 1 is damaged"),
        ("key", "metrics.jsonl: line 1 is damaged (KeyError('test_acc'))"),
        ("value", "metrics.jsonl: line 1 is damaged"),
        ("list", "metrics.jsonl: line 3 is damaged"),
        ("config", "config.json: not a run's configuration"),
    ],
)
def test_bad_runs(script, kind, said, save, tmp_path, monkeypatch, capsys):
    folder = damaged(kind, save, tmp_path / "run")
    before = set(tmp_path.rglob("*"))
    args = [folder, *(["--output", tmp_path / "a.png"] if script is plot_curves else [])]
    code, out, err = call(script, args, monkeypatch, capsys)
    assert code == 2 and out == ""
    assert said in err and str(folder) in err and err.count("\n") == 1
    assert set(tmp_path.rglob("*")) == before


def bad(script, args, said):
    return pytest.param(script, args, said, id=" ".join([script.__name__, *args])[:70])


@pytest.mark.parametrize(
    ("script", "args", "said"),
    [
        bad(
            plot_curves,
            ["{save}", "--output", "a.jpg"],
            "argument --output: 'a.jpg' is not the name of a picture: .png",
        ),
        bad(plot_curves, ["{save}", "--output", "png"], "argument --output: 'png' is not the name of a picture"),
        bad(plot_curves, ["{save}", "--output", "file/a.png"], "a.png: its folder cannot be made"),
        bad(plot_curves, ["{save}", "--output", "folder.png"], "folder.png: cannot be written"),
        bad(plot_curves, ["{save}", "--of", "speed"], "invalid choice: 'speed'"),
        bad(plot_curves, ["nowhere"], "nowhere holds no run with a finished epoch"),
        bad(plot_curves, [], "arguments are required: FOLDER"),
        bad(plot_tsne, ["--path", "nowhere.pth"], "nowhere.pth: no such checkpoint file"),
        bad(plot_tsne, ["--path", "file"], "file: damaged or not a checkpoint (it begins like none)"),
        bad(plot_tsne, ["--path", "unnamed.pth"], "pass --model"),
        bad(plot_tsne, ["--path", "seven.pth", "--of", "logits"], "was trained for 7 classes, the data set has 3"),
        bad(plot_tsne, ["--path", "{path_t}", "--samples", "3"], "argument --samples: 3 is out of range (at least 4)"),
        bad(plot_tsne, ["--path", "{path_t}", "--data_folder", "nowhere"], "nowhere does not exist"),
        bad(plot_tsne, ["--path", "{path_t}", "--output", "a.svg"], "'a.svg' is not the name of a picture"),
        bad(plot_tsne, ["--path", "{path_t}", "--output", "file/a.pdf"], "a.pdf: its folder cannot be made"),
        bad(plot_tsne, ["--path", "{path_t}", "--device", "tpu"], "--device tpu"),
        bad(plot_tsne, ["--path", "mean.pth"], "mean.pth: what it says of its data cannot be read"),
        bad(plot_tsne, ["--path", "std.pth"], "std.pth: what it makes of these images is not finite"),
        bad(plot_corr, ["--path_t", "{path_t}", "--path_s", "nowhere.pth"], "nowhere.pth: no such checkpoint file"),
        bad(plot_corr, ["--path_t", "unnamed.pth", "--path_s", "{path_t}"], "pass --model_t"),
        bad(plot_corr, ["--path_t", "{path_t}", "--path_s", "unnamed.pth"], "pass --model_s"),
        bad(
            plot_corr,
            ["--path_t", "{path_t}", "--path_s", "seven.pth"],
            "seven.pth: was trained for 7 classes, the teacher has 3",
        ),
        bad(plot_corr, ["--path_t", "seven.pth", "--path_s", "seven.pth"], "7 classes, the data set has 3"),
        bad(plot_corr, ["--path_t", "{path_t}", "--path_s", "{path_t}", "--dataset", "mnist"], "unknown data set"),
        bad(plot_corr, ["--path_t", "{path_t}"], "arguments are required: --path_s"),
        bad(plot_corr, ["--path_t", "{path_t}", "--path_s", "{path_t}", "--output", "a"], "'a' is not the name"),
    ],
)
def test_bad_input(script, args, said, save, path_t, image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content = checkpoint.load(path_t)
    checkpoint.save(Path("unnamed.pth"), {"model": content["model"]})
    checkpoint.save(Path("mean.pth"), {**content, "mean": [0.5, 0.5]})
    checkpoint.save(Path("std.pth"), {**content, "std": [0.0, 0.0, 0.0]})
    seven = {"model": create_model("resnet8", 7).state_dict(), "arch": "resnet8", "dataset": "folder"}
    checkpoint.save(Path("seven.pth"), seven)
    Path("file").write_text("x")
    Path("folder.png").mkdir()
    before = set(tmp_path.rglob("*"))
    args = [arg.format(save=save, path_t=path_t) for arg in args]
    data = [] if script is plot_curves or "--data_folder" in args else ["--data_folder", image_folder]
    code, _, err = call(script, [*args, *data], monkeypatch, capsys)
    assert code == 2
    assert said in err and err.startswith(script.__name__.removeprefix("scripts.")) and err.count("\n") == 1
    assert set(tmp_path.rglob("*")) == before
