"""StreamLoader with real workers, sets that are streamed or listed in a table, and runs on them."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from contextlib import suppress
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import kstest

import train_teacher
import transfer_student
from dataset import DataError, ImageFiles, load_dataset
from dataset.image_files import SAMPLE, decode
from dataset.loader import AUGMENTS, TRIES, DeviceLoader, draw_windows, padding
from dataset.stream import StreamLoader
from dataset.torchvision_import import torchvision
from helper import checkpoint
from helper.interrupt import EXIT
from tests.common import call

ROOT = Path(__file__).resolve().parents[1]
MOMENTS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
SIZE = 16


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """25 files of many sizes, and labels."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    files = [root / f"{i}.{'jpg' if i % 2 else 'png'}" for i in range(25)]
    for file in files:
        height, width = rng.integers(12, 70, 2)
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize((int(width), int(height)), Image.Resampling.BICUBIC).save(file)
    return files, np.arange(25) % 4


def streamed(photos, **options):
    files, labels = photos
    return StreamLoader(ImageFiles(files, SIZE, files[0].parent), labels, 4, **{**MOMENTS, "seed": 3, **options})


def epoch(loader, number=2, step=0):
    loader.set_epoch(number, step)
    return list(loader)


def same(a, b):
    return len(a) == len(b) and all(map(torch.equal, chain(*a), chain(*b)))


# --- the batches


@pytest.mark.parametrize("augment", [None, *AUGMENTS])
def test_batches_are_those_of_the_loader_in_memory_with_any_number_of_workers(photos, augment):
    """For resized_crop the number of workers alone: in memory there are no larger pictures to cut from."""
    state = torch.get_rng_state()
    want = epoch(streamed(photos, augment=augment))
    for num_workers in (1, 2):
        assert same(epoch(streamed(photos, augment=augment, num_workers=num_workers)), want)
    assert torch.equal(torch.get_rng_state(), state)
    in_memory = DeviceLoader(decode(photos[0], SIZE), photos[1], 4, augment=augment, seed=3, **MOMENTS)
    if augment == "resized_crop":
        assert all(map(torch.equal, (i for *_, i in epoch(in_memory)), (i for *_, i in want)))
    else:
        assert same(epoch(in_memory), want)
    assert [len(x) for x, *_ in want] == [4] * 6 + [1] and want[0][0].shape[1:] == (3, SIZE, SIZE)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x, *_ in want)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_is_entered_at_any_step_and_reads_no_file_before(photos, num_workers, tmp_path):
    files, labels = photos
    copies = [Path(shutil.copy(file, tmp_path)) for file in files]
    loader = streamed((copies, labels), augment="crop", num_workers=num_workers)
    whole = epoch(loader)
    for i in torch.cat([index for *_, index in whole[:3]]).tolist():
        copies[i].unlink()
    assert same(epoch(loader, 2, 3), whole[3:]) and epoch(loader, 2, 7) == []
    running = iter(streamed(photos, augment="crop"))
    assert same(list(running), epoch(streamed(photos, augment="crop"), 1))


def test_an_iteration_keeps_its_epoch_and_the_next_one_begins_at_the_first_batch(photos):
    loader = streamed(photos, augment="crop", num_workers=1)
    loader.set_epoch(4, 5)
    running = iter(loader)
    loader.set_epoch(2)
    assert same(list(running), epoch(streamed(photos, augment="crop"), 4, 5))
    assert same(list(loader), epoch(streamed(photos, augment="crop"), 2))
    plan = next(loader.plans())
    assert isinstance(plan, tuple) and plan[0].size(-1) == 4 and plan[2].dtype == torch.uint8


def test_resized_crops_are_torchvisions(photos):
    """Each view is the crop of the file, resized by PIL, at a window that torchvision's rule allows."""
    files = photos[0]
    loader = streamed(photos, augment="resized_crop", mean=(0,) * 3, std=(1,) * 3)
    order, draws = loader.draw(2)
    batches = epoch(loader)
    views = torch.cat([x for x, *_ in batches])
    for i, (file, view) in enumerate(zip((files[i] for i in order), views, strict=True)):
        with Image.open(file) as image:
            pil = image.convert("RGB")
        top, left, h, w = draw_windows(draws[:-1, i : i + 1], pil.height, pil.width)[:, 0]
        tf = torchvision.transforms.functional
        want = tf.resized_crop(pil, top, left, h, w, [SIZE, SIZE])
        assert torch.equal(view, tf.to_tensor(tf.hflip(want) if draws[-1, i] else want))
    assert 0 < draws[-1].sum() < 25 and not streamed(photos, augment="resized_crop", flip=False).draw(2)[1][-1].any()


@pytest.mark.parametrize(("height", "width"), [(100, 100), (60, 90), (20, 200), (200, 20)])
def test_windows_are_distributed_as_torchvisions(height, width):
    draws = np.random.default_rng(1).random((2 * TRIES + 2, 4000), np.float32)
    top, left, h, w = windows = draw_windows(draws, height, width)
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= height).all() and (left + w <= width).all()
    transform, image = torchvision.transforms.RandomResizedCrop, torch.empty(3, height, width)
    torch.manual_seed(0)
    theirs = np.array([transform.get_params(image, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(4000)]).T
    for ours, other in zip(windows, theirs, strict=True):
        assert kstest(ours, other).pvalue > 1e-4


@pytest.mark.parametrize("size", [(12, 12), (9, 14)])
def test_resized_crops_on_the_device_are_pils(size):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, *size, 3), dtype=np.uint8)
    options = {"mean": (0,) * 3, "std": (1,) * 3, "augment": "resized_crop", "seed": 1}
    loader = DeviceLoader(images, np.arange(40) % 3, 16, **options)
    plan = loader.plan(1)
    views = torch.cat([x for x, *_ in loader]).mul(255).permute(0, 2, 3, 1).numpy()
    for view, (i, top, left, h, w, flip) in zip(views, plan.T.tolist(), strict=True):
        pil = Image.fromarray(images[i]).crop((left, top, left + w, top + h))
        want = np.asarray(pil.resize(size[::-1], Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(view - (want[:, ::-1] if flip else want)).max() <= 1.01  # Pillow rounds twice
    assert plan[5].unique().tolist() == [0, 1]


def test_none_only_shuffles_and_padding_grows_with_large_images():
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    none = DeviceLoader(images, np.arange(40) % 3, 40, augment="none", seed=1, **MOMENTS)
    plain = DeviceLoader(images, np.arange(40) % 3, 40, **MOMENTS)
    (x, _, index), (every, *_) = next(iter(none)), next(iter(plain))
    assert torch.equal(x, every[index]) and index.tolist() != sorted(index.tolist()) and none.plan(1).shape == (1, 40)
    assert [padding(size) for size in (8, 32, 64, 96, 128, 224)] == [4, 4, 4, 4, 16, 28]
    large = DeviceLoader(np.zeros((400, 128, 128, 3), np.uint8), np.arange(400) % 3, 4, augment="crop", **MOMENTS)
    assert large.plan(1)[1:3].unique().tolist() == list(range(33))
    with pytest.raises(DataError):
        DeviceLoader(images, np.arange(40) % 3, 4, augment="flip", **MOMENTS)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_file_is_named_when_it_is_met(photos, num_workers, tmp_path):
    files, labels = photos
    copies = [Path(shutil.copy(file, tmp_path)) for file in files]
    loader = streamed((copies, labels), num_workers=num_workers)
    copies[9].write_bytes(copies[9].read_bytes()[:200])
    batches = iter(loader)
    assert len([next(batches), next(batches)]) == 2
    with pytest.raises(DataError) as error:
        next(batches)
    assert (
        str(copies[9]) in str(error.value) and "\n" not in str(error.value) and str(copies[8]) not in str(error.value)
    )


def test_workers_beside_busy_threads_and_without_a_warning(photos):
    torch.set_num_threads(2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            loader = streamed(photos, augment="crop", num_workers=64)
            product = torch.randn(600, 600) @ torch.randn(600, 600)
            for _ in loader:
                product = product @ product / product.norm()
    finally:
        torch.set_num_threads(1)


def test_a_killed_worker_is_one_sentence(photos):
    batches = iter(streamed(photos, num_workers=1))
    next(batches)
    (pid,) = workers_of(os.getpid())
    os.kill(pid, signal.SIGSTOP)  # so that this process waits for it
    timer = threading.Timer(0.3, os.kill, (pid, signal.SIGKILL))
    timer.start()
    with pytest.raises(DataError, match="--num_workers"):
        list(batches)
    timer.join()


def workers_of(pid):
    """Children that lead a process group of their own, as begin_worker() makes them."""
    found = set()
    with suppress(OSError):  # one of them has ended
        for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
            found |= {child} if os.getpgid(child) == child else set()
    return found


# --- the sets


def test_what_is_streamed_and_what_it_says(image_folder, tmp_path, monkeypatch, capfd):
    memory = load_dataset("folder", image_folder, 16)
    files = load_dataset("folder", image_folder, 16, stream=True)
    assert isinstance(files.train_images, ImageFiles) and files.train_images.shape == memory.train_images.shape
    assert np.array_equal(decode(files.test_images.files, 16), memory.test_images)
    assert (files.mean, files.std) == (memory.mean, memory.std)  # of fewer images than SAMPLE: of all
    assert files.train_images[np.array([65, 0])].files[1] == files.train_images.files[0]
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr("dataset.image_files.MOST_GB", 1e-6)
    assert isinstance(load_dataset("folder", image_folder, 16, stream=None).train_images, ImageFiles)
    err = capfd.readouterr().err
    assert err.startswith("note: ") and err.count("\n") == 1
    assert not isinstance(load_dataset("folder", image_folder, 16).train_images, ImageFiles)
    with pytest.raises(DataError, match="--stream"):
        load_dataset("digits", tmp_path, stream=True)


def test_moments_are_those_of_a_fixed_sample_and_are_kept(image_folder, tmp_path, monkeypatch):
    root = shutil.copytree(image_folder, tmp_path / "images")
    monkeypatch.setattr("dataset.image_files.SAMPLE", 11)
    whole = load_dataset("folder", image_folder, 16)
    source = load_dataset("folder", root, 16, stream=True)
    pixels = whole.train_images[[i * 66 // 11 for i in range(11)]] / 255
    assert np.allclose(source.mean, pixels.mean((0, 1, 2))) and np.allclose(source.std, pixels.std((0, 1, 2)))
    monkeypatch.setattr("dataset.image_files.decode", None)
    assert load_dataset("folder", root, 16, stream=True).mean == source.mean and SAMPLE == 2048


def table(folder, rows, name="list.csv", header="path,label,split"):
    (folder / name).write_text("\n".join([header, *rows]) + "\n")
    return folder / name


@pytest.fixture
def listed(image_folder, tmp_path):
    """Images and the rows of a table: label 2, 10 and 1 for blue, green and red."""
    root = shutil.copytree(image_folder, tmp_path / "images")
    number = {"blue": 2, "green": 10, "red": 1}
    files = sorted(path.relative_to(root) for path in root.rglob("*.png"))
    return root, [f"{path},{number[path.parent.name]},{path.parts[0]}" for path in files]


@pytest.mark.parametrize("stream", [False, True])
def test_table(listed, stream):
    root, rows = listed
    path = table(root, rows)
    want = load_dataset("folder", root, 16)
    for where in (root, path):
        source = load_dataset("csv", where, 16, stream=stream)
        assert source.class_names == ("1", "2", "10") and source.val_images is None
        order = [1, 2, 0]  # of blue, green, red among the labels
        assert source.train_labels.tolist() == [order[label] for label in want.train_labels]
        pixels = decode(source.train_images.files, 16) if stream else source.train_images
        assert np.array_equal(pixels, want.train_images) and np.allclose(source.mean, want.mean)
    moved = [row.replace(",train", ",val") if "/1" in row else row for row in rows]
    table(root, moved, header="\ufeffpath, label, split")
    source = load_dataset("csv", root, 16, stream=stream)
    held = [i for i, row in enumerate(row for row in rows if row.endswith("train")) if "/1" in row]
    pixels = decode(source.val_images.files, 16) if stream else source.val_images
    assert np.array_equal(pixels, want.train_images[held]) and len(source.train_labels) + len(held) == 66
    table(root, [row.replace(",test", ",val") for row in rows])
    source = load_dataset("csv", root, 16, stream=stream)
    assert source.val_images is None and len(source.test_labels) == 12
    table(root, [row.replace(",1,", ",b,") for row in rows])
    assert load_dataset("csv", root, 16, stream=stream).class_names == ("10", "2", "b")


def test_table_whose_split_alone_changes_is_not_taken_from_the_cache(listed):
    root, rows = listed
    first = [row for row in rows if row.endswith("train")]
    last = [row for row in rows if row.endswith("test")]
    table(root, first + last)
    load_dataset("csv", root, 16)
    table(root, [*first[:-1], first[-1].replace(",train", ",test"), *last])
    assert load_dataset("csv", root, 16).test_images.shape[0] == 13


TABLE_ERRORS = {
    "missing files": (lambda rows: [*rows, "a.png,1,train", "b.png,1,test"], "lists 2 files", "a.png"),
    "unknown split": (lambda rows: [*rows, "train/red/0.png,1,dev"], "line 80", "'dev'"),
    "no label": (lambda rows: [*rows, "train/red/0.png,,train"], "line 80", "train/red/0.png"),
    "short row": (lambda rows: [*rows, "train/red/0.png"], "line 80", "train/red/0.png"),
    "label only in test": (lambda rows: [rows[0].replace(",2,", ",7,"), *rows[1:]], "'7'", "test"),
    "no test": (lambda rows: [row for row in rows if "test" not in row], "needs", "test"),
    "one class": (lambda rows: [row for row in rows if ",1," in row], "needs", "classes"),
    "twice": (lambda rows: [*rows, rows[0]], "line 80", "blue"),
    "quote": (lambda rows: [*rows, '"a.png,1,train'], "list.csv", "not a table"),
    "not text": (lambda rows: [*rows, "\udcff"], "list.csv", "not a table"),
}


@pytest.mark.parametrize("case", TABLE_ERRORS)
def test_table_errors(listed, case):
    root, rows = listed
    change, *said = TABLE_ERRORS[case]
    path = root / "list.csv"
    path.write_bytes("\n".join(["path,label,split", *change(rows), ""]).encode(errors="surrogateescape"))
    with pytest.raises(DataError) as error:
        load_dataset("csv", path, 16)
    text = str(error.value)
    assert str(path) in text and "\n" not in text and all(part in text for part in said)


def test_table_is_nowhere_or_ambiguous(listed):
    root, rows = listed
    with pytest.raises(DataError, match=r"has 0 \.csv"):
        load_dataset("csv", root)
    with pytest.raises(OSError, match=r"none\.csv"):
        load_dataset("csv", root / "none.csv")
    table(root, rows)
    table(root, rows, ".hidden.csv")
    load_dataset("csv", root, 16)
    table(root, rows, "other.csv")
    with pytest.raises(DataError, match=r"has 2 \.csv"):
        load_dataset("csv", root)
    with pytest.raises(DataError, match="no label"):
        load_dataset("csv", table(root, ["x,train"], header="path,split"))


# --- runs


def flags(folder, out, *more):
    same = ["--dataset", "folder", "--data_folder", folder, "--batch_size", "16", "--image_size", "16", "--stream"]
    return [*same, "--model", "resnet8", "--device", "cpu", "--output", out, *more]


def ended(out):
    """Weights and metrics of a run."""
    lines = [json.loads(line) for line in next(out.rglob("metrics.jsonl")).read_text().splitlines()]
    for line in lines:
        line.pop("seconds")
    return checkpoint.load(next(out.rglob("resnet8_last.pth")))["model"], lines


def same_end(a, b):
    (state_a, lines_a), (state_b, lines_b) = ended(a), ended(b)
    return lines_a == lines_b and all(torch.equal(value, state_b[key]) for key, value in state_a.items())


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_run_that_was_cut_off_ends_as_a_whole_one(image_folder, tmp_path, signum, monkeypatch, capsys):
    """The signal goes to the whole process group, as Ctrl-C does; no worker outlives the run, nor says a word."""
    more = ["--epochs", "6", "--val_split", "0.3", "--num_workers", "2"]
    command = [sys.executable, ROOT / "train_teacher.py", *flags(image_folder, tmp_path / "cut", *more)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    workers = set()
    while len(workers) < 2 or not any(tmp_path.rglob("resume.pth")):
        assert process.poll() is None, process.communicate()
        workers |= workers_of(process.pid)
        time.sleep(0.01)
    os.killpg(process.pid, signum)
    err = process.communicate(timeout=60)[1].decode()  # at its end, no worker has it open any more
    assert process.returncode == (-signum if signum == signal.SIGKILL else EXIT) and err.count("\n") <= 1, err

    assert call(train_teacher, flags(image_folder, tmp_path / "cut", *more), monkeypatch, capsys)[0] == 0
    more[-1] = "0"
    assert call(train_teacher, flags(image_folder, tmp_path / "whole", *more), monkeypatch, capsys)[0] == 0
    assert same_end(tmp_path / "cut", tmp_path / "whole")


def test_a_streamed_run_equals_one_in_memory_but_is_another(image_folder, tmp_path, monkeypatch, capsys):
    more = ["--epochs", "2", "--num_workers", "1", "--val_split", "0.2"]
    assert call(train_teacher, flags(image_folder, tmp_path / "a", *more), monkeypatch, capsys)[0] == 0
    more.append("--no-stream")
    assert call(train_teacher, flags(image_folder, tmp_path / "b", *more), monkeypatch, capsys)[0] == 0
    assert same_end(tmp_path / "a", tmp_path / "b")
    code, _, err = call(train_teacher, flags(image_folder, tmp_path / "a", *more), monkeypatch, capsys)
    assert code == 2 and "stream: True there, False here" in err


def test_data_that_changed_is_noticed_without_reading_it(image_folder, tmp_path, monkeypatch, capsys):
    root = shutil.copytree(image_folder, tmp_path / "images")
    args = flags(root, tmp_path / "out", "--epochs", "1", "--num_workers", "0")
    assert call(train_teacher, args, monkeypatch, capsys)[0] == 0
    moved = shutil.move(root, tmp_path / "elsewhere")
    args[args.index("--data_folder") + 1] = moved
    assert call(train_teacher, args, monkeypatch, capsys)[0] == 0
    (moved / "train" / "red" / "0.png").rename(moved / "train" / "red" / "00.png")
    code, _, err = call(train_teacher, args, monkeypatch, capsys)
    assert code == 2 and "data_crc32" in err


def test_a_damaged_image_in_a_run(image_folder, tmp_path, monkeypatch, capsys):
    root = shutil.copytree(image_folder, tmp_path / "images")
    monkeypatch.setattr("dataset.image_files.SAMPLE", 2)
    bad = root / "train" / "green" / "5.png"
    bad.write_bytes(bad.read_bytes()[:100])
    args = flags(root, tmp_path / "out", "--epochs", "1", "--num_workers", "2")
    code, _, err = call(train_teacher, args, monkeypatch, capsys)
    assert code == 2 and str(bad) in err and err.count("\n") == 1
    assert not workers_of(os.getpid())


@pytest.mark.parametrize("more", [["--stream"], ["--augment", "resized_crop"], ["--augment", "none"]])
def test_probe(image_folder, tmp_path, more, monkeypatch, capsys):
    args = flags(image_folder, tmp_path, "--epochs", "1", "--num_workers", "0")
    assert call(train_teacher, args, monkeypatch, capsys)[0] == 0
    same = ["--dataset", "folder", "--data_folder", image_folder, "--device", "cpu", "--epochs", "1"]
    path_s = next(tmp_path.rglob("resnet8_last.pth"))
    args = [
        *same,
        "--image_size",
        "16",
        "--path_s",
        path_s,
        "--output",
        tmp_path / "probe",
        "--num_workers",
        "1",
        *more,
    ]
    code, _, err = call(transfer_student, [*args, "--cache_features"], monkeypatch, capsys)
    assert (code == 0) == ("none" in more) and (code == 0 or "--cache_features" in err)
    assert call(transfer_student, args, monkeypatch, capsys)[0] == 0
    assert any((tmp_path / "probe").rglob("resnet8_last.pth"))


def test_held_out_images_are_named_once(listed, tmp_path, monkeypatch, capsys):
    root, rows = listed
    path = table(root, [row.replace(",train", ",val") if "/1" in row else row for row in rows])
    args = flags(path, tmp_path / "out", "--epochs", "1", "--dataset", "csv", "--num_workers", "0")
    assert call(train_teacher, args, monkeypatch, capsys)[0] == 0
    assert "val_acc" in ended(tmp_path / "out")[1][0]
    code, _, err = call(train_teacher, [*args, "--val_split", "0.2"], monkeypatch, capsys)
    assert code == 2 and "--val_split" in err


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_a_signal_to_the_group_while_workers_are_forked(photos):
    """It is for the main process: the workers, which have just been forked, live on."""
    code = """
import os, pickle, signal, sys
from dataset.stream import StreamLoader
images, labels = pickle.load(sys.stdin.buffer)
os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGTERM))
print(len(list(StreamLoader(images, labels, 8, num_workers=2, mean=(0.5,) * 3, std=(0.25,) * 3))))
"""
    images, labels = ImageFiles(photos[0], SIZE, photos[0][0].parent), photos[1]
    given = pickle.dumps((images, labels))
    done = subprocess.run([sys.executable, "-c", code], input=given, capture_output=True, cwd=ROOT, timeout=100)
    assert done.stdout.strip() == str(-(-len(images) // 8)).encode(), done.stderr
