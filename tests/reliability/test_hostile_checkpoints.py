"""Spoilt checkpoints: a network as it was, or one sentence."""

import argparse
import codecs
import io
import os
import pickle
import pickletools
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import torch

from helper import checkpoint
from helper.setup import Teacher
from models import create_model
from scripts import convert_checkpoint
from tests.reliability.hostile import (
    VALUES,
    cases,
    changed,
    confined,
    damaged,
    outcome,
    outcome_of,
    packed,
    refilled,
    same_bits,
    spoilt_network,
)
from tests.test_foreign import Call


def repickled(data, change):
    """A zip file with another pickle in it, and the right checksums."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as file, zipfile.ZipFile(out, "w") as to:
        for name in file.namelist():
            content = file.read(name)
            to.writestr(name, change(content) if name.endswith("data.pkl") else content)
    return out.getvalue()


def read_network(nets, path, exact=False, arch=None):
    """As train_student.py reads its teacher. exact: nothing but the whole file's network will do"""

    def read():
        found = checkpoint.load_network(path, arch)
        Teacher(found[0], found[2], 2, about=found[3], path=path).fit_for(nets.source, torch.device("cpu"))
        return found

    ended = outcome(read)
    if ended.code == 0:
        arch, n_cls, model, _ = ended.result
        state = model.state_dict()
        assert create_model(arch, n_cls).state_dict().keys() == state.keys()
        assert all(value.isfinite().all() for value in state.values())
        assert not exact or same_bits(state, nets.state)
    return ended


@cases(250)
def test_bytes(rng, folder, nets):
    (folder / "x.pth").write_bytes(damaged(nets.zip, rng))
    return read_network(nets, folder / "x.pth", exact=True)


@cases(250)
def test_bytes_of_the_old_format(rng, folder, nets):
    """It has no checksums: another number in a weight cannot be noticed."""
    (folder / "x.pth").write_bytes(damaged(nets.old, rng))
    return read_network(nets, folder / "x.pth")


@cases(250)
def test_the_pickle(rng, folder, nets):
    (folder / "x.pth").write_bytes(repickled(nets.zip, lambda content: damaged(content, rng)))
    return read_network(nets, folder / "x.pth")


@cases(250)
def test_content(rng, folder, nets):
    content = changed(rng.choice([nets.ours, nets.foreign]), rng, VALUES + nets.odd)
    (folder / "x.pth").write_bytes(packed(content, rng.random() < 0.5))
    return read_network(nets, folder / "x.pth", arch=rng.choice([None, "resnet8"]))


@cases(60)
def test_numbers(rng, folder, nets):
    content = {**nets.ours, "model": dict(nets.state)}
    refilled(content, rng)
    (folder / "x.pth").write_bytes(packed(content, rng.random() < 0.5))
    return read_network(nets, folder / "x.pth")


@cases(60)
def test_conversion(rng, folder, nets):
    spoilt_network(nets, rng, folder / "x.pth")
    target = rng.choice([folder / "out", folder / "out" / "y.pth"])
    ended = outcome_of(convert_checkpoint.main, folder / "x.pth", target, "--model", "resnet8")
    written = [path for path in folder.rglob("*.pth") if path.name != "x.pth"]
    assert len(written) == (ended.code == 0)
    for path in written:
        read_network(nets, path, arch="resnet8")
    return ended


def encoded(depth):
    """Twice as many bytes with each step."""
    value = b"x" * 1000
    for _ in range(depth):
        value = Call(codecs.encode, value, "hex")
    return value


ATTACKS = [
    lambda: Call(os.mkdir, "evil"),
    lambda: Call(exec, "open('evil', 'w')"),
    lambda: Call(Path.touch, Path("evil")),
    lambda: Call(subprocess.getoutput, "touch evil"),
    lambda: create_model("resnet8", 2),
    lambda: argparse.Namespace(x=Call(eval, "open('evil', 'w')")),
    lambda: Call(bytearray, 10**10),
    lambda: Call(torch.FloatTensor, 10**10),
    lambda: Call(torch.UntypedStorage, 10**10),
    lambda: encoded(30),
    lambda: Call(np.zeros, 10**10),
    lambda: Call(torch.load, "x.pth", state={"weights_only": False}),
]


@cases(40)
def test_attacks(rng, folder, nets):
    """Somewhere in a checkpoint, or as one."""
    attack = rng.choice(ATTACKS)()
    content = dict(nets.ours)
    content[rng.choice(["model", "arch", "opt", "mean", "more"])] = rng.choice([attack, [attack], {"x": attack}])
    content = attack if rng.random() < 0.1 else content
    bare = pickle.dumps(content, rng.choice([0, 2, 4])) if rng.random() < 0.2 else None
    (folder / "x.pth").write_bytes(bare or packed(content, rng.random() < 0.5))
    ended = read_network(nets, folder / "x.pth")
    assert ended.code == 2
    return ended


def opcodes(*parts):
    """A pickle, by hand."""
    return b"\x80\x02" + b"".join(parts) + b"."


BOMBS = {
    "a key whose hash has no end": opcodes(b"}", b")", b"\x85" * 300_000, b"K\x01s"),
    "a list in itself": opcodes(b"]q\x00h\x00a"),
    "no pickle": b"",
    "no end": b"\x80\x02" + b"]" * 100_000,
    "deep": opcodes(b"]" * 100_000, b"a" * 99_999),
    "a text that is not there": opcodes(b"X\xff\xff\xff\x7f"),
    "a number of 2040 bits": opcodes(b"}X\x01\0\0\0a\x8a\xff" + b"\x7f" * 255 + b"s"),
    "no such memory": opcodes(b"h\x07"),
    "memory for many": opcodes(b"}", b"r\xff\xff\xff\x7f"),
    "nothing on the stack": opcodes(b"0" * 3),
    "a state for a class": opcodes(b"ccollections\nOrderedDict\n}b"),
    "a state for a function": opcodes(b"ctorch._utils\n_rebuild_tensor_v2\n", b"N}X\x08\0\0\0__init__Ns\x86b"),
}


@cases(2 * len(BOMBS))
def test_bombs(rng, folder, nets):
    bomb = rng.choice(list(BOMBS.values()))
    numbers = [pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, {})]  # as an old checkpoint begins
    old = b"".join(numbers) + bomb + pickle.dumps([], 2)
    (folder / "x.pth").write_bytes(rng.choice([old, repickled(nets.zip, lambda _: bomb)]))
    ended = read_network(nets, folder / "x.pth")
    assert ended.code == 2
    return ended


def test_zeros_are_not_unpacked(nets, tmp_path):
    """Ten gigabytes in ten megabytes."""
    with zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x/data.pkl", pickle.dumps({}, 2))
        with file.open("x/data/0", "w", force_zip64=True) as member:
            for _ in range(80):
                member.write(bytes(2**24))
    with confined():
        assert "unpacks to more than it holds" in read_network(nets, tmp_path / "x.pth").said


def test_memory_that_was_never_filled_is_no_network(nets, tmp_path):
    """An old checkpoint whose list of storages is empty: torch gives what the memory held before."""
    file = io.BytesIO(nets.old)
    for _ in range(4):
        list(pickletools.genops(file))
    (tmp_path / "x.pth").write_bytes(nets.old[: file.tell()] + pickle.dumps([], 2))
    assert torch.load(tmp_path / "x.pth", weights_only=False)["model"].keys() == nets.state.keys()
    assert "its tensors are not what it holds" in read_network(nets, tmp_path / "x.pth").said


def test_a_member_that_torch_takes_for_a_folder(nets, tmp_path):
    """torch does not read its content, nor say so."""
    data = bytearray(nets.zip)
    at = data.index(b"archive/data/6", data.index(b"PK\1\2"))  # in the directory at the end
    data[at - 8] |= 0x10
    (tmp_path / "x.pth").write_bytes(data)
    assert read_network(nets, tmp_path / "x.pth", exact=True).code == 0
