"""scripts/fetch_pretrained_teachers.sh: real checkpoints from a real server on this machine, well and badly behaved."""

import hashlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
import threading
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helper.run import lock
from models import create_model
from scripts import fetch_teachers

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("resnet56", "wrn_40_2")


class Handler(BaseHTTPRequestHandler):
    """Serves server.files; `cuts` of them are broken off after so many bytes, in turn."""

    def do_GET(self):
        server, path = self.server, self.path.lstrip("/")
        server.asked.append((path, self.headers.get("Range")))
        if path not in server.files:
            return self.send_error(404)
        content = server.files[path]
        tag = f'"{hashlib.md5(content).hexdigest()}"' if server.tags else None
        asked = self.headers.get("Range") if server.ranges else None
        start = 0
        if asked and self.headers.get("If-Range", tag) == tag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        if tag:
            self.send_header("ETag", tag)
        if server.lengths:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        cut = server.cuts.pop(0) if server.cuts else None
        with suppress(ConnectionError):  # nobody listens any more
            self.wfile.write(content[start:][:cut])
        if cut is not None and server.replace:
            server.files[path] = server.replace

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.asked, server.cuts, server.replace = {}, [], [], None
        server.ranges = server.tags = server.lengths = True
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def published(name, n_cls=100, seed=0):
    """A file as RepDistiller published them: not a zip, with its optimizer and numpy's numbers."""
    torch.manual_seed(seed)
    state = create_model(name, n_cls).state_dict()
    momentum = {0: {"momentum_buffer": torch.ones_like(state["conv1.weight"])}} if "conv1.weight" in state else {}
    optimizer = {"state": momentum, "param_groups": [{"lr": np.float64(5e-5), "params": [0]}]}
    content = {"epoch": 240, "model": state, "accuracy": torch.tensor(72.34), "optimizer": optimizer}
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def teachers():
    return {name: published(name) for name in NAMES}


def inside(name):
    return f"cifar_teachers/{name}_vanilla/ckpt_epoch_240.pth"


def archive(*members):
    """A tar of (name, content or TarInfo without content)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                content.name = name
                tar.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def as_published(teachers):
    return archive(*((inside(name), content) for name, content in teachers.items()))


def on_mirror(teachers):
    return {f"repo/{name}_vanilla/ckpt_epoch_240.pth": content for name, content in teachers.items()}


@pytest.fixture
def fetch(server, tmp_path, monkeypatch, capsys):
    """-> exit code, stdout, stderr of a call that knows this server alone."""

    def call(*args):
        sources = ["--archive", f"{server.url}/teachers.tar", "--mirror", f"{server.url}/repo"]
        monkeypatch.setattr(sys, "argv", ["fetch_teachers.py", *args, *sources, "--output", str(tmp_path / "save")])
        server.asked.clear()
        try:
            code = fetch_teachers.main()
        except SystemExit as stop:  # argparse
            code = stop.code
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


@pytest.fixture
def models(tmp_path):
    return tmp_path / "save" / "models"


def left(models):
    """All files but that which keeps a second call out."""
    return {str(path.relative_to(models)) for path in models.rglob("*") if path.is_file()} - {".lock"}


def place(name):
    return f"{name}_vanilla/ckpt_epoch_240.pth"


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def is_refused(code, err, *said):
    """One sentence, which says all this."""
    assert code == 2 and err.startswith("fetch_teachers.py: ") and err.count("\n") == 1, err
    for part in said:
        assert part in err


def test_from_the_archive(server, teachers, fetch, models):
    server.files["teachers.tar"] = as_published(teachers)
    code, out, err = fetch(*NAMES)
    assert (code, err) == (0, "") and server.asked == [("teachers.tar", None)]
    assert left(models) == {"teachers.lock", *map(place, NAMES)}  # the archive is gone
    for name in NAMES:
        assert (models / place(name)).read_bytes() == teachers[name]
        assert f"{models / place(name)}, SHA-256 {sha256(teachers[name])}" in out
    lock = "".join(f"{sha256(teachers[name])}  {place(name)}\n" for name in NAMES)
    assert (models / "teachers.lock").read_text() == lock

    code, out, err = fetch(*NAMES)
    assert (code, err, server.asked) == (0, "", []) and out.count("is there already") == 2
    assert (models / "teachers.lock").read_text() == lock


def test_the_second_of_two_calls_is_kept_out(server, teachers, fetch, models):
    server.files["teachers.tar"] = as_published(teachers)
    models.mkdir(parents=True)
    with closing(lock(models)):
        code, _, err = fetch(*NAMES)
    is_refused(code, err, f"{models} is in use by process {os.getpid()} on ")
    assert server.asked == [] and left(models) == set()
    assert fetch(*NAMES)[0] == 0


def test_only_what_is_missing_is_fetched(server, teachers, fetch, models):
    server.files["teachers.tar"] = as_published(teachers)
    assert fetch("wrn_40_2")[0] == 0
    assert left(models) == {"teachers.lock", place("wrn_40_2")}
    before = (models / place("wrn_40_2")).stat()
    assert fetch(*NAMES)[0] == 0
    assert left(models) == {"teachers.lock", *map(place, NAMES)}
    after = (models / place("wrn_40_2")).stat()  # it has been read, and so has another time of access
    assert (after.st_ino, after.st_mtime_ns, after.st_size) == (before.st_ino, before.st_mtime_ns, before.st_size)
    assert (models / "teachers.lock").read_text().count("\n") == 2


def test_the_mirror_where_the_archive_is_not(server, teachers, fetch, models):
    server.files |= on_mirror(teachers)
    code, out, err = fetch(*NAMES)
    assert (code, err) == (0, "") and left(models) == {"teachers.lock", *map(place, NAMES)}
    notes = [line for line in out.splitlines() if line.startswith("note: ")]
    said = f"no resnet56, wrn_40_2 from {server.url}/teachers.tar (HTTP 404 Not Found); trying {server.url}/repo"
    assert notes == [f"note: {said}"]
    assert all((models / place(name)).read_bytes() == teachers[name] for name in NAMES)


def test_the_mirror_for_what_the_archive_lacks(server, teachers, fetch, models):
    server.files["teachers.tar"] = archive((inside("resnet56"), teachers["resnet56"]))
    server.files |= on_mirror(teachers)
    code, out, _ = fetch(*NAMES)
    assert code == 0 and "note: no wrn_40_2 from " in out and "not in the archive" in out
    assert [path for path, _ in server.asked] == ["teachers.tar", "repo/wrn_40_2_vanilla/ckpt_epoch_240.pth"]
    assert left(models) >= {"teachers.lock", *map(place, NAMES)}


@pytest.mark.parametrize("source", ["archive", "mirror"])
@pytest.mark.parametrize("tags", [True, False])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_connection(source, tags, ranges, server, teachers, fetch, models):
    """The rest is asked for; a server that sends the whole file again does no harm."""
    server.ranges, server.tags = ranges, tags
    server.files |= {"teachers.tar": as_published(teachers)} if source == "archive" else on_mirror(teachers)
    path = "teachers.tar" if source == "archive" else "repo/resnet56_vanilla/ckpt_epoch_240.pth"
    server.cuts = [100_000, 5_000]
    second, third = "bytes=100000-", "bytes=105000-" if ranges else "bytes=5000-"
    assert fetch("resnet56")[0] == 0
    assert [asked for asked in server.asked if asked[0] == path] == [(path, None), (path, second), (path, third)]
    assert (models / place("resnet56")).read_bytes() == teachers["resnet56"]
    assert left(models) == {"teachers.lock", place("resnet56")}


def test_a_download_goes_on_in_the_next_call(server, teachers, fetch, models):
    server.files["teachers.tar"] = as_published(teachers)
    server.cuts = [50_000] * fetch_teachers.TRIES
    code, _, err = fetch("resnet56")
    is_refused(code, err, f"cut off {fetch_teachers.TRIES} times", "could not fetch resnet56")
    there = 50_000 * fetch_teachers.TRIES
    assert left(models) == {"cifar_teachers.tar.part", "cifar_teachers.tar.part.origin"}
    assert (models / "cifar_teachers.tar.part").stat().st_size == there
    assert fetch("resnet56")[0] == 0
    assert server.asked == [("teachers.tar", f"bytes={there}-")]
    assert (models / place("resnet56")).read_bytes() == teachers["resnet56"]
    assert left(models) == {"teachers.lock", place("resnet56")}


@pytest.mark.parametrize("tags", [True, False])
def test_a_file_that_changes_meanwhile_is_fetched_anew(tags, server, teachers, fetch, models):
    """No splice of two files: the tag tells them apart, or else their size."""
    server.tags = tags
    server.files["teachers.tar"] = as_published(teachers)
    other = published("resnet56", seed=1)
    server.cuts, server.replace = [100_000], archive((inside("resnet56"), other))
    assert fetch("resnet56")[0] == 0
    assert (models / place("resnet56")).read_bytes() == other


def test_a_part_of_another_address_is_not_gone_on_from(server, teachers, fetch, models):
    models.mkdir(parents=True)
    (models / "cifar_teachers.tar.part").write_bytes(b"x" * 100)
    for origin in (f"http://elsewhere/teachers.tar\n{10**6}\n", "damaged", ""):
        (models / "cifar_teachers.tar.part.origin").write_text(origin)
        server.files["teachers.tar"] = as_published(teachers)
        assert fetch("resnet56")[0] == 0
        assert server.asked == [("teachers.tar", None)]
        (models / place("resnet56")).unlink()


def test_a_part_that_is_longer_than_the_file(server, teachers, fetch, models):
    content = server.files["teachers.tar"] = as_published(teachers)
    models.mkdir(parents=True)
    (models / "cifar_teachers.tar.part").write_bytes(content + b"x")
    (models / "cifar_teachers.tar.part.origin").write_text(f"{server.url}/teachers.tar\n{len(content)}\n")
    assert fetch("resnet56")[0] == 0
    assert [asked for _, asked in server.asked] == [f"bytes={len(content) + 1}-", None]


def test_a_server_that_says_no_length(server, teachers, fetch, models):
    server.lengths = False
    server.files["teachers.tar"] = as_published(teachers)
    assert fetch("resnet56")[0] == 0
    assert (models / place("resnet56")).read_bytes() == teachers["resnet56"]


def test_the_published_checksum(server, teachers, fetch, models):
    """Another resnet32x4 is refused, however well it is made; the teacher beside it is kept."""
    content = published("resnet32x4")
    server.files["teachers.tar"] = archive((inside("resnet32x4"), content), (inside("resnet56"), teachers["resnet56"]))
    server.files |= on_mirror({"resnet32x4": content})
    code, _, err = fetch("resnet56", "resnet32x4")
    said = f"its SHA-256 is {sha256(content)}, not 22aa12e2b632b19ddde155ccf2388671842ddd304824b3095e0a7fff364beb4f"
    is_refused(code, err, "could not fetch resnet32x4 (", said)
    assert err.count(said) == 2 and "cifar_teachers.tar.part is kept" in err
    archived = {"cifar_teachers.tar.part", "cifar_teachers.tar.part.origin"}
    assert left(models) == {"teachers.lock", place("resnet56"), *archived}
    assert not (models / "resnet32x4_vanilla").exists()
    code, _, err = fetch("resnet32x4")  # the archive is not fetched again
    assert code == 2 and [path for path, _ in server.asked] == ["repo/resnet32x4_vanilla/ckpt_epoch_240.pth"]


def test_the_recorded_checksum(server, teachers, fetch, models):
    server.files["teachers.tar"] = as_published(teachers)
    assert fetch("resnet56")[0] == 0
    lock = (models / "teachers.lock").read_text()
    other = published("resnet56", seed=1)

    (models / place("resnet56")).write_bytes(other)
    code, _, err = fetch("resnet56")
    said = f"its SHA-256 is {sha256(other)}, not {sha256(teachers['resnet56'])}"
    is_refused(code, err, f"{models / place('resnet56')}: {said}; move it away")
    assert (models / place("resnet56")).read_bytes() == other and server.asked == []

    (models / place("resnet56")).unlink()
    server.files = {"teachers.tar": archive((inside("resnet56"), other))}
    code, _, err = fetch("resnet56")
    is_refused(code, err, said, "repo: HTTP 404")
    assert not (models / place("resnet56")).exists() and (models / "teachers.lock").read_text() == lock


def test_a_teacher_that_was_put_there_by_hand(server, teachers, fetch, models):
    """It is checked and recorded, or refused."""
    (models / place("resnet56")).parent.mkdir(parents=True)
    (models / place("resnet56")).write_bytes(teachers["resnet56"])
    code, out, _ = fetch("resnet56")
    assert code == 0 and "is there already" in out and server.asked == []
    assert (models / "teachers.lock").read_text() == f"{sha256(teachers['resnet56'])}  {place('resnet56')}\n"
    (models / "teachers.lock").unlink()
    (models / place("resnet56")).write_bytes(teachers["resnet56"][:100_000])
    code, _, err = fetch("resnet56")
    is_refused(code, err, f"{models / place('resnet56')}: damaged", "move it away")
    assert left(models) == {place("resnet56")}


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil-was-here",)


def pickled(torch_format):
    buffer = io.BytesIO()
    if torch_format:
        torch.save({"model": Evil()}, buffer)
        return buffer.getvalue()
    return pickle.dumps(Evil())


NO_TEACHERS = {
    "text": (lambda: b"<html>not here</html>", "not a checkpoint (it begins like none)"),
    "empty": (lambda: b"", "bytes"),
    "a checkpoint that runs code": (
        lambda: pickled(True),
        "refused, not a plain checkpoint of tensors (it asks for",
    ),
    "a pickle that runs code": (lambda: pickled(False), "not a checkpoint (it begins like none)"),
    "another network": (lambda: published("resnet20"), "not a resnet56: lacks layer"),
    "other classes": (lambda: published("resnet56", 10), "has 10 classes, not 100"),
    "cut": (lambda: published("resnet56")[:1_000_000], "damaged or not a checkpoint"),
}


@pytest.mark.parametrize("kind", NO_TEACHERS)
def test_what_is_no_teacher(kind, server, fetch, models, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    content, said = NO_TEACHERS[kind][0](), NO_TEACHERS[kind][1]
    server.files["teachers.tar"] = archive((inside("resnet56"), content))
    server.files |= on_mirror({"resnet56": content})
    code, out, err = fetch("resnet56")
    is_refused(code, err, "could not fetch resnet56", said)
    assert out.startswith("note: no resnet56 from ") and said in out
    assert left(models) == {"cifar_teachers.tar.part", "cifar_teachers.tar.part.origin"}
    assert not list(models.glob("*_vanilla")) and not (tmp_path / "evil-was-here").exists()


def link(kind, to):
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, to
    return info


def kind_of(kind):
    info = tarfile.TarInfo()
    info.type = kind
    return info


@pytest.mark.parametrize("with_teacher", [True, False])
def test_a_hostile_archive(with_teacher, server, teachers, fetch, models, tmp_path):
    """Members lead nowhere: neither by their names nor by links."""
    secret = tmp_path / "secret"
    secret.write_bytes(teachers["resnet56"])
    members = [
        ("../evil", b"x"),
        (f"{tmp_path}/evil", b"x"),
        (f"../../{inside('resnet56')}", b"x"),
        (f"/{inside('resnet56')}", b"x"),
        (f"./{inside('resnet56')}", b"x"),
        ("save", link(tarfile.SYMTYPE, "/")),
        (inside("resnet56"), link(tarfile.SYMTYPE, str(secret))),
        (inside("resnet56"), link(tarfile.LNKTYPE, str(secret))),
        (inside("resnet56"), link(tarfile.LNKTYPE, "other")),
        (inside("resnet56"), kind_of(tarfile.DIRTYPE)),
        (inside("resnet56"), kind_of(tarfile.FIFOTYPE)),
        ("other", teachers["resnet56"]),
    ]
    last = [(inside("resnet56"), teachers["resnet56"])] if with_teacher else []
    server.files["teachers.tar"] = archive(*members, *last)
    code, _, err = fetch("resnet56")
    if with_teacher:
        assert code == 0 and left(models) == {"teachers.lock", place("resnet56")}
        assert (models / place("resnet56")).read_bytes() == teachers["resnet56"]
    else:
        is_refused(code, err, "not a regular file of at most")
        assert left(models) == {"cifar_teachers.tar.part", "cifar_teachers.tar.part.origin"}
    assert {path.name for path in tmp_path.iterdir()} == {"save", "secret"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<html>not here</html>", "not a readable archive"),
        (b"", "not a readable archive"),
        ("truncated", "not a readable archive (unexpected end of data)"),
    ],
)
def test_what_is_no_archive(content, said, server, teachers, fetch, models):
    """It is not kept, and the mirror serves."""
    server.files["teachers.tar"] = as_published(teachers)[:500_000] if content == "truncated" else content
    server.files |= on_mirror(teachers)
    code, out, _ = fetch("resnet56")
    assert code == 0 and said in out
    assert left(models) == {"teachers.lock", place("resnet56")}


@pytest.mark.parametrize("lengths", [True, False])
def test_more_than_is_expected(lengths, server, teachers, fetch, models, monkeypatch):
    server.lengths = lengths
    server.files |= {"teachers.tar": as_published(teachers), **on_mirror(teachers)}
    monkeypatch.setattr(fetch_teachers, "LARGEST_ARCHIVE", 1_000_000)
    monkeypatch.setattr(fetch_teachers, "LARGEST", 2_000_000)
    code, _, err = fetch("resnet56")
    is_refused(code, err, "1,000,000", "2,000,000", "expected")
    assert left(models) == set()
    monkeypatch.setattr(fetch_teachers, "LARGEST_ARCHIVE", 2**30)
    code, _, err = fetch("resnet56")
    is_refused(code, err, "not a regular file of at most 2,000,000 bytes")


def test_nobody_answers(server, fetch, models):
    server.shutdown()
    server.server_close()
    code, out, err = fetch()
    is_refused(code, err, "could not fetch wrn_40_2, resnet56, resnet110, resnet32x4, vgg13, ResNet50 (", "refused")
    assert left(models) == set() and out.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["resnet20"], "unknown teacher 'resnet20'; known: ResNet50, resnet110, "),
        (["--device", "tpu"], "--device tpu"),
        (["--dataset", "cifar"], "unknown data set 'cifar'"),
        (["--archive"], "expected one argument"),
    ],
)
def test_bad_flags(args, said, server, fetch, models):
    code, _, err = fetch(*args)
    is_refused(code, err, said)
    assert server.asked == [] and left(models) == set()


def test_addresses_that_are_none(tmp_path, monkeypatch, capsys):
    args = ["resnet56", "--archive", "teachers.tar", "--mirror", "http://[", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["fetch_teachers.py", *args])
    code, err = fetch_teachers.main(), capsys.readouterr().err
    is_refused(code, err, "unknown url type: 'teachers.tar'", "http://[: ")


@pytest.mark.parametrize("content", [b"<html>", b"\xff\xfe\x00", b"abc  resnet56\n"])
def test_a_damaged_record(content, server, fetch, models):
    models.mkdir(parents=True)
    (models / "teachers.lock").write_bytes(content)
    code, _, err = fetch("resnet56")
    is_refused(code, err, f"{models / 'teachers.lock'}: not lines of SHA-256 and file")
    assert server.asked == [] and (models / "teachers.lock").read_bytes() == content


def test_accuracy(server, teachers, fetch, tmp_path):
    """Of 60 images, of which the network names 40 right: the same as by hand."""
    rng, data = np.random.default_rng(0), tmp_path / "data"
    images = rng.integers(0, 256, (160, 32, 32, 3), dtype=np.uint8)
    train, test = images[:100], torch.from_numpy(images[100:]).permute(0, 3, 1, 2).double()
    mean, std = train.reshape(-1, 3).mean(0), train.reshape(-1, 3).std(0)
    model = create_model("resnet56", 100).eval().double()
    model.load_state_dict(torch.load(io.BytesIO(teachers["resnet56"]), weights_only=False)["model"])
    with torch.no_grad():
        guess = model((test - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)).argmax(1)
    labels = [(g + (i >= 40)) % 100 for i, g in enumerate(guess.tolist())]
    for split, group, of in (("train", train, range(100)), ("test", images[100:], labels)):
        for i, (image, label) in enumerate(zip(group, of, strict=True)):
            (data / split / f"{label:02}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(data / split / f"{label:02}" / f"{i}.png")

    server.files |= on_mirror(teachers)
    flags = ["--evaluate", "--dataset", "folder", "--data_folder", str(data), "--device", "cpu"]
    code, out, err = fetch("resnet56", *flags)
    assert code == 0, err
    assert out.splitlines()[-1].split() == ["resnet56", "folder", "66.67", "published", "72.34"]

    spare = min(set(range(100)) - set(labels))
    (data / "train" / f"{spare:02}").rename(tmp_path / "spare")
    code, _, err = fetch("resnet56", *flags)
    is_refused(code, err, "was trained for 100 classes, the data set has 99")


def test_the_shell_script(server, teachers, tmp_path):
    """As a user calls it, from elsewhere."""
    server.files["teachers.tar"] = as_published(teachers)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["sh", ROOT / "scripts" / "fetch_pretrained_teachers.sh", *NAMES, "--output", tmp_path / "save"]
    command += ["--archive", f"{server.url}/teachers.tar"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.count("SHA-256") == 2
    assert (tmp_path / "save" / "models" / place("wrn_40_2")).read_bytes() == teachers["wrn_40_2"]


def test_a_full_disk(server, teachers, tmp_path):
    """Files may not grow beyond 1 MB."""
    server.files |= {"teachers.tar": as_published(teachers), **on_mirror(teachers)}
    limited = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000));"
    limited += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    script = ROOT / "scripts" / "fetch_teachers.py"
    command = [sys.executable, "-c", limited, script, "resnet56", "--output", tmp_path]
    command += ["--archive", f"{server.url}/teachers.tar", "--mirror", f"{server.url}/repo"]
    done = subprocess.run(command, capture_output=True, text=True)
    is_refused(done.returncode, done.stderr, "cifar_teachers.tar.part: cannot be written (File too large)")
    assert not list(tmp_path.rglob("*.pth"))
