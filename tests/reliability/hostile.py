"""How inputs are damaged, and what must hold for a program that reads them.

Each case ends in exit code 2 and one sentence, or in a right result: no traceback, no warning, no code run, nothing
written elsewhere, no hang. A case follows from its seed: `DISTILLERS_SEED=7` runs that one, `DISTILLERS_SOAK=10` runs
ten times as many.
"""

import copy
import faulthandler
import inspect
import io
import os
import random
import resource
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from helper.util import cli_errors

SOAK = int(os.environ.get("DISTILLERS_SOAK", "1"))
QUICK = 4  # cases of each kind without the slow tests
MEMORY = 2**31  # bytes that a case may use
PATIENCE = 30  # seconds
LONGEST = 5100  # characters of a sentence; some list all networks, or twenty files
UNSEEN = DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning  # not shown by default
NOWHERE = "http://127.0.0.1:9/nothing"


class Hang(BaseException):
    """A case takes too long; no handler may catch it."""


class Outcome(NamedTuple):
    code: int
    said: str  # on stderr
    result: object  # what was returned, or printed


def cases(n: int) -> Callable:
    """Make a test of n seeds from a function (rng, folder, fixtures) -> Outcome."""

    def register(case: Callable) -> Callable:
        fixtures = list(inspect.signature(case).parameters)[2:]

        def test(seeds, request, tmp_path, record_property):
            found = [request.getfixturevalue(name) for name in fixtures]
            refused = 0
            with confined():
                for seed in seeds:
                    try:
                        with scene(tmp_path / "case") as folder:
                            refused += case(random.Random(f"{case.__name__} {seed}"), folder, *found).code != 0
                    except BaseException as error:
                        raise AssertionError(f"DISTILLERS_SEED={seed}: {type(error).__name__}: {error}") from error
            record_property("hostile", (refused, len(seeds) - refused))

        test.__doc__ = case.__doc__
        many = pytest.param(range(QUICK, n * SOAK), id="many", marks=pytest.mark.slow)
        seeds = [[int(os.environ["DISTILLERS_SEED"])]] if "DISTILLERS_SEED" in os.environ else [range(QUICK), many]
        return pytest.mark.parametrize("seeds", seeds, ids=["few", "many"][: len(seeds)])(test)

    return register


def status(key: str) -> int:
    """Bytes, from a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024


@contextmanager
def confined() -> Iterator[None]:
    """Limit the address space: a damaged size must not become an allocation."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    room = MEMORY - min(status("VmRSS"), MEMORY // 2)
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def scene(folder: Path) -> Iterator[Path]:
    """A folder to work in, with `cwd` as the current one: nothing may be written there, nor beside the folder."""

    def stop(*_):
        raise Hang(f"no end after {PATIENCE} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(PATIENCE)
    faulthandler.dump_traceback_later(3 * PATIENCE, exit=True)  # where C code hangs, no handler runs
    here = Path.cwd()
    (folder / "cwd").mkdir(parents=True)
    os.chdir(folder / "cwd")
    try:
        yield folder
        found = [*Path().iterdir(), *(path for path in folder.parent.iterdir() if path != folder)]
        assert not found, f"written elsewhere: {found}"
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)
        os.chdir(here)
        shutil.rmtree(folder)


def outcome(call: Callable[[], object]) -> Outcome:
    """How a call ends, as a script's user sees it. Raises AssertionError where that is not as promised."""
    found = []
    ended = outcome_of(lambda: found.append(call()))
    return ended._replace(result=found[0] if found else None)


def outcome_of(main: Callable, *args: object) -> Outcome:
    """The same for a script's main with these arguments."""
    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["script.py", *map(str, args)]
    try:
        with redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            code = cli_errors(main)
    except SystemExit as stop:  # argparse
        code = stop.code
    finally:
        sys.argv = before
    assert not (seen := [w.message for w in warned if not issubclass(w.category, UNSEEN)]), seen
    check_said(code, err.getvalue())
    return Outcome(code, err.getvalue(), out.getvalue())


def check_said(code: int, err: str) -> None:
    """Only notes beside a result, otherwise one line of reasonable length."""
    if code == 0:
        assert all(line.startswith("note: ") for line in err.splitlines()), err
        return
    assert code == 2, f"exit code {code}: {err}"
    assert err.endswith("\n") and err[:-1].isprintable() and len(err) <= LONGEST, repr(err)
    for sign in ("Traceback", "MemoryError", "allocate"):  # it began to do what it should refuse
        assert sign not in err, err


def place(n: int, rng: random.Random) -> int:
    """A position in n bytes, often near an end, where headers are."""
    return rng.choice([rng.randrange(n), rng.randrange(min(n, 300)), n - 1 - rng.randrange(min(n, 300))])


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Changed as by a failing disk or a broken connection."""
    if not data:
        return rng.randbytes(rng.choice([1, 100]))
    changed, i, n = bytearray(data), place(len(data), rng), rng.choice([1, 2, 4, 8, 30, 500])
    kind = rng.randrange(12)
    if kind < 4:
        for _ in range(rng.choice([1, 1, 3, 20])):
            changed[place(len(data), rng)] ^= 1 << rng.randrange(8)
    elif kind == 4:
        del changed[i:]
    elif kind == 5:
        del changed[i : i + n]
    elif kind == 6:
        changed[i : i + n] = rng.randbytes(n)
    elif kind == 7:
        changed[i : i + n] = bytes(n)
    elif kind == 8:
        number = rng.choice([2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1, 10**9])
        changed[i : i + 8] = number.to_bytes(8, rng.choice(["little", "big"]))
    elif kind == 9:
        changed[i:i] = changed[place(len(data), rng) :][:n]
    elif kind == 10:
        changed += rng.randbytes(n)
    else:
        start = rng.choice([b"", bytes(n), b"PK\3\4", b"\x80\2", b"{", rng.randbytes(n)])
        changed = start + changed[: rng.choice([0, n])]
    return bytes(changed)


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


# What a file of plain values may hold instead of what it should.
VALUES = [
    *(None, True, -1, 0, 3, 10**12, 10**400, -0.5, 1e308, float("nan"), float("inf")),
    *("", "3", "../../evil", "/evil", "a\nb\x1b[31m\0\u202e\ud800", "x" * 100_000, "folder", "vgg8"),
    *([], {}, [1, "2", None], [0.5, 0.5, float("nan")], {"x": [{"y": 1}]}, nested(50)),
]


def places(value: object) -> list[tuple]:
    """Every container with every key in it, at any depth."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [p for key in keys for p in [(value, key), *places(value[key])]]


def changed(content: object, rng: random.Random, values: list) -> object:
    """A copy in which something is missing, of another type, or too much."""

    def other() -> object:
        value = rng.choice(values)
        return copy.deepcopy(value) if isinstance(value, dict | list) else value

    if rng.random() < 0.03:
        return other()
    content = copy.deepcopy(content)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        if not (found := places(content)):
            break
        container, key = rng.choice(found)
        kind, value = rng.randrange(10), other()
        if kind < 6:
            container[key] = value
        elif kind == 6:
            del container[key]
        elif kind == 7:
            container[key] = rng.choice([[container[key]], {"x": container[key]}])
        elif isinstance(container, dict):
            container[rng.choice([f"{key}x", "", "a\nb", 3, "x" * 10_000])] = value
        else:
            container.append(value)
    return content


def packed(content: object, as_zip: bool = True) -> bytes:
    """The bytes of a checkpoint."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=as_zip)
    return buffer.getvalue()


def spoilt_network(nets, rng: random.Random, path: Path) -> None:
    """A checkpoint that may still serve."""
    content = changed(rng.choice([nets.ours, nets.foreign]), rng, VALUES + nets.odd)
    if rng.random() < 0.4 and isinstance(content, dict) and "model" in content:
        content["model"] = dict(nets.state)
    path.write_bytes(packed(content) if rng.random() < 0.8 else damaged(nets.zip, rng))


def same_bits(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def misplaced(path: Path, rng: random.Random, sparse: bool = True) -> None:
    """Something else where a file or folder was. sparse: also a terabyte of zeros"""
    kind = rng.randrange(13 if sparse else 12)
    names = [b"a\nb\x1b", b"\xff\xfe", b"x" * 200, b"." + os.fsencode(path.name)]
    if kind < len(names):
        target = os.path.join(os.fsencode(path.parent), names[kind] + os.fsencode(path.suffix))
        if not os.path.lexists(target):
            os.rename(os.fsencode(path), target)
        return
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if kind == 4:
        path.mkdir()
    elif kind == 5:
        os.mkfifo(path)
    elif kind < 9:
        path.symlink_to([path, "/dev/zero", "/etc/passwd"][kind - 6])
    elif kind < 11:
        path.write_bytes([b"", rng.randbytes(1000)][kind - 9])
    elif kind == 12:
        with open(path, "wb") as file:
            file.truncate(10**12)
