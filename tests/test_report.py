"""The report's page: its numbers against plain loops and other libraries, what it says of runs, and its check."""

import csv
import itertools
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from scipy import stats as scipy_stats
from torch import nn

import train_student
from distiller_zoo import distiller_class
from distiller_zoo.distillation import weights_of
from helper.options import plain
from helper.run import Run, opened
from helper.util import cli_errors
from scripts import page, report, stats

PAIRS = [("wrn_40_2", "wrn_16_2"), ("vgg13", "vgg8"), ("resnet32x4", "ShuffleV1"), ("resnet56", "resnet20")]
EPOCHS = 6
NUMBER = itertools.count()  # folders of one name are one run


def call(*args):
    """-> exit code"""
    try:
        return cli_errors(lambda: report.main([*map(str, args)]))
    except SystemExit as stop:
        return stop.code


def make_run(out, method, pair, trial, acc, *flags, epochs=EPOCHS, done=None, failed="", options=None, **entries):
    """A run's folder, written as training does; its accuracy rises to `acc`, and is best in the last epoch but one."""
    args = ["--path_t", "x", "--model_s", pair[1], "--distill", method, "--trial", trial, "--epochs", epochs, *flags]
    opt = train_student.parse([str(arg) for arg in args])
    weights = {"gamma": 0, "alpha": 0, "beta": 0, **weights_of(distiller_class(method), vars(opt))}
    config = {"role": "student", "method": method, "arch": pair[1], "teacher": pair[0], "params": 77_000}
    config |= {"weights": weights, "kd_T": 4.0, "options": opt.options, "published": {}, "dataset": opt.dataset}
    config |= {"n_cls": 100, "class_names": [f"c{i}" for i in range(100)], "image_size": 32, "mean": [0.5] * 3}
    config |= {"std": [0.25] * 3, "opt": plain(opt), **entries}
    folder = out / "student_model" / f"S_{pair[1]}_T_{pair[0]}_{method}_{next(NUMBER)}_{trial}"
    run = Run(folder, pair[1], config, opt.free, {"argv": opt.argv, "device": "CPU"})
    with opened([run]):
        done = epochs if done is None else done
        for epoch in range(1, done + 1):
            value = acc - 40 * (1 - epoch / epochs) ** 3 + 0.25 * (epoch == epochs - 1)
            line = {"epoch": epoch, "train_acc": value + 5, "train_loss": 4 / epoch, "test_acc": round(value, 4)}
            line |= {"test_macro_f1": round(value - 1, 4), "test_recall": [float("nan"), *[value] * 98, 3.0]}
            run.write_line({**line, "test_loss": 1.2, "seconds": 12.5 * epoch})
            run.epoch = epoch
        if failed:
            run.fail(failed)
        elif done == epochs:
            run.save(f"{pair[1]}_last", nn.Linear(2, int(trial) % 7 + 1))
    return folder


def numbers_of(root):
    return page.embedded((root / "report.html").read_text())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Four pairs, three methods, three trials; one trial has failed, one is unfinished, one cell is missing."""
    root, rng = tmp_path_factory.mktemp("table"), np.random.default_rng(0)
    for pair, (method, gain) in itertools.product(PAIRS, [("kd", 0), ("crd", 1), ("attention", -1)]):
        for trial in "123":
            acc, held = 70 + gain + rng.normal(), (pair, method, trial)
            if held == (PAIRS[0], "crd", "2"):
                make_run(root, method, pair, trial, acc, done=0, failed="epoch 1, step 7: the loss is not finite")
            elif held == (PAIRS[1], "crd", "3"):
                make_run(root, method, pair, trial, acc, done=4)
            elif (pair, method) != (PAIRS[2], "attention"):
                make_run(root, method, pair, trial, acc)
    for trial in "123":
        make_run(root, "none", ("none", "vgg8"), trial, 65 + int(trial))
    make_run(root, "none", ("none", "vgg8"), "1", 66)  # again with the same seed
    assert call(root) == 0
    return root


def test_cells_are_those_of_the_logs(root):
    """Against loops over the files, in plain Python."""
    numbers, found, markdown = numbers_of(root), {}, (root / "report.md").read_text()
    for path in root.rglob("config.json"):
        config = json.loads(path.read_text())
        log = path.with_name("metrics.jsonl")
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        cell = config["method"], f"{config['teacher']}->{config['arch']}".replace("none->", "vgg13->")
        if len(lines) == EPOCHS:
            by_trial = found.setdefault(cell, {})
            by_trial[config["opt"]["trial"]] = lines[-1]["test_acc"], max(line["test_acc"] for line in lines)
    for (method, pair), by_trial in found.items():
        cell = numbers["cells"][method][pair]
        assert len(cell["trials"]) == len(by_trial)
        for key, values in zip(("last", "best"), zip(*by_trial.values(), strict=True), strict=True):
            mean = sum(values) / len(values)
            sd = (sum((x - mean) ** 2 for x in values) / (len(values) - 1)) ** 0.5
            assert cell[key] == pytest.approx([mean, sd], rel=1e-5)
        assert f"{cell['last'][0]:.2f} ± {cell['last'][1]:.2f}" in re.search(rf"\| {method} .*", markdown)[0]
        assert cell["macro_f1"] == pytest.approx([cell["last"][0] - 1, cell["last"][1]], rel=1e-4)
        assert all(numbers["runs"][i]["worst"][0] == [3.0, "c99"] for i in cell["trials"])  # c0 has no test images
        both = [trial for trial in by_trial if trial in found.get(("kd", pair), {})]
        if method != "kd":
            d = [by_trial[trial][0] - found["kd", pair][trial][0] for trial in both]
            low, high = scipy_stats.ttest_1samp(d, 0).confidence_interval()
            assert cell["vs"]["mean"] == pytest.approx(sum(d) / len(d), rel=1e-4)
            assert cell["vs"]["half"] == pytest.approx((high - low) / 2, rel=1e-4)
    assert sum(len(row) for row in numbers["cells"].values()) == len(found) == 4 + 4 + 3 + 1


def test_cells_that_are_not_whole_are_marked(root):
    cells = numbers_of(root)["cells"]
    first, second = cells["crd"]["wrn_40_2->wrn_16_2"], cells["crd"]["vgg13->vgg8"]
    assert (first["failed"], first["unfinished"], second["failed"], second["unfinished"]) == (1, 0, 0, 1)
    assert "resnet32x4->ShuffleV1" not in cells["attention"]
    assert cells["none"]["vgg13->vgg8"]["repeated"] == 1
    html = (root / "report.html").read_text()
    assert "n 2, 1 failed" in html and "n 2, 1 unfinished" in html and 'title="no run"' in html
    with open(root / "report.csv", newline="") as file:
        (failed,) = [row for row in csv.DictReader(file) if row["state"] == "failed"]
    assert (failed["method"], failed["trial"], failed["last"]) == ("crd", "2", "")
    assert failed["reason"] == "epoch 1, step 7: the loss is not finite"


def test_every_run_is_linked_and_has_its_checkpoint(root):
    html, numbers = (root / "report.html").read_text(), numbers_of(root)
    for link in re.findall(r'<a href="\./([^"]+)"', html):
        assert (root / link).exists() or "crd_" in link, link  # a run without an epoch has no metrics.jsonl
    for run in numbers["runs"]:
        assert (run["sha256"] is None) == (run["state"] != "finished")
    assert len({run["sha256"] for run in numbers["runs"]}) > 3
    html = re.sub("<svg.*?</svg>", "", html, flags=re.DOTALL)  # Matplotlib names its address in there
    assert "https:" not in html and "src=" not in html


def test_check_finds_an_edit_of_log_or_page(root, tmp_path, capsys):
    root = shutil.copytree(root, tmp_path / "elsewhere", copy_function=shutil.copy)  # with other times
    assert call("--check", root) == 0
    log = next(root.rglob("*_kd_*/metrics.jsonl"))
    page_text = (root / "report.html").read_text()
    shown = re.search(r'<span class="last[^>]*>(\d\d\.\d\d)', page_text)
    embedded = re.search(r'"last":\[(\d\d\.\d+)', page_text)
    tick = re.search(r">(\d\d)</text>", page_text)
    edits = [(root / "report.html", found.start(1)) for found in (shown, embedded, tick)]
    edits += [(root / "table.tex", (root / "table.tex").read_text().index(".") + 1)]
    edits += [(root / "report.md", (root / "report.md").read_text().index(".", 300) + 1)]
    edits += [(root / "report.csv", (root / "report.csv").read_text().index("finished,,6,6,") + 14)]
    edits += [(log, log.read_text().rindex('"test_acc": ') + 13)]
    for path, at in edits:
        text = path.read_text()
        assert text[at].isdigit()
        path.write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :])
        capsys.readouterr()
        assert call("--check", root) == 1
        assert str(root / "report.html" if path == log else path) in capsys.readouterr().out
        path.write_text(text)
    next(root.rglob("*_last.pth")).unlink()  # too large to be handed on with the logs
    assert call("--check", root) == 0
    next(root.rglob("*_last.pth")).write_bytes(b"another")
    assert call("--check", root) == 1
    (root / "report.html").unlink()
    assert call("--check", root) == 2


def test_tests_over_pairs_are_those_of_scikit_posthocs():
    posthocs, rng = pytest.importorskip("scikit_posthocs"), np.random.default_rng(0)
    table = rng.normal(size=(9, 6)) + np.arange(6) * 0.7  # pairs by methods
    above = np.triu_indices(6, 1)
    ps = [stats.signed_rank(list(table[:, i] - table[:, j])) for i, j in zip(*above, strict=True)]
    plain, holm = (posthocs.posthoc_wilcoxon(list(table.T), p_adjust=name).to_numpy()[above] for name in (None, "holm"))
    assert ps == pytest.approx(plain) and stats.holm(ps) == pytest.approx(holm)
    nemenyi = posthocs.posthoc_nemenyi_friedman(table).to_numpy()
    ranks = stats.mean_ranks(table)
    apart = np.abs(ranks[:, None] - ranks) > stats.critical_difference(6, 9)
    assert (apart == (nemenyi < 0.05)).all() and 0 < apart.sum() < 30


@pytest.mark.parametrize("d", [[0.1, 0.1, -0.1, 0.3, 0.0], [0.2] * 5, [-1.0, 2, 3, -4, 5, 6], [0.0, 0.0]])
def test_signed_rank_is_exact_with_ties(d):
    """By all signs that the differences could have."""
    kept = [x for x in d if x]
    ranks = [sum(abs(y) < abs(x) for y in kept) + (sum(abs(y) == abs(x) for y in kept) + 1) / 2 for x in kept]
    sums = [
        sum(r for r, up in zip(ranks, signs, strict=True) if up)
        for signs in itertools.product((0, 1), repeat=len(kept))
    ]
    own = sum(r for r, x in zip(ranks, kept, strict=True) if x > 0)
    extreme = [abs(s - sum(ranks) / 2) >= abs(own - sum(ranks) / 2) for s in sums]
    assert stats.signed_rank(d) == pytest.approx(sum(extreme) / len(extreme))


def test_intervals_and_power():
    rng = np.random.default_rng(0)
    a, b = rng.normal(70, 0.3, 5), rng.normal(70.2, 0.5, 3)
    low, high = scipy_stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    found = stats.welch((*stats.mean_sd(a), 5), (*stats.mean_sd(b), 3))
    assert found == pytest.approx([(low + high) / 2, (high - low) / 2])
    assert stats.mean_sd([70.0]) == [70.0, None] and stats.paired([0.5]) == [0.5, None]
    for n in (3, 5):  # two groups, a million times
        groups = rng.normal(size=(2, 100_000, n))
        groups[0] += stats.detectable(n)
        assert (scipy_stats.ttest_ind(*groups, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.01)
    pairs = [[0.5, -0.2, 0.0], [1.0, 2.0], [-1.0]]
    draws = []
    for _ in range(4000):
        wins = []
        for i in rng.integers(3, size=3):
            trials = [pairs[i][j] for j in rng.integers(len(pairs[i]), size=len(pairs[i]))]
            wins.append(sum((x > 0) + (x == 0) / 2 for x in trials) / len(trials))
        draws.append(sum(wins) / 3)
    p, low, high = stats.beats(pairs)
    assert p == pytest.approx((0.5 + 1 + 0) / 3) and stats.beats(pairs) == [p, low, high]  # seeded
    assert [low, high] == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.04)


def test_published_numbers_are_compared_where_the_protocol_is_theirs(tmp_path):
    pair, key = ("resnet32x4", "resnet8x4"), "resnet32x4->resnet8x4"
    accs = {"kd": (73.3, 73.5, 73.1), "crd": (76.0, 76.3, 75.9), "dkd": (76.0, 76.1, 76.2), "none": (72.5,)}
    for method, values in accs.items():
        for trial, acc in enumerate(values):
            make_run(tmp_path, method, pair, trial, acc, epochs=240)
    make_run(tmp_path, "pkt", pair, 1, 73.6, "--batch_size", 128, epochs=240)
    assert call(tmp_path) == 0
    cells = {method: row[key] for method, row in numbers_of(tmp_path)["cells"].items()}
    readme, again = cells["crd"]["published"]
    assert (readme["value"], readme["verdict"]) == (75.51, "published uncertainty unknown")
    theirs = scipy_stats.ttest_ind_from_stats(np.mean(accs["crd"]), np.std(accs["crd"], ddof=1), 3, again["value"],
                                              again["sd"], 5, equal_var=False)  # fmt: skip
    assert again["verdict"] == ("beyond noise" if theirs.pvalue < 0.05 else "within noise") == "beyond noise"
    assert [p["verdict"] for p in cells["kd"]["published"]] == ["published uncertainty unknown", "within noise"]
    (dkd,) = cells["dkd"]["published"]  # whose source reports the best epoch
    assert dkd["mean"] == pytest.approx(76.1 + 0.25 - 76.32, abs=0.001)
    assert {p["verdict"] for p in cells["none"]["published"]} == {"one trial"}
    assert cells["pkt"]["published"] == [] and cells["pkt"]["off"] == ["batch_size 128"]
    assert "Not compared: runs with batch_size 128" in (tmp_path / "report.html").read_text()


def test_runs_of_other_settings_are_no_trials_of_the_same(tmp_path):
    make = {"kd": [], "kd, logit_stand": ["--logit_stand"], "crd + kd": ["-a", 1], "crd, beta 5": ["-b", 5]}
    make |= {"pkt, batch_size 64": [], "pkt, batch_size 32": ["--batch_size", 32]}
    for trial, (label, flags) in enumerate(make.items(), 1):
        make_run(tmp_path, re.split("[ ,]", label)[0], PAIRS[0], trial, 70, *flags)
    assert call(tmp_path, "--control", "crd + kd") == 0
    numbers = numbers_of(tmp_path)
    assert numbers["cells"].keys() == make.keys()
    assert numbers["control"] == "crd + kd" and "vs" in numbers["cells"]["kd"]["wrn_40_2->wrn_16_2"]
    assert call(tmp_path, "--control", "crd") == 2


def test_what_files_say_cannot_become_markup(tmp_path):
    bad = """</script><script>alert(1)</script><img src=x onerror="alert('1')">&_%$\\"""
    for trial in "12":
        make_run(tmp_path, "kd", PAIRS[0], trial, 70, dataset=bad, teacher=bad, class_names=[bad] * 100)
    make_run(tmp_path / bad.replace("/", ""), "kd", PAIRS[0], "3", 70, failed=bad, done=2, arch=bad)
    assert call(tmp_path) == 0 and call("--check", tmp_path) == 0
    tags = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append((tag, *(key for key, _ in attrs)))
    parser.feed((tmp_path / "report.html").read_text())
    assert sum(tag == "script" for tag, *_ in tags) == 2
    assert not [tag for tag, *keys in tags if tag == "img" or any(key.startswith("on") for key in keys)]
    assert "<" not in (tmp_path / "report.md").read_text()
    (row,) = [line for line in (tmp_path / "table.tex").read_text().splitlines() if line.startswith("Teacher")]
    assert r"\&\_\%\$\textbackslash{}" in row


def test_a_run_that_failed_in_training(image_folder, tmp_path):
    usual = ["--dataset", "folder", "--data_folder", image_folder, "--epochs", 1, "--batch_size", 22, "--device", "cpu"]
    for rate, code in (("1e30", 1), ("0.01", 0)):
        args = [*usual, "--output", tmp_path, "--distill", "none", "--learning_rate", rate, "--trial", code]
        assert cli_errors(lambda args=args: train_student.main([str(arg) for arg in args])) == code
    assert call(tmp_path) == 0
    runs = {run["trial"]: run for run in numbers_of(tmp_path)["runs"]}
    assert runs["1"]["state"] == "failed" and "not finite" in runs["1"]["reason"] and runs["0"]["state"] == "finished"
