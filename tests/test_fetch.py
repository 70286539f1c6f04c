"""scripts/fetch_teachers.py: real checkpoints from a loopback server that behaves well or badly."""

import io
import os
import subprocess
import sys
import tarfile
import threading
from contextlib import suppress
from hashlib import md5, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helper.interrupt import IN_USE
from helper.run import lock
from helper.util import cli_errors
from models import create_model
from scripts import fetch_teachers

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["resnet56", "wrn_40_2"]
PLACE = "{}_vanilla/ckpt_epoch_240.pth"
INSIDE = f"cifar_teachers/{PLACE}"


class Handler(BaseHTTPRequestHandler):
    """Serves server.files; the first responses end after so many bytes as server.cuts says."""

    def do_GET(self):
        server, path = self.server, self.path.lstrip("/")
        server.asked.append((path, self.headers["Range"]))
        if path not in server.files:
            return self.send_error(404)
        content = server.files[path]
        tag = f'"{md5(content).hexdigest()}"' if server.tags else None
        start = 0
        if self.headers["Range"] and self.headers["If-Range"] == tag:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if start else 200)
        if tag:
            self.send_header("ETag", tag)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        cut = server.cuts.pop(0) if server.cuts else None
        with suppress(ConnectionError):
            self.wfile.write(content[start:][:cut])
        server.files.update(server.changed)

    log_message = staticmethod(lambda *args: None)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.changed, server.asked, server.cuts = {}, {}, [], []
        server.tags, server.url = True, f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def published(name, n_cls=100, seed=0):
    """A file as RepDistiller published them: not a zip, with an optimizer and numpy scalars."""
    torch.manual_seed(seed)
    optimizer = {"state": {}, "param_groups": [{"lr": np.float64(5e-5), "params": [0]}]}
    content = {"epoch": 240, "model": create_model(name, n_cls).state_dict(), "optimizer": optimizer}
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def teachers():
    return {name: published(name) for name in NAMES}


def archive(*members):
    """A tar of (name, content or the target of a symbolic link)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname, content = tarfile.SYMTYPE, content, b""
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return {"teachers.tar": buffer.getvalue()}


def in_archive(teachers):
    return archive(*((INSIDE.format(name), content) for name, content in teachers.items()))


def on_mirror(teachers):
    return {f"repo/{PLACE.format(name)}": content for name, content in teachers.items()}


@pytest.fixture
def models(tmp_path):
    return tmp_path / "save" / "models"


@pytest.fixture
def fetch(server, models, capsys):
    """-> exit code, stdout, stderr of a call that knows this server alone."""

    def call(*args):
        sources = ["--archive", f"{server.url}/teachers.tar", "--mirror", f"{server.url}/repo"]
        server.asked.clear()
        try:
            code = cli_errors(lambda: fetch_teachers.main([*sources, "--output", str(models.parent), *args]))
        except SystemExit as stop:  # argparse
            code = stop.code
        return code, *capsys.readouterr()

    return call


def files(models):
    return {str(path.relative_to(models)) for path in models.rglob("*") if path.is_file()} - {".lock"}


def assert_refused(result, *said, code=2):
    """In one sentence that says all this."""
    ended, _, err = result
    assert ended == code and err.count("\n") == 1, err
    for part in said:
        assert str(part) in err


def test_from_the_archive(server, teachers, fetch, models):
    """Downloaded once; what is there already is only checked."""
    server.files = in_archive(teachers)
    assert fetch("wrn_40_2")[0] == 0
    assert files(models) == {"teachers.lock", PLACE.format("wrn_40_2")}
    assert fetch(*NAMES)[0] == 0 and server.asked == [("teachers.tar", None)]
    assert files(models) == {"teachers.lock", *map(PLACE.format, NAMES)}
    recorded = dict(line.split("  ")[::-1] for line in (models / "teachers.lock").read_text().splitlines())
    for name in NAMES:
        assert (models / PLACE.format(name)).read_bytes() == teachers[name]
        assert recorded[PLACE.format(name)] == sha256(teachers[name]).hexdigest()
    assert fetch(*NAMES)[0] == 0 and server.asked == []
    held = lock(models)  # another call is at work
    assert_refused(fetch(*NAMES), models, code=IN_USE)
    held.release()


@pytest.mark.parametrize(
    "archived",
    [
        lambda teachers: {},
        lambda teachers: {"teachers.tar": b"<html>not here</html>"},
        lambda teachers: {"teachers.tar": in_archive(teachers)["teachers.tar"][:500_000]},
        lambda teachers: in_archive({"resnet56": teachers["resnet56"]}),
    ],
)
def test_the_mirror_serves_what_the_archive_does_not(archived, server, teachers, fetch, models):
    server.files = archived(teachers) | on_mirror(teachers)
    assert fetch(*NAMES)[0] == 0 and (f"repo/{PLACE.format('wrn_40_2')}", None) in server.asked
    assert all((models / PLACE.format(name)).read_bytes() == teachers[name] for name in NAMES)
    assert files(models) == {"teachers.lock", *map(PLACE.format, NAMES)}


@pytest.mark.parametrize("source", [in_archive, on_mirror])
@pytest.mark.parametrize("tags", [True, False])
def test_a_download_that_is_cut_off_is_resumed(source, tags, server, teachers, fetch, models):
    """In the same call and in the next. Where the server cannot tell two versions of a file apart, it starts again."""
    tries = fetch_teachers.TRIES
    server.files, server.tags, server.cuts = source({"resnet56": teachers["resnet56"]}), tags, [50_000] * tries
    assert_refused(fetch("resnet56"), "resnet56", "cut off")
    (path,) = server.files
    starts = [49_999 * i if tags else 49_999 for i in range(1, tries + 1)]  # one byte is sent twice
    assert [asked for name, asked in server.asked if name == path] == [None, *(f"bytes={n}-" for n in starts[:-1])]
    assert fetch("resnet56")[0] == 0 and (path, f"bytes={starts[-1]}-") in server.asked
    assert (models / PLACE.format("resnet56")).read_bytes() == teachers["resnet56"]
    assert files(models) == {"teachers.lock", PLACE.format("resnet56")}


def test_a_file_that_changes_meanwhile_is_not_spliced(server, teachers, fetch, models):
    other = {"resnet56": published("resnet56", seed=1)}
    server.files, server.cuts, server.changed = in_archive(teachers), [100_000], in_archive(other)
    assert fetch("resnet56")[0] == 0
    assert (models / PLACE.format("resnet56")).read_bytes() == other["resnet56"]


def test_the_recorded_checksum(server, teachers, fetch, models):
    """That of the first file, which here was put there by hand."""
    place, other = models / PLACE.format("resnet56"), published("resnet56", seed=1)
    place.parent.mkdir(parents=True)
    place.write_bytes(teachers["resnet56"])
    assert fetch("resnet56")[0] == 0 and server.asked == []
    record = (models / "teachers.lock").read_text()
    assert record == f"{sha256(teachers['resnet56']).hexdigest()}  {PLACE.format('resnet56')}\n"

    place.write_bytes(other)
    assert_refused(fetch("resnet56"), place, sha256(other).hexdigest(), sha256(teachers["resnet56"]).hexdigest())
    assert place.read_bytes() == other and server.asked == []
    place.unlink()
    server.files = in_archive({"resnet56": other})
    assert_refused(fetch("resnet56"), sha256(other).hexdigest())
    assert not place.exists() and (models / "teachers.lock").read_text() == record
    (models / "teachers.lock").write_bytes(b"\xff\xfe\x00 resnet56\n")
    assert_refused(fetch("resnet56"), models / "teachers.lock")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("resnet32x4", lambda: published("resnet32x4")),  # not the published one
        ("resnet56", lambda: published("resnet20")),
        ("resnet56", lambda: published("resnet56", 10)),
        ("resnet56", lambda: published("resnet56")[:1_000_000]),
    ],
)
def test_what_is_not_that_teacher(name, content, server, teachers, fetch, models):
    """It is not put in place; the teacher beside it is."""
    server.files = in_archive({name: content(), "wrn_40_2": teachers["wrn_40_2"]}) | on_mirror({name: content()})
    assert_refused(fetch(name, "wrn_40_2"), f"could not fetch {name} (")
    assert files(models) == {"teachers.lock", PLACE.format("wrn_40_2")}


def test_an_archive_that_leads_elsewhere(server, teachers, fetch, models, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(teachers["resnet56"])
    names = ["../evil", f"{tmp_path}/evil", f"../../{INSIDE.format('resnet56')}", f"/{INSIDE.format('resnet56')}"]
    members = [*((name, teachers["resnet56"]) for name in names), (INSIDE.format("resnet56"), str(secret))]
    server.files = archive(*members)
    assert_refused(fetch("resnet56"), "resnet56")
    assert files(models) == set()
    assert {path.name for path in tmp_path.iterdir()} == {"save", "secret"}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["resnet20"], "resnet20"),
        (["--device", "tpu"], "--device"),
        (["--dataset", "cifar"], "--dataset"),
        (["--archive", "teachers.tar", "--mirror", "http://["], "teachers.tar"),
        (["--archive", "http://127.0.0.1:9", "--mirror", "http://127.0.0.1:9"], "wrn_40_2, resnet56, resnet110"),
    ],
)
def test_bad_input(args, said, server, fetch, models):
    assert_refused(fetch(*args), said)
    assert server.asked == [] and files(models) == set()


def test_accuracy(server, teachers, fetch, tmp_path):
    """Of 60 images, 40 are labelled as the network sees them, by hand and in float64."""
    rng, data = np.random.default_rng(0), tmp_path / "data"
    images = rng.integers(0, 256, (160, 32, 32, 3), dtype=np.uint8)
    torch.manual_seed(0)
    model = create_model("resnet56", 100).eval().double()  # as published() makes it
    x = torch.from_numpy((images[100:] - images[:100].mean((0, 1, 2))) / images[:100].std((0, 1, 2)))
    guess = model(x.permute(0, 3, 1, 2)).argmax(1).tolist()
    labels = [*range(100), *((label + (i >= 40)) % 100 for i, label in enumerate(guess))]
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = data / ("train" if i < 100 else "test") / f"{label:02}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    server.files = on_mirror(teachers)
    code, out, err = fetch("resnet56", "--evaluate", "--dataset", "folder", "--data_folder", str(data))
    assert code == 0, err
    assert out.splitlines()[-1].split() == ["resnet56", "folder", "66.67", "published", "72.34"]
    assert_refused(fetch("resnet56", "--evaluate", "--dataset", "digits"), PLACE.format("resnet56"))


def test_the_shell_script(server, teachers, tmp_path):
    """As a user calls it, from elsewhere."""
    server.files = in_archive(teachers)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["sh", ROOT / "scripts" / "fetch_pretrained_teachers.sh", *NAMES, "--output", tmp_path]
    command += ["--archive", f"{server.url}/teachers.tar"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert (tmp_path / "models" / PLACE.format("wrn_40_2")).read_bytes() == teachers["wrn_40_2"]
